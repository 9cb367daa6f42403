"""Gates that are measured before they learn: what that says, when it ends, how it resumes."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from networks import Head, conv, conv_bn, example, randomised, tiny
from test_wgates import cost_of, full_cost
from torch import Tensor, nn

from wgates_plugin import trace
from wgates_plugin.efficiency import Budget, Limit, MacsModel
from wgates_plugin.errors import ConfigError
from wgates_plugin.plan import PruningPlan
from wgates_plugin.strategies import WGates, WGatesSettings, fit_to_budget
from wgates_plugin.strategies.budgeting import threshold_widths
from wgates_plugin.strategies.wgates.measuring import GateMerits
from wgates_plugin.strategies.wgates.starting import StartingPoint


def make(
    network: nn.Module | str = "residual",
    share: float = 0.5,
    *,
    steps: int | None = None,
    average: Callable[[Tensor], Tensor] | None = None,
    ranking: Tensor | None = None,
    **settings: Any,
) -> WGates:
    network = (tiny(network) if isinstance(network, str) else network).train()
    space = trace(network, example())
    budget = Budget.of(Limit(MacsModel(space), share * full_cost(space)))
    options = WGatesSettings(**{"measuring": 3, "rounds": 1, "learning_rate": 0.05, **settings})
    gates = WGates(network, space, budget, options, steps=steps, average=average, ranking=ranking)
    return gates.attach()


def train(
    gates: WGates,
    steps: int,
    *,
    start: int = 0,
    factor: float = 1.0,
    rate: float = 0.02,
    told: bool = False,
) -> dict[str, float]:
    """Steps of training along with the weights; the loss is multiplied by `factor`."""
    optimizer = torch.optim.SGD(gates.network.parameters(), lr=rate / factor)
    monitor: dict[str, float] = {}
    for seed in range(start, start + steps):
        labels = torch.randint(5, (8,), generator=torch.Generator().manual_seed(seed))
        loss = nn.functional.cross_entropy(gates.network(example(8, seed=seed)), labels)
        optimizer.zero_grad()
        (factor * loss).backward()
        monitor = gates.regularize(scale=factor if told else 1.0)
        optimizer.step()
    return monitor


@pytest.mark.parametrize("name", ["residual", "grouped", "concat", "depthwise"])
@pytest.mark.parametrize("scores", ["weights", "free"])
def test_the_network_computes_as_without_gates_while_they_are_measured(
    name: str, scores: str
) -> None:
    gates, plain = make(name, scores=scores), tiny(name).train()
    thetas = copy.deepcopy(list(gates.scores.parameters()))
    optimizer = torch.optim.SGD(plain.parameters(), lr=0.02)
    for step in range(3):
        labels = torch.randint(5, (8,), generator=torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        nn.functional.cross_entropy(plain(example(8, seed=step)), labels).backward()
        optimizer.step()
        monitor = train(gates, 1, start=step)
        assert monitor["open_share"] == 1.0
        assert monitor["step"] == step + 1
    found, expected = gates.network.state_dict(), plain.state_dict()
    for key, value in expected.items():
        torch.testing.assert_close(found[key], value, rtol=1e-5, atol=1e-6)
    assert all(torch.equal(*pair) for pair in zip(thetas, gates.scores.parameters(), strict=True))
    # Measured: now they act, under the budget, and learn.
    assert cost_of(gates, gates.widths()) <= gates.budget.limits[0].target
    start = gates.unit_scores()
    with torch.no_grad():
        assert torch.equal(gates._gates(), gates.plan().mask.float())
    assert train(gates, 1, start=3)["open_share"] < 1.0
    assert not torch.equal(gates.unit_scores(), start)


def test_capped_groups_are_measured_whole() -> None:
    network = tiny("plain").train()
    space = trace(network, example(), caps={"0.0": 3})
    budget = Budget.of(Limit(MacsModel(space), 0.8 * full_cost(space)))
    gates = WGates(network, space, budget, WGatesSettings(measuring=2, rounds=1)).attach()
    for seed in range(2):
        assert torch.equal(gates._gates().detach(), torch.ones(20))
        train(gates, 1, start=seed)
        assert gates.widths()[0] <= 3
    assert float(gates._gates().detach().sum()) == sum(gates.widths())


@pytest.mark.parametrize("name", ["residual", "concat"])
def test_the_start_is_one_threshold_over_what_was_measured(name: str) -> None:
    gates = make(name, 0.6, grid=2)
    seen = []
    for seed in range(3):
        gates.network(example(8, seed=seed)).square().mean().backward()
        seen.append(gates._leaf.grad.double())
        gates.regularize()
    merits = torch.stack(seen).square().mean(0)
    space, budget = gates.space, gates.budget
    torch.testing.assert_close(gates.merits.mean(), merits / merits.max())
    widths = threshold_widths(space, merits, budget, 2)
    assert gates.widths() == fit_to_budget(space, merits / merits.max(), widths, budget, 2)
    for index, kept in enumerate(gates.plan().kept):
        mine = merits[space.unit_slice(index)]
        gone = [unit for unit in range(len(mine)) if unit not in kept]
        assert not gone or float(mine[list(kept)].min()) >= float(mine[gone].max())


@pytest.mark.parametrize("name", ["residual", "concat", "depthwise"])
def test_channels_close_in_rounds_on_the_way_to_the_target(name: str) -> None:
    gates = make(name, 0.4, measuring=8, rounds=4)
    space, (limit,) = gates.space, gates.budget.limits
    full, opened = full_cost(space), []
    for step in range(8):
        monitor = train(gates, 1, start=step)
        if step % 2 == 0:
            opened.append(gates.starting.opened())
            cost = limit.model(torch.tensor(PruningPlan.from_masks(space, opened[-1]).widths))
            assert float(cost) <= full - step / 8 * (full - limit.target) + 1e-6
            assert monitor["open_share"] == pytest.approx(float(opened[-1].mean()))
    assert opened[0].all()
    assert not any(mask.requires_grad for mask in opened)  # a step's gradient would add to the last
    opened.append(gates.plan().mask.float())
    for wider, narrower in itertools.pairwise(opened):
        assert narrower.sum() < wider.sum()
        assert (narrower > wider).sum() <= 1  # reopened by what the budget had left
    merits = gates.merits.mean()
    assert merits is not None
    for index in range(len(space.groups)):
        mine, last = (each[space.unit_slice(index)] for each in (merits, opened[-2]))
        assert last.all() or float(mine[last > 0].min()) > float(mine[last == 0].max())


@pytest.mark.parametrize(("rate", "exchanges"), [(0.0, False), (0.3, True)])
def test_what_learning_changed_of_the_start_is_told(rate: float, exchanges: bool) -> None:
    gates = make("residual", measuring=2, learning_rate=rate)
    train(gates, 2)
    assert gates.only_measured
    train(gates, 6, start=2)
    assert not gates.only_measured
    widths, scores = gates.widths(), gates.decided_scores()
    facts = gates.learned(scores, widths)
    assert (facts["steps_measured"], facts["steps_learned"]) == (2, 6)
    first = PruningPlan.top(gates.space, gates.starting.offsets(), widths)
    now = PruningPlan.top(gates.space, scores, widths)
    assert facts["units_kept"] == sum(map(len, now.kept))
    assert facts["units_exchanged_by_learning"] == sum(
        len(set(mine) - set(theirs)) for mine, theirs in zip(now.kept, first.kept, strict=True)
    )
    assert (facts["units_exchanged_by_learning"] > 0) == exchanges


def test_channels_close_by_merit_for_their_price() -> None:
    """Equal merits in groups that cost much and in one that costs little."""
    layers = [conv(3, 16, 3), conv(16, 16, 3), nn.MaxPool2d(4), conv(16, 16, 3), conv(16, 4, 1)]
    space = trace(nn.Sequential(*layers), example())
    model = MacsModel(space)
    budget = Budget.of(Limit(model, 0.3 * full_cost(space)))
    rows = torch.tensor(space.full_widths, dtype=torch.float64).repeat(len(space.groups) + 1, 1)
    for index, lowest in enumerate(space.least_widths(1)):
        rows[index + 1, index] = lowest
    closing = rows[0] - rows[1:].diagonal()
    per_unit = (model(rows)[0] - model(rows)[1:]) / closing
    widths = {}
    for price in (0.0, 1.0):
        settings = WGatesSettings(measuring=1, rounds=1, price=price)
        start = StartingPoint(space, budget, settings, lambda: torch.ones(space.total_units))
        prices = start._prices()[list(space.offsets[: len(space.groups)])]
        assert torch.allclose(prices, per_unit / per_unit.max())
        same = torch.linspace(1.0, 2.0, 16).repeat(len(space.groups))
        start.merits.add(same, torch.ones(space.total_units))
        widths[price] = start._widths(start.merits.mean())
    dearest, cheapest = int(per_unit.argmax()), int(per_unit.argmin())
    assert widths[1.0][dearest] < widths[0.0][dearest]
    assert widths[1.0][cheapest] == 16
    assert sum(widths[1.0]) > sum(widths[0.0])


def test_what_is_left_is_measured_anew_without_what_closed() -> None:
    """Two equal channels need each other little; once one is closed, the other does all."""
    network = tiny("plain").train()
    space = trace(network, example())
    merits = GateMerits(4, rounds=2)
    everything, but_one = torch.ones(space.total_units), torch.ones(space.total_units)
    but_one[0] = 0.0
    small = torch.full((space.total_units,), 1.0)
    small[:2] = 0.1
    for _ in range(2):
        merits.add(small, everything)
    assert merits.round == 1
    merits.close(but_one)
    alone = small.clone()
    alone[:2] = 3.0
    for _ in range(2):
        merits.add(alone, but_one)
    found = merits.mean()
    assert found is not None
    assert int(found.argmax()) == 1
    assert int(found.argmin()) == 0
    assert not merits.wanted


def test_ratios_say_how_wide_the_rounds_end() -> None:
    network = tiny("plain").train()
    space = trace(network, example())
    budget = Budget.of(Limit(MacsModel(space), 0.9 * full_cost(space)))
    settings = WGatesSettings(measuring=4, rounds=2, learning_rate=0.0)
    gates = WGates(network, space, budget, settings, opening=lambda _: (4, 4)).attach()
    train(gates, 2)
    gates.network(example())
    assert PruningPlan.from_masks(space, gates.starting.opened()).widths == (6, 8)
    train(gates, 2, start=2)
    assert gates.widths() == (4, 4)


@pytest.mark.parametrize("stop", [0, 1, 2, 3, 5])
@pytest.mark.parametrize("opening", [None, (5, 4)])
def test_a_resumed_measuring_ends_where_an_uninterrupted_one_does(
    stop: int, opening: tuple[int, ...] | None, tmp_path: Any
) -> None:
    def gates_on(network: nn.Module, carried: Tensor | None = None) -> WGates:
        space = trace(network.train(), example())
        budget = Budget.of(Limit(MacsModel(space), 0.5 * full_cost(space)))
        settings = WGatesSettings(measuring=3, learning_rate=0.05)
        return WGates(
            network,
            space,
            budget,
            settings,
            carried=carried,
            opening=None if opening is None else lambda _: opening,
        ).attach()

    whole = gates_on(tiny("plain"), torch.linspace(-0.4, 0.4, 20))
    train(whole, stop)
    torch.save([whole.state_dict(), whole.network.state_dict()], tmp_path / "state.pt")
    scores = whole.unit_scores()
    train(whole, 6 - stop, start=stop)
    resumed = gates_on(tiny("plain", 1))
    state, weights = torch.load(tmp_path / "state.pt", weights_only=True)
    resumed.network.load_state_dict(weights)
    resumed.load_state_dict(state)
    assert torch.equal(resumed.unit_scores(), scores)
    train(resumed, 6 - stop, start=stop)
    assert torch.equal(resumed.scores.offset, whole.scores.offset)
    assert torch.equal(resumed.unit_scores(), whole.unit_scores())
    assert (resumed.step, resumed.balance) == (whole.step, whole.balance)
    assert resumed.plan().kept == whole.plan().kept


@pytest.mark.parametrize("measuring", [0, 3])
def test_gates_learn_at_widths_that_were_settled_for_them(measuring: int, tmp_path: Any) -> None:
    """And go on there after an interruption, under the budget that is exact there."""
    asked: list[tuple[Tensor, tuple[int, ...]]] = []

    def gates_on(network: nn.Module) -> WGates:
        space = trace(network.train(), example())
        full = full_cost(space)
        budget = Budget.of(Limit(MacsModel(space), 0.6 * full))
        narrower = Budget.of(Limit(MacsModel(space), 0.4 * full))

        def settle(scores: Tensor, widths: Sequence[int]) -> tuple[tuple[int, ...], Budget]:
            asked.append((scores, tuple(widths)))
            return fit_to_budget(space, *asked[0], narrower), narrower

        settings = WGatesSettings(measuring=measuring, learning_rate=0.0)
        return WGates(network, space, budget, settings, settle=settle).attach()

    gates = gates_on(tiny("plain"))
    train(gates, 4)
    (first,) = asked
    assert cost_of(gates, first[1]) > gates.budget.limits[0].target  # what was wanted had to shrink
    assert cost_of(gates, gates.widths()) <= gates.budget.limits[0].target
    assert gates.widths() == fit_to_budget(gates.space, *first, gates.budget)
    torch.save([gates.state_dict(), gates.network.state_dict()], tmp_path / "state.pt")
    resumed = gates_on(tiny("plain", 1))
    state, weights = torch.load(tmp_path / "state.pt", weights_only=True)
    resumed.network.load_state_dict(weights)
    resumed.load_state_dict(state)
    assert resumed.budget.limits[0].target == gates.budget.limits[0].target
    assert resumed.widths() == gates.widths()
    train(gates, 2, start=4)
    train(resumed, 2, start=4)
    assert torch.equal(resumed.unit_scores(), gates.unit_scores())


def test_a_channel_that_nobody_reads_has_no_merit_and_goes_first() -> None:
    network = tiny("plain")
    with torch.no_grad():
        network[0][0].weight[3] *= 100  # the best of all by its norm
        network[1][0].weight[:, 3] = 0
    gates = make(network, 0.9)
    assert 3 in gates.plan().kept[0]
    # Weights rest, for a step of training would have it read again.
    train(gates, 3, rate=0.0)
    merits = gates.merits.mean()
    assert merits is not None
    assert float(merits[3]) == 0.0
    assert int((merits[:8] == 0).sum()) == 1
    assert 3 not in gates.plan().kept[0]
    assert int(gates.unit_scores()[:8].argmin()) == 3


def test_depthwise_weights_and_norms_count() -> None:
    """By norm and producer alone, channel 0 is the best of the group and channel 1 the worst."""
    network = nn.Sequential(
        conv_bn(3, 8), nn.Sequential(conv(8, 8, groups=8), nn.BatchNorm2d(8)), nn.ReLU(),
        conv_bn(8, 6, 1), Head(6),
    )  # fmt: skip
    network = randomised(network, 0)
    with torch.no_grad():
        network[0][0].weight[0] *= 100
        network[0][0].weight[1] *= 0.01
        norm = network[1][1]
        norm.weight.fill_(1.0)
        norm.bias.fill_(0.0)
        norm.weight[0] = 0.0  # behind the depthwise convolution: channel 0 is always zero
        norm.weight[1] = 20.0
    norms = make(copy.deepcopy(network), 0.5)
    assert 0 in norms.plan().kept[0]
    assert 1 not in norms.plan().kept[0]
    gates = make(network, 0.5)
    train(gates, 3, rate=0.0)
    merits = gates.merits.mean()
    assert merits is not None
    assert float(merits[0]) == 0.0
    assert int(merits[:8].argmax()) == 1
    assert 0 not in gates.plan().kept[0]
    assert 1 in gates.plan().kept[0]


def test_before_the_first_step_norms_decide() -> None:
    for settings in ({}, {"scores": "free"}, {"grid": 2}):
        measured, plain = make(**settings), make(measuring=0, **settings)
        assert torch.equal(measured.unit_scores(), plain.unit_scores())
        assert measured.plan().kept == plain.plan().kept


def test_a_phase_that_ends_early_is_decided_by_what_was_seen() -> None:
    short, full = make(measuring=50), make(measuring=2)
    for gates in (short, full):
        train(gates, 2)
    assert short.merits.wanted
    assert torch.equal(short.unit_scores(), full.unit_scores())
    assert short.plan().kept == full.plan().kept
    assert cost_of(short, short.plan().widths) <= short.budget.limits[0].target


@pytest.mark.parametrize(
    ("steps", "measuring", "expected"),
    [(None, 50, 50), (400, 50, 50), (70, 50, 35), (3, 50, 1), (1, 50, 0), (100, 0, 0)],
)
def test_at_most_half_of_the_phase_is_spent(
    steps: int | None, measuring: int, expected: int
) -> None:
    assert make(steps=steps, measuring=measuring).merits.steps == expected


def test_nothing_is_measured_where_it_would_have_no_say() -> None:
    assert not make(start="open", steps=100).merits.wanted
    ranking = torch.rand(20, generator=torch.Generator().manual_seed(0))
    gates = make("plain", ranking=ranking)
    assert not gates.merits.wanted
    for where in (slice(0, 8), slice(8, 20)):
        assert torch.equal(gates.unit_scores()[where].argsort(), ranking[where].argsort())


@pytest.mark.parametrize("told", [False, True])
@pytest.mark.parametrize("factor", [1e-8, 1000.0])
def test_the_scale_of_the_loss_is_of_no_account(factor: float, told: bool) -> None:
    plain, scaled = make("concat"), make("concat")
    for count in (2, 1):  # while measuring, and right after it
        train(plain, count, start=plain.step)
        train(scaled, count, start=scaled.step, factor=factor, told=told)
        torch.testing.assert_close(scaled.unit_scores(), plain.unit_scores())
        assert scaled.plan().kept == plain.plan().kept
        assert scaled.widths() == plain.widths()
    merits = scaled.merits.mean()
    assert merits is not None
    assert float(merits.max()) == 1.0  # rules that decide by them have scales of their own


def test_a_gradient_is_averaged_before_it_is_squared() -> None:
    """Two ranks of opposite gradients have seen that nothing changes."""
    ranks = [make() for _ in range(2)]
    for step in range(3):
        leaves = []
        for rank, gates in enumerate(ranks):
            gates.network(example(4, seed=10 * step + rank)).square().mean().backward()
            leaves.append(gates._leaf.grad.clone())
        leaves[1][0] = -leaves[0][0]
        mean = torch.stack(leaves).mean(0)
        for gates in ranks:
            gates.average = lambda gradient, mean=mean: mean
            gates.regularize()
    merits = [gates.merits.mean() for gates in ranks]
    assert float(merits[0][0]) == 0.0
    assert float(merits[0][1:].min()) > 0.0
    assert torch.equal(*merits)
    assert torch.equal(ranks[0].unit_scores(), ranks[1].unit_scores())


def test_a_bad_batch_is_not_measured() -> None:
    clean, hit = make(), make()
    train(clean, 3)
    train(hit, 1)
    buffers = copy.deepcopy(dict(hit.network.named_buffers()))
    (hit.network(example()).sum() * float("inf")).backward()
    assert hit.regularize()["skipped"] == 1.0
    for name, buffer in hit.network.named_buffers():
        buffer.copy_(buffers[name])
    assert hit.merits.done == hit.step == 1
    train(hit, 2, start=1)
    assert torch.equal(hit.unit_scores(), clean.unit_scores())


def test_a_bad_batch_in_a_later_round_reports_what_is_open() -> None:
    gates = make("residual", 0.4, measuring=8, rounds=4)
    before = train(gates, 3)
    (gates.network(example()).sum() * float("inf")).backward()
    skipped = gates.regularize()
    assert skipped["open_share"] == before["open_share"] < 1.0
    assert skipped["violation"] == before["violation"]


def test_the_first_learning_step_finds_the_budgets_weight() -> None:
    """It is an average from then on, which must not start from nothing."""
    late, early = make(measuring=2), make(measuring=0)
    train(late, 2, rate=0.0)
    with torch.no_grad():
        early.scores.offset.copy_(late.scores.offset)
    for module in (*late.network.modules(), *early.network.modules()):
        module.training = not isinstance(module, nn.BatchNorm2d)
    early.network.load_state_dict(late.network.state_dict())
    for gates in (late, early):
        gates.network(example(8)).square().mean().backward()
        gates.regularize()
    assert late.balance == early.balance > 0


def test_merits_without_a_gradient_are_zero() -> None:
    merits = GateMerits(2)
    assert merits.mean() is None
    merits.add(torch.zeros(4), torch.ones(4))
    assert merits.wanted
    merits.add(torch.zeros(4), torch.ones(4))
    assert not merits.wanted
    assert torch.equal(merits.mean(), torch.zeros(4, dtype=torch.float64))


def test_rounds_are_no_more_than_a_float_keeps_apart() -> None:
    with pytest.raises(ConfigError, match="rounds 21: must be 20 or less"):
        WGatesSettings(rounds=21)
    merits = GateMerits(20, rounds=20)
    opened = torch.ones(21)
    for step in range(20):
        merits.add(torch.ones(21), opened)
        opened[step] = 0.0
        merits.close(opened)
    found = merits.mean()
    assert found is not None
    assert (found[1:] > found[:-1]).all()
    assert float(found.min()) > 0.0


@pytest.mark.parametrize("measuring", [-1, 2.5, True, "50"])
def test_wrong_lengths_are_refused(measuring: Any) -> None:
    with pytest.raises(ConfigError, match=r"measuring .*: must be a whole number from 0"):
        WGatesSettings(measuring=measuring)
