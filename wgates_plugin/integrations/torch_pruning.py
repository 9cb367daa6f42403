"""The torch-pruning door: a pruner for torch-pruning's own sparse-training loop."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
import torch_pruning as tp
from torch import Tensor, nn

from wgates_plugin.calling import ExampleInputs, left_as_found
from wgates_plugin.channels import ChannelSpace
from wgates_plugin.dependencies import DependencyTrace
from wgates_plugin.efficiency.base import Budget, EfficiencyModel, Limit
from wgates_plugin.efficiency.counts import MacsModel
from wgates_plugin.errors import ConfigError, PlanError
from wgates_plugin.plan import PruningPlan
from wgates_plugin.strategies.wgates import WGates, WGatesSettings
from wgates_plugin.surgery import removals
from wgates_plugin.verification import check_traced


class WGatesPruner(tp.pruner.BasePruner):
    """W-Gates as a `torch_pruning` pruner: gates learn in your loop, `step()` removes exactly.

    Gates are attached on construction and taken off by `step()` or `detach()`. Between
    `loss.backward()` and `optimizer.step()`, call `regularize(model)` once.

    Args:
        model: the network to prune, in place at `step()`.
        example_inputs: one batch as a tensor, a tuple of arguments or a dict.
        efficiency: what is limited: `LPNet`, `MacsModel`, `ParametersModel`, a function of the
            channel space that returns one, or a `Budget` of several limits. By default MACs.
        target: the limit in the model's unit (ms, MACs, parameters); None for a `Budget`.
        pruning_ratio: with neither target nor budget, the share of the MACs to remove.
        round_to: channel multiple of every width that is cut, torch-pruning's word for the grid.
        steps: gate steps to come, for settings that slide the target.
        min_channels, min_fraction, floors, caps: see `wgates_plugin.trace`.

    Raises:
        TraceError, InfeasibleTargetError, ConfigError: before anything is changed.

    Example:
        >>> net = nn.Sequential(nn.Conv2d(1, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 2))
        >>> x, y = torch.randn(4, 1, 8, 8), torch.tensor([0, 1, 0, 1])
        >>> optimizer = torch.optim.SGD(net.parameters(), lr=0.01)
        >>> pruner = WGatesPruner(net, x, pruning_ratio=0.5)
        >>> loss = nn.functional.cross_entropy(net(x), y)
        >>> optimizer.zero_grad(); loss.backward()
        >>> _ = pruner.regularize(net)
        >>> optimizer.step()
        >>> pruner.step()
        >>> net[0].out_channels
        4
    """

    def __init__(
        self,
        model: nn.Module,
        example_inputs: ExampleInputs,
        *,
        efficiency: EfficiencyModel
        | Budget
        | Callable[[ChannelSpace], EfficiencyModel]
        | None = None,
        target: float | None = None,
        pruning_ratio: float | None = None,
        ignored_layers: Sequence[nn.Module] | None = None,
        round_to: int | None = None,
        settings: WGatesSettings | None = None,
        steps: int | None = None,
        min_channels: int = 1,
        min_fraction: float = 0.0,
        floors: Mapping[str, int] | None = None,
        caps: Mapping[str, int] | None = None,
        average: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        self._trace = DependencyTrace(model, example_inputs)  # refuses what cannot be traced
        with left_as_found(model), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model.requires_grad_(True)  # frozen parameters would make groups vanish silently
            super().__init__(
                model,
                (example_inputs,) if isinstance(example_inputs, Tensor) else example_inputs,
                importance=self._unit_importance,
                ignored_layers=list(ignored_layers or []),
                in_channel_groups={},  # torch-pruning's mutable defaults leak between pruners
                out_channel_groups={},
                num_heads={},
                channel_groups={},
            )
        self.DG = self._trace.graph
        self.space = self._trace.space(
            ignored_layers=list(ignored_layers or []),
            min_channels=min_channels,
            min_fraction=min_fraction,
            floors=floors,
            caps=caps,
        )
        if not self._trace.keeps_channel_order:
            check_traced(model, self.space, example_inputs)
        self.budget = _budget(self.space, efficiency, target, pruning_ratio)
        full = torch.tensor(self.space.full_widths, dtype=torch.float64)
        if float(self.budget.excess(full)) <= 0:
            warnings.warn(
                "WGatesPruner: the network is within its budget as it is "
                f"({self.budget.describe(full)}); nothing will be removed",
                stacklevel=2,
            )
        settings = settings or WGatesSettings()
        if round_to is not None:
            settings = replace(settings, grid=round_to)
        self.gates = WGates(
            model, self.space, self.budget, settings, steps=steps, average=average
        ).attach()
        self.plan: PruningPlan | None = None

    def regularize(self, model: nn.Module, loss: Tensor | None = None) -> dict[str, float]:
        """Add the budget's gradient, step the gates; returns the step's monitor values.

        `model` and `loss` are there for torch-pruning's signature.
        """
        if model is not self.model and getattr(model, "module", None) is not self.model:
            raise PlanError(
                "WGatesPruner.regularize: another model than the one the pruner was made for"
            )
        return self.gates.regularize()

    def step(self, interactive: bool = False) -> Iterator[Any] | None:
        """Decide the plan, take the gates off and remove the closed channels exactly.

        With `interactive=True` the groups come one by one; call `group.prune()` on each before
        asking for the next.

        Raises:
            PlanError: the gates never learned, or the network is pruned already.
        """
        if self.plan is not None:
            raise PlanError(
                "WGatesPruner.step: this network is pruned already; make a new pruner to prune more"
            )
        if self.gates.step == 0:
            raise PlanError(
                "WGatesPruner.step: the gates never learned; call `regularize(model)` between "
                "`loss.backward()` and `optimizer.step()` in your training loop first"
            )
        self.plan = self.gates.plan()
        self.detach()
        groups = removals(self.model, self.plan, traced=self._trace)
        self.current_step += 1
        if interactive:
            return groups
        for group in groups:
            group.prune()
        return None

    def detach(self) -> nn.Module:
        """Take the gates off without pruning."""
        return self.gates.detach()

    def _unit_importance(self, group: Any) -> Tensor:
        """Scores of a torch-pruning group whose root is one of our groups."""
        name = self._trace.names[group[0].dep.target.module]
        index = self.space.names.index(name)
        scores = self.gates.unit_scores()[self.space.unit_slice(index)]
        return scores.repeat(self.space.groups[index].ties)

    def state_dict(self) -> dict[str, Any]:
        """State of the gates: tensors and plain values."""
        return self.gates.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.gates.load_state_dict(state)


def _budget(
    space: ChannelSpace,
    efficiency: EfficiencyModel | Budget | Callable[[ChannelSpace], EfficiencyModel] | None,
    target: float | None,
    pruning_ratio: float | None,
) -> Budget:
    if isinstance(efficiency, Budget):
        if target is not None or pruning_ratio is not None:
            raise ConfigError(
                "WGatesPruner", ["a Budget holds its targets: leave out target and pruning_ratio"]
            )
        return efficiency
    if (target is None) == (pruning_ratio is None):
        raise ConfigError("WGatesPruner", ["give either `target` or `pruning_ratio`"])
    model: EfficiencyModel
    if efficiency is None:
        model = MacsModel(space)
    elif isinstance(efficiency, type) or not isinstance(efficiency, EfficiencyModel):
        model = efficiency(space)
    else:
        model = efficiency
    if target is not None:
        return Budget.of(Limit(model, target))
    assert pruning_ratio is not None
    if not 0 < pruning_ratio < 1:
        raise ConfigError("WGatesPruner", [f"pruning_ratio {pruning_ratio}: needs 0 to 1"])
    full = float(model(torch.tensor(space.full_widths, dtype=torch.float64)))
    return Budget.of(Limit(model, full * (1.0 - pruning_ratio)))
