"""Claim: at equal measured latency, no other method keeps more accuracy.

An experiment (benchmarks/experiments/*.yaml) is a network, data, runtimes, targets, seeds and methods.
`python -m benchmarks comparison NAME` does what is missing of it: dense networks (and these trained on
for as many epochs as pruning takes), latency samples, one run per method, target and seed, each by the
same pipeline, and at the end all final networks timed in one sitting. It can be stopped at any moment.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from benchmarks.comparison import runs
from benchmarks.comparison.experiment import FOLDER, Run, load_experiment, runs_of
from benchmarks.records import parser

CLAIM = "at equal measured latency, no other method keeps more accuracy"
SCRATCH = Path("runs") / "comparison"


def main(argv: Sequence[str] = ()) -> None:
    options = parser("comparison", __doc__)
    known = ", ".join(sorted(path.stem for path in FOLDER.glob("*.yaml")))
    options.add_argument("experiment", help=f"a YAML file, or one of: {known}")
    options.add_argument("--scratch", type=Path, default=SCRATCH, help="where run folders go")
    options.add_argument("--methods", nargs="+", help="only these")
    options.add_argument("--seeds", nargs="+", type=int, help="only these")
    options.add_argument("--workers", type=int, default=1, help="processes of one thread")
    options.add_argument("--only", help="one run, by its key, with everything shared in place")
    options.add_argument("--finals", action="store_true", help="only time the final networks")
    arguments = options.parse_args(list(argv))
    experiment = load_experiment(arguments.experiment)
    places = runs.Places(experiment, arguments.results, arguments.scratch)
    torch.set_num_threads(1)
    if arguments.only:
        run = next(run for run in runs_of(experiment) if run.key == arguments.only)
        print(runs.attempt(experiment, places, run), flush=True)
        return
    if not arguments.finals:
        runs.prepared(experiment, places)
        todo = [
            run
            for run in runs.missing(experiment, places)
            if (not arguments.methods or run.method in arguments.methods)
            and (not arguments.seeds or run.seed in arguments.seeds)
        ]
        print(f"{experiment.name}: {len(todo)} runs to do", flush=True)
        if arguments.workers > 1:
            _in_parallel(list(argv), todo, arguments.workers)
        else:
            for run in todo:
                print(runs.attempt(experiment, places, run), flush=True)
    for block in experiment.runtimes:
        runs.time_finals(experiment, places, block)


def _in_parallel(argv: list[str], todo: list[Run], workers: int) -> None:
    """One process of one thread per run."""

    def one(run: Run) -> None:
        command = [sys.executable, "-m", "benchmarks", "comparison", *argv, "--only", run.key]
        subprocess.run(command, check=False, env={**os.environ, "OMP_NUM_THREADS": "1"})

    with ThreadPoolExecutor(workers) as pool:
        list(pool.map(one, todo))
