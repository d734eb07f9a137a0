"""Shared by tests and benchmarks: numeric asserts, shapes, data makers, a timer. No product module imports it."""
