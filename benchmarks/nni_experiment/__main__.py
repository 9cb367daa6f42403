"""`python -m benchmarks.nni_experiment`, the same as `python -m benchmarks nni_experiment`."""

import sys

from benchmarks.nni_experiment import main

main(sys.argv[1:])
