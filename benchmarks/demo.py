"""Claim: `wgates demo` takes under five minutes on two CPU cores, from nothing to a held target.

Measured: wall time of the command as a user types it, in a fresh temporary folder, with training,
pruning, export and report. No rival: the figure is its own bar.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

from benchmarks.records import HOME, parser, write_record
from wgates_plugin.cli import MISSED
from wgates_plugin.report.contents import load_report

CLAIM = "`wgates demo` takes under 300 seconds on two CPU cores"


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
    with TemporaryDirectory() as folder:
        started = time.perf_counter()
        done = subprocess.run(command, cwd=folder, env={**os.environ, "PYTHONPATH": path})
        seconds = time.perf_counter() - started
        if done.returncode != MISSED:  # a missed target is a result, not a failure
            done.check_returncode()
        report = load_report(find_report(Path(folder)))
    numbers = {
        "seconds": seconds,
        "contract": report["contract"],
        "baseline_ms": report["baseline"]["latency_ms"],
        "target_ms": report["target_ms"],
        "latency_ms": report["final"]["latency_ms"],
        "baseline_accuracy": report["baseline"]["accuracy"],
        "accuracy": report["final"]["accuracy"],
    }
    print(f"demo: {seconds:.0f} s, {numbers['contract']}")
    write_record(
        arguments.results,
        "demo",
        claim=CLAIM,
        settings={"options": passed_on},
        seed=report["seed"],
        numbers=numbers,
        samples={"seconds": [seconds], "phases": report["seconds"]},
    )
