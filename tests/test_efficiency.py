"""Efficiency models, sampling files and constraint forms."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from networks import TINY, Head, conv_bn, example, tiny
from safetensors.torch import save_file
from torch import Tensor, nn

from wgates_plugin import ChannelSpace, trace
from wgates_plugin.efficiency import (
    Budget,
    EfficiencyModel,
    Limit,
    LPNet,
    MacsModel,
    ParametersModel,
)
from wgates_plugin.efficiency.constraint import AugmentedLagrangian, Weighted, make_constraint
from wgates_plugin.efficiency.sampling import SampleFile, collect, draw_widths
from wgates_plugin.errors import ConfigError, FileFormatError, MeasurementError, TargetError
from wgates_plugin.files import append_line
from wgates_plugin.latency.measurement import Measurement
from wgates_plugin.latency.timing import measure


@pytest.fixture(scope="module")
def space() -> ChannelSpace:
    return trace(tiny("plain"), example())


def staircase_ms(space: ChannelSpace, widths: Sequence[int]) -> float:
    """A runtime that works in blocks of 4 channels: exact MACs at widths rounded up, and a floor."""
    blocks = [
        min(math.ceil(w / 4) * 4, g.channels) for w, g in zip(widths, space.groups, strict=True)
    ]
    return 0.2 + 1e-4 * float(MacsModel(space)(torch.tensor(blocks)))


class SteadySession:
    """Claims a time by a clock of its own, so that no test depends on the machine's."""

    def __init__(self, latency_ms: float) -> None:
        self.latency_ms = latency_ms
        self.identity = {"runtime": "staircase"}
        self.closed = False

    def run(self) -> None: ...

    def outputs(self) -> list[Tensor]:
        return []

    def elapsed_ms(self) -> float:
        return self.latency_ms

    def close(self) -> None:
        self.closed = True


def measured(latency_ms: float) -> Measurement:
    return measure(
        SteadySession(latency_ms),
        reference=SteadySession(2.0),
        reference_ms=2.0,
        seconds=0.0,
        min_rounds=2,
        environment={},
    )


# Counts


def test_counts_of_the_whole_network_by_hand(space: ChannelSpace) -> None:
    full = torch.tensor(space.full_widths)
    assert float(MacsModel(space)(full)) == 8 * 3 * 9 * 64 + 12 * 8 * 9 * 16 + 12 * 5
    assert float(ParametersModel(space)(full)) == 8 * 27 + 16 + 12 * 72 + 24 + 12 * 5 + 5
    small = torch.tensor([3, 2])
    assert float(MacsModel(space)(small)) == 3 * 27 * 64 + 2 * 27 * 16 + 2 * 5
    assert float(ParametersModel(space)(small)) == 3 * 27 + 6 + 2 * 27 + 4 + 2 * 5 + 5


@pytest.mark.parametrize("name", TINY)
def test_counts_are_batched_and_differentiable(name: str) -> None:
    space = trace(tiny(name), example())
    rows = torch.tensor([space.full_widths, space.least_widths()], dtype=torch.float64)
    for model in (MacsModel(space), ParametersModel(space)):
        assert isinstance(model, EfficiencyModel)
        found = model(rows)
        torch.testing.assert_close(found, torch.stack([model(row) for row in rows]))
        assert found[1] < found[0]
        widths = rows[0].clone().requires_grad_(True)
        (slope,) = torch.autograd.grad(model(widths), widths)
        for index in range(len(widths)):
            ahead, behind = widths.detach().clone(), widths.detach().clone()
            ahead[index] += 0.5
            behind[index] -= 0.5
            # quadratic in one width where a layer reads and writes the same group
            assert float(slope[index]) == pytest.approx(float(model(ahead) - model(behind)))
            assert float(slope[index]) > 0


def test_batch_size_does_not_count() -> None:
    network = tiny("transposed")
    widths = torch.tensor([3.0, 5.0])
    one, four = (MacsModel(trace(network, example(batch))) for batch in (1, 4))
    assert float(one(widths)) == float(four(widths))


# Budgets


def test_budgets_report_relative_excess(space: ChannelSpace) -> None:
    macs, parameters = MacsModel(space), ParametersModel(space)
    full = torch.tensor(space.full_widths)
    budget = Budget.of(
        Limit(macs, 0.5 * float(macs(full))), Limit(parameters, 2 * float(parameters(full)))
    )
    torch.testing.assert_close(budget.violations(full), torch.tensor([1.0, -0.5]).double())
    assert float(budget.excess(full)) == pytest.approx(1.0)
    looser = budget.scaled([2.0, 1.0])
    assert float(looser.excess(full)) == pytest.approx(0.0)
    assert "macs" in budget.describe(full)
    assert "parameters" in budget.describe(full)
    with pytest.raises(TargetError, match="at least one"):
        Budget.of()


@pytest.mark.parametrize("target", [0, -1.0, float("nan"), float("inf"), True, "8", None])
def test_targets_are_positive_numbers(space: ChannelSpace, target: Any) -> None:
    with pytest.raises(TargetError, match="MACs"):
        Limit(MacsModel(space), target)


# Constraint forms


def test_the_augmented_lagrangian_presses_until_the_limit_holds() -> None:
    constraint = AugmentedLagrangian(2, rate=0.5, curvature=10.0)
    broken = torch.tensor([0.2, -0.3], dtype=torch.float64)
    assert constraint.pressure(broken).tolist() == pytest.approx([2.0, 0.0])
    for _ in range(3):
        constraint.update(broken)
    assert constraint.multipliers.tolist() == pytest.approx([0.3, 0.0])
    held = torch.tensor([-0.01, -0.3], dtype=torch.float64)
    assert constraint.pressure(held).tolist() == pytest.approx([0.2, 0.0])
    for _ in range(100):
        constraint.update(held)
    assert constraint.multipliers.tolist() == [0.0, 0.0]
    other = AugmentedLagrangian(2)
    constraint.update(broken)
    other.load_state_dict(constraint.state_dict())
    assert torch.equal(other.multipliers, constraint.multipliers)


def test_dual_ascent_solves_a_small_problem() -> None:
    """min (x - 2)^2 subject to x <= 1, whose multiplier is 2."""
    constraint = AugmentedLagrangian(1, rate=0.05)
    x = torch.tensor(0.0, dtype=torch.float64)
    for _ in range(2000):
        violation = (x - 1.0).reshape(1)
        x = x - 0.02 * (2 * (x - 2.0) + constraint.pressure(violation)[0])
        constraint.update(violation)
    assert float(x) == pytest.approx(1.0, abs=1e-3)
    assert float(constraint.multipliers) == pytest.approx(2.0, abs=1e-2)


@pytest.mark.parametrize("form", ["linear", "log"])
def test_weighted_forms_are_derivatives_of_the_papers_sums(form: str) -> None:
    constraint = make_constraint(form, 1, alpha=0.7)
    cost = torch.tensor([1.8], dtype=torch.float64, requires_grad=True)
    value = 0.7 * (torch.log1p(cost) if form == "log" else cost)
    (slope,) = torch.autograd.grad(value.sum(), cost)
    pressure = constraint.pressure(cost.detach() - 1.0)
    torch.testing.assert_close(pressure, slope)
    constraint.update(cost.detach())
    assert constraint.state_dict() == {}
    assert isinstance(constraint, Weighted)


def test_unknown_forms_are_refused() -> None:
    with pytest.raises(ConfigError, match="known: augmented-lagrangian, linear, log"):
        make_constraint("barrier", 1)


# LPNet


@pytest.fixture(scope="module")
def wide() -> ChannelSpace:
    network = nn.Sequential(conv_bn(3, 32), conv_bn(32, 48, stride=2), conv_bn(48, 40), Head(40))
    return trace(network, example())


@pytest.fixture(scope="module")
def staircase(wide: ChannelSpace) -> tuple[list[tuple[int, ...]], list[float]]:
    rng = np.random.default_rng(0)
    widths = sorted({draw_widths(wide, 1, rng) for _ in range(120)})
    return widths, [staircase_ms(wide, row) for row in widths]


@pytest.fixture(scope="module")
def lpnet(wide: ChannelSpace, staircase: Any) -> LPNet:
    return LPNet.fit(wide, *staircase, steps=400)


@pytest.mark.parametrize(("structure", "bar"), [("layers", 0.08), ("mlp", 0.15)])
def test_lpnet_learns_a_staircase(
    wide: ChannelSpace, staircase: Any, structure: str, bar: float
) -> None:
    widths, latencies = staircase
    model = LPNet.fit(wide, widths, latencies, structure=structure, steps=400)
    report = model.report
    assert report is not None
    assert (report.samples, report.held_out) == (len(widths), round(0.2 * len(widths)))
    assert report.mape < bar
    assert report.mape <= report.worst
    assert not any(p.requires_grad for p in model.parameters())
    rng = np.random.default_rng(99)
    unseen = sorted({draw_widths(wide, 1, rng) for _ in range(60)} - set(widths))
    truth = torch.tensor([staircase_ms(wide, row) for row in unseen])
    errors = model.relative_errors(torch.tensor(unseen), truth).abs()
    assert float(errors.mean()) < bar


def test_lpnet_is_an_efficiency_model(wide: ChannelSpace, lpnet: LPNet) -> None:
    assert isinstance(lpnet, EfficiencyModel)
    rows = torch.tensor([wide.full_widths, wide.least_widths()], dtype=torch.float64)
    found = lpnet(rows)
    assert found.shape == (2,)
    torch.testing.assert_close(found, torch.stack([lpnet(row) for row in rows]))
    assert (found > 0).all()
    widths = rows[0].clone().requires_grad_(True)
    (slope,) = torch.autograd.grad(lpnet(widths), widths)
    step = 1e-4 * torch.ones_like(slope)
    change = float(lpnet(rows[0] + step) - lpnet(rows[0] - step)) / 2e-4
    assert change == pytest.approx(float(slope.sum()), rel=1e-4)


def test_fitting_is_repeatable_and_leaves_the_random_state(
    wide: ChannelSpace, staircase: Any, lpnet: LPNet, tmp_path: Path
) -> None:
    state = torch.get_rng_state()
    again = LPNet.fit(wide, *staircase, steps=400)
    for name, tensor in lpnet.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor)
    assert again.report == lpnet.report
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


def test_lpnet_survives_its_file(wide: ChannelSpace, lpnet: LPNet, tmp_path: Path) -> None:
    path = tmp_path / "lpnet.safetensors"
    lpnet.save(path)
    rows = torch.tensor([[3.0, 7.0, 9.0], [8.0, 12.0, 40.0]])
    for again in (LPNet.load(path), LPNet.load(path, space=wide)):
        assert torch.equal(again(rows), lpnet(rows))
        assert again.report == lpnet.report
        assert again.fingerprint == wide.fingerprint
    other = trace(tiny("residual"), example())
    with pytest.raises(FileFormatError, match="fitted for another network"):
        LPNet.load(path, space=other)


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
        ([[8, 12]] * 10, [1.0] * 10, "all measurements are of the same widths"),
        ([[k, 12] for k in range(1, 8)], [1.0] * 7, "at least 8"),
        ([[k, 12] for k in range(1, 9)], [1.0] * 9, "9 measurements"),
        ([[k, 12] for k in range(1, 9)], [1.0] * 7 + [0.0], "not a positive finite number"),
        ([[k, 12] for k in range(1, 9)], [1.0] * 7 + [float("nan")], "positive finite"),
        ([[k] for k in range(1, 9)], [1.0] * 8, r"needed \(N, 2\)"),
        ([], [], r"needed \(N, 2\)"),
    ],
)
def test_useless_measurements_are_refused(
    space: ChannelSpace, widths: Any, latencies: Any, words: str
) -> None:
    with pytest.raises(MeasurementError, match=words):
        LPNet.fit(space, widths, latencies, steps=5)


def test_equal_latencies_are_allowed(space: ChannelSpace) -> None:
    model = LPNet.fit(space, [[k, 12] for k in range(1, 9)], [2.0] * 8, steps=200)
    assert float(model(torch.tensor([4.0, 12.0]))) == pytest.approx(2.0, rel=0.1)


def test_an_unknown_structure_is_refused(space: ChannelSpace) -> None:
    with pytest.raises(ConfigError, match="known: layers, mlp"):
        LPNet(space, structure="tree")


# Samples


def test_drawn_widths_are_allowed_and_span_the_range(space: ChannelSpace) -> None:
    rng = np.random.default_rng(0)
    drawn = [draw_widths(space, 4, rng) for _ in range(300)]
    for row in drawn:
        assert all(w in a for w, a in zip(row, space.allowed_widths(4), strict=True))
    assert {row[0] for row in drawn} == set(space.allowed_widths(4)[0])
    assert {space.least_widths(4), space.full_widths} <= set(drawn)


def _file(path: Path, space: ChannelSpace, **identity: Any) -> SampleFile:
    return SampleFile.open(path, space, {"runtime": "staircase", **identity}, 2.0)


def test_samples_survive_their_file(space: ChannelSpace, tmp_path: Path) -> None:
    path = tmp_path / "samples.jsonl"
    file = _file(path, space)
    file.add([4, 8], measured(1.5))
    file.add([8, 12], measured(2.0))
    again = _file(path, space)
    assert again.widths == [(4, 8), (8, 12)]
    assert again.latencies_ms == [1.5, 2.0]
    assert again.measurements == file.measurements
    assert len(SampleFile.load(path)) == 2


@pytest.mark.parametrize("cut", [1, 2, 40, 200])
def test_a_torn_last_line_is_taken_again(space: ChannelSpace, tmp_path: Path, cut: int) -> None:
    path = tmp_path / "samples.jsonl"
    file = _file(path, space)
    file.add([4, 8], measured(1.5))
    file.add([8, 12], measured(2.0))
    path.write_bytes(path.read_bytes()[:-cut])
    torn = _file(path, space)
    complete = 2 if cut == 1 else 1  # losing the line's end alone loses nothing
    assert len(torn) == complete
    torn.add([6, 6], measured(1.7))
    again = _file(path, space)
    assert again.widths == [*[(4, 8), (8, 12)][:complete], (6, 6)]


@pytest.mark.parametrize(
    "line",
    [
        {"widths": [4, 8]},
        {"widths": ["a", "b"], "measurement": {}},
        [1, 2],
        {"widths": [4, 8], "measurement": {**measured(1.5).to_json(), "latency_ms": -1.0}},
        {"widths": [4, 8], "measurement": {**measured(1.5).to_json(), "kind": "plan"}},
    ],
)
def test_a_line_that_is_no_sample_is_refused(
    space: ChannelSpace, tmp_path: Path, line: Any
) -> None:
    path = tmp_path / "samples.jsonl"
    _file(path, space).add([4, 8], measured(1.5))
    append_line(path, line)
    with pytest.raises(FileFormatError, match="line 3: not a sample"):
        _file(path, space)


@pytest.mark.parametrize("content", [b"", b"\n", b"{", b"[]\n", b'{"kind": "x"}\n', b"\xff\xfe\n"])
def test_a_file_without_a_header_is_refused(
    space: ChannelSpace, tmp_path: Path, content: bytes
) -> None:
    (tmp_path / "samples.jsonl").write_bytes(content)
    with pytest.raises(FileFormatError, match="no readable header"):
        _file(tmp_path / "samples.jsonl", space)


def test_foreign_samples_are_refused(space: ChannelSpace, tmp_path: Path) -> None:
    path = tmp_path / "samples.jsonl"
    _file(path, space, threads=1).add([4, 8], measured(1.5))
    with pytest.raises(FileFormatError, match="use another file per runtime"):
        _file(path, space, threads=2)
    with pytest.raises(FileFormatError, match="measured on another network"):
        _file(path, trace(tiny("residual"), example()), threads=1)
    assert len(_file(path, space, threads=1)) == 1


class SteadyFamily:
    def __init__(self, space: ChannelSpace) -> None:
        self.space = space
        self.sessions: list[SteadySession] = []

    def session(self, widths: Sequence[int]) -> SteadySession:
        self.sessions.append(SteadySession(staircase_ms(self.space, widths)))
        return self.sessions[-1]


def test_sampling_goes_on_where_it_was_interrupted(space: ChannelSpace, tmp_path: Path) -> None:
    options = {"grid": 1, "seed": 3, "seconds_per_sample": 0.0}
    reference = SteadySession(2.0)
    family = SteadyFamily(space)
    whole, parts = _file(tmp_path / "a", space), _file(tmp_path / "b", space)
    seen = []
    collect(
        whole, space, family, reference, count=8, on_sample=lambda n, m: seen.append(n), **options
    )
    assert seen == list(range(1, 9))
    assert len(set(whole.widths)) == 8
    assert all(session.closed for session in family.sessions)
    for row, latency in zip(whole.widths, whole.latencies_ms, strict=True):
        assert latency == pytest.approx(staircase_ms(space, row))
    collect(parts, space, family, reference, count=3, **options)
    parts = _file(tmp_path / "b", space)
    collect(parts, space, family, reference, count=8, **options)
    assert parts.widths == whole.widths
    cost = collect(parts, space, family, reference, count=8, **options)
    assert cost.inference_seconds == 0.0


def test_sampling_more_than_there_is_stops(space: ChannelSpace, tmp_path: Path) -> None:
    few = trace(tiny("plain"), example(), floors={"0.0": 8, "1.0": 10})
    file = _file(tmp_path / "samples", few)
    with pytest.raises(MeasurementError, match="only 3 different widths on a grid of 1"):
        collect(
            file, few, SteadyFamily(few), SteadySession(2.0),
            count=4, grid=1, seed=0, seconds_per_sample=0.0,
        )  # fmt: skip
    assert len(file) == 3
