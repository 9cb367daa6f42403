"""What this package's torch-pruning pruners share: the siblings' words, the trace, and the goal."""

from __future__ import annotations

import warnings
from typing import Any

import torch_pruning as tp
from torch import nn

from wgates_plugin import modules as kinds
from wgates_plugin.calling import ExampleInputs
from wgates_plugin.dependencies import DependencyTrace
from wgates_plugin.efficiency.base import Budget, measured_grid
from wgates_plugin.efficiency.belonging import check_inputs
from wgates_plugin.errors import ConfigError
from wgates_plugin.integrations.torch_pruning import options
from wgates_plugin.integrations.torch_pruning.goals import (
    BudgetGoal,
    Goal,
    RatioGoal,
    as_budget,
    check_reachable,
    target_problems,
)
from wgates_plugin.integrations.torch_pruning.words import Words
from wgates_plugin.plan import PruningPlan
from wgates_plugin.strategies.budgeting import nothing_to_remove
from wgates_plugin.verification import verify


class TracedPruner(tp.pruner.BasePruner):
    """A `torch_pruning` pruner whose groups are a `ChannelSpace` and whose goal is a budget or ratios.

    Attributes:
        space: of the network as it was given. plan: of all steps so far; None before the first.
    """

    current_step: int

    @property
    def _subject(self) -> str:
        """What error messages call this."""
        return type(self).__name__

    def _open(
        self,
        model: nn.Module,
        example_inputs: ExampleInputs,
        words: Words,
        problems: list[str],
        *,
        grid: int | None,
    ) -> None:
        """Check all words at once (`problems`: those of the caller), trace, and set the goal.

        A `grid` of None is that of the widths which the budget's latency model has measured.
        """
        problems = words.problems(model) + problems
        if problems:
            raise ConfigError(self._subject, problems + target_problems(words.target))
        if isinstance(example_inputs, list):
            example_inputs = tuple(example_inputs)
        self._inputs = example_inputs
        self._dims = options.parameter_dims(model, words.unwrapped_parameters)
        self._trace = DependencyTrace(model, example_inputs, parameter_dims=self._dims)
        self.model = model
        space, self._ignored = words.space(self._trace, model)
        verify(self._trace, space)
        self.space = self._now = space
        budget = None
        if words.budgeted:
            budget = as_budget(space, words.efficiency, words.target)
            check_inputs(budget, example_inputs)
        self._grid = grid or measured_grid(budget)
        if budget is not None:
            check_reachable(space, budget, self._grid, told_unit=words.efficiency is not None)
        self._set_what_siblings_have(words)
        with options.told_as(self._subject):
            self._goal = self._make_goal(budget, words.ratios)
        self.plan: PruningPlan | None = None

    def _set_what_siblings_have(self, words: Words) -> None:
        """The attributes of `BasePruner`, whose constructor would trace the network again."""
        graph = self.DG = self._trace.graph
        self.global_pruning, self.isomorphic = words.global_pruning, words.isomorphic
        self.pruning_ratio = words.ratios.ratio
        self.max_pruning_ratio = words.max_pruning_ratio
        self.round_to = self._grid if self._grid > 1 else None
        self.iterative_steps = words.iterative_steps
        self.iterative_pruning_ratio_scheduler = words.iterative_pruning_ratio_scheduler
        self.importance: Any = None
        self.ignored_layers = [
            inner
            for layer in options.listed_layers(self.model, words.ignored_layers)
            if isinstance(layer, nn.Module)
            for inner in layer.modules()
        ]
        self.ignored_params: list[nn.Parameter] = []
        self.root_module_types = [tp.ops.TORCH_CONV, tp.ops.TORCH_LINEAR, tp.ops.TORCH_LSTM]
        self.current_step = 0
        steps, scheduler = self.iterative_steps, self.iterative_pruning_ratio_scheduler
        self.per_step_pruning_ratio = scheduler(self.pruning_ratio, steps)
        self.pruning_ratio_dict: dict[Any, Any] = {}
        # Attention heads are not pruned here.
        self.num_heads: dict[nn.Module, int] = {}
        self.init_num_heads: dict[nn.Module, int] = {}
        self.initial_total_heads = 0
        self.prune_num_heads, self.prune_head_dims = False, True
        self.head_pruning_ratio = 0.0
        self.per_step_head_pruning_ratio = [0.0] * (steps + 1)
        self.head_pruning_ratio_dict: dict[Any, Any] = {}
        self._layer_to_scope: dict[Any, Any] = {}
        self._scope_initial_channels: dict[Any, Any] = {}
        self.in_channel_groups: dict[nn.Module, int] = {}
        self.out_channel_groups: dict[nn.Module, int] = {}
        self.layer_init_in_ch: dict[Any, Any] = {}
        self.layer_init_out_ch: dict[Any, Any] = {}
        for module in graph.module2node:
            if tp.ops.module2type(module) not in graph.REGISTERED_PRUNERS:
                continue
            self.layer_init_out_ch[module] = graph.get_out_channels(module)
            self.layer_init_in_ch[module] = graph.get_in_channels(module)
            if kinds.is_depthwise(module):
                continue
            pruner = graph.get_pruner_of_module(module)
            for found, groups in (
                (self.in_channel_groups, pruner.get_in_channel_groups(module)),
                (self.out_channel_groups, pruner.get_out_channel_groups(module)),
            ):
                if groups > 1:
                    found[module] = groups
        self.initial_total_channels = sum(group.units for group in self.space.groups)

    def follow(self, example_inputs: ExampleInputs) -> None:
        """Trace again if other modules took the place of traced ones; the space stays as it is."""
        if any(module not in self._trace.names for module in self.model.modules()):
            self._retrace(example_inputs)

    def _retrace(self, example_inputs: ExampleInputs) -> None:
        """The graph of the network as it is now, with the history of the one before."""
        history = self.DG.pruning_history()
        self._trace = DependencyTrace(self.model, example_inputs, parameter_dims=self._dims)
        self.DG = self._trace.graph
        self.DG._pruning_history = history

    def _make_goal(self, budget: Budget | None, ratios: options.Ratios) -> Goal:
        steps, scheduler = self.iterative_steps, self.iterative_pruning_ratio_scheduler
        if budget is None:
            for words in options.ratios_without_effect(self.model, self.space, ratios.by_module):
                warnings.warn(f"{self._subject}: {words}", stacklevel=4)
            scopes = options.scopes_of(self.model, self.space, ratios, steps, scheduler)
            return RatioGoal(self.space, scopes, self._grid)
        if why := nothing_to_remove(self.space, budget):
            warnings.warn(f"{self._subject}: {why}", stacklevel=4)
        way = options.schedule(scheduler, 1.0, steps)
        return BudgetGoal(self.space, budget, self._grid, way)
