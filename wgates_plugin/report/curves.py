"""The picture of the training: the strategy's own phase by step, accuracy by epoch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from wgates_plugin.report.theme import Theme, new_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


FEW_STEPS = 40
"""Up to as many are drawn as they are; more are smoothed."""

SHARES = {
    "open_share": "gates open",
    "dead_share": "gates out of reach",
    "mean_beta": "weight of the real feature maps",
    "width_share": "channels of the network drawn",
}
"""What a phase may note of a step as a share of all channels -> its label."""


def draw_training(report: dict[str, Any], theme: Theme) -> Figure | None:
    """What the strategy's own phase noted of its steps, and training accuracy epoch by epoch."""
    gates, epochs = report["gates"], report["training"]
    panels: list[Callable[[Axes], None]] = []
    if noted(gates, "loss"):
        panels.append(lambda axis: _curve(axis, gates, "loss", "Loss while deciding", theme))
    if noted(gates, "violation"):
        panels.append(lambda axis: _violation(axis, gates, theme))
    if any(noted(gates, key) for key in SHARES):
        panels.append(lambda axis: _shares(axis, gates, theme))
    if noted(epochs, "accuracy"):
        panels.append(lambda axis: _accuracy_by_epoch(axis, epochs, theme))
    if not panels:
        return None
    columns = min(2, len(panels))
    rows = -(-len(panels) // columns)
    figure, axes = new_figure(2.9 * rows, columns=columns, rows=rows)
    for axis, panel in zip(axes, panels, strict=False):
        panel(axis)
        axis.grid()
        axis.tick_params(length=0)
    for axis in axes[len(panels) :]:
        axis.set_axis_off()
    return figure


def noted(points: Sequence[dict[str, Any]], key: str) -> bool:
    return any(point.get(key) is not None for point in points)


def _series(points: list[dict[str, Any]], key: str) -> tuple[list[float], list[float]]:
    known = [point for point in points if point.get(key) is not None]
    return [point["step"] for point in known], [point[key] for point in known]


def _curve(axis: Axes, points: list[dict[str, Any]], key: str, title: str, theme: Theme) -> None:
    steps, values = _series(points, key)
    marker = "o" if len(values) == 1 else ""
    if len(values) > FEW_STEPS:
        axis.plot(steps, values, color=theme.after, linewidth=0.8, alpha=0.3)
        axis.plot(steps, smooth(values), color=theme.after, linewidth=1.8)
    else:
        axis.plot(steps, values, color=theme.after, linewidth=1.8, marker=marker)
    axis.set_title(title)
    axis.set_xlabel("step")


def smooth(values: Sequence[float], weight: float = 0.9) -> list[float]:
    """Exponential moving average without the pull of its start (Adam's correction)."""
    total, norm, out = 0.0, 0.0, []
    for value in values:
        total = weight * total + (1 - weight) * value
        norm = weight * norm + (1 - weight)
        out.append(total / norm)
    return out


def _violation(axis: Axes, gates: list[dict[str, Any]], theme: Theme) -> None:
    steps, values = _series(gates, "violation")
    scaled = [100 * value for value in values]
    axis.axhline(0, color=theme.target, linestyle=(0, (5, 3)), linewidth=1.4, label="target")
    axis.plot(
        steps, scaled, color=theme.after, linewidth=1.4, marker="o" if len(scaled) == 1 else ""
    )
    axis.set_title("Predicted cost over the target, %")
    axis.set_xlabel("step")
    axis.legend(loc="best")


def _shares(axis: Axes, gates: list[dict[str, Any]], theme: Theme) -> None:
    found = [key for key in SHARES if noted(gates, key)]
    for key, colour in zip(found, (theme.after, theme.target, theme.second), strict=False):
        steps, values = _series(gates, key)
        marker = "o" if len(values) == 1 else ""
        scaled = [100 * value for value in values]
        axis.plot(steps, scaled, color=colour, linewidth=1.8, label=SHARES[key], marker=marker)
    axis.set_ylim(-3, 103)
    axis.set_title("% of all channels")
    axis.set_xlabel("step")
    axis.legend(loc="best")


def _accuracy_by_epoch(axis: Axes, epochs: list[dict[str, Any]], theme: Theme) -> None:
    from matplotlib.ticker import MaxNLocator

    labels = list(dict.fromkeys(epoch["label"] for epoch in epochs))
    colours = [theme.after, theme.second, theme.target, theme.before]
    for number, label in enumerate(labels):
        mine = [
            (place + 1, 100 * epoch["accuracy"])
            for place, epoch in enumerate(epochs)
            if epoch["label"] == label and epoch.get("accuracy") is not None
        ]
        if mine:
            axis.plot(
                [place for place, _ in mine],
                [value for _, value in mine],
                marker="o",
                markersize=4,
                linewidth=1.8,
                color=colours[number % len(colours)],
                label=label,
            )
    axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    axis.set_title("Accuracy on training images, %")
    axis.set_xlabel("epoch")
    axis.legend(loc="best")
