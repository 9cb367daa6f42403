"""Channel scores by torch-pruning's importances, and plans from them under our budgets and floors.

Every criterion scores channels of a torch-pruning group; scores are added up by root index and
averaged over tied conv groups, which gives one score per unit of a `ChannelSpace`. The groups are
made from the space's records, so that nothing is traced. Some criteria do not compute what their
papers say in torch-pruning 1.6.1: they are repaired here (see `criteria_repaired.py`) or refused.

No criterion counts the weights of depthwise convolutions, which lose their channels with their group
all the same: torch-pruning's importances know the pruning functions of dense and grouped
convolutions, linear layers and norms only, so that `group-norm`, `lamp`, `taylor` and `hessian` pass
them over in silence. The repaired ones do as well, so that scores stay comparable with theirs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np
import torch
import torch_pruning as tp
from torch import Tensor, nn
from torch_pruning.dependency.dependency import Dependency
from torch_pruning.dependency.group import Group
from torch_pruning.dependency.node import Node
from torch_pruning.pruner.function import PrunerBox
from torch_pruning.pruner.importance import (
    GroupHessianImportance,
    GroupTaylorImportance,
    OBDCImportance,
)

from wgates_plugin.channels import ChannelSpace, Slot
from wgates_plugin.dependencies import DependencyTrace
from wgates_plugin.efficiency.base import Budget
from wgates_plugin.errors import ConfigError, PlanError
from wgates_plugin.option_checks import is_whole
from wgates_plugin.plan import PruningPlan
from wgates_plugin.strategies import budgeting
from wgates_plugin.strategies.criteria_repaired import (
    BNScaleImportance,
    FPGMImportance,
    HessianImportance,
    LossFunction,
    TaylorImportance,
    gradients_of,
    mean_one,
)
from wgates_plugin.strategies.ratios import structure_of
from wgates_plugin.training.as_found import random_state_kept, seed_epoch
from wgates_plugin.training.evaluation import cross_entropy
from wgates_plugin.transforms.scatter import Scatter, ScatterPruner

Importance = Callable[[Any], Tensor | None]


@dataclass(frozen=True)
class Criterion:
    """One entry of the table.

    Attributes:
        make: builds the importance.
        paper: what it computes.
        needs_data: gradients have to be taken first.
    """

    make: Callable[[], Any]
    paper: str
    needs_data: bool = False


CRITERIA: dict[str, Criterion] = {
    "l1": Criterion(
        lambda: tp.importance.GroupMagnitudeImportance(
            p=1, group_reduction="first", normalizer=mean_one
        ),
        "L1 norm of the filters of the group's first producer (Li et al., ICLR 2017)",
    ),
    "l2": Criterion(
        lambda: tp.importance.GroupMagnitudeImportance(
            p=2, group_reduction="first", normalizer=mean_one
        ),
        "squared L2 norm of the filters of the group's first producer",
    ),
    "group-norm": Criterion(
        lambda: tp.importance.GroupMagnitudeImportance(p=2, normalizer=mean_one),
        "squared L2 norm over all coupled layers (DepGraph, Fang et al., CVPR 2023)",
    ),
    "fpgm": Criterion(
        FPGMImportance,
        "distance from the other filters of the layer (He et al., CVPR 2019), over coupled layers",
    ),
    "lamp": Criterion(
        tp.importance.LAMPImportance, "layer-adaptive magnitude (Lee et al., ICLR 2021)"
    ),
    "bn-scale": Criterion(
        BNScaleImportance,
        "BatchNorm scales (Network Slimming, Liu et al., ICCV 2017)",
    ),
    "random": Criterion(tp.importance.RandomImportance, "chance"),
    "taylor": Criterion(
        TaylorImportance, "first-order loss change (Molchanov et al., CVPR 2019)", needs_data=True
    ),
    "hessian": Criterion(
        HessianImportance,
        "second-order loss change, diagonal Fisher (Optimal Brain Damage)",
        needs_data=True,
    ),
}
"""Name -> criterion."""

REFUSED: dict[str, str] = {
    "obdc": (
        "torch-pruning's OBDCImportance prepares attention groups only and raises a TypeError on "
        "every other one, so that no convolutional network gets a score; use `hessian`"
    ),
    "growing-reg": (
        "torch-pruning's GrowingRegPruner is a regulariser, not an importance, and its BatchNorm "
        "step adds to a copy of the gradient and so does nothing; use `group-norm`"
    ),
}
"""Name -> why it is not offered."""

SCOPES = ("global", "local", "isomorphic")

_FLAWED: tuple[tuple[type, str], ...] = (
    (TaylorImportance, ""),  # repaired ones come first: they are subclasses
    (HessianImportance, ""),
    (
        GroupTaylorImportance,
        "torch-pruning's Taylor importance looks for GroupNorm where it means BatchNorm and leaves "
        'every BatchNorm out; use the criterion "taylor"',
    ),
    (
        GroupHessianImportance,
        "torch-pruning's Hessian importance keeps the last gradient only instead of accumulating "
        'them; use the criterion "hessian"',
    ),
    (OBDCImportance, REFUSED["obdc"]),
)


def plan_by_criterion(
    network: nn.Module,
    space: ChannelSpace,
    criterion: str | Importance,
    budget: Budget,
    grid: int = 1,
    data: Iterable[Any] | None = None,
    *,
    scope: str = "global",
    loss: LossFunction = cross_entropy,
    seed: int = 0,
    batches: int | None = None,
) -> PruningPlan:
    """A plan that keeps `budget`, with the channels that a torch-pruning criterion rates highest.

    Args:
        criterion: a name from `CRITERIA`, or an importance of torch-pruning or of yours.
        data: batches (inputs, targets), for criteria that need gradients.
        scope: "global" ranks all groups together, their scores first brought to mean 1 in each (LAMP
            is made comparable by its own rule); "local" takes the same share from every group;
            "isomorphic" ranks groups of equal structure together, and takes the same share of each
            such set (Fang et al., ECCV 2024).
        loss: of logits and targets, a mean over the batch.
        seed: of `random`, and of what data draw at random.
        batches: that are taken of the data; None takes all. "hessian" runs every image by itself.

    Raises:
        ConfigError: an unknown or refused criterion or scope, no number of batches, or data are
            missing.
        PlanError: the criterion says nothing about a group. InfeasibleTargetError: the budget.
    """
    plan, _ = decide_by_criterion(
        network,
        space,
        criterion,
        budget,
        grid,
        data,
        scope=scope,
        loss=loss,
        seed=seed,
        batches=batches,
    )
    return plan


def decide_by_criterion(
    network: nn.Module,
    space: ChannelSpace,
    criterion: str | Importance,
    budget: Budget,
    grid: int = 1,
    data: Iterable[Any] | None = None,
    *,
    scope: str = "global",
    loss: LossFunction = cross_entropy,
    seed: int = 0,
    batches: int | None = None,
) -> tuple[PruningPlan, Tensor]:
    """`plan_by_criterion`, and the scores (total_units,) it ranked by; arguments as there.

    Scores are comparable between groups as the scope compares them: a channel may be exchanged
    for one of another group by them.
    """
    if scope not in SCOPES:
        raise ConfigError("criterion", [f"scope `{scope}`: known: {', '.join(SCOPES)}"])
    budgeting.check_feasible(space, budget, grid)
    scores = criterion_scores(
        network, space, criterion, data, loss=loss, seed=seed, batches=batches
    )
    name = criterion if isinstance(criterion, str) else type(criterion).__name__
    if scope == "local":
        ranks = _within_groups(space, scores, _ranks)
        uniform = budgeting.uniform_widths(space, budget, grid)
        widths = budgeting.fit_to_budget(space, ranks, uniform, budget, grid)
        return PruningPlan.top(space, ranks, widths, strategy=name), ranks
    if name != "lamp" and not isinstance(criterion, tp.importance.LAMPImportance):
        scores = _within_groups(space, scores, lambda mine: mine / mine.mean().clamp_min(1e-12))
    if scope == "isomorphic":
        scores = _ranks_among_equals(network, space, scores)
    start = budgeting.threshold_widths(space, scores, budget, grid)
    return budgeting.plan_for_budget(space, scores, start, budget, grid, strategy=name), scores


def criterion_scores(
    network: nn.Module,
    space: ChannelSpace,
    criterion: str | Importance,
    data: Iterable[Any] | None = None,
    *,
    loss: LossFunction = cross_entropy,
    seed: int = 0,
    batches: int | None = None,
) -> Tensor:
    """The criterion's scores as torch-pruning gives them, (total_units,). The network is left as found.

    Raises:
        ConfigError, PlanError: see `plan_by_criterion`.
    """
    if problems := batches_problems(batches):
        raise ConfigError("criterion", problems)
    importance: Any = criterion
    needs_data = False
    if isinstance(criterion, str):
        if criterion in REFUSED:
            raise ConfigError("criterion", [f"`{criterion}`: {REFUSED[criterion]}"])
        if criterion not in CRITERIA:
            raise ConfigError(
                "criterion", [f"`{criterion}`: unknown; known: {', '.join(CRITERIA)}"]
            )
        importance, needs_data = CRITERIA[criterion].make(), CRITERIA[criterion].needs_data
    needs_data = needs_data or isinstance(importance, (TaylorImportance, HessianImportance))
    if needs_data and data is None:
        raise ConfigError(
            "criterion",
            [
                f"{type(importance).__name__}: needs gradients; give `data`, batches of "
                "inputs and targets"
            ],
        )
    device = next(network.parameters()).device
    with random_state_kept(device, data):
        seed_epoch(seed, 0, device, data)
        if not needs_data:
            return importance_scores(network, space, importance)
        assert data is not None
        with gradients_of(network, islice(data, batches), loss, importance):
            return importance_scores(network, space, importance)


def batches_problems(batches: int | None) -> list[str]:
    """What is wrong with a number of batches, None of which means all."""
    if batches is None or is_whole(batches, least=1):
        return []
    return [f"batches is {batches!r}, needs a whole number from 1, or None for all"]


def flaw_of(importance: object) -> str:
    """Why an importance is not taken as torch-pruning ships it; empty for one that is."""
    return next((reason for kind, reason in _FLAWED if isinstance(importance, kind)), "")


def importance_scores(
    network: nn.Module,
    space: ChannelSpace,
    importance: Importance,
    *,
    traced: DependencyTrace | None = None,
) -> Tensor:
    """What a torch-pruning importance says of every unit, (total_units,).

    With `traced`, the groups are torch-pruning's own, for importances that look at more of them
    than layers, functions and indices.

    Raises:
        ConfigError: one that torch-pruning ships flawed.
        PlanError: it says nothing, or no finite numbers, about a group.
    """
    if reason := flaw_of(importance):
        raise ConfigError("importance", [f"{type(importance).__name__}: {reason}"])
    scores = torch.zeros(space.total_units)
    silent, not_finite = [], []
    for index, group in enumerate(space.groups):
        if traced is None:
            made = tp_group(network, space, index)
        else:
            root = network.get_submodule(group.name)
            prune = traced.graph.get_pruner_of_module(root).prune_out_channels
            made = traced.graph.get_pruning_group(root, prune, list(range(group.channels)))
        try:
            found = importance(made)
        except (RuntimeError, AttributeError, TypeError, IndexError, KeyError) as error:
            raise PlanError(
                f"{type(importance).__name__}: fails on group `{group.name}` "
                f"({type(error).__name__}: {error}); leave it out with `ignored_layers`, or choose "
                "another criterion"
            ) from error
        if found is None or found.shape != (group.channels,):
            silent.append(group.name)
            continue
        if not torch.isfinite(found).all():
            not_finite.append(group.name)
            continue
        # Channel u + k * units belongs to unit u.
        scores[space.unit_slice(index)] = found.float().cpu().view(group.ties, -1).mean(0)
    if silent:
        raise PlanError(
            f"{type(importance).__name__}: gives no score per channel for {_shown(silent)}, such as a "
            "BatchNorm criterion where there is none; leave them out with `ignored_layers`, or "
            "choose another"
        )
    if not_finite:
        raise PlanError(
            f"{type(importance).__name__}: gives scores that are not finite for "
            f"{_shown(not_finite)}; check weights, gradients and data for values that are not finite "
            "or too large, or choose another criterion"
        )
    return scores


def _shown(groups: Sequence[str]) -> str:
    return f"{len(groups)} groups (`{groups[0]}`{', ...' if groups[1:] else ''})"


def tp_group(network: nn.Module, space: ChannelSpace, index: int) -> Group:
    """Group `index` of the space as a torch-pruning group over all of its channels."""
    record = space.groups[index]
    found = dict(network.named_modules())
    root = Node(found[record.name], None, record.name)
    group = Group()
    # The root comes first, as in torch-pruning: reductions like "first" count on it.
    for slot in sorted(record.slots, key=lambda s: (s.module, s.side) != (record.name, "out")):
        module = found.get(slot.module)
        if module is None:
            raise PlanError(f"module `{slot.module}`: not in the network; trace this network first")
        pruner = _pruner_of(module)
        handler = pruner.prune_out_channels if slot.side == "out" else pruner.prune_in_channels
        trigger = _pruner_of(found[record.name]).prune_out_channels
        dependency = Dependency(trigger, handler, root, Node(module, None, slot.module))
        indices, roots = _indices(slot, record.units, record.ties)
        group.add_dep(dependency, indices)
        group[len(group.items) - 1].root_idxs = roots
    return group


def _pruner_of(module: nn.Module) -> Any:
    """How torch-pruning cuts this module; no importance counts anything of a `Scatter`."""
    if isinstance(module, Scatter):
        return ScatterPruner()
    return PrunerBox[tp.ops.module2type(module)]


def _indices(slot: Slot, units: int, ties: int) -> tuple[list[int], list[int]]:
    """(channels of the slot, root channel of each): runs of one unit are dealt out to its ties."""
    indices = np.flatnonzero(slot.units >= 0)
    owners = slot.units[indices]
    order = np.argsort(owners, kind="stable")
    per_unit = len(owners) // units
    turn = np.empty(len(owners), dtype=np.int64)
    turn[order] = np.tile(np.arange(per_unit), units)
    roots = owners + units * (turn // max(1, per_unit // ties))
    return indices.tolist(), roots.tolist()


def _within_groups(
    space: ChannelSpace, scores: Tensor, change: Callable[[Tensor], Tensor]
) -> Tensor:
    parts: Sequence[Tensor] = [
        change(scores[space.unit_slice(index)]) for index in range(len(space.groups))
    ]
    return torch.cat(list(parts))


def _ranks_among_equals(network: nn.Module, space: ChannelSpace, scores: Tensor) -> Tensor:
    """Ranks of units (total_units,) among all groups of their group's structure.

    One threshold over such ranks takes the same share of each set of groups.
    """
    sets: dict[object, list[int]] = {}
    for index, group in enumerate(space.groups):
        units = space.unit_slice(index)
        mine = sets.setdefault(structure_of(group, network), [])
        mine += range(units.start, units.stop)
    ranks = torch.empty_like(scores)
    for units_of_set in sets.values():
        ranks[units_of_set] = _ranks(scores[units_of_set])
    return ranks


def _ranks(scores: Tensor) -> Tensor:
    """1 for the best of (n,) down to 1/n; equal scores are decided by the lower number."""
    ranks = torch.empty_like(scores)
    order = scores.argsort(descending=True, stable=True)
    ranks[order] = 1.0 - torch.arange(len(scores), dtype=scores.dtype) / len(scores)
    return ranks
