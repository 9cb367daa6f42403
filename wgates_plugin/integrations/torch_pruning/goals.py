"""What a pruner of several steps asks of the network after each: a budget, or channel ratios."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor

from wgates_plugin.channels import ChannelSpace
from wgates_plugin.efficiency.base import Budget, EfficiencyModel, Limit, check_target
from wgates_plugin.efficiency.belonging import check_models
from wgates_plugin.efficiency.counts import efficiency_problems, model_of
from wgates_plugin.errors import ConfigError, InfeasibleTargetError, TargetError
from wgates_plugin.integrations.torch_pruning.options import SUBJECT
from wgates_plugin.strategies.budgeting import check_feasible
from wgates_plugin.strategies.ratios import Scope, ratio_budget, ratio_widths
from wgates_plugin.strategies.wgates.starting import Opening


class Goal(Protocol):
    """What is asked of the network after step 1, 2, ...; `now` is its space before that step."""

    def budget(self, now: ChannelSpace, step: int) -> Budget:
        """The limits that gates learn under."""

    def opening(self, now: ChannelSpace, step: int) -> Opening | None:
        """From merits to the widths (G,) where gates start; None leaves it to the budget."""

    def widths(self, now: ChannelSpace, scores: Tensor, step: int) -> Sequence[int] | None:
        """The decided widths (G,) for learned scores; None leaves it to the budget."""


class RatioGoal:
    """Shares of channels, per scope."""

    def __init__(self, space: ChannelSpace, scopes: Sequence[Scope], grid: int) -> None:
        self.space, self.scopes, self.grid = space, list(scopes), grid

    def budget(self, now: ChannelSpace, step: int) -> Budget:
        return ratio_budget(now, self.scopes, step, self.grid)

    def opening(self, now: ChannelSpace, step: int) -> Opening:
        return lambda merits: self.widths(now, merits, step)

    def widths(self, now: ChannelSpace, scores: Tensor, step: int) -> Sequence[int]:
        return ratio_widths(now, scores, self.scopes, step, self.grid)


class BudgetGoal:
    """Limits on cost, approached from the untouched network's cost."""

    def __init__(
        self, space: ChannelSpace, budget: Budget, grid: int, way: Sequence[float]
    ) -> None:
        self.space, self.goal, self.grid, self.way = space, budget, grid, way
        full = torch.tensor(space.full_widths, dtype=torch.float64)
        self._full = [float(limit.model(full)) for limit in budget.limits]

    def budget(self, now: ChannelSpace, step: int) -> Budget:
        limits = []
        for limit, full in zip(self.goal.limits, self._full, strict=True):
            left = max(0.0, full - limit.target) * (1.0 - self.way[step])
            whole = now.names == self.space.names and now.full_widths == self.space.full_widths
            model = limit.model if whole else _OfSmaller(limit.model, self.space, now)
            limits.append(Limit(model, limit.target + left))
        return Budget.of(*limits)

    def opening(self, now: ChannelSpace, step: int) -> None:
        return None

    def widths(self, now: ChannelSpace, scores: Tensor, step: int) -> None:
        return None


class _OfSmaller:
    """A model of the untouched network, for widths of the smaller one.

    Groups that are down to one unit are no longer in the smaller space, and keep that unit.
    """

    def __init__(self, model: EfficiencyModel, full: ChannelSpace, now: ChannelSpace) -> None:
        self.model, self.name, self.unit = model, model.name, model.unit
        self.place = torch.zeros(len(now.groups), len(full.groups), dtype=torch.float64)
        self.fixed = torch.zeros(len(full.groups), dtype=torch.float64)
        rows = {name: row for row, name in enumerate(now.names)}
        for column, group in enumerate(full.groups):
            if group.name in rows:
                self.place[rows[group.name], column] = 1.0
            else:
                self.fixed[column] = float(group.ties)

    def __call__(self, widths: Tensor) -> Tensor:
        return self.model(widths.double() @ self.place + self.fixed)


def goal_problems(efficiency: object, target: float | None) -> list[str]:
    """What is wrong with the two together, before the network is looked at."""
    problems = efficiency_problems(efficiency)
    if isinstance(efficiency, Budget) and target is not None:
        problems.append("target: a Budget holds its targets, leave it out")
    if efficiency is not None and not isinstance(efficiency, Budget) and target is None:
        problems.append("efficiency: give its `target` too, or a Budget")
    return problems


def target_problems(target: object) -> list[str]:
    """What is wrong with the target alone; by itself it is a `TargetError`, see `as_budget`."""
    try:
        if target is not None:
            check_target(target, "the model's unit")
    except TargetError as error:
        return [str(error)]
    return []


def as_budget(
    space: ChannelSpace,
    efficiency: EfficiencyModel | Budget | Callable[[ChannelSpace], EfficiencyModel] | None,
    target: float | None,
) -> Budget:
    """The budget that `efficiency` and `target` stand for.

    Raises:
        ConfigError: a target is missing or one too many, or a model is another network's.
        TargetError: the target is no positive number.
    """
    if problems := goal_problems(efficiency, target):
        raise ConfigError(SUBJECT, problems)
    if isinstance(efficiency, Budget):
        check_models(space, efficiency)
        return efficiency
    assert target is not None
    model = model_of(space, efficiency)
    budget = Budget.of(Limit(model, check_target(target, model.unit)))
    check_models(space, budget)
    return budget


def check_reachable(space: ChannelSpace, budget: Budget, grid: int, *, told_unit: bool) -> None:
    """`check_feasible`; where nobody said of what the target is, the error says that it is of MACs.

    Raises:
        InfeasibleTargetError: names the least reachable cost.
    """
    try:
        check_feasible(space, budget, grid)
    except InfeasibleTargetError as error:
        if told_unit:
            raise
        raise InfeasibleTargetError(
            f"target {budget.limits[0].target:g} MACs: without `efficiency` a target counts MACs; "
            "did you mean milliseconds? Give `efficiency=LPNet.load(...)`, fitted for this network, "
            f"beside it ({error})"
        ) from error
