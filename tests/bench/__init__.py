"""Programs that measure: `python -m tests.bench.kernels`, `python -m tests.bench.train`."""
