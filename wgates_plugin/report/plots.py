"""The pictures of a report: what was won, what was removed, what was predicted."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from wgates_plugin.errors import MissingExtraError
from wgates_plugin.files import atomic_path
from wgates_plugin.report.curves import draw_training
from wgates_plugin.report.names import shorten
from wgates_plugin.report.predictions import draw_lpnet
from wgates_plugin.report.tables import count, milliseconds, targets_of
from wgates_plugin.report.theme import DARK, LIGHT, Theme, new_figure, style

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

DPI = 150


@dataclass(frozen=True)
class Picture:
    """A drawn picture: its files for light and dark pages, and words for those who cannot see it."""

    name: str
    title: str
    description: str
    light: Path
    dark: Path


Drawing = tuple[str, str, Callable[[dict[str, Any], Theme], Any]]
"""Title, description, and what draws it: a figure, or None where there is no data."""


def draw_pictures(
    report: dict[str, Any], folder: Path, drawings: Mapping[str, Drawing] | None = None
) -> list[Picture]:
    """Draw what the report has data for into `folder`/*.png; by default the pictures of a run.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    try:
        import matplotlib.figure
    except ImportError as error:
        raise MissingExtraError("matplotlib", "plots", "drawing the report's pictures") from error
    pictures = []
    for name, (title, description, draw) in (drawings or PICTURES).items():
        files = {}
        for theme in (LIGHT, DARK):
            with matplotlib.rc_context(style(theme)):
                figure = draw(report, theme)
                if figure is None:
                    break
                path = folder / f"{name}{theme.suffix}.png"
                with atomic_path(path) as part:
                    figure.savefig(part, format="png", dpi=DPI)
                files[theme.name] = path
        if len(files) == 2:
            pictures.append(Picture(name, title, description, files["light"], files["dark"]))
    return pictures


def save_images(images: Mapping[str, Any], folder: Path) -> list[str]:
    """Write images (H, W, 3) uint8 as `folder`/NAME.png; returns the names of the files.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    try:
        import matplotlib.image
    except ImportError as error:
        raise MissingExtraError("matplotlib", "plots", "writing the strategy's pictures") from error
    names = []
    for name, image in images.items():
        names.append(f"strategy-{''.join(c if c.isalnum() else '-' for c in name)}.png")
        with atomic_path(folder / names[-1]) as part:
            matplotlib.image.imsave(part, image, format="png")
    return names


def draw_summary(report: dict[str, Any], theme: Theme) -> Figure | None:
    """Each targeted cost before and after with its target line; accuracy at every station."""
    before, after, target = report["baseline"], report["final"], targets_of(report)
    panels: list[tuple[str, str, Callable[[float], str], float]] = [
        ("latency_ms", "Latency, ms per inference", milliseconds, 1.0),
        ("macs", "MACs per image, millions", count, 1e6),
        ("parameters", "Parameters, thousands", count, 1e3),
    ]
    shown = [
        panel
        for panel in panels
        if before[panel[0]] is not None
        and after[panel[0]] is not None
        and (panel[0] in target or panel[0] == "latency_ms")
    ]
    stations = _accuracy_stations(report)
    total = len(shown) + bool(stations)
    if not total:
        return None
    columns = 2 if total == 4 else total
    figure, axes = new_figure(3.4 * (total // columns), columns=columns, rows=total // columns)
    for axis, (key, title, text, scale) in zip(axes, shown, strict=False):
        values = [before[key] / scale, after[key] / scale]
        words = [text(before[key]), text(after[key])]
        # The bar's own end is where the target line runs, so the figures stand below.
        names = [f"{name}\n{word}" for name, word in zip(("before", "after"), words, strict=True)]
        _bars(axis, names, values, ["", ""], [theme.before, theme.after], theme)
        axis.set_title(title)
        limit = target.get(key)
        if limit is not None:
            axis.axhline(limit / scale, color=theme.target, linestyle=(0, (5, 3)), linewidth=1.6)
            axis.set_xlim(-0.6, 2.35)
            axis.text(
                2.33,
                limit / scale,
                f"target\n{text(limit)}",
                color=theme.target,
                ha="right",
                va="center",
                linespacing=1.5,
                fontsize=9,
                bbox={"facecolor": theme.background, "edgecolor": "none", "pad": 3},
            )
            axis.set_ylim(0, 1.08 * max([*values, limit / scale]))
    if stations:
        names, values = [name for name, _ in stations], [100 * value for _, value in stations]
        colours = [theme.before] * (len(values) - 1) + [theme.after]
        _bars(axes[-1], names, values, [f"{value:.1f}" for value in values], colours, theme)
        axes[-1].set_title("Accuracy, %")
        axes[-1].set_ylim(0, 115)
        axes[-1].set_yticks([0, 25, 50, 75, 100])
        if columns == 3:
            axes[-1].tick_params(axis="x", labelsize=7.5)
    return figure


def _accuracy_stations(report: dict[str, Any]) -> list[tuple[str, float]]:
    removal = report["after_removal"] or {}
    stations = [
        ("before", report["baseline"]["accuracy"]),
        ("channels\nremoved", removal.get("accuracy")),
        ("statistics\nrenewed", removal.get("accuracy_recalibrated")),
        ("after", report["final"]["accuracy"]),
    ]
    if stations[0][1] is None or stations[-1][1] is None:
        return []
    return [(name, value) for name, value in stations if value is not None]


def _bars(
    axis: Axes,
    names: Sequence[str],
    values: Sequence[float],
    words: Sequence[str],
    colours: Sequence[str],
    theme: Theme,
) -> None:
    places = range(len(values))
    axis.bar(places, values, width=0.62, color=colours)
    axis.set_xticks(list(places), names, color=theme.text)
    axis.tick_params(axis="x", length=0)
    axis.tick_params(axis="y", length=0)
    axis.grid(axis="y")
    axis.set_ylim(0, 1.18 * max(max(values), 1e-12))
    axis.spines["left"].set_visible(False)
    for place, value, word in zip(places, values, words, strict=True):
        axis.annotate(
            word,
            (place, value),
            xytext=(0, 4),
            textcoords="offset points",
            ha="center",
            fontweight="bold",
            zorder=5,
            bbox={"facecolor": theme.background, "edgecolor": "none", "pad": 1, "alpha": 0.85},
        )


def draw_widths(report: dict[str, Any], theme: Theme) -> Figure | None:
    """Dense and kept channels of every group, in the order of the network."""
    from matplotlib.patches import Patch

    rows = report["widths"]
    if not rows:
        return None
    row_inches = 0.24 if len(rows) > 12 else 0.32
    figure, (axis,) = new_figure(1.25 + row_inches * len(rows))
    places = list(range(len(rows)))
    dense, kept = [row["dense"] for row in rows], [row["kept"] for row in rows]
    axis.barh(places, dense, height=0.72, color=theme.grid)
    axis.barh(places, kept, height=0.72, color=theme.after)
    longest = max(dense)
    for place, row in zip(places, rows, strict=True):
        axis.annotate(
            f"{row['kept']} of {row['dense']}",
            (row["dense"], place),
            xytext=(5, 0),
            textcoords="offset points",
            va="center",
            fontsize=8,
            color=theme.faint,
        )
    axis.set_yticks(places, [shorten(row["group"]) for row in rows], fontsize=8.5, color=theme.text)
    axis.set_ylim(len(rows) - 0.4, -0.6)
    axis.set_xlim(0, longest * 1.14)
    axis.tick_params(length=0)
    axis.grid(axis="x")
    axis.spines["left"].set_visible(False)
    axis.set_xlabel("channels")
    handles = [Patch(color=theme.after, label="kept"), Patch(color=theme.grid, label="removed")]
    figure.legend(handles=handles, loc="outside upper right", ncols=2)
    return figure


PICTURES: dict[str, Drawing] = {
    "summary": (
        "Before and after",
        "Bars of latency and accuracy before and after pruning, with the target.",
        draw_summary,
    ),
    "widths": (
        "Channels kept",
        "Horizontal bars of kept and removed channels for each channel group.",
        draw_widths,
    ),
    "lpnet": (
        "How well latency was predicted",
        "Predicted over measured latency of sampled and visited networks, with 90 % intervals.",
        draw_lpnet,
    ),
    "training": (
        "How it learned",
        "Loss, excess over the target and share of open gates by step; accuracy by epoch.",
        draw_training,
    ),
}
