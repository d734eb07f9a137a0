"""The runtime of DeepSeek-V2, V3 and V3.1: configuration, layers, loading and generation."""
