"""W-Gates: the gate function, the starting point, learning under a budget, resuming."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from helpers import MeasuredMacs
from networks import conv_bn, example, randomised, tiny
from torch import Tensor, nn

from wgates_plugin import ChannelSpace, trace
from wgates_plugin.efficiency import Budget, Limit, MacsModel, ParametersModel
from wgates_plugin.errors import ConfigError, InfeasibleTargetError, TrainingError
from wgates_plugin.integrations.torch_pruning import WGatesPruner
from wgates_plugin.strategies import WGates, WGatesSettings, fit_to_budget, uniform_widths
from wgates_plugin.strategies.gdp import GDPSettings, PolarisedGates
from wgates_plugin.strategies.unit_scores import widths_of
from wgates_plugin.strategies.wgates import WeightScores, filter_scores, starting_offsets
from wgates_plugin.strategies.wgates.functions import binary_step, squash, surrogate


def full_cost(space: ChannelSpace) -> float:
    return float(MacsModel(space)(torch.tensor(space.full_widths)))


def cost_of(gates: WGates, widths: tuple[int, ...]) -> float:
    return float(gates.budget.limits[0].model(torch.tensor(widths)))


def make(
    name: str = "residual",
    share: float = 0.5,
    network: nn.Module | None = None,
    steps: int | None = None,
    **settings: Any,
) -> WGates:
    """Gates that learn from the first step on; `test_wgates_measuring` has those that look first."""
    network = (network or tiny(name)).train()
    space = trace(network, example())
    budget = Budget.of(Limit(MacsModel(space), share * full_cost(space)))
    settings = {"measuring": 0, **settings}
    return WGates(network, space, budget, WGatesSettings(**settings), steps=steps).attach()


def train_step(gates: WGates, seed: int, optimizer: Any = None) -> dict[str, float]:
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(5, (8,), generator=generator)
    gates.network.zero_grad()
    nn.functional.cross_entropy(gates.network(example(8, seed=seed)), labels).backward()
    monitor = gates.regularize()
    if optimizer is not None:
        optimizer.step()
    return monitor


# The gate function


def test_the_step_and_its_surrogate() -> None:
    scores = torch.linspace(-1, 1, 401, dtype=torch.float64, requires_grad=True)
    gates = binary_step(scores)
    assert torch.equal(gates, (scores > 0).double())
    gates.sum().backward()
    points = scores.detach()
    expected = torch.where(points.abs() <= 0.5, 2 - 4 * points.abs(), torch.zeros(()).double())
    torch.testing.assert_close(scores.grad, expected)
    torch.testing.assert_close(surrogate(points), expected)
    assert float(torch.trapezoid(expected, points)) == pytest.approx(1.0, abs=1e-6)


def test_the_surrogate_is_the_derivative_of_a_smooth_step() -> None:
    """Bi-Real Net's polynomial on [-1/2, 1/2]: `1/2 + 2s + 2s^2` left of 0, `1/2 + 2s - 2s^2` right."""
    s = torch.linspace(-0.49, 0.49, 99, dtype=torch.float64, requires_grad=True)
    smooth = torch.where(s < 0, 0.5 + 2 * s + 2 * s * s, 0.5 + 2 * s - 2 * s * s)
    (slope,) = torch.autograd.grad(smooth.sum(), s)
    torch.testing.assert_close(surrogate(s.detach()), slope)


def test_squash_keeps_scores_in_reach() -> None:
    raw = torch.tensor([-50.0, -1e-4, 0.0, 1e-4, 50.0], dtype=torch.float64)
    scores = squash(raw)
    assert float(scores.abs().max()) <= 0.5
    torch.testing.assert_close(scores[1:4], raw[1:4])


# Scores


def test_filter_scores_equal_the_standardised_product() -> None:
    flat, theta = 3 + 5 * torch.randn(8, 27).double(), torch.randn(27).double()
    standard = (flat - flat.mean()) / flat.std(correction=0)
    torch.testing.assert_close(filter_scores(flat, theta), standard @ theta / 27)


def test_scores_do_not_depend_on_the_scale_of_weights() -> None:
    network = tiny("projection")
    scores = WeightScores(network, trace(network, example()))
    with torch.no_grad():
        for theta in scores.thetas:
            theta.normal_()
        before, norms = scores(), scores.norms()
        for module in network.modules():
            if isinstance(module, nn.Conv2d):
                module.weight.mul_(37.0)
        torch.testing.assert_close(scores(), before)
        torch.testing.assert_close(scores.norms(), norms)
    assert float(before.std()) > 0


def test_coupled_producers_add_up() -> None:
    network = tiny("projection")
    space = trace(network, example())
    scores = WeightScores(network, space)
    shared = space.unit_slice(space.names.index("1.main.1"))
    with torch.no_grad():
        for theta in scores.thetas:
            theta.normal_()
        expected = scores.offset[shared].clone()
        table = dict(network.named_modules())
        for name in ("1.main.1", "1.shortcut.0"):
            place = [m for m, _ in scores._producers].index(table[name])
            expected += filter_scores(table[name].weight.flatten(1), scores.thetas[place])
        torch.testing.assert_close(scores()[shared], squash(expected))


# The starting point


@pytest.mark.parametrize("grid", [1, 2, 4, 8])
@pytest.mark.parametrize("share", [0.3, 0.6, 1.0])
@pytest.mark.parametrize("name", ["residual", "grouped", "concat", "off-grid"])
def test_the_start_holds_the_budget_at_the_fitted_widths(
    name: str, share: float, grid: int
) -> None:
    network = None
    if name == "off-grid":  # full widths 12, 20, 17 lie between steps of 8
        layers = [conv_bn(3, 12), conv_bn(12, 20), conv_bn(20, 17)]
        head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(17, 5)]
        network = randomised(nn.Sequential(*layers, *head), 0)
    try:
        gates = make(name, share, network, grid=grid)
    except InfeasibleTargetError:
        space = trace(network or tiny(name), example())
        assert cost_at_least(space, grid) > share * full_cost(space)
        return
    space, budget = gates.space, gates.budget
    widths = gates.widths()
    assert cost_of(gates, widths) <= budget.limits[0].target
    norms = gates.scores.norms()
    start = uniform_widths(space, budget, grid)
    ranks = torch.cat(
        [norms[space.unit_slice(g)].argsort().argsort() / group.units
         for g, group in enumerate(space.groups)]
    )  # fmt: skip
    assert widths == fit_to_budget(space, ranks, start, budget, grid)
    for width, allowed in zip(widths, space.allowed_widths(grid), strict=True):
        assert width in allowed
    for index, (kept, group) in enumerate(zip(gates.plan().kept, space.groups, strict=True)):
        mine = norms[space.unit_slice(index)]
        gone = sorted(set(range(group.units)) - set(kept))
        if gone:
            assert float(mine[list(kept)].min()) >= float(mine[gone].max())


def cost_at_least(space: ChannelSpace, grid: int) -> float:
    return float(MacsModel(space)(torch.tensor(space.least_widths(grid))))


def test_starting_scores_stay_within_reach() -> None:
    space = trace(tiny("grouped"), example())
    norms = torch.rand(space.total_units)
    for widths in (space.least_widths(), space.full_widths):
        offsets = starting_offsets(space, norms, widths, grid=1, spread=0.4)
        assert float(offsets.abs().max()) <= 0.4 + 1e-6
        assert widths_of(space, offsets, 1) == tuple(widths)


def test_gates_at_the_start_are_those_of_the_plan() -> None:
    gates = make("grouped", grid=2)
    mask = gates.plan().mask.float()
    with torch.no_grad():
        assert torch.equal(gates._gates(), mask)
    assert torch.equal(gates._gates().detach(), mask)


# Learning


def test_channels_are_exchanged_at_constant_cost() -> None:
    gates = make("concat", 0.5, learning_rate=0.05)
    start = gates.plan()
    target = gates.budget.limits[0].target
    optimizer = torch.optim.SGD(gates.network.parameters(), lr=0.02)
    for seed in range(25):
        monitor = train_step(gates, seed, optimizer)
        assert monitor["violation"] < 0.5
    plan = gates.plan()
    assert cost_of(gates, plan.widths) <= target
    assert cost_of(gates, plan.widths) >= 0.7 * target
    assert plan.kept != start.kept
    assert sum(set(a) != set(b) for a, b in zip(plan.kept, start.kept, strict=True)) >= 2


def test_a_useful_channel_is_reopened_and_a_useless_one_closed() -> None:
    """Channel merits are known by construction: the head reads channels 0-3 only."""
    network = nn.Sequential(conv_bn(3, 8), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5))
    network = randomised(network, 0)
    with torch.no_grad():
        network[0][0].weight[:4].mul_(0.5)  # by norm, the useless half looks better
        network[3].weight[:, :4].mul_(8)
        network[3].weight[:, 4:].zero_()
    teacher = copy.deepcopy(network)
    gates = make(network=network, learning_rate=0.05)
    useful = {0, 1, 2, 3}
    assert not useful <= set(gates.plan().kept[0])
    network.requires_grad_(False)
    for module in network[0]:
        module.eval()  # the norm keeps its statistics while the gates learn
    for seed in range(150):
        x = example(16, seed=seed)
        with torch.no_grad():
            target = teacher(x)
        nn.functional.mse_loss(network(x), target).backward()
        gates.regularize()
    kept = gates.plan().kept[0]
    assert len(useful & set(kept)) == min(4, len(kept))


def test_a_frozen_network_learns_gates_alone() -> None:
    gates = make("residual", learning_rate=0.05)
    gates.network.requires_grad_(False)
    before = {name: p.clone() for name, p in gates.network.named_parameters()}
    thetas = [theta.detach().clone() for theta in gates.scores.thetas]
    train_step(gates, 0)
    assert all(p.grad is None for p in gates.network.parameters())
    assert all(torch.equal(before[n], p) for n, p in gates.network.named_parameters())
    assert any(
        not torch.equal(old, new) for old, new in zip(thetas, gates.scores.thetas, strict=True)
    )


def test_learning_rate_zero_freezes_the_gates() -> None:
    gates = make("residual", learning_rate=0.0)
    kept = gates.plan().kept
    for seed in range(3):
        train_step(gates, seed)
    assert gates.plan().kept == kept
    assert gates.step == 3


def test_accumulated_passes_step_the_gates_once() -> None:
    once, twice = make("residual", learning_rate=0.05), make("residual", learning_rate=0.05)
    for module in (*once.network.modules(), *twice.network.modules()):
        module.training = not isinstance(module, nn.BatchNorm2d)
    x = example(8)
    once.network(x).square().mean().backward()
    for part in x.split(4):
        (twice.network(part).square().mean() / 2).backward()
    torch.testing.assert_close(twice._leaf.grad, once._leaf.grad, rtol=1e-4, atol=1e-6)
    once.regularize()
    twice.regularize()
    assert once.step == twice.step == 1
    torch.testing.assert_close(twice.unit_scores(), once.unit_scores(), rtol=1e-3, atol=1e-5)


def test_evaluation_between_passes_leaves_the_gradient_alone() -> None:
    gates = make("residual")
    gates.network(example()).sum().backward()
    before = gates._leaf.grad.clone()
    gates.network.eval()
    with torch.no_grad():
        gates.network(example())
    gates.network(example()).sum().backward()
    assert torch.equal(gates._leaf.grad, before)


def test_learning_in_the_wrong_order_is_told() -> None:
    gates = make("residual")
    with pytest.raises(TrainingError, match="no gradient reached them"):
        gates.regularize()
    loss = gates.network(example()).sum()
    with pytest.raises(TrainingError, match=r"`loss.backward\(\)` before `regularize\(\)`"):
        gates.regularize()
    loss.backward()
    assert gates.regularize()["step"] == 1.0


def test_a_gradient_that_is_not_finite_steps_no_gate() -> None:
    gates = make("residual", 0.5, learning_rate=0.05)
    before = copy.deepcopy((gates.unit_scores(), gates.constraint.state_dict()))
    (gates.network(example()).sum() * float("nan")).backward()
    assert gates.regularize()["skipped"] == 1.0
    assert gates.step == 0
    assert torch.equal(gates.unit_scores(), before[0])
    assert torch.equal(gates.constraint.state_dict()["multipliers"], before[1]["multipliers"])
    with pytest.raises(TrainingError, match="no gradient reached them"):
        gates.regularize()  # what was collected is gone
    assert train_step(gates, 0)["step"] == 1.0


def test_weights_that_are_not_finite_have_no_plan() -> None:
    gates = make("residual")
    with torch.no_grad():
        gates.network[0][0].weight[0, 0] = float("inf")
    with pytest.raises(TrainingError, match=r"`0\.0`\) are not finite"):
        gates.plan()


def test_ranks_that_average_gradients_stay_alike() -> None:
    """Two ranks see different data; the average is all they share."""
    ranks = [make("residual", 0.5, learning_rate=0.05) for _ in range(2)]
    for step in range(4):
        leaves = []
        for rank, gates in enumerate(ranks):
            gates.network.zero_grad()
            (gates.network(example(4, seed=10 * step + rank)).sum() * (1 + 9 * rank)).backward()
            leaves.append(gates._leaf.grad.clone())
        mean = torch.stack(leaves).mean(0)
        for gates in ranks:
            gates.average = lambda gradient, mean=mean: mean
            gates.regularize()
        assert torch.equal(ranks[0].unit_scores(), ranks[1].unit_scores())
    assert ranks[0].balance == ranks[1].balance


def test_a_sliding_target_comes_down_to_the_target() -> None:
    gates = make("residual", 0.5, steps=20, start="open", slide_fraction=0.5, learning_rate=0.05)
    full, target = full_cost(gates.space), gates.budget.limits[0].target
    assert gates.widths() == gates.space.full_widths
    seen = []
    for seed in range(20):
        seen.append(gates.current_budget().limits[0].target)
        train_step(gates, seed)
    assert seen[0] == pytest.approx(full)
    assert seen == sorted(seen, reverse=True)
    assert seen[5] == pytest.approx((full + target) / 2)
    assert seen[10:] == [pytest.approx(target)] * 10
    assert cost_of(gates, gates.plan().widths) <= target
    with pytest.raises(ConfigError, match="give `steps`"):
        make("residual", start="open")


def test_a_budget_pulls_open_gates_shut() -> None:
    gates = make("plain", 0.4, steps=1, start="open", slide_fraction=1.0, learning_rate=0.05)
    gates.step = 1  # the target itself from now on
    for seed in range(60):
        monitor = train_step(gates, seed)
    assert monitor["violation"] < 0.25
    assert monitor["open_share"] < 0.95


def test_the_monitor_counts_gates_out_of_reach() -> None:
    gates = make("plain", 1.0)
    assert train_step(gates, 0)["dead_share"] == 0.0
    with torch.no_grad():
        gates.scores.offset[:5] = 9.0
        gates.scores.offset[5:7] = -9.0
    monitor = train_step(gates, 1)
    assert monitor["dead_share"] == pytest.approx(7 / 20)
    assert monitor["step"] == 2.0


@pytest.mark.parametrize(("asked", "multiple"), [(None, 4), (1, 1), (8, 8)])
def test_settings_of_ones_own_keep_to_the_widths_that_were_measured(
    asked: int | None, multiple: int
) -> None:
    network = tiny("plain")
    space = trace(network, example())
    model = MeasuredMacs(space, grid=4)
    budget = Budget.of(Limit(model, 0.9 * full_cost(space)))
    gates = WGates(network, space, budget, WGatesSettings(rounds=2, grid=asked))
    polarised = PolarisedGates(network, space, budget, GDPSettings(travel=2.0, grid=asked), steps=4)
    pruner = WGatesPruner(
        tiny("plain"),
        example(),
        efficiency=model,
        target=0.9 * full_cost(space),
        settings=WGatesSettings(rounds=2, grid=asked),
    )
    assert [gates.grid, polarised.grid, pruner.round_to or 1] == [multiple] * 3


def test_floors_and_grid_bind_while_learning() -> None:
    network = tiny("plain").train()
    space = trace(network, example(), floors={"0.0": 5})
    model = MacsModel(space)
    budget = Budget.of(Limit(model, 0.9 * full_cost(space)))
    settings = WGatesSettings(grid=4, learning_rate=0.2, measuring=0)
    gates = WGates(network, space, budget, settings).attach()
    with torch.no_grad():
        gates.scores.offset.fill_(-0.4)  # as if learning had closed everything
    assert gates.widths() == (8, 4)
    with torch.no_grad():
        assert float(gates._gates().sum()) == 12.0
    for seed in range(5):
        train_step(gates, seed)
        assert gates.plan().widths[0] == 8
        assert gates.plan().widths[1] % 4 == 0


def test_several_limits_hold_together() -> None:
    network = tiny("concat").train()
    space = trace(network, example())
    widths = torch.tensor(space.full_widths)
    limits = [
        Limit(model, share * float(model(widths)))
        for model, share in ((MacsModel(space), 0.6), (ParametersModel(space), 0.4))
    ]
    settings = WGatesSettings(learning_rate=0.05, measuring=0)
    gates = WGates(network, space, Budget.of(*limits), settings).attach()
    for seed in range(5):
        train_step(gates, seed)
    chosen = torch.tensor(gates.plan().widths)
    assert all(float(limit.model(chosen)) <= limit.target for limit in limits)


@pytest.mark.parametrize("constraint", ["augmented-lagrangian", "linear", "log"])
@pytest.mark.parametrize("start", ["target", "open"])
def test_a_resumed_run_continues_identically(constraint: str, start: str) -> None:
    options = {"steps": 8, "start": start, "constraint": constraint, "learning_rate": 0.05}
    whole = make("concat", 0.5, **options)
    optimizer = torch.optim.SGD(whole.network.parameters(), lr=0.02)
    for seed in range(4):
        train_step(whole, seed, optimizer)
    kept = copy.deepcopy((whole.state_dict(), whole.network.state_dict()))
    for seed in range(4, 8):
        train_step(whole, seed, optimizer)
    network = tiny("concat")
    network.load_state_dict(kept[1])
    resumed = make("concat", 0.5, network, **options)
    resumed.load_state_dict(kept[0])
    optimizer = torch.optim.SGD(resumed.network.parameters(), lr=0.02)
    for seed in range(4, 8):
        train_step(resumed, seed, optimizer)
    assert torch.equal(resumed.unit_scores(), whole.unit_scores())
    assert resumed.plan().kept == whole.plan().kept
    assert (resumed.step, resumed.balance) == (whole.step, whole.balance)


def test_state_is_plain_enough_to_load_without_unpickling(tmp_path: Any) -> None:
    gates = make("residual")
    train_step(gates, 0)
    torch.save(gates.state_dict(), tmp_path / "gates.pt")
    state = torch.load(tmp_path / "gates.pt", weights_only=True)
    other = make("residual")
    other.load_state_dict(state)
    with torch.no_grad():
        other.network.load_state_dict(gates.network.state_dict())
    assert torch.equal(other.unit_scores(), gates.unit_scores())


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"learning_rate": -1.0}, "learning_rate"),
        ({"learning_rate": float("nan")}, "learning_rate"),
        ({"grid": 0}, "grid"),
        ({"grid": 2.5}, "grid"),
        ({"start": "closed"}, "known: target, open"),
        ({"constraint": "hard"}, "augmented-lagrangian"),
        ({"spread": 0.5}, "spread"),
        ({"slide_fraction": 0.0}, "slide_fraction"),
    ],
)
def test_wrong_settings(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        WGatesSettings(**options)


def test_wrong_settings_are_listed_at_once() -> None:
    with pytest.raises(ConfigError) as caught:
        WGatesSettings(grid=-1, start="x", spread=2.0)
    assert len(caught.value.problems) == 3


# From scores to widths


def _random_scores(space: ChannelSpace) -> Tensor:
    return torch.randn(space.total_units, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("grid", [1, 4])
@pytest.mark.parametrize("share", [0.4, 0.8])
@pytest.mark.parametrize("name", ["grouped", "concat", "depthwise"])
def test_fitted_widths_hold_the_budget_and_fill_it(name: str, share: float, grid: int) -> None:
    space = trace(tiny(name), example())
    budget = Budget.of(Limit(MacsModel(space), share * full_cost(space)))
    if cost_at_least(space, grid) > share * full_cost(space):
        with pytest.raises(InfeasibleTargetError, match="out of reach"):
            fit_to_budget(space, _random_scores(space), space.full_widths, budget, grid)
        return
    for start in (space.full_widths, space.least_widths(grid)):
        widths = fit_to_budget(space, _random_scores(space), start, budget, grid)
        assert float(budget.excess(torch.tensor(widths))) <= 0
        for index, allowed in enumerate(space.allowed_widths(grid)):
            wider = [w for w in allowed if w > widths[index]]
            if wider:  # one more step anywhere breaks the budget
                more = [*widths[:index], wider[0], *widths[index + 1 :]]
                assert float(budget.excess(torch.tensor(more))) > 0


def test_the_better_channels_survive_the_fit() -> None:
    space = trace(tiny("plain"), example())
    scores = torch.cat([torch.full((8,), 1.0), torch.full((12,), 0.1)])
    budget = Budget.of(Limit(ParametersModel(space), 500.0))
    first = fit_to_budget(space, scores, space.full_widths, budget)
    second = fit_to_budget(space, 1.1 - scores, space.full_widths, budget)
    assert first[0] > second[0]
    assert first[1] < second[1]


def test_uniform_widths_are_uniform() -> None:
    space = trace(tiny("plain"), example())
    budget = Budget.of(Limit(MacsModel(space), 0.5 * full_cost(space)))
    first, second = uniform_widths(space, budget)
    assert abs(first / 8 - second / 12) <= 1 / 8
    assert uniform_widths(space, Budget.of(Limit(MacsModel(space), 1e9))) == (8, 12)
