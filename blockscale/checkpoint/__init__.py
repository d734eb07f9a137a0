"""Safetensors checkpoints in, safetensors checkpoints out: read, plan, convert, inspect, verify."""
