"""Pictures of a fitted LPNet: errors, intervals, and single layers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from wgates_plugin.report.names import shorten
from wgates_plugin.report.predictions import draw_points
from wgates_plugin.report.theme import Theme, new_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from wgates_plugin.report.plots import Drawing

MOST_LAYERS = 40


def draw_held_out(report: dict[str, Any], theme: Theme) -> Figure | None:
    """Predicted unseen against measured, and the errors with their 90 % intervals."""
    points = report["held_out"]
    if not points:
        return None
    figure, (axis, errors) = new_figure(4.4, columns=2)
    draw_points(axis, points, (("held out", "predicted unseen", theme.after, "o"),), theme)
    axis.legend(loc="upper left")
    known = [point for point in points if point["low_ms"] is not None]

    def measured(points: list[dict[str, Any]]) -> list[float]:
        return [point["measured_ms"] for point in points]

    def off(points: list[dict[str, Any]], key: str) -> list[float]:
        return [100 * (point[key] / point["measured_ms"] - 1.0) for point in points]

    errors.axhline(0, color=theme.faint, linewidth=1.2)
    errors.vlines(
        measured(known),
        off(known, "low_ms"),
        off(known, "high_ms"),
        color=theme.before,
        linewidth=1.2,
    )
    errors.scatter(measured(points), off(points, "predicted_ms"), color=theme.after, s=16, zorder=3)
    errors.grid()
    errors.tick_params(length=0)
    errors.set_xlabel("measured latency, ms")
    errors.set_ylabel("predicted less measured, %")
    return figure


def draw_coverage(report: dict[str, Any], theme: Theme) -> Figure | None:
    """How often measurements lay inside their intervals, against how often they should."""
    rows = report["coverage"]
    if not rows:
        return None
    figure, (axis,) = new_figure(3.6)
    nominal = [100 * row["nominal"] for row in rows]
    axis.plot([0, 100], [0, 100], color=theme.faint, linewidth=1.2, label="as promised")
    axis.plot(
        nominal,
        [100 * row["empirical"] for row in rows],
        color=theme.after,
        marker="o",
        linewidth=1.8,
        label="found",
    )
    axis.set_xlim(min(nominal) - 5, 101)
    axis.set_ylim(min(nominal) - 15, 103)
    axis.grid()
    axis.tick_params(length=0)
    axis.set_xlabel("interval, %")
    axis.set_ylabel("measurements inside, %")
    axis.legend(loc="upper left")
    return figure


def draw_layers(report: dict[str, Any], theme: Theme) -> Figure | None:
    """Errors of single layers: middle half as a bar, nine tenths as a line, the median as a dot."""
    every = report["layers"]
    if not every:
        return None
    longest = sorted(every, key=lambda row: row["share"], reverse=True)[:MOST_LAYERS]
    rows = [row for row in every if row in longest]
    figure, (axis,) = new_figure(1.3 + 0.24 * len(rows))
    places = list(range(len(rows)))
    ends = [[100 * value for value in row["quantiles"]] for row in rows]
    axis.axvline(0, color=theme.faint, linewidth=1.0)
    axis.hlines(places, [e[0] for e in ends], [e[4] for e in ends], color=theme.before)
    axis.hlines(places, [e[1] for e in ends], [e[3] for e in ends], color=theme.after, linewidth=6)
    axis.scatter([e[2] for e in ends], places, color=theme.target, s=16, zorder=3)
    names = [f"{shorten(row['layer'])}  {row['share']:.0%}" for row in rows]
    axis.set_yticks(places, names, fontsize=8.5, color=theme.text)
    axis.set_ylim(len(rows) - 0.4, -0.6)
    axis.grid(axis="x")
    axis.tick_params(length=0)
    axis.spines["left"].set_visible(False)
    axis.set_xlabel("predicted unseen less profiled, % of the layer's mean time")
    return figure


def _colours(curves: list[dict[str, Any]], theme: Theme) -> dict[float, str]:
    """Input share -> colour, the same in all panels."""
    shares = {line["share"] for curve in curves for line in curve["lines"]}
    order = (theme.after, theme.second, theme.target, theme.before)
    return dict(zip(sorted(shares, reverse=True), order, strict=False))


def draw_curves(report: dict[str, Any], theme: Theme) -> Figure | None:
    """Latency of single layers over their output width: predicted lines, profiled points."""
    curves = report["curves"]
    if not curves:
        return None
    columns = min(2, len(curves))
    rows = -(-len(curves) // columns)
    figure, axes = new_figure(2.9 * rows, columns=columns, rows=rows)
    colours = _colours(curves, theme)
    for axis, curve in zip(axes, curves, strict=False):
        for line in curve["lines"]:
            several = len(curve["lines"]) > 1
            axis.plot(
                [width for width, _ in line["points"]],
                [ms for _, ms in line["points"]],
                color=colours[line["share"]],
                linewidth=1.4,
                label=f"input {line['share']:.0%}" if several else "predicted",
            )
        axis.scatter(
            [point["width"] for point in curve["profiled"]],
            [point["ms"] for point in curve["profiled"]],
            color=[colours[point["share"]] for point in curve["profiled"]],
            s=11,
            alpha=0.7,
            linewidths=0,
        )
        axis.set_title(shorten(curve["layer"], 36))
        axis.set_xlabel("output channels")
        axis.set_ylabel("ms")
        axis.set_ylim(bottom=0)
        axis.grid()
        axis.tick_params(length=0)
    for axis in axes[len(curves) :]:
        axis.set_axis_off()
    axes[0].legend(loc="upper left")
    return figure


LPNET_PICTURES: dict[str, Drawing] = {
    "held-out": (
        "Predicted against measured",
        "Held-out predictions over measured latency, with 90 % intervals.",
        draw_held_out,
    ),
    "coverage": (
        "Do the intervals keep their promise",
        "Share of measurements inside intervals of several levels.",
        draw_coverage,
    ),
    "layers": (
        "Errors of single layers",
        "For each layer, the spread of predicted less profiled time.",
        draw_layers,
    ),
    "curves": (
        "Latency of single layers over their width",
        "Predicted curves and profiled points of the layers that take longest.",
        draw_curves,
    ),
}
