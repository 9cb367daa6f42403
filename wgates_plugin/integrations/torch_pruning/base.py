"""What this package's torch-pruning pruners share: the siblings' words, the trace, and the goal."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch_pruning as tp
from torch import Tensor, nn

from wgates_plugin.calling import ExampleInputs, left_as_found
from wgates_plugin.channels import ChannelSpace
from wgates_plugin.dependencies import DependencyTrace
from wgates_plugin.efficiency.base import Budget, EfficiencyModel
from wgates_plugin.efficiency.belonging import check_inputs
from wgates_plugin.errors import ConfigError
from wgates_plugin.integrations.torch_pruning import options
from wgates_plugin.integrations.torch_pruning.goals import (
    BudgetGoal,
    Goal,
    RatioGoal,
    as_budget,
    goal_problems,
)
from wgates_plugin.plan import PruningPlan
from wgates_plugin.verification import check_traced

Scheduler = Callable[[float, int], Sequence[float]]
Efficiency = EfficiencyModel | Budget | Callable[[ChannelSpace], EfficiencyModel]


def linear(goal: float, steps: int) -> list[float]:
    """torch-pruning's default way to a ratio."""
    return [goal * step / steps for step in range(steps + 1)]


class TracedPruner(tp.pruner.BasePruner):
    """A `torch_pruning` pruner whose groups are a `ChannelSpace` and whose goal is a budget or ratios.

    Attributes:
        space: of the network as it was given. plan: of all steps so far; None before the first.
    """

    current_step: int

    def _open(
        self,
        model: nn.Module,
        example_inputs: ExampleInputs,
        problems: list[str],
        *,
        grid: int,
        efficiency: Efficiency | None,
        target: float | None,
        pruning_ratio: float | None,
        pruning_ratio_dict: Mapping[Any, float] | None,
        global_pruning: bool,
        isomorphic: bool,
        max_pruning_ratio: float,
        iterative_steps: int,
        iterative_pruning_ratio_scheduler: Scheduler,
        ignored_layers: Sequence[Any] | None,
        root_module_types: Sequence[type] | None,
        unwrapped_parameters: Any,
        min_channels: int,
        min_fraction: float,
        floors: Mapping[str, int] | None,
        caps: Mapping[str, int] | None,
        others: Mapping[str, Any],
    ) -> None:
        """Check all words at once (`problems`: those of the caller), trace, and set the goal."""
        budgeted = efficiency is not None or target is not None
        problems = (
            options.refused_options(others)
            + options.ratio_problems(
                budgeted,
                pruning_ratio,
                pruning_ratio_dict,
                max_pruning_ratio,
                iterative_steps,
                isomorphic,
            )
            + goal_problems(efficiency, target)
            + options.problems_of(
                lambda: options.listed_layers(model, ignored_layers),
                lambda: options.parameter_dims(model, unwrapped_parameters),
                lambda: options.check_root_types(root_module_types),
            )
            + problems
        )
        if problems:
            raise ConfigError(type(self).__name__, problems)
        self._grid, self._inputs = grid, example_inputs
        self._dims = options.parameter_dims(model, unwrapped_parameters)
        layers = options.listed_layers(model, ignored_layers)
        self._trace = DependencyTrace(model, example_inputs, parameter_dims=self._dims)
        self._init_base(
            model,
            [layer for layer in layers if isinstance(layer, nn.Module)],
            global_pruning=global_pruning,
            pruning_ratio=0.5 if pruning_ratio is None else pruning_ratio,
            max_pruning_ratio=max_pruning_ratio,
            iterative_steps=iterative_steps,
            iterative_pruning_ratio_scheduler=iterative_pruning_ratio_scheduler,
            round_to=grid if grid > 1 else None,
            isomorphic=isomorphic,
        )
        limits: dict[str, Any] = {
            "min_channels": min_channels,
            "min_fraction": max(min_fraction, 1.0 - max_pruning_ratio),
            "floors": floors,
            "caps": caps,
        }
        space = self._trace.space(ignored_layers=layers, **limits)
        left_out = options.root_types_left_out(model, space, root_module_types)
        self._ignored = [*layers, *left_out]
        if left_out:
            space = self._trace.space(ignored_layers=self._ignored, **limits)
        if not self._trace.keeps_channel_order:
            check_traced(model, space, example_inputs)
        self.space = self._now = space
        budget = as_budget(space, efficiency, target) if budgeted else None
        if budget is not None:
            check_inputs(budget, example_inputs)
        self._goal = self._make_goal(
            budget,
            options.Ratios(
                self.pruning_ratio, pruning_ratio_dict or {}, global_pruning, isomorphic
            ),
        )
        self.plan: PruningPlan | None = None

    def _init_base(self, model: nn.Module, ignored: list[nn.Module], **words: Any) -> None:
        inputs = (self._inputs,) if isinstance(self._inputs, Tensor) else self._inputs
        with left_as_found(model), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model.requires_grad_(True)  # frozen parameters would make groups vanish silently
            super().__init__(
                model,
                inputs,
                importance=None,
                ignored_layers=ignored,
                unwrapped_parameters=list(self._dims),
                in_channel_groups={},  # torch-pruning's mutable defaults leak between pruners
                out_channel_groups={},
                num_heads={},
                channel_groups={},
                **words,
            )
        self.DG = self._trace.graph

    def _make_goal(self, budget: Budget | None, ratios: options.Ratios) -> Goal:
        steps, scheduler = self.iterative_steps, self.iterative_pruning_ratio_scheduler
        if budget is None:
            scopes = options.scopes_of(self.model, self.space, ratios, steps, scheduler)
            return RatioGoal(self.space, scopes, self._grid)
        full = torch.tensor(self.space.full_widths, dtype=torch.float64)
        if float(budget.excess(full)) <= 0:
            warnings.warn(
                f"{type(self).__name__}: the network is within its budget as it is "
                f"({budget.describe(full)}); nothing will be removed",
                stacklevel=3,
            )
        way = options.schedule(scheduler, 1.0, steps)
        return BudgetGoal(self.space, budget, self._grid, way)
