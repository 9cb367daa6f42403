"""`python -m benchmarks NAME [options]`: run one benchmark, or make scoreboard, tables, pictures."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence

BENCHMARKS = {
    "gate_step": "a training step with gates against the plain step and activation masking",
    "removal": "trace and removal against torch-pruning and NNI",
    "masked_equals_removed": "gated and physically smaller network compute the same, through every door",
    "sampling": "how much of LPNet's sampling is timed inference, against the plain way",
    "latency_samples": "raw latencies of thousands of sub-networks, for the next one (hours)",
    "lpnet_accuracy": "LPNet's error and intervals against four other predictors, stored samples",
    "targets_at_224": "half the latency of ImageNet-sized networks, held by the exported file",
    "not_faster": "latency at equal MACs against torch-pruning's uniform 30 %, on CPU runtimes",
    "fashion_mnist": "half the latency on Fashion-MNIST: accuracy kept, three seeds (hours)",
    "comparison": "all methods at equal measured latency, by experiment (hours)",
    "demo": "`wgates demo` from start to end",
    "nni_experiment": "pruners by name in an NNI experiment: accuracy and latency of every trial",
    "nni_masked_equals_removed": "masked equals removed through the NNI door, where nni is installed",
    "strategy_cost": "every strategy on ResNet-50 and MobileNetV2: its step over a plain step",
    "gdp_promise": "GDP: absorption is exact, no fine-tuning owed",
    "scop_promise": "SCOP: its arithmetic, and planted noise filters ranked last",
    "functionality_promise": "functionality: one of each planted duplicate is kept",
    "metapruning_promise": "MetaPruning: its fitness ranks widths like training from scratch",
    "unification_promise": "unification: bytes at equal accuracy against plain pruning",
}
REPORTS = {
    "scoreboard": "scoreboard.json from the stored results",
    "tables": "the tables of both READMEs from the stored results",
    "pictures": "the pictures from the stored results",
}


def usage() -> str:
    known = BENCHMARKS | REPORTS
    width = max(map(len, known))
    rows = [f"  {name.ljust(width)}  {about}" for name, about in known.items()]
    return "\n".join(["usage: python -m benchmarks NAME [options]", "", *rows])


def main(argv: Sequence[str]) -> int:
    if not argv or argv[0] in ("-h", "--help"):
        print(usage())
        return 0
    name, *options = argv
    if name not in BENCHMARKS | REPORTS:
        print(f"benchmark `{name}`: unknown; choose one of: {', '.join(BENCHMARKS | REPORTS)}")
        return 2
    place = "benchmarks" if name in BENCHMARKS else "benchmarks.report"
    try:
        importlib.import_module(f"{place}.{name}").main(options)
    except KeyboardInterrupt:
        print("stopped; what is done stays, and the same command goes on", file=sys.stderr)
        return 130
    except Exception as error:
        from wgates_plugin.errors import WGatesError

        if not isinstance(error, WGatesError):
            raise
        print(f"Error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
