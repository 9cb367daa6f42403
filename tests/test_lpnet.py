"""LPNet: what it learns, how sure it is, adapting to another runtime, and its file."""

from __future__ import annotations

import itertools
import json
import math
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from networks import Head, conv_bn, example, tiny
from safetensors.torch import save_file
from torch import nn

from wgates_plugin import ChannelSpace, trace
from wgates_plugin.efficiency import Budget, EfficiencyModel, Limit, LPNet, MacsModel
from wgates_plugin.efficiency.base import measured_grid
from wgates_plugin.efficiency.belonging import check_inputs
from wgates_plugin.efficiency.counts import LayerShapes
from wgates_plugin.efficiency.lpnet import weighted_names
from wgates_plugin.efficiency.lpnet.data import LatencyData, folds
from wgates_plugin.efficiency.lpnet.layers import LayersStructure
from wgates_plugin.efficiency.sampling import draw_widths
from wgates_plugin.errors import ConfigError, FileFormatError, MeasurementError
from wgates_plugin.integrations.torch_pruning import WGatesPruner
from wgates_plugin.strategies import plan_by_criterion
from wgates_plugin.strategies.base import Task
from wgates_plugin.strategies.budgeting import fit_to_budget

RISING = [1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0]


@pytest.fixture(scope="module")
def space() -> ChannelSpace:
    return trace(tiny("plain"), example())


@pytest.fixture(scope="module")
def wide() -> ChannelSpace:
    network = nn.Sequential(conv_bn(3, 32), conv_bn(32, 48, stride=2), conv_bn(48, 40), Head(40))
    return trace(network, example())


class Staircase:
    """A runtime that works in blocks of 4 channels and is slow where a width is no multiple of 4.

    Args:
        slowness: factor per layer.
        noise: relative standard deviation of a measurement.
    """

    def __init__(
        self, space: ChannelSpace, *, slowness: Sequence[float] | None = None, noise: float = 0.0
    ) -> None:
        self.space, self.noise = space, noise
        self.shapes = LayerShapes(space)
        self.names = weighted_names(space)
        self.slowness = list(slowness or [1.0] * len(self.names))
        self.rng = np.random.default_rng(5)

    def layers_ms(self, widths: Sequence[int]) -> dict[str, float]:
        row = torch.tensor(widths, dtype=torch.float64)
        found = {}
        sides = zip(
            self.space.layers, self.shapes.inputs(row), self.shapes.outputs(row), strict=True
        )
        for layer, ins, outs in sides:
            if layer.kernel:
                blocks = math.ceil(float(ins) / 4) * math.ceil(float(outs) / 4) * 16
                odd = 1.0 + 0.4 * (float(outs) % 4 > 0)
                found[layer.name] = 0.02 + 1e-6 * blocks * odd * layer.kernel * layer.positions
        return {n: ms * f for (n, ms), f in zip(found.items(), self.slowness, strict=True)}

    def ms(self, widths: Sequence[int]) -> float:
        total = 0.1 + sum(self.layers_ms(widths).values())
        return total * (1.0 + self.noise * float(self.rng.standard_normal()))

    def data(self, count: int, seed: int) -> tuple[list[Any], list[float], list[dict[str, float]]]:
        rng = np.random.default_rng(seed)
        widths = list({draw_widths(self.space, 1, rng): None for _ in range(count)})
        return widths, [self.ms(w) for w in widths], [self.layers_ms(w) for w in widths]


def error(model: LPNet, runtime: Staircase, seed: int = 99) -> float:
    widths, latencies, _ = runtime.data(80, seed)
    found = model.relative_errors(torch.tensor(widths), torch.tensor(latencies))
    return float(found.abs().mean())


@pytest.fixture(scope="module")
def lpnet(wide: ChannelSpace) -> LPNet:
    widths, latencies, layers = Staircase(wide).data(60, 0)
    return LPNet.fit(wide, widths, latencies, layers_ms=layers)


@pytest.mark.parametrize(("structure", "bar"), [("layers", 0.05), ("mlp", 0.15)])
def test_totals_alone_teach_a_staircase(wide: ChannelSpace, structure: str, bar: float) -> None:
    widths, latencies, _ = Staircase(wide).data(120, 0)
    model = LPNet.fit(wide, widths, latencies, structure=structure)
    report = model.report
    assert report is not None
    assert report.samples == report.held_out == len(widths)
    assert report.mape < bar
    assert report.mape <= report.worst
    assert error(model, Staircase(wide)) < bar
    assert model.structure == structure


def test_profiles_replace_measurements() -> None:
    sizes = [3, 32, 24, 40, 16, 48, 20, 36, 28]
    layers = [conv_bn(a, b) for a, b in itertools.pairwise(sizes)]
    deep = trace(nn.Sequential(*layers, Head(28)), example())
    runtime = Staircase(deep)
    widths, latencies, profiles = runtime.data(25, 0)
    told = LPNet.fit(deep, widths, latencies, layers_ms=profiles)
    untold = LPNet.fit(deep, widths, latencies)
    assert error(told, runtime) < 0.75 * error(untold, runtime)
    full = torch.tensor(deep.full_widths, dtype=torch.float64)
    expected = torch.tensor(list(runtime.layers_ms(deep.full_widths).values())).double()
    share = (told.layer_ms(full) - expected).abs().sum() / expected.sum()
    assert float(share) < 0.15  # the constant 0.1 ms is spread over them


def test_some_measurements_may_lack_a_profile(wide: ChannelSpace) -> None:
    runtime = Staircase(wide)
    widths, latencies, layers = runtime.data(40, 0)
    some = [seen if index % 3 else None for index, seen in enumerate(layers)]
    assert error(LPNet.fit(wide, widths, latencies, layers_ms=some), runtime) < 0.08
    with pytest.raises(MeasurementError, match="1 layer profiles for"):
        LPNet.fit(wide, widths, latencies, layers_ms=layers[:1])


def test_lpnet_is_an_efficiency_model(wide: ChannelSpace, lpnet: LPNet) -> None:
    assert isinstance(lpnet, EfficiencyModel)
    assert isinstance(lpnet.upper(), EfficiencyModel)
    rows = torch.tensor([wide.full_widths, wide.least_widths()], dtype=torch.float64)
    found = lpnet(rows)
    assert found.shape == (2,)
    torch.testing.assert_close(found, torch.stack([lpnet(row) for row in rows]))
    assert lpnet(rows[None]).shape == (1, 2)
    assert lpnet.layer_ms(rows).shape == (2, len(weighted_names(wide)))
    assert (found > 0).all()


def test_the_slope_says_what_channels_cost(wide: ChannelSpace, lpnet: LPNet) -> None:
    """Latency is a staircase; its slope is that of the ramp over the steps."""
    middle = torch.tensor([16.0, 24.0, 20.0], dtype=torch.float64, requires_grad=True)
    (slope,) = torch.autograd.grad(lpnet(middle), middle)
    for index in range(3):
        step = torch.zeros(3, dtype=torch.float64)
        step[index] = 8.0
        rise = float((lpnet(middle + step) - lpnet(middle - step)).detach()) / 16.0
        assert float(slope[index]) == pytest.approx(rise, rel=0.5)


def test_intervals_hold_what_they_promise(wide: ChannelSpace) -> None:
    noisy = Staircase(wide, noise=0.03)
    widths, latencies, layers = noisy.data(120, 0)
    model = LPNet.fit(wide, widths, latencies, layers_ms=layers)
    fresh, seen, _ = noisy.data(400, 77)
    rows, truth = torch.tensor(fresh, dtype=torch.float64), torch.tensor(seen)
    for coverage in (0.5, 0.9):
        low, high = model.interval(rows, coverage)
        share = float(((low <= truth) & (truth <= high)).double().mean())
        assert share == pytest.approx(coverage, abs=0.08)
    assert (model.upper(0.9)(rows) > model.upper(0.5)(rows)).all()
    assert (model.spread(rows) > 0.02).all()
    assert model.report is not None
    assert 0.03 < model.report.half_width_90 < 0.1
    with pytest.raises(ConfigError, match=r"coverage: got 1\.5"):
        model.interval(rows, 1.5)


def test_few_measurements_do_not_promise_too_much(wide: ChannelSpace) -> None:
    """Sixteen networks, ten times: parameters bent to the data would make intervals too narrow."""
    noisy = Staircase(wide, noise=0.03)
    fresh, seen, _ = noisy.data(150, 77)
    rows, truth = torch.tensor(fresh, dtype=torch.float64), torch.tensor(seen)
    shares = []
    for seed in range(10):
        widths, latencies, layers = noisy.data(16, seed)
        low, high = LPNet.fit(wide, widths, latencies, layers_ms=layers).interval(rows)
        shares.append(float(((low <= truth) & (truth <= high)).double().mean()))
    assert np.mean(shares) > 0.84


def test_a_coverage_that_cannot_be_promised_is_refused(wide: ChannelSpace) -> None:
    widths, latencies, layers = Staircase(wide, noise=0.03).data(12, 0)
    model = LPNet.fit(wide, widths, latencies, layers_ms=layers)
    rows = torch.tensor(widths)
    model.interval(rows, 0.9)
    with pytest.raises(ConfigError, match=r"0\.99 cannot be promised from 12 measurements"):
        model.interval(rows, 0.99)
    with pytest.raises(ConfigError, match="cannot be promised"):
        model.upper(0.99)


def test_repeated_measurements_stay_together() -> None:
    widths = torch.tensor([[1, 2], [3, 4], [1, 2], [5, 6], [3, 4], [7, 8]])
    parts = folds(widths, parts=3, seed=0)
    assert sorted(torch.cat(parts).tolist()) == list(range(6))
    for part in parts:
        rest = torch.tensor([row for row in range(6) if row not in part.tolist()])
        shared = {tuple(w) for w in widths[part].tolist()} & {
            tuple(w) for w in widths[rest].tolist()
        }
        assert not shared
    assert len(folds(widths[:3], parts=5, seed=0)) == 2


def test_a_budget_may_hold_the_upper_bound(wide: ChannelSpace) -> None:
    noisy = Staircase(wide, noise=0.03)
    widths, latencies, layers = noisy.data(40, 0)
    model = LPNet.fit(wide, widths, latencies, layers_ms=layers)
    row = torch.tensor(wide.full_widths, dtype=torch.float64)
    target = float(model(row)) * 1.001
    assert float(Budget.of(Limit(model, target)).excess(row)) < 0
    assert float(Budget.of(Limit(model.upper(), target)).excess(row)) > 0


def test_few_measurements_adapt_it_to_another_runtime(wide: ChannelSpace, lpnet: LPNet) -> None:
    other = Staircase(wide, slowness=[3.0, 1.5, 2.0, 1.0])
    widths, latencies, _ = other.data(12, 3)
    adapted = LPNet.fit(wide, widths, latencies, prior=lpnet)
    fresh = LPNet.fit(wide, widths, latencies)
    assert error(adapted, other) < 0.05
    assert error(adapted, other) < 0.5 * error(fresh, other)


def test_a_prior_must_fit(space: ChannelSpace, wide: ChannelSpace, lpnet: LPNet) -> None:
    widths, latencies = [[k, 12] for k in range(1, 9)], RISING
    with pytest.raises(ConfigError, match="prior: fitted for another network"):
        LPNet.fit(space, widths, latencies, prior=lpnet)
    with pytest.raises(ConfigError, match="only the structure `layers` adapts"):
        LPNet.fit(space, widths, latencies, structure="mlp", prior=lpnet)


def test_a_refit_knows_what_was_measured_since(wide: ChannelSpace, lpnet: LPNet) -> None:
    slow = Staircase(wide, slowness=[2.0, 2.0, 2.0, 2.0])
    widths, latencies, layers = slow.data(40, 4)
    again = lpnet.refit(widths, latencies, layers_ms=layers)
    assert error(lpnet, slow) > 0.3
    assert error(again, slow) < 0.1
    assert again.report == lpnet.report


def test_lpnet_knows_the_multiple_that_was_measured(wide: ChannelSpace) -> None:
    widths, latencies, _ = Staircase(wide).data(20, 0)
    assert LPNet.fit(wide, widths, latencies).grid == 1
    fours = [
        [
            full if w == full else max(4, w // 4 * 4)
            for w, full in zip(row, wide.full_widths, strict=True)
        ]
        for row in widths
    ]
    model = LPNet.fit(wide, fours, latencies)
    assert (model.grid, model.upper(0.5).grid, model.corrected(fours[0], 3.0).grid) == (4, 4, 4)
    budget = Budget.of(Limit(MacsModel(wide), 1e9), Limit(model, 1.0))
    assert [measured_grid(each) for each in (None, MacsModel, model, budget)] == [1, 1, 4, 4]


def test_fitting_is_repeatable_and_leaves_the_random_state(
    wide: ChannelSpace, lpnet: LPNet, tmp_path: Path
) -> None:
    state = torch.get_rng_state()
    widths, latencies, layers = Staircase(wide).data(60, 0)
    again = LPNet.fit(wide, widths, latencies, layers_ms=layers)
    rows = torch.tensor(widths)
    assert torch.equal(again(rows), lpnet(rows))
    assert again.report == lpnet.report
    LPNet.fit(wide, widths[:20], latencies[:20], structure="mlp")
    lpnet.save(tmp_path / "lpnet.safetensors")
    LPNet.load(tmp_path / "lpnet.safetensors")
    lpnet.corrected(wide.full_widths, 1.0)
    assert torch.equal(torch.get_rng_state(), state)


def test_a_corrected_lpnet_is_exact_at_one_network(wide: ChannelSpace, lpnet: LPNet) -> None:
    near, far = torch.tensor([4.0, 8.0, 9.0]), torch.tensor([32.0, 12.0, 40.0])
    before = float(lpnet(near)), float(lpnet(far))
    twin = lpnet.corrected((4, 8, 9), 3.0)
    assert float(twin(near)) == pytest.approx(3.0)
    assert float(twin(far)) / before[1] == pytest.approx(3.0 / before[0])
    assert (float(lpnet(near)), float(lpnet(far))) == before
    assert float(twin.corrected((4, 8, 9), 5.0)(near)) == pytest.approx(5.0)


def _kinds(wide: ChannelSpace, lpnet: LPNet) -> dict[str, LPNet]:
    widths, latencies, _ = Staircase(wide).data(20, 1)
    return {
        "profiled": lpnet,
        "corrected": lpnet.corrected((4, 8, 9), 3.0),
        "adapted": LPNet.fit(wide, widths, latencies, prior=lpnet),
        "totals": LPNet.fit(wide, widths, latencies),
        "mlp": LPNet.fit(wide, widths, latencies, structure="mlp"),
    }


def test_lpnet_survives_its_file(wide: ChannelSpace, lpnet: LPNet, tmp_path: Path) -> None:
    path = tmp_path / "lpnet.safetensors"
    rows = torch.tensor([[3.0, 7.0, 9.0], [8.0, 12.0, 40.0]])
    for kind, model in _kinds(wide, lpnet).items():
        model.save(path)
        for again in (LPNet.load(path), LPNet.load(path, space=wide)):
            assert torch.equal(again(rows), model(rows)), kind
            assert torch.equal(again.interval(rows)[1], model.interval(rows)[1]), kind
            assert again.report == model.report
            assert again.grid == model.grid
            assert (again.fingerprint, again.structure) == (wide.fingerprint, model.structure)
    other = trace(tiny("residual"), example())
    with pytest.raises(FileFormatError, match="fitted for another network"):
        LPNet.load(path, space=other)


def test_lpnet_is_found_in_a_run_folder(wide: ChannelSpace, lpnet: LPNet, tmp_path: Path) -> None:
    with pytest.raises(FileFormatError, match=r"a folder without `lpnet\.safetensors`; give"):
        LPNet.load(tmp_path)
    lpnet.save(tmp_path / "lpnet.safetensors")
    rows = torch.tensor([[3.0, 7.0, 9.0]])
    assert torch.equal(LPNet.load(str(tmp_path))(rows), lpnet(rows))


def _truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def _garble(path: Path) -> None:
    path.write_bytes(b"\x00" + path.read_bytes())


def _empty(path: Path) -> None:
    path.write_bytes(b"")


def _plain_weights(path: Path) -> None:
    save_file({"weight": torch.zeros(2)}, str(path))


def _another_kind(path: Path) -> None:
    save_file({"weight": torch.zeros(2)}, str(path), metadata={"about": '{"kind": "gates"}'})


def _no_json(path: Path) -> None:
    save_file({"weight": torch.zeros(2)}, str(path), metadata={"about": "lpnet"})


def _other_weights(path: Path) -> None:
    from safetensors import safe_open

    with safe_open(str(path), framework="pt") as file:
        metadata = file.metadata()
    save_file({"scale": torch.zeros(2)}, str(path), metadata=metadata)


def _missing_field(path: Path) -> None:
    from safetensors import safe_open
    from safetensors.torch import load_file

    with safe_open(str(path), framework="pt") as file:
        about = json.loads(file.metadata()["about"])
    del about["structure"]
    save_file(load_file(str(path)), str(path), metadata={"about": json.dumps(about)})


@pytest.mark.parametrize(
    "damage",
    [_truncate, _garble, _empty, Path.unlink, _plain_weights, _another_kind, _no_json,
     _other_weights, _missing_field],
)  # fmt: skip
def test_damaged_lpnet_files_are_refused(
    lpnet: LPNet, tmp_path: Path, damage: Callable[[Path], None]
) -> None:
    path = tmp_path / "lpnet.safetensors"
    lpnet.save(path)
    damage(path)
    with pytest.raises(FileFormatError, match=r"LPNet `.*lpnet.safetensors`"):
        LPNet.load(path)


@pytest.mark.parametrize(
    ("widths", "latencies", "words"),
    [
        ([[8, 12]] * 10, [*RISING, 9.0, 10.0], "all measurements are of the same widths"),
        ([[k, 12] for k in range(1, 8)], RISING[:7], "at least 8"),
        ([[k, 12] for k in range(1, 9)], [*RISING, 9.0], "9 measurements"),
        ([[k, 12] for k in range(1, 9)], [*RISING[:7], 0.0], "not a positive finite number"),
        ([[k, 12] for k in range(1, 9)], [*RISING[:7], float("nan")], "positive finite"),
        ([[k] for k in range(1, 9)], RISING, r"needed \(N, 2\)"),
        ([[k, 12] for k in range(1, 9)], [2.0] * 8, "all 8 measurements say 2 ms"),
        ([], [], r"needed \(N, 2\)"),
    ],
)
def test_useless_measurements_are_refused(
    space: ChannelSpace, widths: Any, latencies: Any, words: str
) -> None:
    with pytest.raises(MeasurementError, match=words):
        LPNet.fit(space, widths, latencies)


def test_an_unknown_structure_is_refused(space: ChannelSpace) -> None:
    with pytest.raises(ConfigError, match="known: layers, mlp"):
        LPNet.fit(space, [[k, 12] for k in range(1, 9)], RISING, structure="tree")


def test_the_mlp_predicts_no_single_layers(space: ChannelSpace) -> None:
    model = LPNet.fit(space, [[k, 12] for k in range(1, 9)], RISING, structure="mlp")
    with pytest.raises(ConfigError, match="predicts no single layers"):
        model.layer_ms(torch.tensor([4.0, 12.0]))


def test_a_prior_that_misleads_few_measurements_is_left_out(wide: ChannelSpace) -> None:
    other = Staircase(wide, noise=0.02)
    widths, latencies, layers = other.data(12, 3)
    wrong = Staircase(wide, slowness=[0.01, 40.0, 0.01, 60.0], noise=0.5).data(40, 1)
    prior = LPNet.fit(wide, wrong[0], wrong[1], layers_ms=wrong[2])
    adapted = LPNet.fit(wide, widths, latencies, layers_ms=layers, prior=prior)
    alone = LPNet.fit(wide, widths, latencies, layers_ms=layers)
    assert adapted.report is not None
    assert alone.report is not None
    assert adapted.report.mape <= alone.report.mape


def test_a_scale_that_all_samples_have_in_common_is_left_alone(
    wide: ChannelSpace, lpnet: LPNet
) -> None:
    other = Staircase(wide, slowness=[3.0, 1.5, 2.0, 1.0], noise=0.02)
    widths, latencies, layers = other.data(12, 3)
    slower = [0.8 * ms for ms in latencies]
    first = LPNet.fit(wide, widths, latencies, layers_ms=layers, prior=lpnet).report
    second = LPNet.fit(wide, widths, slower, layers_ms=layers, prior=lpnet).report
    assert first is not None
    assert second is not None
    assert second.mape == pytest.approx(first.mape, rel=0.2)


def test_held_out_widths_are_held_out_of_the_prior_too(wide: ChannelSpace) -> None:
    """A prior of the same noisy measurements would know those that it is to be judged on."""
    noisy = Staircase(wide, noise=0.3)
    widths, latencies, _ = noisy.data(40, 0)
    prior = LPNet.fit(wide, widths, latencies)
    data = LatencyData.of(wide, widths[:12], latencies[:12])
    before = prior._structure
    assert isinstance(before, LayersStructure)
    learned = LayersStructure.fit(wide, data, seed=0, prior=before)
    blind = learned._unaware_of(data.widths[:3]).prior
    assert blind is not None
    hidden = set(map(tuple, widths[:3]))
    assert len(blind.data) == sum(tuple(row) not in hidden for row in widths)
    assert not hidden & {tuple(map(int, row)) for row in blind.data.widths.tolist()}
    # What is predicted of them must not hang on how the prior found them.
    parts = [torch.arange(3), torch.arange(3, 12)]
    there = torch.tensor([tuple(row) in hidden for row in widths])
    other = LatencyData(
        before.data.widths,
        torch.where(there, 9.0, 1.0) * before.data.latency_ms,
        before.data.layers_ms,
    )
    twin = LayersStructure.fit(wide, data, seed=0, prior=before.conditioned(other))
    first, _ = learned.without(data, parts)
    second, _ = twin.without(data, parts)
    torch.testing.assert_close(first[:3], second[:3])


def test_held_out_widths_are_held_out_of_the_prior_s_prior_too(wide: ChannelSpace) -> None:
    widths, latencies, layers = Staircase(wide, noise=0.3).data(40, 0)
    first = LPNet.fit(wide, widths, latencies, layers_ms=layers)
    second = LPNet.fit(wide, widths, latencies, prior=first)._structure
    assert isinstance(second, LayersStructure)
    third = LayersStructure.fit(
        wide, LatencyData.of(wide, widths[:12], latencies[:12]), seed=0, prior=second
    )
    asked = third.data.widths[:3]
    prior = third._unaware_of(asked).prior
    assert prior is not None
    assert prior.prior is not None
    hidden = {tuple(map(int, row)) for row in asked.tolist()}
    for structure in (prior, prior.prior):
        assert not hidden & {tuple(map(int, row)) for row in structure.data.widths.tolist()}
    unknown = third._unaware_of(torch.tensor(widths, dtype=torch.float64))
    assert unknown.prior is None


def test_what_was_learned_from_profiles_asks_for_them_again(
    wide: ChannelSpace, lpnet: LPNet
) -> None:
    widths, latencies, layers = Staircase(wide).data(20, 4)
    with pytest.raises(MeasurementError, match="give `layers_ms` with the measurements"):
        lpnet.refit(widths, latencies)
    known = [*layers[:5], *([None] * (len(layers) - 5))]
    again = lpnet.refit(widths, latencies, layers_ms=known)
    assert torch.isfinite(again(torch.tensor(widths))).all()


def test_an_interval_of_ninety_per_cent_needs_nine_measurements(wide: ChannelSpace) -> None:
    runtime = Staircase(wide, noise=0.03)
    for count, promised in ((8, False), (9, True)):
        widths, latencies, layers = runtime.data(count, 0)
        report = LPNet.fit(wide, widths, latencies, layers_ms=layers).report
        assert report is not None
        assert (report.half_width_90 is not None) == promised
        assert (report.widest_90 is not None) == promised


def test_the_runtime_s_identity_is_kept_and_is_no_prior_of_itself(
    wide: ChannelSpace, tmp_path: Path
) -> None:
    identity = {"runtime": "staircase", "inputs": {"input_0": [1, 3, 8, 8]}}
    widths, latencies, _ = Staircase(wide).data(12, 0)
    model = LPNet.fit(wide, widths, latencies, identity=identity)
    model.save(tmp_path / "lpnet")
    loaded = LPNet.load(tmp_path / "lpnet")
    assert (loaded.identity, loaded.upper().identity) == (identity, identity)
    with pytest.raises(ConfigError, match="fitted on this very runtime"):
        LPNet.fit(wide, widths, latencies, identity=identity, prior=loaded)
    LPNet.fit(wide, widths, latencies, identity={**identity, "threads": 2}, prior=loaded)


def test_a_budget_knows_the_shape_it_was_measured_on(wide: ChannelSpace) -> None:
    identity = {"runtime": "staircase", "inputs": {"input_0": [1, 3, 8, 8]}}
    widths, latencies, _ = Staircase(wide).data(12, 0)
    budget = Budget.of(Limit(LPNet.fit(wide, widths, latencies, identity=identity), 5.0))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_inputs(budget, torch.zeros(1, 3, 8, 8))
        check_inputs(budget, {"image": torch.zeros(1, 3, 8, 8)})
    with pytest.warns(
        UserWarning, match=r"shape 1,3,8,8, the example inputs are 8,3,8,8: .* batch of 1"
    ):
        check_inputs(budget, torch.zeros(8, 3, 8, 8))
    with pytest.raises(ConfigError, match="fit one for this shape"):
        check_inputs(budget, torch.zeros(1, 3, 16, 16))
    two = {"runtime": "staircase", "inputs": {"image": [1, 3, 8, 8], "mask": [1, 1, 8, 8]}}
    budget = Budget.of(Limit(LPNet.fit(wide, widths, latencies, identity=two), 5.0))
    swapped = {"mask": torch.zeros(1, 1, 8, 8), "image": torch.zeros(1, 3, 8, 8)}
    check_inputs(budget, swapped)
    with pytest.raises(ConfigError, match="fit one for this shape"):
        check_inputs(budget, tuple(swapped.values()))


def test_a_budget_of_another_network_is_refused_before_it_predicts(
    space: ChannelSpace, lpnet: LPNet
) -> None:
    budget = Budget.of(Limit(lpnet, 5.0))
    doors = {
        "criterion": lambda: plan_by_criterion(tiny("plain"), space, "l1", budget),
        "fit": lambda: fit_to_budget(
            space, torch.zeros(space.total_units), space.full_widths, budget
        ),
        "pruner": lambda: WGatesPruner(tiny("plain"), example(), efficiency=lpnet, target=5.0),
        "budget": lambda: WGatesPruner(tiny("plain"), example(), efficiency=budget),
        "task": lambda: Task(tiny("plain"), space, budget, example(), []),
    }
    for enter in doors.values():
        with pytest.raises(ConfigError, match="its model was made for another network"):
            enter()
