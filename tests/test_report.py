"""The report: reading, wording, pictures and the page, on made-up runs."""

from __future__ import annotations

import base64
import copy
import io
import json
import re
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from wgates_plugin.errors import FileFormatError, MissingExtraError
from wgates_plugin.report import headline, load_report, summary_table, write_report
from wgates_plugin.report.curves import SHARES, draw_training, smooth
from wgates_plugin.report.page import render
from wgates_plugin.report.plots import save_images
from wgates_plugin.report.tables import comparison_rows
from wgates_plugin.report.theme import LIGHT

VOID = {"meta", "img", "source", "br", "link", "hr"}


def made_up(**changes: Any) -> dict[str, Any]:
    """A complete report of a run that never was."""
    state = {"latency": {}, "accuracy": 0.913, "parameters": 300_000}
    report: dict[str, Any] = {
        "kind": "wgates-report",
        "version": 1,
        "name": "ResNetSmall",
        "strategy": "wgates",
        "runtime": "onnxruntime",
        "device": "cpu",
        "identity": {"runtime": "onnxruntime", "threads": 1, "inputs": {"input_0": [1, 3, 32, 32]}},
        "target": {"latency_ms": 1.2, "macs": None, "parameters": None},
        "target_ms": 1.2,
        "contract": "held",
        "seed": 0,
        "baseline": {**state, "latency_ms": 2.4, "macs": 1.0e7, "file_bytes": 1_234_000},
        "final": {
            "latency": {},
            "latency_ms": 1.18,
            "accuracy": 0.91,
            "macs": 4.4e6,
            "parameters": 120_000,
            "file_bytes": 498_000,
        },
        "after_removal": {"accuracy": 0.55, "accuracy_recalibrated": 0.8},
        "seconds": {"baseline": 1.0, "gates": 80.0, "total": 81.0},
        "environment": {"cpu": "a CPU", "libraries": {"torch": "2.13.0"}},
        "grid": {"multiple": 16, "probed": True, "evidence": [[16, 0.1]]},
        "lpnet": {
            "structure": "layers",
            "samples": 9,
            "held_out": 2,
            "mape_held_out": 0.031,
            "within_10_percent": 1.0,
            "mape_visited": 0.02,
            "share_in_inference": 0.7,
            "predictions": [
                {"measured_ms": 1.1, "predicted_ms": 1.12, "set": "sampled"},
                {"measured_ms": 1.2, "predicted_ms": 1.19, "set": "visited"},
            ],
        },
        "widths": [
            {"group": "layer1.conv1", "dense": 64, "kept": 40},
            {"group": "layer1.conv2", "dense": 32, "kept": 32},
        ],
        "gates": [
            {"step": n, "loss": 0.4, "violation": 0.01, "open_share": 0.6, "dead_share": 0.0}
            for n in range(3)
        ],
        "training": [
            {"label": "gates", "epoch": 0, "loss": 0.3, "accuracy": 0.9, "seconds": 4.0},
            {"label": "fine-tune", "epoch": 1, "loss": 0.2, "accuracy": None, "seconds": 4.0},
        ],
        "attempts": [
            {"stage": "plan", "predicted_ms": 1.19, "measured_ms": 1.3, "verdict": "over"},
            {"stage": "delivery", "predicted_ms": None, "measured_ms": 1.18, "verdict": "held"},
        ],
        "masked_equals_removed": 3.1e-07,
        "settings": {"samples": 9, "options": {"spread": 0.3}},
    }
    report.update(changes)
    return report


def without_extras() -> dict[str, Any]:
    """As a run by MACs leaves it whose network needed no training."""
    return made_up(
        target={"latency_ms": None, "macs": 5.0e6, "parameters": None},
        target_ms=None,
        lpnet=None,
        gates=[],
        training=[],
        attempts=[],
        after_removal=None,
        grid=None,
        masked_equals_removed=None,
    )


def folder_with(report: dict[str, Any], folder: Path) -> Path:
    (folder / "report.json").write_text(json.dumps(report), encoding="utf-8")
    return folder


class Page(HTMLParser):
    """Checks nesting and collects what the tests ask about."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.attributes: list[tuple[str, str, str]] = []
        self.words: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.attributes += [(tag, name, value or "") for name, value in attrs]
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())


def page_of(report: dict[str, Any], folder: Path) -> Page:
    path = write_report(folder_with(report, folder))
    assert path == folder / "report.html"
    return Page(path.read_text(encoding="utf-8"))


def test_headline_says_before_after_target_and_verdict() -> None:
    assert headline(made_up()) == (
        "2.40 ms -> 1.18 ms on onnxruntime (cpu, 1 thread), target 1.20 ms: held; "
        "accuracy 91.3 % -> 91.0 %"
    )


def test_headline_without_latency_target_speaks_of_macs() -> None:
    assert headline(without_extras()).startswith(
        "10.0 M MACs -> 4.40 M MACs, target 5.00 M MACs: held"
    )


def test_a_missed_target_is_not_rounded_away() -> None:
    report = made_up(contract="missed")
    report["final"]["latency_ms"] = 1.2004
    assert "1.2004 ms" in headline(report)
    assert "target 1.2000 ms: missed" in headline(report)


def test_rows_have_changes_and_leave_out_what_nobody_took() -> None:
    report = made_up()
    report["baseline"]["file_bytes"] = report["final"]["file_bytes"] = None
    rows = {row.label: row for row in comparison_rows(report)}
    assert list(rows) == ["Latency", "Accuracy", "MACs", "Parameters"]
    assert rows["MACs"].change == "-56 %  (2.3x less)"
    assert rows["MACs"].better
    assert rows["Accuracy"].change == "-0.3 points"
    assert rows["Latency"].target == "≤ 1.20 ms"


def test_accuracy_is_judged_only_beyond_noise() -> None:
    report = made_up()
    report["final"]["accuracy"] = 0.88
    rows = {row.label: row for row in comparison_rows(report)}
    assert rows["Accuracy"].better is False
    assert {row.label: row for row in comparison_rows(made_up())}["Accuracy"].better is None


def test_summary_table_prints_and_takes_names_literally() -> None:
    stream = io.StringIO()
    Console(file=stream, width=120).print(summary_table(made_up(name="[red]net[/nothing]")))
    text = stream.getvalue()
    assert "[red]net[/nothing]" in text
    for piece in ("2.40 ms", "1.18 ms", "91.3 %", "4.40 M", "498 kB", "target held"):
        assert piece in text


def test_without_a_latency_target_the_verdict_is_about_counts(tmp_path: Path) -> None:
    stream = io.StringIO()
    Console(file=stream, width=120).print(summary_table(without_extras()))
    text = " ".join(stream.getvalue().split())
    assert "target held: MACs; latency for information on onnxruntime (cpu, 1 thread)" in text
    words = " ".join(page_of(without_extras(), tmp_path).words)
    assert "No latency was asked for" in words
    assert "The claimed latency" not in words


def test_load_names_every_missing_key(tmp_path: Path) -> None:
    report = made_up()
    del report["contract"], report["final"]["macs"], report["widths"][1]["kept"]
    del report["lpnet"]["predictions"]
    with pytest.raises(FileFormatError) as caught:
        load_report(folder_with(report, tmp_path))
    for key in ("contract", "final.macs", "widths[1].kept", "lpnet.predictions"):
        assert f"`{key}`" in str(caught.value)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"kind": "other"}, "no report"),
        ({"version": 2}, "version 2"),
        ({"contract": "perhaps"}, "`contract` is 'perhaps'"),
        ({"widths": 3}, "`widths` is int, expected a list"),
        ({"seed": True}, "`seed` is True, expected a whole number"),
        ({"baseline": None}, "`baseline` is NoneType, expected an object"),
    ],
)
def test_load_refuses_wrong_content(change: dict[str, Any], words: str, tmp_path: Path) -> None:
    with pytest.raises(FileFormatError, match=re.escape(words)):
        load_report(folder_with(made_up(**change), tmp_path))


def test_load_refuses_missing_and_cut_off_files(tmp_path: Path) -> None:
    with pytest.raises(FileFormatError, match="no such file"):
        load_report(tmp_path)
    (tmp_path / "report.json").write_text('{"kind": "wgates')
    with pytest.raises(FileFormatError, match="not readable as JSON"):
        load_report(tmp_path)


@pytest.mark.parametrize(
    ("noted", "titles", "lines", "caption"),
    [
        ({"violation": 0.01, "open_share": 0.6, "dead_share": 0.0}, 4, ["gates open"], True),
        ({"mean_beta": 0.5}, 3, ["weight of the real feature maps"], False),
        ({"width_share": 0.5}, 3, ["channels of the network drawn"], False),
        ({}, 2, [], False),
    ],
)
def test_only_what_a_strategy_noted_is_drawn_of_its_phase(
    tmp_path: Path, noted: dict[str, float], titles: int, lines: list[str], caption: bool
) -> None:
    report = made_up(gates=[{"step": n, "loss": 0.4, **noted} for n in range(3)])
    figure = draw_training(report, LIGHT)
    assert figure is not None
    axes = [axis for axis in figure.axes if axis.lines]
    assert len([axis for axis in axes if axis.axison]) == titles
    labels = [str(line.get_label()) for axis in axes for line in axis.lines]
    assert [label for label in labels if label in SHARES.values()][: len(lines)] == lines
    assert ("target" in labels) == ("violation" in noted)
    assert ("Out of reach" in page_of(report, tmp_path).text) == caption


def test_page_holds_everything_and_needs_nothing(tmp_path: Path) -> None:
    page = page_of(made_up(), tmp_path)
    for piece in (
        "2.40 ms → 1.18 ms",
        "Target held",
        "exported file",
        "over",
        "3.1 %",
        "deciding which channels go",
        "torch 2.13.0",
        "input_0 1x3x32x32",
        "options.spread",
        "layer1.conv1",
    ):
        assert piece in page.text
    sources = [value for _, name, value in page.attributes if name in ("src", "srcset", "href")]
    assert len(sources) == 8  # four pictures, each for light and dark
    for source in sources:
        head, _, data = source.partition(",")
        assert head == "data:image/png;base64"
        assert base64.b64decode(data).startswith(b"\x89PNG")
    names = sorted(path.name for path in (tmp_path / "pictures").iterdir())
    assert [name for name in names if "-dark" not in name] == [
        "lpnet.png",
        "summary.png",
        "training.png",
        "widths.png",
    ]


def test_page_without_lpnet_gates_and_training(tmp_path: Path) -> None:
    page = page_of(without_extras(), tmp_path)
    assert "How well latency was predicted" not in page.text
    assert "How it learned" not in page.text
    assert "Attempts" not in page.text
    names = {path.name for path in (tmp_path / "pictures").iterdir()}
    assert {"summary.png", "widths.png"} <= names
    assert not {"lpnet.png", "training.png"} & names


def test_page_of_a_network_without_accuracy_or_groups(tmp_path: Path) -> None:
    report = made_up(widths=[], seconds={}, environment={}, settings={}, contract="missed")
    report["baseline"]["accuracy"] = report["final"]["accuracy"] = None
    page = page_of(report, tmp_path)
    assert "Target missed" in page.text
    assert "accuracy" not in headline(report)


def test_names_are_escaped_everywhere(tmp_path: Path) -> None:
    evil = "<script>alert('$x^2$')</script>&\""
    report = made_up(name=evil)
    report["widths"][0]["group"] = evil
    report["attempts"][0]["verdict"] = evil
    report["settings"] = {evil: evil}
    report["environment"] = {evil: {evil: evil}}
    page = page_of(report, tmp_path)
    assert not [tag for tag, _, _ in page.attributes if tag == "script"]
    text = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "<script" not in text
    assert evil in page.text


def test_page_without_matplotlib_says_how_to_get_pictures(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    page = page_of(made_up(), tmp_path)
    assert (
        str(MissingExtraError("matplotlib", "plots", "x")).split("install it with: ")[1]
        in page.text
    )
    assert not [tag for tag, _, _ in page.attributes if tag == "img"]


def test_writing_a_report_changes_neither_report_nor_matplotlib(tmp_path: Path) -> None:
    matplotlib = pytest.importorskip("matplotlib")
    before = copy.deepcopy(dict(matplotlib.rcParams))
    folder_with(made_up(), tmp_path)
    content = (tmp_path / "report.json").read_bytes()
    write_report(tmp_path)
    assert (tmp_path / "report.json").read_bytes() == content
    assert dict(matplotlib.rcParams) == before


def test_moving_average_starts_at_the_first_value() -> None:
    assert smooth([3.0, 3.0, 3.0]) == pytest.approx([3.0, 3.0, 3.0])
    assert smooth([0.0, 1.0], weight=0.5)[1] == pytest.approx(2 / 3)


def test_what_the_strategy_saw_is_shown(tmp_path: Path) -> None:
    """Its pictures from their files, inside the page; a file that is gone leaves the rest."""
    pytest.importorskip("matplotlib")
    folder = tmp_path / "pictures"
    image = np.zeros((4, 6, 3), dtype=np.uint8)
    files = save_images({"conv1: patterns": image, "gone": image}, folder)
    (folder / files[1]).unlink()
    pictures = [{"name": "conv1: patterns", "file": files[0]}, {"name": "gone", "file": files[1]}]
    report = made_up(
        decision={"facts": {"clusters": {"conv1": 7}}, "pictures": pictures},
        strategy="functionality",
    )
    page = render(report, [], folder=folder)
    assert "What functionality saw" in page
    assert base64.b64encode((folder / files[0]).read_bytes()).decode() in page
    assert "<figcaption>conv1: patterns" in page
    assert "<figcaption>gone" not in page
    assert "clusters.conv1" in page
