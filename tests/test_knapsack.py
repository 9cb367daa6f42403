"""The knapsack: packed widths against every allowed choice, saliency against gradients by hand."""

from __future__ import annotations

import copy
import itertools
from typing import Any

import pytest
import torch
from networks import CLASSES, conv_bn, example, tiny
from torch import Tensor, nn

from wgates_plugin import ChannelSpace, trace
from wgates_plugin.efficiency import Budget, Limit, MacsModel, ParametersModel
from wgates_plugin.errors import ConfigError
from wgates_plugin.strategies import Task, make_strategy
from wgates_plugin.strategies.budgeting import holds
from wgates_plugin.strategies.criteria import criterion_scores
from wgates_plugin.strategies.criteria.repaired import TaylorImportance
from wgates_plugin.strategies.knapsack import (
    kept_saliency,
    pack,
    saliency_by_width,
    taylor_saliency,
)

pytest.importorskip("scipy")


def batches(count: int = 2) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(3)
    return [
        (example(4, seed=seed), torch.randint(CLASSES, (4,), generator=generator))
        for seed in range(count)
    ]


def budget_of(space: ChannelSpace, share: float) -> Budget:
    full = torch.tensor(space.full_widths)
    models = (MacsModel(space), ParametersModel(space))
    return Budget.of(*(Limit(model, share * float(model(full))) for model in models))


def task(network: nn.Module, **changes: Any) -> Task:
    space = trace(network, example())
    return Task(
        copy.deepcopy(network), space, budget_of(space, 0.5), example(), batches(), **changes
    )


def best_of_all(space: ChannelSpace, saliency: Tensor, budget: Budget) -> float:
    """The share of all saliency that the best of all allowed widths keep."""
    rows = torch.tensor(list(itertools.product(*space.allowed_widths())), dtype=torch.float64)
    rows = rows[budget.excess(rows) <= 0]
    worth = torch.zeros(len(rows), dtype=torch.float64)
    for place, (group, table) in enumerate(
        zip(space.groups, saliency_by_width(space, saliency), strict=True)
    ):
        worth += table[(rows[:, place] / group.ties).long()]
    return float(worth.max() / saliency.sum())


@pytest.mark.parametrize("share", [0.3, 0.6])
@pytest.mark.parametrize("name", ["plain", "residual", "grouped", "flattened", "projection"])
def test_packed_widths_are_near_the_best_of_all_and_never_below_the_greedy(
    name: str, share: float
) -> None:
    space = trace(tiny(name), example(), min_fraction=0.2)
    budget = budget_of(space, share)
    gaps = []
    for seed in range(3):
        generator = torch.Generator().manual_seed(seed)
        saliency = torch.rand(space.total_units, generator=generator).double() ** 3
        packed = pack(space, saliency, budget)
        assert holds(budget, packed.widths)
        assert packed.kept == pytest.approx(
            kept_saliency(space, saliency, packed.widths) / float(saliency.sum())
        )
        assert packed.kept >= packed.kept_greedily
        gaps.append(best_of_all(space, saliency, budget) - packed.kept)
    assert min(gaps) >= -1e-9
    assert max(gaps) < 0.02
    assert sorted(gaps)[1] < 1e-9


def test_programs_are_counted_and_rounds_hold_for_each_start() -> None:
    space = trace(tiny("residual"), example(), min_fraction=0.2)
    saliency = torch.rand(space.total_units, generator=torch.Generator().manual_seed(0)).double()
    budget = budget_of(space, 0.3)
    none = pack(space, saliency, budget, rounds=0)
    assert (none.programs, none.kept) == (0, none.kept_greedily)
    one = pack(space, saliency, budget, rounds=1)
    assert 1 <= one.programs <= 2 * 3
    assert pack(space, saliency, budget).programs > one.programs


@pytest.mark.parametrize("name", ["residual", "flattened", "concat"])
def test_saliency_is_the_mean_first_order_change_of_all_that_goes_with_a_unit(name: str) -> None:
    given = task(tiny(name))
    network = copy.deepcopy(given.network).eval()
    products = {parameter: torch.zeros_like(parameter) for parameter in network.parameters()}
    for inputs, targets in batches():
        network.zero_grad()
        nn.functional.cross_entropy(network(inputs), targets).backward()
        for parameter, total in products.items():
            assert parameter.grad is not None
            total += (parameter * parameter.grad).detach().abs() / len(batches())
    expected = torch.zeros(given.space.total_units + 1)  # last: channels of no group
    for module, side in given.space.slots_of:
        product = products[network.get_parameter(f"{module}.weight")]
        index = given.space.unit_index(module, side)
        assert index is not None
        by_channel = product.transpose(0, 1) if side == "in" else product
        expected.index_add_(0, torch.from_numpy(index), by_channel.flatten(1).sum(1)
                            if product.dim() > 1 else product)  # fmt: skip
    found = taylor_saliency(given, scale="loss")
    assert found.dtype == torch.float64
    assert torch.allclose(found.float(), expected[:-1], rtol=1e-4)


def test_tied_channels_count_together() -> None:
    """Of a producer in two conv groups, a unit is one filter in each of them."""
    body = (conv_bn(4, 8, groups=2), conv_bn(8, 8, groups=2), nn.Flatten(), nn.Linear(512, CLASSES))
    network = nn.Sequential(conv_bn(3, 4), *body)
    given = task(network)
    index = given.space.names.index("2.0")
    assert given.space.groups[index].ties == 2
    mean = criterion_scores(
        given.network,
        given.space,
        TaylorImportance(group_reduction="sum", normalizer=None),
        batches(),
    )
    mine = given.space.unit_slice(index)
    assert torch.allclose(taylor_saliency(given, scale="loss")[mine].float(), 2 * mean[mine])


def test_groups_of_equal_weight_keep_their_order_within() -> None:
    given = task(nn.Sequential(conv_bn(3, 8), conv_bn(8, 12), nn.Flatten(), nn.Linear(768, 5)))
    space = given.space
    plain, scaled = (taylor_saliency(given, scale=scale) for scale in ("loss", "group"))
    for index in range(len(space.groups)):
        mine = space.unit_slice(index)
        assert float(scaled[mine].mean()) == pytest.approx(1.0)
        assert torch.allclose(scaled[mine] * plain[mine].mean(), plain[mine])
    # A group that the loss does not feel stays at nothing.
    with torch.no_grad():
        given.network[1][1].weight.zero_()
        given.network[1][1].bias.fill_(-1.0)
    assert torch.isfinite(taylor_saliency(given, scale="group")).all()
    decided = [
        make_strategy("knapsack", {"scale": scale}).decide(given) for scale in ("loss", "group")
    ]
    assert all(holds(given.budget, decision.widths) for decision in decided)


def test_saliency_of_some_batches() -> None:
    network = tiny("plain")
    some = make_strategy("knapsack", {"batches": 1}).decide(task(network))
    first = task(network)
    first.train_loader = batches()[:1]
    assert torch.equal(some.scores, make_strategy("knapsack").decide(first).scores)
    assert not torch.equal(some.scores, make_strategy("knapsack").decide(task(network)).scores)


def test_all_wrong_options_at_once() -> None:
    with pytest.raises(ConfigError) as caught:
        make_strategy("knapsack", {"scale": "log", "choices": 2, "rounds": -1, "batches": 0})
    assert len(caught.value.problems) == 4
