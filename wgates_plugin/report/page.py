"""The page of a run: one HTML file that needs nothing else, readable in light and dark."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from html import escape
from pathlib import Path
from string import Template
from typing import Any

from wgates_plugin.errors import MissingExtraError
from wgates_plugin.files import write_text
from wgates_plugin.report import blocks
from wgates_plugin.report.contents import load_report
from wgates_plugin.report.curves import FEW_STEPS, noted
from wgates_plugin.report.plots import Picture, draw_pictures
from wgates_plugin.report.tables import headline, targets_of

CAPTIONS = {
    "summary": "Statistics renewed: BatchNorm means and variances were taken again after the "
    "channels were removed, before any further training.",
    "lpnet": "Sampled networks were measured before the search and are shown as predicted unseen, "
    "by cross-validation; visited ones are those that the search came by. Vertical lines are 90 % "
    "intervals. Error figures are in the table below.",
}
OUT_OF_REACH = (
    "Out of reach: gates so far from their threshold that hardly any gradient gets through."
)
SMOOTHED = "Pale lines are single steps, strong lines their moving average."


def write_report(run_folder: str | Path) -> Path:
    """Draw `pictures/*.png` and write `report.html` from `report.json`; returns the page's path.

    Without matplotlib the page is written without pictures and says so.

    Raises:
        FileFormatError: report.json is missing or incomplete.
    """
    folder = Path(run_folder)
    report = load_report(folder)
    pictures: list[Picture] = []
    note = None
    try:
        pictures = draw_pictures(report, folder / "pictures")
    except MissingExtraError as error:
        note = str(error)
    path = folder / "report.html"
    write_text(path, render(report, pictures, note=note, folder=folder / "pictures"))
    return path


def render(
    report: dict[str, Any],
    pictures: list[Picture],
    *,
    note: str | None = None,
    folder: Path | None = None,
) -> str:
    """The page's HTML. `note` says why there are no pictures; `folder` has the strategy's own."""
    held = report["contract"] == "held"
    drawn = {picture.name: _figure(picture, report) for picture in pictures}
    missing = "" if note is None else blocks.section("Pictures", f"<p>{escape(note)}</p>")
    parts = [
        blocks.section("Figures", blocks.comparison(report) + drawn.pop("summary", "")),
        missing,
        *drawn.values(),
        _strategy(report, folder),
        blocks.pair(
            blocks.section("How well latency was predicted, in figures", blocks.lpnet(report)),
            blocks.section("Attempts", blocks.attempts(report)),
        ),
        blocks.pair(
            blocks.section("Where the time went", blocks.seconds(report)),
            blocks.section("Measured on", blocks.environment(report)),
        ),
        blocks.folded("All settings", blocks.settings(report)),
        blocks.folded("Channels by group", blocks.widths(report)),
    ]
    return filled(
        title=report["name"],
        mood="good" if held else "bad",
        verdict="Target held" if held else "Target missed",
        headline=headline(report, arrow="→"),
        parts=parts,
        footer=f"Strategy {report['strategy']}, seed {report['seed']}. {_latency_note(report)}",
    )


def _latency_note(report: dict[str, Any]) -> str:
    if "latency_ms" in targets_of(report):
        return (
            "The claimed latency was measured on the exported file, interleaved with the untouched "
            "network."
        )
    return "No latency was asked for; the one shown is for information."


def _strategy(report: dict[str, Any], folder: Path | None) -> str:
    """What the strategy has to show of its own."""
    decision = report.get("decision") or {}
    parts = []
    for picture in decision.get("pictures", []):
        path = None if folder is None else folder / Path(picture["file"]).name
        if path is not None and path.is_file():
            name = escape(picture["name"], quote=True)
            parts.append(
                f'<figure><img class="pixels" src="{_data_uri(path)}" alt="{name}">'
                f"<figcaption>{name}</figcaption></figure>"
            )
    title = f"What {report['strategy']} saw"
    shown = blocks.section(title, "".join(parts)) if parts else ""
    return shown + blocks.folded(f"{title}, in figures", blocks.nested(decision.get("facts", {})))


def filled(
    *, title: str, mood: str, verdict: str, headline: str, parts: Sequence[str], footer: str
) -> str:
    """A whole page; `parts` are HTML, all else is escaped. `mood` is "good" or "bad"."""
    template = Template(Path(__file__).with_name("page.html").read_text(encoding="utf-8"))
    return template.substitute(
        title=escape(title),
        mood=mood,
        verdict=escape(verdict),
        headline=escape(headline),
        body="\n".join(part for part in parts if part),
        footer=escape(footer),
    )


def _figure(picture: Picture, report: dict[str, Any]) -> str:
    caption = CAPTIONS.get(picture.name)
    if picture.name == "summary" and not report["after_removal"]:
        caption = None
    if picture.name == "training":
        caption = _of_training(report["gates"])
    inside = image(picture, caption)
    return inside if picture.name == "summary" else blocks.section(picture.title, inside)


def _of_training(gates: Sequence[dict[str, Any]]) -> str | None:
    words = [OUT_OF_REACH] if noted(gates, "dead_share") else []
    words += [SMOOTHED] if len(gates) > FEW_STEPS else []
    return " ".join(words) or None


def image(picture: Picture, caption: str | None = None) -> str:
    """The picture as HTML, light or dark as the page is, with all its bytes inside."""
    alternative = escape(picture.description, quote=True)
    inside = (
        '<div class="picture"><picture><source media="(prefers-color-scheme: dark)" '
        f'srcset="{_data_uri(picture.dark)}">'
        f'<img src="{_data_uri(picture.light)}" alt="{alternative}"></picture></div>'
    )
    return inside + (f'<p class="note">{escape(caption)}</p>' if caption else "")


def _data_uri(path: Path) -> str:
    return "data:image/png;base64," + base64.b64encode(path.read_bytes()).decode("ascii")
