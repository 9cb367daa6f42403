"""Accuracy over measured latency, and over MACs beside it: one picture per task and runtime."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks.comparison.contests import has_rivals
from benchmarks.comparison.experiment import Experiment
from benchmarks.comparison.summary import CHANCE, Cell, Row, mean_and_spread, read_cells
from wgates_plugin.files import atomic_path
from wgates_plugin.latency.base import require
from wgates_plugin.report.theme import DARK, LIGHT, Theme, new_figure, style

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

RUNTIME_WORDS = {
    "onnxruntime": "ONNX\nRuntime",
    "openvino": "OpenVINO",
    "eager": "PyTorch\neager",
    "executorch": "Execu-\nTorch",
}

AXES = {"ratio": "measured latency over untouched", "macs": "MACs over untouched"}
"""Attribute of a row -> what it is called."""


def draw_experiment(experiment: Experiment, results: Path) -> list[Path]:
    """Draw `RUNTIME.svg` and `RUNTIME-dark.svg` beside an experiment's page, as far as it has runs.

    One of ablations alone, which are nobody's rivals, has no picture.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    written: list[Path] = []
    if not has_rivals(experiment):
        return written
    for runtime, cells in cells_by_runtime(experiment, results).items():
        words = RUNTIME_WORDS.get(runtime, runtime).replace("\n", " ")
        written += both_themes(
            results / "comparison" / experiment.name / runtime,
            functools.partial(
                draw_trade_off, f"{experiment.task or experiment.name} on {words}", cells
            ),
        )
    return written


def both_themes(path: Path, picture: Callable[[Theme], Figure]) -> list[Path]:
    """`path` with `.svg` and `-dark.svg` behind it."""
    matplotlib = require("matplotlib", extra="plots", purpose="drawing the benchmarks' pictures")
    written = []
    for theme in (LIGHT, DARK):
        # Without the salt and the date, the same record would not give the same file.
        with matplotlib.rc_context({**style(theme), "svg.hashsalt": path.name}):
            figure = picture(theme)
            written.append(path.with_name(f"{path.name}{theme.suffix}.svg"))
            with atomic_path(written[-1]) as part:
                figure.savefig(part, format="svg", metadata={"Date": None})
    return written


def cells_by_runtime(experiment: Experiment, results: Path) -> dict[str, list[Cell]]:
    """Cells of the runtimes on which a method is complete, the lowest target first."""
    found: dict[str, list[Cell]] = {}
    for cell in sorted(read_cells(experiment, results), key=lambda cell: cell.target):
        found.setdefault(cell.runtime, []).append(cell)
    return {
        runtime: cells
        for runtime, cells in found.items()
        if any(row.complete for cell in cells for row in cell.rows.values())
    }


def draw_trade_off(title: str, cells: Sequence[Cell], theme: Theme) -> Figure:
    """Means over seeds with their standard deviation both ways; a line per method over the targets."""
    figure, panels = new_figure(4.2, columns=len(AXES))
    for panel, (attribute, words) in zip(panels, AXES.items(), strict=True):
        _draw(panel, cells, attribute, theme)
        panel.set_xlabel(words)
    panels[0].set_ylabel("accuracy, %")
    panels[0].set_title(title)
    missing = [f"{round(100 * cell.target)} %" for cell in cells if cell.missing()]
    if missing:
        panels[-1].set_title(f"runs are missing at {', '.join(missing)}")
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper right", ncols=len(labels))
    return figure


def _draw(panel: Axes, cells: Sequence[Cell], attribute: str, theme: Theme) -> None:
    trained_on = max((cell.trained_on for cell in cells), key=len)
    if trained_on:
        level = 100 * mean_and_spread(trained_on)[0]
        panel.axhline(level, color=theme.target, linewidth=1.2, linestyle="--", label="not pruned")
    looks = {
        CHANCE: (theme.second, 1.4, "chance"),
        "uniform": (theme.text, 1.4, "uniform widths"),
        cells[0].ours: (theme.after, 2.0, "W-Gates"),
    }
    others = [m for m in dict.fromkeys(m for c in cells for m in c.rivals_here) if m not in looks]
    # Ours comes last, on top of everything.
    told = set[str]()
    for method in [*others, *looks]:
        rows = [c.rows[method] for c in cells if method in c.rows and c.rows[method].complete]
        if not rows:
            continue
        colour, width, label = looks.get(method, (theme.before, 0.8, "other methods"))
        _line(panel, rows, attribute, colour, width, "" if label in told else label)
        told.add(label)
    panel.grid(axis="y")


def _line(
    panel: Axes, rows: Sequence[Row], attribute: str, colour: str, width: float, label: str
) -> None:
    across = [mean_and_spread(getattr(row, attribute)) for row in rows]
    up = [mean_and_spread([100 * value for value in row.accuracy]) for row in rows]
    panel.errorbar(
        [mean for mean, _ in across],
        [mean for mean, _ in up],
        yerr=[spread for _, spread in up],
        xerr=[spread for _, spread in across],
        color=colour,
        linewidth=width,
        elinewidth=0.8,
        marker="o",
        markersize=2 + 1.5 * width,
        label=label or "_",
    )
