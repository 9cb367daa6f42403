"""Colours and shapes that all pictures share, for light and for dark pages."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

WIDTH_INCHES = 9.0


@dataclass(frozen=True)
class Theme:
    """Colours. `before` and `after` mean the same in every picture; safe for colour-blind eyes."""

    name: str
    suffix: str
    background: str
    text: str
    faint: str
    grid: str
    before: str
    after: str
    second: str
    target: str


LIGHT = Theme(
    "light",
    "",
    "#ffffff",
    "#1f2733",
    "#5b6675",
    "#e4e8ee",
    "#a9b4c2",
    "#1668c7",
    "#0f8f76",
    "#d4500c",
)
DARK = Theme(
    "dark",
    "-dark",
    "#171c24",
    "#e6eaf0",
    "#9aa6b5",
    "#2b333f",
    "#66748a",
    "#5aa7ff",
    "#3fcaa9",
    "#ff9152",
)


def style(theme: Theme) -> dict[str, Any]:
    return {
        "font.family": "sans-serif",
        "font.size": 10,
        "text.color": theme.text,
        # Names come from outside; a dollar sign in one is no formula.
        "text.parse_math": False,
        "axes.titlesize": 11,
        "axes.titleweight": "bold",
        "axes.titlelocation": "left",
        "axes.titlepad": 10,
        "axes.labelcolor": theme.faint,
        "axes.edgecolor": theme.grid,
        "axes.facecolor": theme.background,
        "axes.axisbelow": True,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "xtick.color": theme.faint,
        "ytick.color": theme.faint,
        "grid.color": theme.grid,
        "figure.facecolor": theme.background,
        "legend.frameon": False,
        "legend.labelcolor": theme.text,
        "legend.fontsize": 9,
    }


def new_figure(height: float, columns: int = 1, rows: int = 1) -> tuple[Figure, list[Axes]]:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    engine = ConstrainedLayoutEngine(w_pad=0.12, h_pad=0.12, wspace=0.06, hspace=0.08)
    figure = Figure(figsize=(WIDTH_INCHES, height), layout=engine)
    FigureCanvasAgg(figure)
    axes = [figure.add_subplot(rows, columns, n + 1) for n in range(rows * columns)]
    return figure, axes
