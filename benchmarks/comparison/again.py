"""Runs that are made again, and what they had found, which stays on record."""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from benchmarks.comparison.experiment import Experiment, Run, runs_of
from benchmarks.comparison.runs import Places
from benchmarks.comparison.summary import Cell, Row, last_ratio
from wgates_plugin.files import read_json, write_json

MOST_APART = 0.03
"""Relative. One network's ratio is found again to about 2 % on a machine with nothing else to do."""

FLOOR = ("grid", "min_channels", "min_fraction", "floors", "caps")
"""Settings that the least widths depend on."""


@dataclass(frozen=True)
class Found:
    """What a run had found of its network: latencies are ratios, by the run and in the last sitting."""

    accuracy: float
    own: float
    last: float | None
    disturbed: bool

    @property
    def judged(self) -> bool:
        """What was timed beside other work in the last sitting says nothing of what the run had found."""
        return self.last is not None and not self.disturbed

    @property
    def apart(self) -> bool:
        """Whether other work on the machine led the run to other widths than it would have chosen."""
        if self.last is None or self.disturbed:
            return False
        return abs(self.own / self.last - 1.0) > MOST_APART


def found_by_cell(
    places: Places, chosen: Iterable[Run]
) -> dict[tuple[str, float], dict[Run, Found]]:
    """(runtime, target) -> the runs that delivered a network there; cells after a last sitting."""
    cells: dict[tuple[str, float], dict[Run, Found]] = {}
    sittings: dict[str, dict[str, Any]] = {}
    for run in chosen:
        path, stored = places.finals(run.runtime), _stored(places, run)
        if "final" not in stored or not path.exists():
            continue
        if run.runtime not in sittings:
            sittings[run.runtime] = read_json(path, kind="final latencies")
        timed = sittings[run.runtime]
        cells.setdefault((run.runtime, run.target), {})[run] = Found(
            stored["final"]["accuracy"],
            own=stored["final"]["latency_ms"] / stored["baseline"]["latency_ms"],
            last=last_ratio(timed, run, stored),
            disturbed=run.key in timed["disturbed"],
        )
    return cells


def forget_disturbed(places: Places, chosen: Sequence[Run]) -> list[str]:
    """Take away all results of the cells in which a run was `apart`, with a line for each cell.

    A run that is made again is another draw of its accuracy too, so a cell is drawn again as a
    whole, or not at all: `chosen` has all runs of its cells.
    """
    lines = []
    for (runtime, target), found in found_by_cell(places, chosen).items():
        apart = sum(one.apart for one in found.values())
        if not apart:
            continue
        lines.append(
            f"{runtime}, {target:.0%}: {apart} of {len(found)} runs found another latency than the "
            "last sitting; all of them again"
        )
        timed = read_json(places.finals(runtime), kind="final latencies")
        cell = [run for run in chosen if (run.runtime, run.target) == (runtime, target)]
        # Those that are apart go last: after an interruption the cell is still one to draw again.
        for run in sorted(cell, key=lambda run: run in found and found[run].apart):
            if run in found:
                one = found[run]
                _forget(places, run, accuracy=one.accuracy, own=one.own, last=one.last)
            elif stored := _stored(places, run):
                _forget(places, run, refused=stored["reason"])
            for table in (timed["ratio"], timed["networks"]):
                table.pop(run.key, None)
        write_json(places.finals(runtime), timed)
    return lines


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


def first_draws(cell: Cell, places: Places) -> Cell:
    """This cell with what its runs had found, or why they were refused, before they were made again.

    As much of it as a verdict needs; runs that were made once stay as they are.
    """
    first = {one["run"]: one for one in reversed(read_replaced(places.replaced))}
    rows = {}
    for name, row in cell.rows.items():
        found = dict(zip(row.seeds, zip(row.accuracy, row.ratio, strict=True), strict=True))
        refused = dict(row.refused)
        for seed in sorted({*found, *refused}):
            one = first.get(Run(name, cell.runtime, cell.target, seed).key)
            if one is None:
                continue
            found.pop(seed, None)
            refused.pop(seed, None)
            if "refused" in one:
                refused[seed] = one["refused"]
            else:
                found[seed] = one["accuracy"], one["own"] if one["last"] is None else one["last"]
        seeds = sorted(found)
        rows[name] = Row(
            name,
            seeds,
            accuracy=[found[seed][0] for seed in seeds],
            ratio=[found[seed][1] for seed in seeds],
            missing=row.missing,
            refused=refused,
        )
    return replace(cell, rows=rows)


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
