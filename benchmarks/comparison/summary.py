"""What the runs of an experiment say: mean and spread over seeds, differences paired by seed."""

from __future__ import annotations

import functools
import hashlib
import json
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from enum import StrEnum
from pathlib import Path
from typing import Any

from benchmarks.comparison.experiment import Experiment, Run, runtime_name
from wgates_plugin.files import read_json
from wgates_plugin.latency.base import require

CHANCE = "random"
TIGHT = 0.95
"""A final latency under this share of the target gives speed away that accuracy could have used."""

EQUAL_LATENCY = 0.05
"""Of the target: the latency that the more accurate of two may take beyond the other's."""


@dataclass(frozen=True)
class Difference:
    """Mean of paired differences, in points of accuracy, and its standard error."""

    mean: float
    error: float
    pairs: int = 1

    @classmethod
    def of(cls, first: Sequence[float], second: Sequence[float]) -> Difference:
        """Of two accuracies per seed."""
        return cls.among([100.0 * (a - b) for a, b in zip(first, second, strict=True)])

    @classmethod
    def among(cls, points: Sequence[float]) -> Difference:
        error = statistics.stdev(points) / math.sqrt(len(points)) if len(points) > 1 else math.inf
        # As many right answers are the same accuracy, whatever floats make of it.
        return cls(round(statistics.mean(points), 9), error, len(points))

    def interval(self, confidence: float = 0.95) -> tuple[float, float]:
        """Student's t interval of the mean; all numbers for a single pair."""
        if self.pairs < 2:
            return -math.inf, math.inf
        stats = require("scipy.stats", extra="knapsack", purpose="intervals of differences")
        half = float(stats.t.ppf(0.5 + confidence / 2, self.pairs - 1)) * self.error
        return self.mean - half, self.mean + half


@dataclass
class Row:
    """One method in one cell; lists are by seed, in the order of the experiment's seeds.

    Attributes:
        accuracy, macs, parameters: of the delivered network. ratio: latency over the untouched
            network's, timed in one sitting with all others where that was done. finals: those of
            this sitting alone. again: of those that said "held", whether they were under the target
            in that sitting too.
        other_images: accuracy on images that judge nobody, of the seeds that have been scored so.
        missing: seeds without a result. refused: seed -> why its target was refused.
    """

    method: str
    seeds: list[int] = field(default_factory=list)
    accuracy: list[float] = field(default_factory=list)
    other_images: list[float] = field(default_factory=list)
    cut: list[float] = field(default_factory=list)
    ratio: list[float] = field(default_factory=list)
    finals: list[float] = field(default_factory=list)
    again: list[bool] = field(default_factory=list)
    held: list[bool] = field(default_factory=list)
    facts: list[dict[str, Any]] = field(default_factory=list)
    macs: list[float] = field(default_factory=list)
    parameters: list[float] = field(default_factory=list)
    seconds: list[dict[str, float]] = field(default_factory=list)
    missing: list[int] = field(default_factory=list)
    refused: dict[int, str] = field(default_factory=dict)

    @property
    def complete(self) -> bool:
        return not self.missing and not self.refused


class Verdict(StrEnum):
    """What a cell says of ours."""

    INCOMPLETE = "incomplete"
    OUT_OF_REACH = "out of reach"
    UNDECIDED = "undecided"
    UNEQUAL = "not at equal latency"
    LOST = "lost"
    OVER_TARGET = "lost: ours is over the target"
    TIED = "tied"
    WON = "won"
    WON_BEYOND = "won beyond one standard error"

    @property
    def counts(self) -> bool:
        """For one side or the other."""
        return self not in (self.INCOMPLETE, self.OUT_OF_REACH, self.UNDECIDED, self.UNEQUAL)

    @property
    def won(self) -> bool:
        """Ours is at least as accurate as the best rival, and keeps the target."""
        return self in (self.TIED, self.WON, self.WON_BEYOND)


@dataclass
class Cell:
    """All methods at one target on one runtime.

    Attributes:
        ours: the method that is held against the `rivals`. Ablations are rows, but neither.
        processor: on which the last sitting was; empty before there was one.
    """

    runtime: str
    target: float
    rows: dict[str, Row]
    dense: list[float]
    trained_on: list[float]
    ours: str | None = None
    rivals: tuple[str, ...] = ()
    processor: str = ""

    @property
    def seeds(self) -> int:
        """The most that a method was done with."""
        return max((len(row.seeds) for row in self.rows.values()), default=0)

    def row(self, method: str) -> Row:
        return self.rows[method]

    @property
    def rivals_here(self) -> list[str]:
        return [method for method in self.rivals if method in self.rows]

    @property
    def contestants(self) -> list[str]:
        return [m for m in self.rows if m == self.ours or m in self.rivals]

    def missing(self) -> int:
        """Runs of ours and the rivals that are not there.

        A method whose target was refused for some seeds and not for others counts with those: near
        the least latency there is, a single measurement decides.
        """
        rows = [self.rows[method] for method in self.contestants]
        return sum(len(row.missing) + len(row.refused) * bool(row.seeds) for row in rows)

    def out_of_reach(self) -> bool:
        """Whether the target was refused to ours and to all rivals, with every seed."""
        rows = [self.rows[method] for method in self.contestants]
        return bool(rows) and not any(row.missing or row.seeds for row in rows)

    def best(self, methods: Sequence[str]) -> str | None:
        """The complete method of highest mean accuracy among `methods`; of equals the first."""
        whole = [m for m in methods if self.rows[m].complete]
        return max(
            whole, key=lambda m: round(statistics.mean(self.rows[m].accuracy), 9), default=None
        )

    def decided(self) -> bool:
        """Whether the best method beats chance by more than one standard error, or ours falls as far
        behind the best: that is lost, whoever is best."""
        best = self.best(self.contestants)
        if best is None:
            return False
        if not self.rows[CHANCE].seeds:  # refused with every seed: nothing is there by chance
            return self.seeds > 1
        ahead = self.between(best, CHANCE)
        behind = None if self.ours is None else self.between(best, self.ours)
        return any(found is not None and found.mean > found.error for found in (ahead, behind))

    def verdict(self) -> Verdict:
        if self.missing():
            return Verdict.INCOMPLETE
        if self.out_of_reach():
            return Verdict.OUT_OF_REACH
        if CHANCE in self.rows and not self.decided():
            return Verdict.UNDECIDED
        margin, rival = self.margin(), self.best(self.rivals_here)
        keeps = self.keeps_target(self.ours)
        if rival is not None and (margin is None or margin.mean < 0):
            ahead = [one for one in self.rivals_here if self.ahead_of_ours(one)]
            fairly = margin is None or not keeps or any(self.fair(one) for one in ahead)
            return Verdict.LOST if fairly else Verdict.UNEQUAL
        if not keeps:
            return Verdict.OVER_TARGET
        if margin is None or rival is None:  # nobody else was allowed the target
            return Verdict.WON
        if not self.fair(rival):
            return Verdict.UNEQUAL
        if margin.mean == 0:
            return Verdict.TIED
        return Verdict.WON_BEYOND if margin.mean > margin.error else Verdict.WON

    def ahead_of_ours(self, rival: str) -> bool:
        margin = None if self.ours is None else self.between(self.ours, rival)
        return margin is not None and margin.mean < 0

    def fair(self, rival: str) -> bool:
        """Whether latency leaves the better of ours and a complete rival the better one.

        The better one may take no more than `EQUAL_LATENCY` of the target more than the other; a rival
        that keeps the target may.
        """
        more = (self._latency(self.ours or "") - self._latency(rival)) / self.target
        if self.ahead_of_ours(rival):
            return self.keeps_target(rival) or more >= -EQUAL_LATENCY
        return more <= EQUAL_LATENCY

    def keeps_target(self, method: str | None) -> bool:
        """On average over seeds: what is won above it is no gain at equal latency."""
        row = self.rows.get(method or "")
        return row is not None and bool(row.ratio) and self._latency(row.method) <= self.target

    def _latency(self, method: str) -> float:
        return statistics.mean(self.rows[method].ratio)

    def between(self, first: str, second: str) -> Difference | None:
        """`first` minus `second`; None unless both are complete."""
        rows = [self.rows.get(method) for method in (first, second)]
        found = [row.accuracy for row in rows if row is not None and row.complete]
        return Difference.of(*found) if len(found) == 2 else None

    def lost(self, method: str) -> Difference | None:
        """Points lost against the untouched network trained on; None unless all seeds are there."""
        row = self.rows.get(method)
        if row is None or not row.complete or len(self.trained_on) != len(row.accuracy):
            return None
        return Difference.of(self.trained_on, row.accuracy)

    def on_other_images(self) -> Cell:
        """This cell with accuracies on images that judge nobody; a method that was not scored on them
        with every seed has no result there, nor have the untouched networks."""
        rows = {}
        for name, row in self.rows.items():
            scored = len(row.other_images) == len(row.seeds)
            rows[name] = replace(
                row,
                accuracy=row.other_images if scored else [],
                seeds=row.seeds if scored else [],
                missing=row.missing if scored else [*row.missing, *row.seeds],
            )
        return replace(self, rows=rows, dense=[], trained_on=[])

    def margin(self) -> Difference | None:
        """Ours minus the best rival; None where one of the two is not complete."""
        rival = self.best(self.rivals_here)
        return None if self.ours is None or rival is None else self.between(self.ours, rival)

    def margin_on_other_images(self) -> Difference | None:
        """Over the same rival: the best on these would be chosen by them."""
        rival = self.best(self.rivals_here)
        if self.ours is None or rival is None:
            return None
        return self.on_other_images().between(self.ours, rival)


def read_cells(experiment: Experiment, results: Path) -> list[Cell]:
    """All cells as far as they are stored under `results` (the folder of all benchmarks)."""
    home = results / "comparison" / experiment.name
    dense = {}
    for seed in experiment.seeds:
        path = home / f"dense-{seed}.json"
        if path.exists():
            dense[seed] = read_json(path, kind="dense result")
    cells = []
    for block in experiment.runtimes:
        runtime = runtime_name(block)
        path = home / f"finals-{runtime}.json"
        finals = read_json(path, kind="final latencies") if path.exists() else {}
        for target in experiment.targets:
            rows = {}
            for name in experiment.methods:
                if not experiment.has(name, runtime, target):
                    continue
                rows[name] = row = Row(name)
                for seed in experiment.seeds:
                    run = Run(name, runtime, target, seed)
                    stored = home / "runs" / f"{run.key}.json"
                    if not stored.exists():
                        row.missing.append(seed)
                        continue
                    report = _read(stored, stored.stat().st_mtime_ns)
                    _add(row, seed, report, target, last_ratio(finals, run, report))
            cells.append(
                Cell(
                    runtime,
                    target,
                    rows,
                    [dense[s]["accuracy"] for s in experiment.seeds if s in dense],
                    [dense[s]["trained_on"]["accuracy"] for s in experiment.seeds if s in dense],
                    experiment.ours,
                    tuple(experiment.with_role("rival")),
                    finals.get("environment", {}).get("cpu", ""),
                )
            )
    return cells


_NEEDED = (
    "kind", "reason", "baseline", "final", "after_removal", "contract", "seconds", "decision",
    "widths", "before_cut", "after_cut", "other_images",
)  # fmt: skip


@functools.cache
def _read(path: Path, modified_ns: int) -> dict[str, Any]:
    """What the tables need of a report; every claim and table reads the same thousands of files."""
    report = read_json(path, kind="run")
    return {key: report[key] for key in _NEEDED if key in report}


def network_of(report: dict[str, Any]) -> str:
    """A short digest of the network that a stored run delivered: its widths, and what else changed."""
    made = [
        [row["kept"] for row in report.get("widths", ())],
        report.get("before_cut", []),
        report.get("after_cut", []),
    ]
    return hashlib.sha256(json.dumps(made).encode()).hexdigest()[:16]


def last_ratio(finals: dict[str, Any], run: Run, report: dict[str, Any]) -> float | None:
    """A run's latency in the last sitting; None where that did not time this very network."""
    if not finals or finals["networks"].get(run.key) != network_of(report):
        return None
    ratio: float = finals["ratio"][run.key]
    return ratio


def _add(
    row: Row, seed: int, report: dict[str, Any], target: float, final_ratio: float | None
) -> None:
    if report.get("kind") == "refused":
        row.refused[seed] = report["reason"]
        return
    before, after = report["baseline"], report["final"]
    row.seeds.append(seed)
    row.accuracy.append(after["accuracy"])
    if "other_images" in report:
        row.other_images.append(report["other_images"]["accuracy"])
    row.cut.append(report["after_removal"]["accuracy"])
    row.ratio.append(
        after["latency_ms"] / before["latency_ms"] if final_ratio is None else final_ratio
    )
    if final_ratio is not None:
        row.finals.append(final_ratio)
        if report["contract"] == "held":
            row.again.append(final_ratio <= target)
    row.held.append(report["contract"] == "held" if final_ratio is None else final_ratio <= target)
    row.facts.append(report.get("decision", {}).get("facts", {}))
    row.macs.append(after["macs"] / before["macs"])
    row.parameters.append(after["parameters"] / before["parameters"])
    row.seconds.append(report["seconds"])


def mean_and_spread(values: Sequence[float]) -> tuple[float, float]:
    """Mean and standard deviation over seeds; 0 for one."""
    return statistics.mean(values), statistics.stdev(values) if len(values) > 1 else 0.0
