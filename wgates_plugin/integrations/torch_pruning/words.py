"""The words of torch-pruning's constructors that every pruner here takes, as they were given."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from wgates_plugin.channels import ChannelSpace
from wgates_plugin.dependencies import DependencyTrace
from wgates_plugin.efficiency.base import Budget, EfficiencyModel
from wgates_plugin.integrations.torch_pruning import checks, options
from wgates_plugin.integrations.torch_pruning.goals import goal_problems

Scheduler = Callable[[float, int], Sequence[float]]
Efficiency = EfficiencyModel | Budget | Callable[[ChannelSpace], EfficiencyModel]

USUAL_RATIO = 0.5
"""torch-pruning's default, where neither a budget nor a ratio is given."""


def linear(goal: float, steps: int) -> list[float]:
    """torch-pruning's default way to a ratio."""
    return [goal * step / steps for step in range(steps + 1)]


@dataclass(frozen=True, kw_only=True)
class Words:
    """What they mean is said in `WGatesPruner`; `others` are all that it has no name for."""

    efficiency: Efficiency | None
    target: float | None
    pruning_ratio: float | None
    pruning_ratio_dict: Mapping[Any, float] | None
    global_pruning: bool
    isomorphic: bool
    max_pruning_ratio: float
    ignored_layers: Sequence[Any] | None
    root_module_types: Sequence[type] | None
    unwrapped_parameters: Any
    min_channels: int
    min_fraction: float
    floors: Mapping[str, int] | None
    caps: Mapping[str, int] | None
    iterative_steps: int = 1
    iterative_pruning_ratio_scheduler: Scheduler = linear
    others: Mapping[str, Any] = field(default_factory=dict)

    @property
    def budgeted(self) -> bool:
        """Whether a budget decides the widths, and not ratios."""
        return self.efficiency is not None or self.target is not None

    @property
    def ratios(self) -> options.Ratios:
        ratio = USUAL_RATIO if self.pruning_ratio is None else self.pruning_ratio
        by_module = self.pruning_ratio_dict or {}
        return options.Ratios(ratio, by_module, self.global_pruning, self.isomorphic)

    def problems(self, model: nn.Module) -> list[str]:
        """Everything wrong with them before `model` is traced."""
        return [
            *checks.refused_options(self.others),
            *checks.ratio_problems(
                self.budgeted,
                self.pruning_ratio,
                self.pruning_ratio_dict,
                self.max_pruning_ratio,
                self.iterative_steps,
                self.isomorphic,
                self.global_pruning,
            ),
            *checks.limit_problems(self.min_channels, self.min_fraction, self.floors, self.caps),
            *goal_problems(self.efficiency, self.target),
            *options.problems_of(
                lambda: options.listed_layers(model, self.ignored_layers),
                lambda: options.parameter_dims(model, self.unwrapped_parameters),
                lambda: options.check_root_types(self.root_module_types),
                lambda: options.check_ratio_modules(model, self.pruning_ratio_dict),
            ),
            *checks.schedule_problems(
                self.iterative_pruning_ratio_scheduler,
                1.0 if self.budgeted else self.ratios.ratio,
                self.pruning_ratio_dict,
                self.iterative_steps,
            ),
        ]

    def space(self, trace: DependencyTrace, model: nn.Module) -> tuple[ChannelSpace, list[Any]]:
        """The channels that may go, and all layers whose outputs stay."""
        limits: dict[str, Any] = {
            "min_channels": self.min_channels,
            "min_fraction": max(self.min_fraction, 1.0 - self.max_pruning_ratio),
            "floors": self.floors,
            "caps": self.caps,
        }
        listed = options.listed_layers(model, self.ignored_layers)
        space = trace.space(ignored_layers=listed, **limits)
        left_out = options.root_types_left_out(model, space, self.root_module_types)
        ignored = [*listed, *left_out]
        return (trace.space(ignored_layers=ignored, **limits) if left_out else space), ignored
