"""What tests and benchmarks share: asserts, shapes, data makers, a timer. No product module imports it."""
