"""What a criterion says of every unit of a channel space."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn

from wgates_plugin.channels import ChannelSpace
from wgates_plugin.dependencies import DependencyTrace
from wgates_plugin.dependencies.raw_groups import coupled_with
from wgates_plugin.errors import ConfigError, PlanError
from wgates_plugin.option_checks import is_whole
from wgates_plugin.strategies.criteria.gradients import gradients_of
from wgates_plugin.strategies.criteria.group import tp_group
from wgates_plugin.strategies.criteria.refused import REFUSED, flaw_of
from wgates_plugin.strategies.criteria.repaired import HessianImportance, TaylorImportance
from wgates_plugin.strategies.criteria.table import CRITERIA
from wgates_plugin.training.as_found import random_state_kept, seed_epoch
from wgates_plugin.training.engine import LossFunction
from wgates_plugin.training.evaluation import cross_entropy

Importance = Callable[[Any], Tensor | None]


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
            made = coupled_with(traced.graph, root, range(group.channels))
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
