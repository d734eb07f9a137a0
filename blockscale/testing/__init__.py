"""What tests and benchmarks share: numeric asserts, shapes, data makers, a timer. No product module imports it."""
