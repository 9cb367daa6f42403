"""Claim: `wgates demo` takes under five minutes on two CPU cores, from nothing to a held target.

Measured: wall time of the command as a user types it, in a fresh temporary folder, with training,
pruning, export and report, on two cores where the operating system can pin a process to them; the
record says on how many it was. No rival: the figure is its own bar.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

from benchmarks.tools.records import HOME, parser, write_record
from wgates_plugin.cli import MISSED
from wgates_plugin.latency.environment import usable_cores
from wgates_plugin.report.contents import load_report

CLAIM = "`wgates demo` takes under 300 seconds on two CPU cores"
CORES = 2


@contextmanager
def pinned(cores: int) -> Iterator[int]:
    """Keep this thread and what it starts on at most `cores` cores; gives how many it has.

    Where processes cannot be pinned, all usable cores are left and counted.
    """
    if not hasattr(os, "sched_setaffinity"):
        yield usable_cores()
        return
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, sorted(before)[:cores])
    try:
        yield len(os.sched_getaffinity(0))
    finally:
        os.sched_setaffinity(0, before)


def find_report(folder: Path) -> Path:
    """The run folder under `folder`.

    Raises:
        FileNotFoundError: the demo left none, or several.
    """
    found = sorted(folder.rglob("report.json"))
    if len(found) != 1:
        raise FileNotFoundError(f"demo: {len(found)} files report.json in `{folder}`, expected one")
    return found[0].parent


def main(argv: Sequence[str] = ()) -> None:
    options = parser("demo", __doc__)
    arguments, passed_on = options.parse_known_args(list(argv))
    command = [sys.executable, "-m", "wgates_plugin", "demo", *passed_on]
    path = os.pathsep.join(filter(None, [str(HOME.parent), os.environ.get("PYTHONPATH")]))
    with TemporaryDirectory() as folder, pinned(CORES) as cores:
        started = time.perf_counter()
        done = subprocess.run(command, cwd=folder, env={**os.environ, "PYTHONPATH": path})
        seconds = time.perf_counter() - started
        if done.returncode != MISSED:  # a missed target is a result, not a failure
            done.check_returncode()
        report = load_report(find_report(Path(folder)))
    numbers = {
        "seconds": seconds,
        "cores": cores,
        "contract": report["contract"],
        "baseline_ms": report["baseline"]["latency_ms"],
        "target_ms": report["target_ms"],
        "latency_ms": report["final"]["latency_ms"],
        "baseline_accuracy": report["baseline"]["accuracy"],
        "accuracy": report["final"]["accuracy"],
    }
    print(f"demo: {seconds:.0f} s on {cores} cores, {numbers['contract']}")
    write_record(
        arguments.results,
        "demo",
        claim=CLAIM,
        settings={"options": passed_on},
        seed=report["seed"],
        numbers=numbers,
        samples={"seconds": [seconds], "phases": report["seconds"]},
    )
