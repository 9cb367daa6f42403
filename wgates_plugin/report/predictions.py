"""Pictures of predicted against measured latency."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from wgates_plugin.report.tables import milliseconds
from wgates_plugin.report.theme import Theme, new_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def draw_lpnet(report: dict[str, Any], theme: Theme) -> Figure | None:
    """Predicted against measured latency; the diagonal is a perfect prediction."""
    points = report["lpnet"]["predictions"] if report["lpnet"] else []
    if not points:
        return None
    figure, (axis,) = new_figure(5.4)
    low = draw_points(
        axis,
        points,
        (
            ("sampled", "sampled, predicted unseen", theme.after, "o"),
            ("visited", "visited by the search", theme.second, "D"),
        ),
        theme,
    )
    target = report["target_ms"]
    if target is not None and axis.get_xlim()[0] < target < axis.get_xlim()[1]:
        axis.axvline(target, color=theme.target, linestyle=(0, (5, 3)), linewidth=1.2)
        axis.annotate(
            f"target {milliseconds(target)}",
            (target, low),
            xytext=(5, 6),
            textcoords="offset points",
            color=theme.target,
            fontsize=9,
        )
    axis.legend(loc="upper left")
    return figure


def draw_points(
    axis: Axes,
    points: list[dict[str, Any]],
    sets: tuple[tuple[str, str, str, str], ...],
    theme: Theme,
) -> float:
    """Points of several sets, (name, label, colour, marker), with their intervals where known.

    Returns the lower end of both axes.
    """
    values = [point[key] for point in points for key in ("measured_ms", "predicted_ms")]
    low, high = min(values), max(values)
    gap = 0.06 * (high - low) or 0.1 * high
    ends = [max(0.0, low - gap), high + gap]
    axis.fill_between(
        ends,
        [0.9 * end for end in ends],
        [1.1 * end for end in ends],
        color=theme.grid,
        alpha=0.7,
        linewidth=0,
        label="within 10 %",
    )
    axis.plot(ends, ends, color=theme.faint, linewidth=1.2, label="perfect prediction")
    for name, label, colour, marker in sets:
        mine = [point for point in points if point["set"] == name]
        if not mine:
            continue
        known = [point for point in mine if point.get("low_ms") is not None]
        axis.vlines(
            [point["measured_ms"] for point in known],
            [point["low_ms"] for point in known],
            [point["high_ms"] for point in known],
            color=colour,
            linewidth=1.0,
            alpha=0.45,
        )
        axis.scatter(
            [point["measured_ms"] for point in mine],
            [point["predicted_ms"] for point in mine],
            s=30 if marker == "o" else 46,
            marker=marker,
            color=colour,
            edgecolors=theme.background,
            linewidths=0.6,
            label=f"{label} ({len(mine)})",
            zorder=3,
        )
    axis.set_xlim(*ends)
    axis.set_ylim(*ends)
    axis.grid()
    axis.tick_params(length=0)
    axis.set_xlabel("measured latency, ms")
    axis.set_ylabel("predicted latency, ms")
    return ends[0]
