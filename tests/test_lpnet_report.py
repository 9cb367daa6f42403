"""The page of a fit: what it says is what was measured, and it needs nothing else."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from fake_bench import IDENTITY, staircase_ms, steady_bench
from networks import example, tiny

from wgates_plugin import ChannelSpace, trace
from wgates_plugin.efficiency.learner import Learner
from wgates_plugin.efficiency.lpnet import LPNet, weighted_names
from wgates_plugin.efficiency.samples.file import SampleFile
from wgates_plugin.efficiency.sampling import collect
from wgates_plugin.report.lpnet_contents import contents
from wgates_plugin.report.lpnet_page import write_lpnet_report


def profiled(space: ChannelSpace, file: SampleFile) -> list[dict[str, float]]:
    """A profile in which layer number k takes 1, 2, 3, ... parts of the whole."""
    names = weighted_names(space)
    total = sum(range(1, len(names) + 1))
    return [
        {name: ms * (k + 1) / total for k, name in enumerate(names)} for ms in file.latencies_ms
    ]


@pytest.fixture(scope="module")
def space() -> ChannelSpace:
    return trace(tiny("residual"), example())


@pytest.fixture(scope="module")
def file(space: ChannelSpace, tmp_path_factory: pytest.TempPathFactory) -> SampleFile:
    path = tmp_path_factory.mktemp("samples") / "samples.jsonl"
    made = SampleFile.open(path, space, IDENTITY)
    collect(made, space, steady_bench(space), count=14, grid=1, seed=0, seconds_per_sample=0.0)
    return made


@pytest.fixture(scope="module")
def lpnet(space: ChannelSpace, file: SampleFile) -> LPNet:
    return LPNet.fit(space, file.widths, file.latencies_ms, layers_ms=profiled(space, file), seed=0)


def test_contents_agree_with_the_lpnet(space: ChannelSpace, file: SampleFile, lpnet: LPNet) -> None:
    found = contents(lpnet, file, name="tiny", identity=IDENTITY)
    assert lpnet.report is not None
    rows = found["held_out"]
    errors = [abs(row["predicted_ms"] / row["measured_ms"] - 1.0) for row in rows]
    assert sum(errors) / len(errors) == pytest.approx(lpnet.report.mape)
    assert sorted(row["measured_ms"] for row in rows) == pytest.approx(sorted(file.latencies_ms))
    assert all(row["low_ms"] < row["predicted_ms"] < row["high_ms"] for row in rows)
    assert [row["layer"] for row in found["layers"]] == weighted_names(space)
    assert sum(row["share"] for row in found["layers"]) == pytest.approx(1.0)
    assert found["sources"][0]["samples"] == len(file) == found["errors"]["samples"]
    json.dumps(found, allow_nan=False)


def test_curves_are_the_predictions(space: ChannelSpace, file: SampleFile, lpnet: LPNet) -> None:
    for curve in contents(lpnet, file, name="tiny", identity=IDENTITY)["curves"]:
        group = next(i for i, g in enumerate(space.groups) if g.name == curve["group"])
        layer = weighted_names(space).index(curve["layer"])
        widest = torch.tensor(space.full_widths, dtype=torch.float64)
        width, ms = curve["lines"][0]["points"][-1]
        assert width == space.full_widths[group]
        assert ms == pytest.approx(float(lpnet.profile_ms(widest)[layer]))


def test_coverage_grows_with_the_level(lpnet: LPNet) -> None:
    found = [lpnet.held_out.covered(level) for level in (0.1, 0.5, 0.9)]
    assert found == sorted(found)
    assert 0.0 <= found[0] < found[-1] <= 1.0


def test_the_page_needs_nothing_else(file: SampleFile, lpnet: LPNet, tmp_path: Path) -> None:
    page = write_lpnet_report(tmp_path, lpnet, file, name="<tiny>", identity=IDENTITY)
    html = page.read_text(encoding="utf-8")
    assert "&lt;tiny&gt;" in html
    assert "<tiny>" not in html
    assert "http" not in html.replace("http://www.w3.org", "")
    for name in ("held-out", "coverage", "layers", "curves"):
        assert (tmp_path / "pictures" / f"{name}.png").is_file()
    assert html.count("data:image/png;base64,") == 8
    assert json.loads((tmp_path / "lpnet.json").read_text())["kind"] == "wgates-lpnet-report"


def test_without_profiles_and_matplotlib_it_says_so(
    space: ChannelSpace, file: SampleFile, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    plain = LPNet.fit(space, file.widths, file.latencies_ms, structure="mlp", seed=0)
    page = write_lpnet_report(tmp_path, plain, file, name="tiny", identity=IDENTITY)
    html = page.read_text(encoding="utf-8")
    assert "nothing to show of single layers" in html
    assert "wgates-plugin[plots]" in html


def test_eight_measurements_make_a_page_without_intervals(
    space: ChannelSpace, tmp_path: Path
) -> None:
    """Nine are needed to promise 90 %."""
    few = SampleFile.open(tmp_path / "few.jsonl", space, IDENTITY)
    collect(few, space, steady_bench(space), count=8, grid=1, seed=0, seconds_per_sample=0.0)
    lpnet = LPNet.fit(space, few.widths, few.latencies_ms, seed=0)
    found = contents(lpnet, few, name="tiny", identity=IDENTITY)
    assert [point["low_ms"] for point in found["held_out"]] == [None] * 8
    assert write_lpnet_report(tmp_path, lpnet, few, name="tiny", identity=IDENTITY).is_file()


def test_the_learner_is_asked_after_the_covering_part(space: ChannelSpace, tmp_path: Path) -> None:
    made = SampleFile.open(tmp_path / "samples.jsonl", space, IDENTITY)
    learner = Learner(space, seed=0)
    active = learner.active(covering=10)
    seen: list[bool] = []
    collect(
        made, space, steady_bench(space), count=20, grid=1, seed=0, seconds_per_sample=0.0,
        active=active, on_sample=lambda *_: seen.append(learner.lpnet is not None),
    )  # fmt: skip
    assert seen == [False] * 10 + [True] * 10
    assert learner.lpnet is not None
    full = LPNet.fit(space, made.widths, made.latencies_ms, seed=0)
    rows = torch.tensor([space.full_widths], dtype=torch.float64)
    expected = staircase_ms(space, space.full_widths)
    assert float(full(rows)) == pytest.approx(expected, rel=0.2)
    assert learner.spread(rows).shape == (1,)
