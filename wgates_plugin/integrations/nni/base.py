"""What this package's NNI pruners share: the traced network, what limits it, and masks from a plan."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import torch
from nni.compression.base.compressor import Pruner
from nni.compression.base.wrapper import ModuleWrapper
from nni.compression.utils import Evaluator
from torch import Tensor, nn

from wgates_plugin.calling import ExampleInputs
from wgates_plugin.dependencies import DependencyTrace
from wgates_plugin.efficiency.base import measured_grid
from wgates_plugin.errors import ConfigError, PlanError
from wgates_plugin.integrations.nni.asked import (
    Efficiency,
    budget_of,
    checked_selection,
    contradictions,
    ratios_decide,
)
from wgates_plugin.integrations.nni.choices import ConfigList, missing_entries, read_config
from wgates_plugin.integrations.nni.evaluators import (
    evaluator_problems,
    example_from,
    guessed_inputs,
)
from wgates_plugin.integrations.nni.gates import changes, layers_of, unsynchronised
from wgates_plugin.integrations.nni.masks import (
    Masks,
    closed_units,
    flags_of,
    masks_from,
    needed_targets,
    out_targets,
)
from wgates_plugin.integrations.nni.readers import open_readers
from wgates_plugin.plan import PruningPlan, score_problem
from wgates_plugin.strategies.budgeting import check_feasible
from wgates_plugin.targets import Target
from wgates_plugin.verification import verify


class TracedPruner(Pruner):
    """An NNI pruner whose groups are a `ChannelSpace` and whose masks carry out a `PruningPlan`.

    Args:
        grid: channel multiple of the widths; None takes that of those which the budget's latency
            model has measured.
        problems: what is wrong with words of the subclass; told together with what is wrong here.
        the others: see `WGatesPruner`.

    Attributes:
        space: floors and caps of its groups are what the config leaves open.
        budget: what the config's ratios, or efficiency and target, come to.
        plan: the decided plan, None before `compress`.
        left_out: layer that the config names -> why all its channels stay.

    Raises:
        ConfigError, TraceError, InfeasibleTargetError: before the network is wrapped.
    """

    def __init__(
        self,
        model: nn.Module,
        config_list: ConfigList,
        evaluator: Evaluator | None,
        existed_wrappers: dict[str, ModuleWrapper] | None,
        *,
        example_inputs: ExampleInputs | None,
        efficiency: Efficiency | None,
        target: float | Target | None,
        grid: int | None,
        min_channels: int,
        problems: Sequence[str] = (),
    ) -> None:
        read = read_config(model, config_list)
        problems = [
            *read.problems,
            *contradictions(read.choices, efficiency, target, grid=grid),
            *problems,
        ]
        if any(hasattr(module, "_nni_wrapper") for module in model.modules()):
            problems.append(
                "the network is wrapped by another compressor; unwrap it, or use "
                "`WGatesPruner.from_compressor(compressor, config_list, ...)`"
            )
        elif evaluator is not None:
            problems += evaluator_problems(evaluator, model)
        if problems:
            raise ConfigError(self._subject, problems)
        by_ratio = ratios_decide(efficiency, target)
        if example_inputs is None and evaluator is None and by_ratio:
            example_inputs = guessed_inputs(model)
        if example_inputs is None:
            example_inputs = example_from(evaluator, model)
        with unsynchronised(model):
            traced = DependencyTrace(model, example_inputs)
            verify(traced, traced.space())
        selection = checked_selection(
            self._subject, traced.space(min_channels=min_channels), read.choices, by_ratio
        )
        # Groups the config leaves alone stay in the space at full width: an LPNet of the whole
        # network then fits, whatever is pruned.
        space = traced.space(floors=selection.floors, caps=selection.caps)
        budget = budget_of(self._subject, space, selection, efficiency, target)
        self._grid = grid or measured_grid(budget)
        check_feasible(space, budget, self._grid)
        self._readers = open_readers(model, space, example_inputs, selection.chosen)
        self._needed = needed_targets(
            model, out_targets(model, space, selection.chosen), self._readers
        )
        wrapped = {name: set(keys) for name, keys in read.wrapped.items()}
        for name, wrapper in (existed_wrappers or {}).items():
            wrapped.setdefault(name, set()).update(wrapper.pruning_target_spaces)
        self._layers = layers_of(model, [name for name, _ in space.slots_of])
        super().__init__(
            model=model,
            config_list=read.entries + missing_entries(self._needed, wrapped),
            evaluator=evaluator,
            existed_wrappers=existed_wrappers,
        )
        self._sort(model)
        self.evaluator: Evaluator | None
        self.space, self.budget = space, budget
        self.left_out = selection.left_out
        self.plan: PruningPlan | None = None
        if self.left_out:
            shown = "; ".join(f"`{name}`: {why}" for name, why in list(self.left_out.items())[:8])
            more = f"; and {len(self.left_out) - 8} more" if len(self.left_out) > 8 else ""
            warnings.warn(f"{self._subject}: layers that stay whole: {shown}{more}", stacklevel=3)

    @property
    def _subject(self) -> str:
        """The name that errors and warnings begin with."""
        return type(self).__name__

    def _sort(self, model: nn.Module) -> None:
        """Wrappers in `named_modules()` order: NNI keeps them in the order of a set."""
        order = {name: place for place, (name, _) in enumerate(model.named_modules())}
        for attribute in ("_module_wrappers", "_target_spaces"):
            table = getattr(self, attribute)
            setattr(self, attribute, dict(sorted(table.items(), key=lambda item: order[item[0]])))

    def get_masks(self) -> Masks:
        """The masks as they stand, in plain dicts, which `torch.save` writes for any `torch.load`."""
        return {name: dict(targets) for name, targets in super().get_masks().items()}

    def _closed(self) -> Tensor:
        """Units (total_units,) that earlier links of a chain have masked."""
        return closed_units(self.bound_model, self.space, self.get_masks())

    def _check_ready(self) -> None:
        """Refuse to compress twice, or a network that is not the one that was traced."""
        if self.plan is not None:
            raise PlanError(
                f"{self._subject}.compress: this network is compressed already; chain another pruner "
                "with `from_compressor`, or unwrap it and remove the channels"
            )
        self._check_unchanged()

    def _check_unchanged(self) -> None:
        problems = changes(self.bound_model, self._layers)
        if problems:
            raise PlanError(
                f"{self._subject}: the network changed since it was traced: "
                f"{'; '.join(problems[:5])}; unwrap it and make the pruner anew"
            )

    def _collect_data(self) -> dict[str, dict[str, Tensor]]:
        """The weights that are scored: those of every chosen convolution and linear layer."""
        producers = {
            slot.module for group in self.space.groups for slot in group.slots_as("producer")
        }
        return {
            name: {"weight": wrapper.weight.detach().clone()}
            for name, wrapper in self._module_wrappers.items()
            if name in producers and name in self._needed
        }

    def _by_layer(
        self, scores: Tensor, data: dict[str, dict[str, Tensor]]
    ) -> dict[str, dict[str, Tensor]]:
        """Scores (total_units,) as NNI's pruners have them: (C, 1, ...) for each layer of `data`.

        Raises:
            PlanError: they have another shape, or a NaN.
        """
        if problem := score_problem(self.space, scores, infinite=True):
            raise PlanError(f"{self._subject}: {problem}")
        scores = torch.cat([scores.cpu(), torch.zeros(1)])
        metrics = {}
        for name, held in data.items():
            index = self.space.unit_index(name, "out")
            assert index is not None
            by_channel = scores[torch.from_numpy(index)]
            metrics[name] = {"weight": by_channel.view(-1, *[1] * (held["weight"].dim() - 1))}
        return metrics

    def _masks_of(self, plan: PruningPlan) -> Masks:
        """The masks that carry `plan` out, and what a chain has masked before."""
        self.plan = plan
        wrappers = self._module_wrappers
        spaces = {
            name: {key: wrappers[name].pruning_target_spaces[key] for key in keys}
            for name, keys in self._needed.items()
        }
        masks = masks_from(
            flags_of(self.plan),
            self.bound_model,
            self.space,
            {name: {k: held.target for k, held in keys.items()} for name, keys in spaces.items()},
            self._readers,
        )
        for name, keys in spaces.items():
            for key, held in keys.items():
                masks[name][key] = masks[name][key] * held.mask
        return masks
