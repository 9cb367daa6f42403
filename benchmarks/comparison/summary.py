"""What the runs of an experiment say: mean and spread over seeds, differences paired by seed."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.comparison.experiment import Experiment, Run, runtime_name
from wgates_plugin.files import read_json

CHANCE = "random"
TIGHT = 0.95
"""A final latency under this share of the target gives speed away that accuracy could have used."""


@dataclass(frozen=True)
class Difference:
    """Mean of differences paired by seed, in points of accuracy, and its standard error."""

    mean: float
    error: float

    @classmethod
    def of(cls, first: Sequence[float], second: Sequence[float]) -> Difference:
        points = [100.0 * (a - b) for a, b in zip(first, second, strict=True)]
        error = statistics.stdev(points) / math.sqrt(len(points)) if len(points) > 1 else math.inf
        return cls(statistics.mean(points), error)


@dataclass
class Row:
    """One method in one cell; lists are by seed, in the order of the experiment's seeds.

    Attributes:
        accuracy, macs, parameters: of the delivered network. ratio: latency over the untouched
            network's, timed in one sitting with all others where that was done.
        missing: seeds without a result. refused: why there is none, if the target was refused.
    """

    method: str
    seeds: list[int] = field(default_factory=list)
    accuracy: list[float] = field(default_factory=list)
    cut: list[float] = field(default_factory=list)
    ratio: list[float] = field(default_factory=list)
    held: list[bool] = field(default_factory=list)
    macs: list[float] = field(default_factory=list)
    parameters: list[float] = field(default_factory=list)
    seconds: list[dict[str, float]] = field(default_factory=list)
    missing: list[int] = field(default_factory=list)
    refused: str | None = None

    @property
    def complete(self) -> bool:
        return not self.missing and self.refused is None


@dataclass
class Cell:
    """All methods at one target on one runtime."""

    runtime: str
    target: float
    rows: dict[str, Row]
    dense: list[float]
    trained_on: list[float]

    def row(self, method: str) -> Row:
        return self.rows[method]

    def best(self, methods: Sequence[str]) -> str | None:
        """The complete method of highest mean accuracy among `methods`."""
        whole = [m for m in methods if self.rows[m].complete]
        return max(whole, key=lambda m: statistics.mean(self.rows[m].accuracy), default=None)

    def decided(self) -> bool:
        """Whether the best method beats chance by more than one standard error."""
        best = self.best(list(self.rows))
        chance = self.rows.get(CHANCE)
        if best is None or chance is None or not chance.complete or best == CHANCE:
            return False
        found = Difference.of(self.rows[best].accuracy, chance.accuracy)
        return found.mean > found.error


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
        finals = read_json(path, kind="final latencies")["ratio"] if path.exists() else {}
        for target in experiment.targets:
            rows = {}
            for method in experiment.methods:
                rows[method] = row = Row(method)
                for seed in experiment.seeds:
                    run = Run(method, runtime, target, seed)
                    stored = home / "runs" / f"{run.key}.json"
                    if not stored.exists():
                        row.missing.append(seed)
                        continue
                    _add(row, seed, read_json(stored, kind="run"), finals.get(run.key))
            cells.append(
                Cell(
                    runtime,
                    target,
                    rows,
                    [dense[s]["accuracy"] for s in experiment.seeds if s in dense],
                    [dense[s]["trained_on"]["accuracy"] for s in experiment.seeds if s in dense],
                )
            )
    return cells


def _add(row: Row, seed: int, report: dict[str, Any], final_ratio: float | None) -> None:
    if report.get("kind") == "refused":
        row.refused = report["reason"]
        return
    before, after = report["baseline"], report["final"]
    row.seeds.append(seed)
    row.accuracy.append(after["accuracy"])
    row.cut.append(report["after_removal"]["accuracy"])
    row.ratio.append(
        after["latency_ms"] / before["latency_ms"] if final_ratio is None else final_ratio
    )
    row.held.append(report["contract"] == "held")
    row.macs.append(after["macs"] / before["macs"])
    row.parameters.append(after["parameters"] / before["parameters"])
    row.seconds.append(report["seconds"])


def mean_and_spread(values: Sequence[float]) -> tuple[float, float]:
    """Mean and standard deviation over seeds; 0 for one."""
    return statistics.mean(values), statistics.stdev(values) if len(values) > 1 else 0.0
