"""The benchmark of equal MACs and its picture, on tiny networks and made-up records; nothing is timed."""

from __future__ import annotations

import xml.etree.ElementTree as ElementTree
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from torch import nn

from benchmarks import not_faster
from benchmarks.not_faster import DENSE, ON_GRID, OURS, RIVAL, ROUNDED, WAYS, Contestant
from benchmarks.report import pictures, scoreboard, tables
from benchmarks.tools.interleave import compare
from benchmarks.tools.records import read_record, write_record
from tests import networks
from wgates_plugin.channels import ChannelSpace
from wgates_plugin.efficiency.counts import MacsModel
from wgates_plugin.errors import InfeasibleTargetError, MissingExtraError
from wgates_plugin.latency import get_runtime
from wgates_plugin.report.theme import LIGHT
from wgates_plugin.tracing import trace

CLAIM = "speed_at_equal_macs_vs_torch_pruning/mobilenet_v2/onnxruntime"


def wide() -> nn.Module:
    """A plain network wide enough for a grid to leave a choice."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 64, 3, padding=1),
        nn.BatchNorm2d(64),
        nn.ReLU(),
        nn.Conv2d(64, 128, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(128, 128, 1),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(128, 10),
    ).eval()


def versions() -> dict[str, Contestant]:
    macs = {DENSE: 100.0, RIVAL: 50.0, "torch_pruning_8": 45.0, "torch_pruning_16": 46.0}
    return {
        way: Contestant(nn.Identity(), count, int(count))
        for way, count in {**macs, ON_GRID: 49.9, OURS: 49.5}.items()
    }


def made_up(*, rival: float = 1.2) -> dict[str, Any]:
    """Numbers of one network and runtime: the rival `rival` times dense, ours at half of dense."""
    seconds = {
        DENSE: [0.010, 0.020, 0.010],
        RIVAL: [0.010 * rival, 0.020 * rival, 0.010 * rival],
        **{way: [0.004, 0.008, 0.004] for way in ROUNDED},
        ON_GRID: [0.006, 0.012, 0.006],
        OURS: [0.005, 0.010, 0.005],
    }
    errors = dict.fromkeys(WAYS, 1e-7)
    return not_faster.numbers_of(seconds, versions(), errors, grid=16)


def store(folder: Path, numbers: Any) -> None:
    write_record(folder, "not_faster", claim="c", settings={}, seed=0, numbers=numbers, samples={})


def test_numbers_pair_rounds_and_say_what_is_slower() -> None:
    found = made_up(rival=1.2)
    assert found["speed_ratio"] == pytest.approx(2.4)
    assert found["ways"][RIVAL]["ratio"] == pytest.approx(1.2)
    assert found["ways"][RIVAL]["slower_than_dense"]
    assert not found["ways"][OURS]["slower_than_dense"]
    assert found["ways"][OURS]["macs_share"] == pytest.approx(0.495)
    assert found["macs_of_rival"] == pytest.approx(0.99)
    assert found["speed_ratio_over_rounded"] == pytest.approx(dict.fromkeys(ROUNDED, 0.8))
    assert found["dense_ms"] == pytest.approx(10.0)
    assert not made_up(rival=1.0)["ways"][RIVAL]["slower_than_dense"]


def test_torch_pruning_removes_a_share_and_rounds_down() -> None:
    network, example = wide(), networks.example(batch=1)
    as_shipped = not_faster.pruned_uniformly(network, example)
    rounded = not_faster.pruned_uniformly(network, example, round_to=16)
    convolutions = [
        [m.out_channels for m in each.modules() if isinstance(m, nn.Conv2d)]
        for each in (network, as_shipped, rounded)
    ]
    assert convolutions[0] == [64, 128, 128]
    assert convolutions[1] == [44, 89, 89]
    assert convolutions[2] == [32, 80, 80]
    assert as_shipped(example).shape == (1, 10)


def test_torch_prunings_settings_do_not_leak() -> None:
    network, example = wide(), networks.example(batch=1)
    first = not_faster.pruned_uniformly(network, example).state_dict()
    not_faster.pruned_uniformly(networks.tiny("grouped"), example)
    second = not_faster.pruned_uniformly(network, example).state_dict()
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_macs_of_a_pruned_network_are_recounted() -> None:
    """Against a count from the convolutions' own shapes."""
    example = networks.example(batch=1)
    smaller = not_faster.pruned_uniformly(wide(), example)
    counted = 0

    def count(layer: nn.Module, _: Any, output: torch.Tensor) -> None:
        nonlocal counted
        weight = cast(torch.Tensor, layer.weight)
        counted += weight.numel() * output[0, 0].numel()

    hooks = [
        m.register_forward_hook(count)
        for m in smaller.modules()
        if isinstance(m, (nn.Conv2d, nn.Linear))
    ]
    smaller(example)
    for hook in hooks:
        hook.remove()
    assert not_faster.macs_of(smaller, example) == counted


def test_ours_has_the_rivals_macs_on_the_grid() -> None:
    network, example = wide(), networks.example(batch=1)
    macs = not_faster.macs_of(not_faster.pruned_uniformly(network, example), example)
    smaller = not_faster.ours_at_macs(network, example, macs, 4)
    assert not_faster.LEAST_MACS * macs <= not_faster.macs_of(smaller, example) <= macs
    widths = [m.out_channels for m in smaller.modules() if isinstance(m, nn.Conv2d)]
    assert all(width % 4 == 0 for width in widths)
    assert [m.out_channels for m in network.modules() if isinstance(m, nn.Conv2d)] == [64, 128, 128]


def test_lpnet_picks_the_fastest_of_these_macs() -> None:
    """A predictor for which the last layer's channels cost ten times the others'."""
    network, example = wide(), networks.example(batch=1)
    space = trace(network, example)
    macs = 0.5 * not_faster.macs_of(network, example)
    scores = torch.ones(space.total_units)

    class Costly:
        name, unit, fingerprint = "latency", "ms", space.fingerprint

        def __call__(self, widths: torch.Tensor) -> torch.Tensor:
            return MacsModel(space)(widths) / 1e6 + widths[..., -1]

    model = Costly()
    chosen = not_faster.fastest_at_macs(space, scores, macs, 4, cast(Any, model))
    usual, _ = not_faster.widths_at_macs(space, scores, macs, 4)
    rows = torch.tensor([chosen, usual], dtype=torch.float64)
    assert not_faster.LEAST_MACS * macs <= float(MacsModel(space)(rows[0])) <= macs
    assert float(model(rows[0])) < float(model(rows[1]))


def test_a_grid_too_coarse_is_refused() -> None:
    network, example = wide(), networks.example(batch=1)
    space: ChannelSpace = trace(network, example)
    scores = torch.arange(space.total_units, dtype=torch.float32)
    full = torch.tensor(space.full_widths, dtype=torch.float64)
    with pytest.raises(InfeasibleTargetError, match="use a finer grid"):
        not_faster.widths_at_macs(space, scores, 0.9 * float(MacsModel(space)(full)), 64)


def test_files_compute_what_the_networks_do(tmp_path: Path) -> None:
    network, example = wide(), networks.example(batch=1)
    session, error = not_faster.run_from_file(
        get_runtime("eager"), network, example, tmp_path / "model.pt2"
    )
    with session:
        assert error < 1e-5
        assert torch.allclose(session.outputs()[0], network(example), atol=1e-5)


def test_every_round_times_everything_in_alternating_order() -> None:
    ran: list[str] = []

    class Session:
        def __init__(self, name: str) -> None:
            self.name = name

        def active(self) -> Any:
            ran.append(self.name)
            return not_faster.ExitStack()

        def run(self) -> None:
            sum(range(1000))

    sessions = cast(Any, {name: Session(name) for name in "abc"})
    taken = not_faster.time_sessions(sessions, seconds=0.0, least_rounds=2)
    assert {name: len(seconds) for name, seconds in taken.items()} == dict.fromkeys("abc", 2)
    assert ran[-6:] == ["a", "b", "c", "c", "b", "a"]


def test_the_whole_way_leaves_a_record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(not_faster, "torchvision_network", lambda name, seed: wide())
    monkeypatch.setattr(not_faster, "GRIDS", {"eager": 4})
    monkeypatch.setattr(not_faster, "lpnet_for", lambda *_: None)  # near-uniform widths then
    options = ["--networks", "mobilenet_v2", "--side", "8", "--runtimes", "eager"]
    not_faster.main([*options, "--seconds", "0", "--least-rounds", "2", "--results", str(tmp_path)])
    record = read_record(tmp_path, "not_faster")
    assert record is not None
    found = record["numbers"]["mobilenet_v2"]["eager"]
    assert (found["rounds"], found["grid"]) == (2, 4)
    assert not_faster.LEAST_MACS <= found["macs_of_rival"] <= 1.0
    assert all(facts["relative_error"] < 1e-4 for facts in found["ways"].values())
    seconds = record["samples"]["mobilenet_v2"]["eager"]
    assert set(seconds) == {DENSE, *WAYS}
    # The rounds that are stored are those that the numbers came from.
    assert compare(seconds[RIVAL], seconds[OURS])["ratio"] == found["speed_ratio"]
    assert "mobilenet_v2 | eager" in tables.not_faster_table(tmp_path)


def test_runtimes_that_are_not_installed_are_left_out(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def only_eager(name: str, settings: Any) -> Any:
        if name != "eager":
            raise MissingExtraError(name, name, f"the runtime `{name}`")
        return SimpleNamespace(name=name)

    monkeypatch.setattr(not_faster, "get_runtime", only_eager)
    assert list(not_faster.installed(["openvino", "eager"])) == ["eager"]
    assert "openvino: left out" in capsys.readouterr().out


@pytest.mark.parametrize(("rival", "holds"), [(1.2, True), (0.9, False)])
def test_the_claim_reads_the_record(tmp_path: Path, rival: float, holds: bool) -> None:
    store(tmp_path, {"mobilenet_v2": {"onnxruntime": made_up(rival=rival)}})
    (entry,) = [each for each in scoreboard.entries(tmp_path) if each.claim == CLAIM]
    assert entry.value == pytest.approx(2 * rival)
    assert entry.holds == holds


def test_a_record_without_the_claims_runtime_leaves_it_empty(tmp_path: Path) -> None:
    store(tmp_path, {"mobilenet_v2": {"eager": made_up()}})
    (entry,) = [each for each in scoreboard.entries(tmp_path) if each.claim == CLAIM]
    assert (entry.value, entry.holds) == (None, False)


def test_the_table_marks_what_is_slower(tmp_path: Path) -> None:
    store(tmp_path, {"mobilenet_v2": {"onnxruntime": made_up(rival=1.2)}})
    last = tables.not_faster_table(tmp_path).splitlines()[-1]
    assert last == (
        "| mobilenet_v2 | onnxruntime | 10.00 ms | **1.20 ± 0.00** (50%) | 0.40 ± 0.00 (45%) "
        "| 0.40 ± 0.00 (46%) | 0.60 ± 0.00 (50%) | 0.50 ± 0.00 (50%) | 2.40 ± 0.00 |"
    )
    assert tables.not_faster_table(tmp_path / "nothing") == tables.NOT_RUN


def test_pictures_are_drawn_for_light_and_dark_and_repeat(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    both = {"onnxruntime": made_up(), "openvino": made_up(rival=0.7)}
    store(tmp_path, {"mobilenet_v2": both, "resnet34": both})
    pictures.main(["--results", str(tmp_path)])
    light, dark = (tmp_path / f"not_faster{end}.svg" for end in ("", "-dark"))
    before = light.read_bytes()
    assert ElementTree.fromstring(before).tag.endswith("svg")
    assert before != dark.read_bytes()
    assert pictures.draw(tmp_path) == [light, dark]
    assert light.read_bytes() == before


def test_bars_are_as_high_as_the_record_says() -> None:
    pytest.importorskip("matplotlib")
    record = {"numbers": {"mobilenet_v2": {"onnxruntime": made_up(rival=1.2)}}}
    (panel,) = pictures.draw_not_faster(record, LIGHT).axes
    heights = [bar.get_height() for bar in cast(Any, panel).patches]
    assert heights == pytest.approx([1.2, 0.5])
    assert panel.get_ylim()[1] > 1.2


def test_without_a_record_there_is_no_picture(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("matplotlib")
    assert pictures.draw(tmp_path) == []
    assert "no record" in capsys.readouterr().out
