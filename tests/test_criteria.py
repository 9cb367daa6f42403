"""torch-pruning's criteria as strategies: their scores, our budgets; the flawed ones repaired."""

from __future__ import annotations

import copy
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch_pruning as tp
from helpers import snapshot
from networks import TINY, conv_bn, example, randomised, tiny
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from torch_pruning.pruner.importance import FPGMImportance as ShippedFPGM
from torch_pruning.pruner.importance import OBDCImportance

from wgates_plugin import ChannelSpace, remove, trace
from wgates_plugin.dependencies import DependencyTrace
from wgates_plugin.efficiency import Budget, Limit, LPNet, MacsModel, ParametersModel
from wgates_plugin.errors import ConfigError, InfeasibleTargetError, PlanError, TrainingError
from wgates_plugin.strategies.budgeting import threshold_widths
from wgates_plugin.strategies.criteria import (
    CRITERIA,
    criterion_scores,
    importance_scores,
    plan_by_criterion,
)
from wgates_plugin.strategies.criteria.gradients import gradients_of
from wgates_plugin.strategies.criteria.group import tp_group
from wgates_plugin.strategies.criteria.plan import SCOPES
from wgates_plugin.strategies.criteria.refused import REFUSED
from wgates_plugin.strategies.criteria.repaired import (
    FPGMImportance,
    HessianImportance,
    TaylorImportance,
)
from wgates_plugin.verification import TOLERANCE, removal_error

NO_DATA = [name for name, criterion in CRITERIA.items() if not criterion.needs_data]


def data(batches: int = 2, batch: int = 4) -> list[tuple[Tensor, Tensor]]:
    return [
        (
            example(batch, seed=seed),
            torch.randint(5, (batch,), generator=torch.Generator().manual_seed(seed)),
        )
        for seed in range(batches)
    ]


def budget_of(space: ChannelSpace, share: float = 0.5) -> Budget:
    model = MacsModel(space)
    return Budget.of(Limit(model, share * float(model(torch.tensor(space.full_widths)))))


# Every criterion, every budget


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("criterion", CRITERIA)
@pytest.mark.parametrize("name", ["residual", "grouped", "concat", "flattened"])
def test_every_criterion_prunes_to_the_budget(name: str, criterion: str, scope: str) -> None:
    network = tiny(name).train()
    if name == "flattened" and criterion == "bn-scale":
        pytest.skip("its linear layer has no BatchNorm")
    space = trace(network, example(), min_channels=2)
    budget = budget_of(space)
    for parameter in network.parameters():
        parameter.grad = torch.ones_like(parameter)
    before, state = snapshot(network), torch.get_rng_state()
    plans = [
        plan_by_criterion(network, space, criterion, budget, data=data(), scope=scope)
        for _ in range(2)
    ]
    assert snapshot(network) == before
    assert torch.equal(torch.get_rng_state(), state)
    assert plans[0].kept == plans[1].kept
    assert plans[0].note["strategy"] == criterion
    cost = float(budget.limits[0].model(torch.tensor(plans[0].widths)))
    assert 0.8 * budget.limits[0].target <= cost <= budget.limits[0].target
    smaller = remove(copy.deepcopy(network), plans[0], example())
    assert removal_error(network, smaller, plans[0], example()) <= TOLERANCE


def test_milliseconds_grid_and_several_limits() -> None:
    network = nn.Sequential(conv_bn(3, 16), conv_bn(16, 24), nn.Flatten(), nn.Linear(24 * 64, 5))
    randomised(network, 0)
    space = trace(network, example(), floors={"1.0": 12})
    widths = [[a, b] for a in (4, 8, 12, 16) for b in (6, 12, 18, 24)]
    lpnet = LPNet.fit(
        space, widths, [0.5 + 0.05 * a + 0.01 * a * b / 4 for a, b in widths], structure="mlp"
    )
    full = float(lpnet(torch.tensor([[16.0, 24.0]])).item())
    limits = (Limit(lpnet, 0.8 * full), Limit(ParametersModel(space), 8000.0))
    plan = plan_by_criterion(network, space, "l1", Budget.of(*limits), grid=4)
    assert all(width % 4 == 0 for width in plan.widths)
    assert plan.widths[1] >= 12
    assert plan.widths != space.full_widths
    for limit in limits:
        assert float(limit.model(torch.tensor([plan.widths]))) <= limit.target
    with pytest.raises(InfeasibleTargetError):
        plan_by_criterion(network, space, "l1", Budget.of(Limit(ParametersModel(space), 50.0)))


def test_the_threshold_is_the_lowest_that_holds() -> None:
    space = trace(tiny("plain"), example())
    scores = torch.arange(space.total_units).float()
    budget = budget_of(space, 0.4)
    best = None
    for bound in range(space.total_units + 1):
        kept = scores >= bound
        widths = tuple(
            max(1, int(kept[space.unit_slice(g)].sum())) for g in range(len(space.groups))
        )
        if float(budget.excess(torch.tensor(widths, dtype=torch.float64))) <= 0:
            best = widths
            break
    assert threshold_widths(space, scores, budget) == best


# Scores as torch-pruning gives them


@pytest.mark.parametrize("criterion", ["l1", "l2", "group-norm", "lamp", "fpgm"])
@pytest.mark.parametrize("name", TINY)
def test_groups_from_records_score_as_torch_prunings_own(name: str, criterion: str) -> None:
    network = tiny(name)
    traced = DependencyTrace(network, example())
    space = traced.space()
    importance = CRITERIA[criterion].make()
    ours = importance_scores(network, space, importance)
    theirs = importance_scores(network, space, importance, traced=traced)
    assert torch.allclose(ours, theirs, rtol=1e-4)
    assert len(set(theirs.tolist())) > space.total_units / 2


@pytest.mark.parametrize("name", ["grouped", "grouped-two-ways", "flattened", "signed-concat"])
def test_root_indices_agree_with_torch_prunings(name: str) -> None:
    network = tiny(name)
    traced = DependencyTrace(network, example())
    space = traced.space()
    for index, record in enumerate(space.groups):
        root = network.get_submodule(record.name)
        prune = traced.graph.get_pruner_of_module(root).prune_out_channels
        theirs = traced.graph.get_pruning_group(root, prune, list(range(record.channels)))
        expected = {
            (item.dep.target.module, item.dep.handler.__name__, channel, owner % record.units)
            for item in theirs
            if isinstance(item.dep.target.module, nn.Module)
            for channel, owner in zip(item.idxs, item.root_idxs, strict=True)
        }
        found = {
            (item.dep.target.module, item.dep.handler.__name__, channel, owner % record.units)
            for item in tp_group(network, space, index)
            for channel, owner in zip(item.idxs, item.root_idxs, strict=True)
        }
        assert found
        assert found <= expected


def test_local_takes_the_same_share_and_global_does_not() -> None:
    network = tiny("plain")
    with torch.no_grad():  # of the second layer, three filters stand out
        network[1][0].weight[3:] *= 1e-3
    space = trace(network, example())
    plans = {
        scope: plan_by_criterion(network, space, "l1", budget_of(space), scope=scope)
        for scope in SCOPES
    }
    shares = {
        scope: [w / g.channels for w, g in zip(plan.widths, space.groups, strict=True)]
        for scope, plan in plans.items()
    }
    assert abs(shares["local"][0] - shares["local"][1]) < 0.15
    assert shares["global"][0] - shares["global"][1] > 0.4


def test_isomorphic_takes_the_same_share_of_each_structure_and_not_of_each_group() -> None:
    body = [conv_bn(3, 24), conv_bn(24, 24), conv_bn(24, 24)]
    network = randomised(nn.Sequential(*body, nn.Flatten(), nn.Linear(24 * 64, 5)), 0)
    with torch.no_grad():  # in one of two equal groups, three filters stand out
        network.get_parameter("1.0.weight")[3:] *= 1e-3
    space = trace(network, example())
    plan = plan_by_criterion(network, space, "l1", budget_of(space), scope="isomorphic")
    alike, odd = sum(plan.widths[:2]) / 48, plan.widths[2] / 24
    assert plan.widths[0] - plan.widths[1] >= 6
    assert abs(alike - odd) < 0.1
    overall = plan_by_criterion(network, space, "l1", budget_of(space))
    assert abs(sum(overall.widths[:2]) / 48 - overall.widths[2] / 24) > abs(alike - odd)


def test_global_scores_do_not_depend_on_a_layers_scale() -> None:
    networks = [tiny("plain") for _ in range(2)]
    with torch.no_grad():
        networks[1][0][0].weight *= 100
    plans = []
    for network in networks:
        space = trace(network, example())
        plans.append(plan_by_criterion(network, space, "l2", budget_of(space)))
    assert plans[0].kept == plans[1].kept


def test_random_has_a_seed() -> None:
    network = tiny("residual")
    space = trace(network, example())
    first, again, other = (
        criterion_scores(network, space, "random", seed=seed) for seed in (0, 0, 1)
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


@pytest.mark.parametrize(
    "criterion", [*CRITERIA, TaylorImportance(), HessianImportance(), FPGMImportance()]
)
def test_channels_that_the_loss_does_not_feel_are_the_first_to_go(criterion: Any) -> None:
    """A branch whose last scale starts at 0, as ResNets are often made: its inner channels get no
    gradient. No other score changes by the way they are brought to a mean of 1."""
    network = tiny("residual")
    with torch.no_grad():
        network[1].main[2].weight.zero_()
    space = trace(network, example())
    inner = space.unit_slice(space.names.index("1.main.0.0"))
    found = criterion_scores(network, space, criterion, data())
    assert torch.isfinite(found).all()
    if criterion in ("taylor", "hessian") or isinstance(
        criterion, (TaylorImportance, HessianImportance)
    ):
        assert not found[inner].any()
        plan = plan_by_criterion(network, space, criterion, budget_of(space), data=data())
        assert plan.widths[space.names.index("1.main.0.0")] <= 2  # of 6: what room was left over


@pytest.mark.parametrize("name", ["l1", "l2", "group-norm", "fpgm", "bn-scale"])
def test_groups_of_zeros_score_zero(name: str) -> None:
    network = tiny("plain")
    with torch.no_grad():
        for parameter in network[0].parameters():
            parameter.zero_()
        network[1][0].weight.zero_()
    space = trace(network, example())
    found = criterion_scores(network, space, name)
    assert not found[space.unit_slice(0)].any()


@pytest.mark.parametrize(
    "name", ["l1", "l2", "group-norm", "fpgm", "bn-scale", "taylor", "hessian"]
)
def test_a_mean_of_one_is_torch_prunings(name: str) -> None:
    network = tiny("residual")
    space = trace(network, example())
    found = criterion_scores(network, space, name, data())
    raw: Any = CRITERIA[name].make()
    raw.normalizer = lambda scores: scores / scores.mean()
    assert torch.equal(found, criterion_scores(network, space, raw, data()))


def test_scores_that_are_not_finite_are_told_as_such() -> None:
    network = tiny("plain")
    space = trace(network, example())

    def endless(group: Any) -> Tensor:
        return torch.full((len(group[0].idxs),), float("inf"))

    with pytest.raises(
        PlanError, match=r"not finite for 2 groups \(`0\.0`, \.\.\.\); check weights"
    ):
        importance_scores(network, space, endless)


class Signed(nn.Module):
    """`torch.cat([relu(x), relu(-x)])`: one norm behind it has two scales for each channel."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([torch.relu(x), torch.relu(-x)], dim=1)


@pytest.mark.parametrize("behind", ["flatten", "concat"])
def test_several_scales_of_a_channel_in_one_norm_count_by_their_mean(behind: str) -> None:
    if behind == "flatten":
        norm: Any = nn.BatchNorm1d(8 * 16)
        body = [nn.Flatten(), norm, nn.ReLU(), nn.Linear(8 * 16, 5)]
    else:
        norm = nn.BatchNorm2d(16)
        body = [Signed(), norm, conv_bn(16, 6), nn.Flatten(), nn.Linear(6 * 16, 5)]
    first = nn.Conv2d(3, 8, 3, stride=2, padding=1)
    network = randomised(nn.Sequential(first, *body), 0)
    space = trace(network, example())
    scales = norm.weight.detach().abs()
    expected = scales.view(8, 16).mean(1) if behind == "flatten" else scales.view(2, 8).mean(0)
    found = criterion_scores(network, space, "bn-scale")
    assert torch.allclose(found[space.unit_slice(0)], expected / expected.mean())


@pytest.mark.parametrize("name", ["residual", "concat", "grouped-two-ways"])
def test_one_scale_of_a_channel_per_norm_counts_as_torch_pruning_has_it(name: str) -> None:
    network = tiny(name)
    space = trace(network, example())
    shipped = importance_scores(network, space, tp.importance.BNScaleImportance())
    assert torch.allclose(criterion_scores(network, space, "bn-scale"), shipped)


def test_an_importance_of_ones_own() -> None:
    network = tiny("residual")
    space = trace(network, example())

    def last_first(group: Any) -> Tensor:
        return torch.arange(len(group[0].idxs)).float() + 1

    plan = plan_by_criterion(network, space, last_first, budget_of(space))
    for group, kept in zip(space.groups, plan.kept, strict=True):
        assert kept == tuple(range(group.units - len(kept), group.units))


# What is flawed as shipped


def test_taylor_as_shipped_leaves_batchnorm_out_and_ours_does_not() -> None:
    network = tiny("plain")
    space = trace(network, example())
    group = tp_group(network, space, 0)
    shipped, repaired = (
        kind(normalizer=None, group_reduction="sum")
        for kind in (tp.importance.TaylorImportance, TaylorImportance)
    )
    conv, norm, reader = network[0][0], network[0][1], network[1][0]
    with gradients_of(network, data(), nn.functional.cross_entropy, repaired):
        by_conv = (conv.weight * conv.weight.grad).abs().flatten(1).sum(1)
        by_reader = (reader.weight * reader.weight.grad).abs().sum((0, 2, 3))
        by_norm = (norm.weight * norm.weight.grad).abs()
        assert bool((by_norm > 0).all())
        assert torch.allclose(shipped(group), by_conv + by_reader)
        assert torch.allclose(repaired(group), by_conv + by_reader + by_norm)


def test_taylor_is_the_mean_of_what_each_batch_says() -> None:
    network = tiny("plain").eval()
    group = tp_group(network, trace(network, example()), 0)
    # The same images twice, their loss turned round: with signs nothing would be left.
    (inputs, targets), *_ = data()
    turned = iter([1.0, -1.0])

    def loss(logits: Tensor, labels: Tensor) -> Tensor:
        return next(turned) * nn.functional.cross_entropy(logits, labels)

    importance = TaylorImportance(normalizer=None, group_reduction="sum")
    with gradients_of(network, [(inputs, targets)], nn.functional.cross_entropy, importance):
        once = importance(group)
    with gradients_of(network, [(inputs, targets)] * 2, loss, importance):
        assert torch.allclose(importance(group), once)
    turned = iter([1.0, -1.0])
    signed = TaylorImportance(normalizer=None, group_reduction="sum", multivariable=True)
    with gradients_of(network, [(inputs, targets)] * 2, loss, signed):
        assert float(signed(group).abs().max()) < 1e-6 * float(once.max())


@pytest.mark.parametrize("criterion", ["taylor", "hessian"])
def test_the_seed_decides_what_is_drawn_and_all_random_states_are_given_back(
    criterion: str,
) -> None:
    network = tiny("plain").eval()
    space = trace(network, example())
    inputs, targets = (torch.cat(part) for part in zip(*data(), strict=True))

    def noisy(batch: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
        first, second = zip(*batch, strict=True)
        return torch.stack(first) * (1 + np.random.rand()), torch.stack(second)

    generator = torch.Generator().manual_seed(5)
    loader = DataLoader(
        TensorDataset(inputs, targets), 4, shuffle=True, generator=generator, collate_fn=noisy
    )
    before = (np.random.get_state()[1].copy(), torch.get_rng_state(), generator.get_state())
    found = [criterion_scores(network, space, criterion, loader, seed=s) for s in (1, 1, 2)]
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2])
    after = (np.random.get_state()[1], torch.get_rng_state(), generator.get_state())
    assert all(np.array_equal(one, two) for one, two in zip(before, after, strict=True))


@pytest.mark.parametrize("criterion", ["taylor", "hessian"])
def test_some_batches_are_the_first_ones(criterion: str) -> None:
    network = tiny("plain").eval()
    space = trace(network, example())
    some = criterion_scores(network, space, criterion, data(3), batches=2)
    assert torch.equal(some, criterion_scores(network, space, criterion, data(2)))
    assert not torch.equal(some, criterion_scores(network, space, criterion, data(3)))
    found = [
        plan_by_criterion(network, space, criterion, budget_of(space), data=batches, batches=1)
        for batches in (data(3), data(1))
    ]
    assert found[0].kept == found[1].kept
    for wrong in (0, True, 1.5):
        with pytest.raises(ConfigError, match=f"batches is {wrong}, needs a whole number"):
            criterion_scores(network, space, criterion, data(), batches=wrong)  # type: ignore[arg-type]


def test_some_batches_are_those_of_the_seed() -> None:
    """Of a loader that shuffles, whose generator is given back."""
    network = tiny("plain").eval()
    space = trace(network, example())
    inputs, targets = (torch.cat(part) for part in zip(*data(4), strict=True))
    own = torch.Generator()
    loader = DataLoader(TensorDataset(inputs, targets), 4, shuffle=True, generator=own)
    found = []
    for state in (1, 2):
        before = own.manual_seed(state).get_state()
        found.append(criterion_scores(network, space, "taylor", loader, batches=1))
        assert torch.equal(own.get_state(), before)
    assert torch.equal(found[0], found[1])


def test_hessian_leaves_out_samples_whose_labels_are_ignored() -> None:
    network = tiny("plain").eval()
    space = trace(network, example())
    (inputs, targets), second = data()
    ignored = targets.clone()
    ignored[1] = -100
    kept = [0, 2, 3]
    found = criterion_scores(network, space, "hessian", [(inputs, ignored), second])
    without = criterion_scores(network, space, "hessian", [(inputs[kept], targets[kept]), second])
    assert torch.allclose(found, without)
    criterion_scores(network, space, "taylor", [(inputs, ignored), second])
    with pytest.raises(TrainingError, match=r"labels of all samples are ones to ignore \(-100\)"):
        criterion_scores(network, space, "hessian", [(inputs, torch.full((4,), -100))])


def test_a_sample_without_a_finite_loss_is_named() -> None:
    network = tiny("plain").eval()
    space = trace(network, example())
    first, (inputs, targets) = data()
    inputs[2] = float("nan")
    broken = [first, (inputs, targets)]
    with pytest.raises(TrainingError, match="loss is nan on sample 2 of batch 1 of `data`"):
        criterion_scores(network, space, "hessian", broken)
    with pytest.raises(TrainingError, match="loss is nan on batch 1 of `data`"):
        criterion_scores(network, space, "taylor", broken)


def test_hessian_takes_targets_of_any_form() -> None:
    """As mixup has them: two labels for each image, and one weight for all."""
    network = tiny("plain").eval()
    space = trace(network, example())
    (inputs, targets), *_ = data()

    def mixed(logits: Tensor, target: Any) -> Tensor:
        one, two, share = target
        entropy = nn.functional.cross_entropy
        return share * entropy(logits, one) + (1 - share) * entropy(logits, two)

    both = (targets, targets, torch.tensor(0.3))
    found = criterion_scores(network, space, "hessian", [(inputs, both)], loss=mixed)
    plain = criterion_scores(network, space, "hessian", [(inputs, targets)])
    assert torch.allclose(found, plain, rtol=1e-4)


def test_hessian_of_a_network_that_squeezes() -> None:
    """One image by itself loses its batch dimension there."""

    class Squeezing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.head = nn.Conv2d(3, 8, 3), nn.Linear(8, 5)

        def forward(self, x: Tensor) -> Tensor:
            features = self.first(x).relu().mean((2, 3), keepdim=True).squeeze()
            found: Tensor = self.head(features)
            return found

    class Plain(Squeezing):
        def forward(self, x: Tensor) -> Tensor:
            found: Tensor = self.head(self.first(x).relu().mean((2, 3)))
            return found

    torch.manual_seed(0)
    network, plain = Squeezing().eval(), Plain().eval()
    plain.load_state_dict(network.state_dict())
    inputs, targets = torch.randn(4, 3, 8, 8), torch.tensor([0, 1, 2, 3])
    found, expected = (
        criterion_scores(each, trace(each, inputs), "hessian", [(inputs, targets)])
        for each in (network, plain)
    )
    assert torch.allclose(found, expected, rtol=1e-4)


@pytest.mark.parametrize("criterion", ["taylor", "hessian"])
def test_labels_of_32_bits(criterion: str) -> None:
    network = tiny("plain").eval()
    space = trace(network, example())
    short = [(inputs, targets.int()) for inputs, targets in data()]
    found = criterion_scores(network, space, criterion, short)
    assert torch.equal(found, criterion_scores(network, space, criterion, data()))


def test_hessian_as_shipped_keeps_the_last_sample_and_ours_accumulates() -> None:
    network = tiny("plain").eval()
    space = trace(network, example())
    group = tp_group(network, space, 0)
    batches = data()
    squares: list[dict[nn.Parameter, Tensor]] = []
    for inputs, targets in batches:
        for row in range(len(inputs)):
            network.zero_grad()
            out = network(inputs[row : row + 1])
            nn.functional.cross_entropy(out, targets[row : row + 1]).backward()
            squares.append({p: p.grad.square() for p in network.parameters()})

    def by_hand(samples: list[dict[nn.Parameter, Tensor]]) -> Tensor:
        def merit(weight: nn.Parameter) -> Tensor:
            return weight.detach() ** 2 * sum(s[weight] for s in samples) / len(samples)

        conv, norm, reader = network[0][0], network[0][1], network[1][0]
        return (
            merit(conv.weight).flatten(1).sum(1)
            + merit(reader.weight).sum((0, 2, 3))
            + merit(norm.weight)
        )

    found = []
    for kind in (tp.importance.HessianImportance, HessianImportance):
        importance = kind(normalizer=None, group_reduction="sum")
        with gradients_of(network, batches, nn.functional.cross_entropy, importance):
            found.append(importance(group))
    assert torch.allclose(found[0], by_hand(squares[-1:]), rtol=1e-4)
    assert torch.allclose(found[1], by_hand(squares), rtol=1e-4)
    assert not torch.allclose(found[0], found[1], rtol=0.05)


def test_fpgm_as_shipped_takes_a_filter_for_its_negative_and_fails_on_conv_groups() -> None:
    network = nn.Sequential(nn.Conv2d(1, 4, 1, bias=False), nn.ReLU(), nn.Conv2d(4, 1, 1))
    with torch.no_grad():
        network[0].weight.copy_(torch.tensor([-1.0, 1.0, 1.0, 1.0]).view(4, 1, 1, 1))
    space = trace(network, torch.randn(1, 1, 4, 4))
    group = tp_group(network, space, 0)
    shipped, repaired = (
        kind(group_reduction="first", normalizer=None) for kind in (ShippedFPGM, FPGMImportance)
    )
    assert shipped(group).tolist() == [0.0, 0.0, 0.0, 0.0]
    assert repaired(group).tolist() == [6.0, 2.0, 2.0, 2.0]
    grouped = tiny("grouped")
    records = trace(grouped, example())
    with pytest.raises(PlanError, match="FPGMImportance: fails on group"):
        importance_scores(grouped, records, ShippedFPGM())
    assert torch.isfinite(importance_scores(grouped, records, FPGMImportance())).all()


def test_obdc_as_shipped_fails_on_a_convolutional_network() -> None:
    """The reason why it is refused, in torch-pruning's own words."""
    network = tiny("plain")
    pruner = tp.pruner.BasePruner(
        network,
        (example(),),
        tp.importance.RandomImportance(),
        in_channel_groups={},
        out_channel_groups={},
    )
    with pytest.raises(TypeError, match="NoneType"):
        OBDCImportance(num_classes=5)._prepare_model(network, pruner)


@pytest.mark.parametrize("name", CRITERIA)
def test_depthwise_weights_count_for_none_as_documented(name: str) -> None:
    network, changed = tiny("depthwise"), tiny("depthwise")
    space = trace(network, example())
    found = dict(changed.named_modules())
    depthwise = [layer.name for layer in space.layers if layer.kind == "depthwise"]
    assert depthwise
    for layer in depthwise:
        weight = found[layer].get_parameter("weight")
        gradient = torch.rand(weight.shape, generator=torch.Generator().manual_seed(1))
        with torch.no_grad():
            weight.mul_(1 + 9 * torch.arange(len(weight)).view(-1, 1, 1, 1))
        weight.grad = gradient
    importance: Any = CRITERIA[name].make()
    scores = []
    for one in (network, changed):
        for parameter in one.parameters():
            parameter.grad = (
                torch.ones_like(parameter) if parameter.grad is None else parameter.grad
            )
        if isinstance(importance, HessianImportance):
            importance.accumulate_grad(one)
        torch.manual_seed(0)
        scores.append(importance_scores(one, space, importance))
    assert torch.equal(*scores)


def test_growing_reg_as_shipped_does_nothing_to_batchnorm() -> None:
    """The reason why it is refused: its regulariser adds to a copy."""
    network = tiny("plain")
    pruner = tp.pruner.GrowingRegPruner(
        network,
        (example(),),
        tp.importance.MagnitudeImportance(),
        reg=1.0,
        in_channel_groups={},
        out_channel_groups={},
    )
    for parameter in network.parameters():
        parameter.grad = torch.zeros_like(parameter)
    pruner.regularize(network)
    assert float(network[0][0].weight.grad.abs().sum()) > 0
    assert float(network[0][1].weight.grad.abs().sum()) == 0


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_repaired_is_refused_by_name(name: str) -> None:
    network = tiny("plain")
    space = trace(network, example())
    with pytest.raises(ConfigError, match=f"`{name}`: torch-pruning"):
        plan_by_criterion(network, space, name, budget_of(space))


@pytest.mark.parametrize(
    ("importance", "words"),
    [
        (tp.importance.TaylorImportance(), "leaves every BatchNorm out"),
        (tp.importance.GroupTaylorImportance(), "leaves every BatchNorm out"),
        (tp.importance.HessianImportance(), "last gradient only"),
    ],
)
def test_shipped_ones_are_refused_as_objects_too(importance: Any, words: str) -> None:
    network = tiny("plain")
    space = trace(network, example())
    with pytest.raises(ConfigError, match=words):
        plan_by_criterion(network, space, importance, budget_of(space), data=data())


def test_the_readme_names_them_all() -> None:
    text = (Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8")
    rows = text.split("| criterion | |", 1)[1].split("\n\n", 1)[0].splitlines()[2:]
    named = [name for row in rows for name in re.findall(r"`([^`]+)`", row.split("|")[1])]
    assert sorted(named) == sorted([*CRITERIA, *REFUSED])


# Bad input


def test_unknown_words_list_the_known_ones() -> None:
    network = tiny("plain")
    space = trace(network, example())
    with pytest.raises(ConfigError, match=r"`l3`: unknown; known: l1, l2"):
        plan_by_criterion(network, space, "l3", budget_of(space))
    with pytest.raises(ConfigError, match=r"scope `everywhere`: known: global, local"):
        plan_by_criterion(network, space, "l1", budget_of(space), scope="everywhere")


@pytest.mark.parametrize("criterion", ["taylor", "hessian", TaylorImportance()])
def test_gradients_need_data(criterion: Any) -> None:
    network = tiny("plain")
    space = trace(network, example())
    with pytest.raises(ConfigError, match="give `data`"):
        plan_by_criterion(network, space, criterion, budget_of(space))
    with pytest.raises(TrainingError, match="no batch"):
        plan_by_criterion(network, space, criterion, budget_of(space), data=[])
    broken = [(example(2) * float("nan"), torch.tensor([0, 1]))]
    before = snapshot(network)
    with pytest.raises(TrainingError, match="loss is nan"):
        plan_by_criterion(network, space, criterion, budget_of(space), data=broken)
    assert snapshot(network) == before


def test_a_criterion_without_an_opinion_says_so() -> None:
    network = tiny("biased")
    space = trace(network, example())
    with pytest.raises(PlanError, match=r"BNScaleImportance: gives no score .* 2 groups"):
        plan_by_criterion(network, space, "bn-scale", budget_of(space))
