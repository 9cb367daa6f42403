"""Runs that are made again, and what they had found, which stays on record."""

from __future__ import annotations

import shutil
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.comparison.experiment import Experiment, Run, runs_of
from benchmarks.comparison.runs import Places
from benchmarks.comparison.summary import last_ratio
from wgates_plugin.files import read_json, write_json

MOST_APART = 0.03
"""Relative. One network's ratio is found again to about 2 % on a machine with nothing else to do."""

FLOOR = ("grid", "min_channels", "min_fraction", "floors", "caps")
"""Settings that the least widths depend on."""


def forget_disturbed(places: Places, chosen: Iterable[Run]) -> list[str]:
    """Take away all results of the cells in which a run was disturbed, with a line for each cell.

    Disturbed is a run that found another latency of what it delivered, smaller or larger, than the last
    sitting did, in which all are timed: other work on the machine led it to other widths. What was
    timed beside other work in that sitting says nothing. A run that is made again is another draw of
    its accuracy too, so a cell is drawn again as a whole, or not at all.
    """
    by_cell: dict[tuple[str, float], list[Run]] = {}
    for run in chosen:
        by_cell.setdefault((run.runtime, run.target), []).append(run)
    lines = []
    for (runtime, target), cell in by_cell.items():
        path = places.finals(runtime)
        timed = read_json(path, kind="final latencies") if path.exists() else None
        found = [] if timed is None else [_found(places, timed, run) for run in cell]
        apart = sum(one is not None and one.apart for one in found)
        if timed is None or not apart:
            continue
        lines.append(
            f"{runtime}, {target:.0%}: {apart} of {len(cell)} runs found another latency than the last "
            "sitting; all of them again"
        )
        for run, one in zip(cell, found, strict=True):
            if one is None:
                continue
            _forget(places, run, accuracy=one.accuracy, own=one.own, last=one.last)
            for table in (timed["ratio"], timed["networks"]):
                table.pop(run.key, None)
        write_json(path, timed)
    return lines


@dataclass(frozen=True)
class _Found:
    """What a run had found of its network: latencies are ratios, by the run and in the last sitting."""

    accuracy: float
    own: float
    last: float | None
    disturbed: bool

    @property
    def apart(self) -> bool:
        if self.last is None or self.disturbed:
            return False
        return abs(self.own / self.last - 1.0) > MOST_APART


def _found(places: Places, timed: dict[str, Any], run: Run) -> _Found | None:
    """None without a delivered network."""
    stored = _stored(places, run)
    if "final" not in stored:
        return None
    return _Found(
        stored["final"]["accuracy"],
        own=stored["final"]["latency_ms"] / stored["baseline"]["latency_ms"],
        last=last_ratio(timed, run, stored),
        disturbed=run.key in timed["disturbed"],
    )


def forget_refused(experiment: Experiment, places: Places, chosen: Iterable[Run]) -> list[str]:
    """Take away the refusals of targets that another method of that cell and seed was allowed, with a
    line for each.

    Where both prune the same network, the least widths are the same for both, so near their latency a
    single measurement has decided. There is no accuracy to choose by.
    """
    refused = [run for run in chosen if "reason" in _stored(places, run)]
    lines = []
    for run in filter(lambda run: _prunes_the_same(experiment, run), refused):
        report = _stored(places, run)
        siblings = [
            _stored(places, other)
            for other in runs_of(experiment)
            if (other.runtime, other.target, other.seed) == (run.runtime, run.target, run.seed)
            and _prunes_the_same(experiment, other)
        ]
        if any("final" in other and _floor(other) == _floor(report) for other in siblings):
            lines.append(f"{run.key}: refused, where another method was not; again")
            _forget(places, run, refused=report["reason"])
    return lines


def read_replaced(path: Path) -> list[dict[str, Any]]:
    """What runs had found, or why they were refused, that were made again; oldest first."""
    if not path.exists():
        return []
    found: list[dict[str, Any]] = read_json(path, kind="replaced runs")["runs"]
    return found


def _forget(places: Places, run: Run, **found: Any) -> None:
    gone = [*read_replaced(places.replaced), {"run": run.key, **found}]
    write_json(places.replaced, {"kind": "replaced runs", "runs": gone})
    shutil.rmtree(places.run_folder(run), ignore_errors=True)
    places.result(run).unlink()


def _stored(places: Places, run: Run) -> dict[str, Any]:
    path = places.result(run)
    return read_json(path, kind="run") if path.exists() else {}


def _prunes_the_same(experiment: Experiment, run: Run) -> bool:
    """A method with samples of its own changes the network before it is pruned."""
    return "samples_file" not in experiment.methods[run.method].pruning


def _floor(report: dict[str, Any]) -> list[Any]:
    return [report.get("settings", {}).get(key) for key in FLOOR]
