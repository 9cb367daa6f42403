"""The page of a fit: how good an LPNet is, layer by layer, and what it was measured on."""

from __future__ import annotations

from collections.abc import Mapping
from html import escape
from pathlib import Path
from typing import Any

from wgates_plugin.efficiency.lpnet import LPNet
from wgates_plugin.efficiency.samples.file import SampleFile
from wgates_plugin.efficiency.sampling import SamplingCost
from wgates_plugin.errors import MissingExtraError
from wgates_plugin.files import write_json, write_text
from wgates_plugin.report import blocks
from wgates_plugin.report.lpnet_contents import contents
from wgates_plugin.report.lpnet_plots import LPNET_PICTURES
from wgates_plugin.report.page import filled, image
from wgates_plugin.report.plots import Picture, draw_pictures
from wgates_plugin.report.tables import NOTHING, milliseconds, percent

CAPTIONS = {
    "held-out": "Each network as predicted by a fit on the other four fifths of the measurements. "
    "Vertical lines are 90 % intervals.",
    "coverage": "Intervals are made without the fifth that they are tried on.",
    "layers": "Each layer's share of the time stands behind its name. Bar: the middle half; line: "
    "nine tenths; dot: the median.",
    "curves": "Lines: predicted, all other widths full and the input at the share named. Points: "
    "the profiles of the sampled networks, in the colour of the nearest input share.",
}


def write_lpnet_report(
    folder: str | Path,
    lpnet: LPNet,
    file: SampleFile,
    *,
    name: str,
    identity: Mapping[str, Any],
    cost: SamplingCost | None = None,
) -> Path:
    """Write `lpnet.html`, `lpnet.json` and `pictures/*.png` into `folder`; returns the page's path.

    Without matplotlib the page is written without pictures and says so.

    Args:
        file: the samples that `lpnet` was fitted to. identity: of the runtime they were taken on.
        cost: of the sampling, where it was done just now.
    """
    folder = Path(folder)
    report = contents(lpnet, file, name=name, identity=identity, cost=cost)
    write_json(folder / "lpnet.json", report)
    pictures: list[Picture] = []
    note = None
    try:
        pictures = draw_pictures(report, folder / "pictures", LPNET_PICTURES)
    except MissingExtraError as error:
        note = str(error)
    path = folder / "lpnet.html"
    write_text(path, render_lpnet(report, pictures, note=note))
    return path


def render_lpnet(
    report: dict[str, Any], pictures: list[Picture], *, note: str | None = None
) -> str:
    """The page's HTML. `note` says why there are no pictures."""
    missing = "" if note is None else blocks.section("Pictures", f"<p>{escape(note)}</p>")
    drawn = [
        blocks.section(picture.title, image(picture, CAPTIONS.get(picture.name)))
        for picture in pictures
    ]
    unprofiled = ""
    if not report["profiled"]:
        unprofiled = blocks.section(
            "Single layers",
            "<p>The measurements came without a profile of the layers: there is nothing to show "
            "of single layers, and more measurements are needed for the same error.</p>",
        )
    identity, errors = report["identity"], report["errors"] or {}
    threads = identity.get("threads")
    where = f"{identity.get('runtime', '')} ({identity.get('device', 'cpu')}, threads: {threads})"
    return filled(
        title=f"LPNet of {report['name']}",
        mood="good",
        verdict="LPNet fitted",
        headline=f"Latency of {report['name']} on {where}: off by "
        f"{percent(errors.get('mape'))} on average on networks it had not seen",
        parts=[
            blocks.section("Figures", _figures(report, errors)),
            missing,
            *drawn,
            unprofiled,
            blocks.section("Where the samples come from", _sources(report)),
            blocks.section(
                "Measured on",
                blocks.facts(
                    (key.replace("_", " "), blocks.words(value))
                    for key, value in {**report["environment"], **identity}.items()
                    if value not in (None, "", {}, [])
                ),
            ),
        ],
        footer="Errors and intervals come from five-fold cross-validation. A sample is timed "
        "interleaved with a reference network, itself timed against the untouched one.",
    )


def _figures(report: dict[str, Any], errors: dict[str, Any]) -> str:
    rows = [
        ("structure", report["structure"]),
        ("measured sub-networks", str(errors.get("samples", NOTHING))),
        ("of these with a profile of their layers", str(report["profiled"])),
        ("mean error, held out", percent(errors.get("mape"))),
        ("held out within 10 %", percent(errors.get("within_10_percent"), 0)),
        ("largest error, held out", percent(errors.get("worst"))),
        ("90 % interval, half width", percent(errors.get("half_width_90"))),
        ("samples set aside (another environment)", str(report["set_aside"])),
        ("measurements taken again", str(report["measured_again"])),
        ("sampling time inside inference", percent(report["share_in_inference"], 0)),
    ]
    return blocks.facts(row for row in rows if row[1] != NOTHING)


def _sources(report: dict[str, Any]) -> str:
    rows = [
        (
            str(source["id"]),
            source["worker"],
            str(source["device_name"]),
            "yes" if source["used"] else "set aside",
            source["reference"],
            milliseconds(source["reference_ms"]),
            str(source["samples"]),
        )
        for source in report["sources"]
    ]
    heads = ("", "worker", "device", "used", "reference", "its latency", "samples")
    return blocks.table(heads, rows, numbers=2) if rows else ""
