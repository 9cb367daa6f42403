"""One script per claim; run one with `python -m benchmarks NAME`."""
