"""Claim: at equal measured latency, no other method keeps more accuracy.

An experiment (benchmarks/experiments/*.yaml) is a network, data, runtimes, targets, seeds and methods.
`python -m benchmarks comparison NAME` does what is missing of it: dense networks (and these trained on
for as many epochs as pruning takes), latency samples, one run per method, target and seed, each by the
same pipeline; at the end all final networks are scored on test images that judge nobody, and timed in one
sitting. It can be stopped at any moment. `--methods`, `--seeds`, `--targets` and `--runtimes` do a part:
only what these runs need is trained and sampled. `--profile gpu` lays the experiment's block of that name
over it, and keeps the results apart.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

from benchmarks.comparison import again, finals, other_images, runs, turns
from benchmarks.comparison.contests import has_rivals
from benchmarks.comparison.experiment import (
    DENSE,
    FOLDER,
    Experiment,
    Run,
    load_experiment,
    runs_of,
    runtime_name,
)
from benchmarks.comparison.pictures import draw_experiment
from benchmarks.comparison.summary import read_cells
from benchmarks.comparison.tables import verdict, write_page
from benchmarks.tools.records import RESULTS, parser
from wgates_plugin.errors import ConfigError, MissingExtraError
from wgates_plugin.latency.base import require
from wgates_plugin.latency.timing import measuring_within

CLAIM = "at equal measured latency, no other method keeps more accuracy"
SCRATCH = Path("runs") / "comparison"
AGAIN = ("--again-disturbed", "--again-refused")
"""Words for the whole command, not for the processes that do its runs."""

MOST_AT_ONCE = 4
"""Runs that one process does, one after the other."""


def main(argv: Sequence[str] = ()) -> None:
    arguments = _arguments(argv)
    experiment = load_experiment(arguments.experiment, arguments.profile)
    chosen = choose(
        experiment,
        methods=arguments.methods,
        seeds=arguments.seeds,
        targets=arguments.targets,
        runtimes=arguments.runtimes,
    )
    places = runs.Places(experiment, arguments.results, arguments.scratch)
    torch.set_num_threads(1)
    ours = turns.Turns(turns.folder_of(arguments.scratch))
    with measuring_within(ours.alone):
        if arguments.only:
            _do_these(experiment, places, arguments.only)
            return
        touched = chosen
        if not (arguments.finals or arguments.again_disturbed or arguments.again_refused):
            touched = runs.missing(places, chosen)
        runs.refuse_other_machines(experiment, places, {run.runtime for run in touched})
        runs.refuse_other_dense(experiment, places, dict.fromkeys(run.seed for run in chosen))
        if arguments.again_disturbed:
            _say(again.forget_disturbed(places, chosen))
        if arguments.again_refused:
            _say(again.forget_refused(experiment, places, chosen))
        if not arguments.finals:
            _do_missing(experiment, places, chosen, _SideBySide(experiment, arguments, argv, ours))
        other_images.score(experiment, places, chosen)
        refused: list[ConfigError] = []
        for block in experiment.runtimes:
            if not arguments.runtimes or runtime_name(block) in arguments.runtimes:
                try:
                    finals.time_finals(experiment, places, block, again=arguments.finals)
                except ConfigError as error:  # one runtime's machine is another: the others go on
                    refused.append(error)
    _show(experiment, arguments.results)
    if refused:
        raise refused[0]
    still = runs.missing(places, chosen)
    if still and not arguments.finals:
        print(f"{experiment.name}: {len(still)} runs failed; see above", flush=True)
        raise SystemExit(1)


def _do_these(experiment: Experiment, places: runs.Places, keys: Sequence[str]) -> None:
    """Runs and dense networks by their keys, one after the other, in this process."""
    for key in keys:
        if key.startswith(DENSE):
            runs.make_dense(experiment, places, int(key.removeprefix(DENSE)))
        else:
            print(runs.attempt(experiment, places, _run_of_key(experiment, key)), flush=True)


def _do_missing(
    experiment: Experiment, places: runs.Places, chosen: Sequence[Run], side_by_side: _SideBySide
) -> None:
    """The chosen runs without a result; what they share is made before."""
    runs.prepared(experiment, places, chosen, side_by_side)
    _say(runs.outdated(experiment, places, chosen))
    todo = [run.key for run in runs.missing(places, chosen)]
    print(f"{experiment.name}: {len(todo)} runs to do", flush=True)
    if not side_by_side(todo):
        _do_these(experiment, places, todo)


def _say(lines: Sequence[str]) -> None:
    for line in lines:
        print(line, flush=True)


def _show(experiment: Experiment, results: Path) -> None:
    path = write_page(experiment, results)
    try:
        draw_experiment(experiment, results)
    except MissingExtraError as error:
        print(f"{error}; the page is without pictures", flush=True)
    if has_rivals(experiment):
        for cell in read_cells(experiment, results):
            print(
                f"{cell.runtime}, {cell.target:.0%}: {verdict(cell).replace('*', '')}", flush=True
            )
    print(f"page: {path}", flush=True)


class _SideBySide:
    """Does runs and dense networks in processes of their own, as the command line has it."""

    def __init__(
        self,
        experiment: Experiment,
        arguments: argparse.Namespace,
        argv: Sequence[str],
        ours: turns.Turns,
    ) -> None:
        words = [word for word in argv if word not in AGAIN]
        self.command = [sys.executable, "-m", "benchmarks", "comparison", *words, "--only"]
        self.experiment, self.arguments, self.ours = experiment, arguments, ours

    def __call__(self, keys: list[str]) -> bool:
        """Whether there was a way to do these so, or nothing to do."""
        if not keys:
            return True
        arguments = self.arguments
        singly = [[*self.command, key] for key in keys]
        if arguments.ray and _on_ray(singly, arguments.scratch, _gpus(self.experiment)):
            return True
        if arguments.workers > 1:
            handfuls = _handfuls(keys, arguments.workers)
            _in_parallel([[*self.command, *few] for few in handfuls], arguments.workers, self.ours)
        return bool(arguments.workers > 1)


def _arguments(argv: Sequence[str]) -> argparse.Namespace:
    options = parser("comparison", __doc__, seed=None)
    known = ", ".join(sorted(path.stem for path in FOLDER.glob("*.yaml")))
    options.add_argument("experiment", help=f"a YAML file, or one of: {known}")
    options.add_argument("--profile", help="one of the experiment's profiles, such as gpu")
    options.add_argument(
        "--scratch",
        type=Path,
        help=f"where run folders go: {SCRATCH}, and with --results the folder `scratch` in that",
    )
    options.add_argument("--methods", nargs="+", help="only these")
    options.add_argument("--seeds", nargs="+", type=int, help="only these")
    options.add_argument("--targets", nargs="+", type=float, help="only these")
    options.add_argument("--runtimes", nargs="+", help="only these")
    options.add_argument(
        "--workers",
        type=int,
        default=1,
        help="processes of one thread; they stand still while one of them measures",
    )
    options.add_argument(
        "--ray",
        action="store_true",
        help="as many runs at once as a Ray cluster has room for; its machines must see the same "
        "results, scratch and current folders",
    )
    options.add_argument(
        "--only",
        nargs="+",
        metavar="KEY",
        help="these runs, by their keys, with everything shared in place; or dense-SEED",
    )
    options.add_argument("--finals", action="store_true", help="only time the final networks")
    options.add_argument(
        "--again-disturbed",
        action="store_true",
        help="run again all of a cell (a target on a runtime) in which a run found another latency than "
        f"the last sitting, by more than {100 * again.MOST_APART:.0f} %%",
    )
    options.add_argument(
        "--again-refused",
        action="store_true",
        help="run again what was refused its target where another method of the same seed was not",
    )
    arguments = options.parse_args(list(argv))
    if (
        arguments.scratch is None
    ):  # other results are other draws, not copies of finished run folders
        stored_here = arguments.results.resolve() == RESULTS.resolve()
        arguments.scratch = SCRATCH if stored_here else arguments.results / "scratch"
    if arguments.again_disturbed and (arguments.methods or arguments.seeds):
        options.error(
            "--again-disturbed draws a cell again as a whole, or it would favour somebody; leave out "
            "--methods and --seeds, and choose cells by --targets and --runtimes"
        )
    return arguments


def _handfuls(keys: list[str], workers: int) -> list[list[str]]:
    """Keys in the order given, a few for each process: one takes seconds to begin. Towards the end
    fewer, so that all are done at about the same time."""
    handfuls, left = [], keys
    while left:
        count = max(1, min(MOST_AT_ONCE, len(left) // (2 * workers)))
        handfuls.append(left[:count])
        left = left[count:]
    return handfuls


def _run_of_key(experiment: Experiment, key: str) -> Run:
    for run in runs_of(experiment):
        if run.key == key:
            return run
    raise ConfigError(
        f"experiment {experiment.name}",
        [
            f"--only {key}: no run of it; a key is METHOD-RUNTIME-PERCENT-SEED, as in its files of runs"
        ],
    )


def choose(
    experiment: Experiment,
    *,
    methods: Sequence[str] | None = None,
    seeds: Sequence[int] | None = None,
    targets: Sequence[float] | None = None,
    runtimes: Sequence[str] | None = None,
) -> list[Run]:
    """The experiment's runs of these methods, seeds, targets and runtimes; None takes all.

    Raises:
        ConfigError: the experiment has no such one; all at once.
    """
    asked: dict[str, tuple[Sequence[object] | None, list[Any]]] = {
        "methods": (methods, list(experiment.methods)),
        "seeds": (seeds, experiment.seeds),
        "targets": (targets, experiment.targets),
        "runtimes": (runtimes, [runtime_name(block) for block in experiment.runtimes]),
    }
    problems = [
        f"--{what} {value}: not in the experiment; it has {', '.join(map(str, known))}"
        for what, (values, known) in asked.items()
        for value in values or ()
        if value not in known
    ]
    if problems:
        raise ConfigError(f"experiment {experiment.name}", problems)
    return [
        run
        for run in runs_of(experiment)
        if (methods is None or run.method in methods)
        and (seeds is None or run.seed in seeds)
        and (targets is None or run.target in targets)
        and (runtimes is None or run.runtime in runtimes)
    ]


def _caller(scratch: Path) -> Callable[[list[str]], None]:
    """Runs a command where it is called, in a process of one thread that stands still while another of
    that machine measures. A closure, which Ray ships by value: a worker finds this module in the folder
    only."""
    folder = os.getcwd()
    turn = [sys.executable, turns.__file__, str(scratch)]

    def call(command: list[str]) -> None:
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        subprocess.run([*turn, *command], check=False, cwd=folder, env=environment)

    return call


def _in_parallel(commands: list[list[str]], workers: int, ours: turns.Turns) -> None:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}

    def call(command: list[str]) -> int:
        return ours.call(command, environment=environment)

    with ThreadPoolExecutor(workers) as pool:
        try:
            list(pool.map(call, commands))
        except BaseException:
            ours.interrupt()
            raise


def _on_ray(commands: list[list[str]], scratch: Path, gpus: int) -> bool:
    """The same on a Ray cluster (RAY_ADDRESS, or one of this machine); False where there is no Ray."""
    try:
        ray = require("ray", extra="ray", purpose="runs on a cluster")
    except MissingExtraError as error:
        print(f"{error}; going on without it, with `--workers` processes here", flush=True)
        return False
    started_here = not ray.is_initialized()
    if started_here:
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # nobody asked for a report
        ray.init(include_dashboard=False)
    remote = ray.remote(num_cpus=1, num_gpus=gpus)(_caller(scratch))
    try:
        ray.get([remote.remote(command) for command in commands])
    finally:
        if started_here:
            ray.shutdown()
    return True


def _gpus(experiment: Experiment) -> int:
    """What a run needs: the GPU alone, if a latency is measured on it."""
    return int(any(str(block.get("device")).startswith("cuda") for block in experiment.runtimes))
