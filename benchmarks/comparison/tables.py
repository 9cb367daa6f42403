"""Tables of the compared methods, as markdown, from the stored runs."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path

from benchmarks.comparison.experiment import Experiment
from benchmarks.comparison.summary import Cell, Difference, Row, mean_and_spread, read_cells

PHASES = {
    "lpnet": "LPNet",
    "gates": "deciding",
    "plan": "settling",
    "removal": "removal",
    "fine_tune": "fine-tuning",
}
"""Key of a report's seconds -> heading."""


def cell_table(cell: Cell) -> list[list[str]]:
    """One row per method: accuracy, loss, latency, MACs, parameters and where the time went."""
    return [_row(cell, row) for row in cell.rows.values()]


HEAD = [
    "method", "accuracy", "lost", "right after the cut", "latency", "held", "MACs", "parameters",
    *(f"{name}, s" for name in PHASES.values()),
]  # fmt: skip


def _row(cell: Cell, row: Row) -> list[str]:
    if row.refused is not None:
        return [f"`{row.method}`", f"refused: {row.refused}", *["-"] * (len(HEAD) - 2)]
    if not row.accuracy:
        return [f"`{row.method}`", "*missing*", *["-"] * (len(HEAD) - 2)]
    mark = "" if not row.missing else f" ({len(row.accuracy)} seeds, {len(row.missing)} missing)"
    lost = "-"
    if row.complete and len(cell.trained_on) == len(row.accuracy):
        lost = _points(Difference.of(cell.trained_on, row.accuracy))
    return [
        f"`{row.method}`",
        _percent(row.accuracy) + mark,
        lost,
        _percent(row.cut),
        _spread(row.ratio, "{:.3f}"),
        f"{sum(row.held)} of {len(row.held) + len(row.missing)}",
        _spread(row.macs, "{:.2f}"),
        _spread(row.parameters, "{:.2f}"),
        *(_seconds(row, phase) for phase in PHASES),
    ]


def _seconds(row: Row, phase: str) -> str:
    return f"{statistics.mean(seconds.get(phase, 0.0) for seconds in row.seconds):.0f}"


def _points(found: Difference) -> str:
    return f"{found.mean:+.2f} ± {found.error:.2f}"


def _percent(values: Sequence[float]) -> str:
    return _spread([100.0 * value for value in values], "{:.2f}") + " %"


def _spread(values: Sequence[float], form: str) -> str:
    mean, spread = mean_and_spread(values)
    return f"{form.format(mean)} ± {form.format(spread)}" if len(values) > 1 else form.format(mean)


def experiment_text(experiment: Experiment, results: Path) -> str:
    """All cells of an experiment: a heading line and a table each."""
    parts = []
    for cell in read_cells(experiment, results):
        words = f"**{round(100 * cell.target)} % of the latency on {cell.runtime}**"
        if cell.dense:
            words += f": untouched {_percent(cell.dense)}, trained on {_percent(cell.trained_on)}"
        best = cell.best(list(cell.rows))
        if best is not None and not cell.decided():
            words += "; *undecided*: chance is within one standard error of the best"
        lines = [HEAD, ["---"] * len(HEAD), *cell_table(cell)]
        parts.append(words + "\n\n" + "\n".join("| " + " | ".join(line) + " |" for line in lines))
    return "\n\n".join(parts)
