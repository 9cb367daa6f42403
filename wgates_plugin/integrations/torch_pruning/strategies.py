"""Any strategy of this package as a torch-pruning pruner."""

from __future__ import annotations

import dataclasses
import logging
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from torch import nn

from wgates_plugin.calling import ExampleInputs, copied
from wgates_plugin.errors import PlanError
from wgates_plugin.integrations.strategy_checks import (
    data_problems,
    learning_problems,
    preparation_problems,
)
from wgates_plugin.integrations.torch_pruning.base import TracedPruner
from wgates_plugin.integrations.torch_pruning.checks import round_to_problems
from wgates_plugin.integrations.torch_pruning.options import plain
from wgates_plugin.integrations.torch_pruning.words import Efficiency, Words
from wgates_plugin.plan import PruningPlan
from wgates_plugin.strategies.base import Decision, Task
from wgates_plugin.strategies.budgeting import plan_for_budget
from wgates_plugin.strategies.metapruning import MetaPruningStrategy
from wgates_plugin.strategies.metapruning.genes import Genes, check_searchable
from wgates_plugin.strategies.table import make_strategy, strategy_problems
from wgates_plugin.surgery import check_shapes, removals
from wgates_plugin.training.engine import LossFunction
from wgates_plugin.training.settings import TrainingSettings
from wgates_plugin.transforms import apply_steps

logger = logging.getLogger("wgates_plugin")

_FRESH = (
    "metapruning gives the network fresh weights, untrained at the widths it found: train it from "
    'scratch after `step()`, or choose options={"weights": "inherit"} to keep trained ones'
)


def _goal_problems(strategy: str, budgeted: bool) -> list[str]:
    if strategy != "metapruning" or budgeted:
        return []
    return [
        "strategy 'metapruning': searches widths within a budget, and ratios fix them: its search "
        "would be for nothing and the trained weights lost; give a `target`, or choose "
        "another strategy for ratios"
    ]


class StrategyPruner(TracedPruner):
    """A strategy by name: `step()` lets it decide on your data and removes exactly.

    What it learns, it learns in `step()`, in `epochs` over `data`; the weights it trained are those
    of the network afterwards. `WGatesPruner` learns in a loop of yours instead. "metapruning" takes
    no ratios, and leaves an untrained network unless it is told to inherit weights.

    Args:
        model: the network to prune, in place at `step()`.
        example_inputs: one batch as a tensor, a tuple or list of arguments or a dict.
        strategy: a key of `wgates_plugin.strategies.STRATEGIES`, or "package.module:Class"; its own
            settings are `options`.
        data: batches (inputs, targets), with a length; None for criteria of weights alone.
        epochs, training: of its phase; without effect where it does not learn.
        loss: of logits and targets, which it learns by, or ranks by ("taylor", "hessian", "knapsack",
            "functionality"); cross entropy by default.
        round_to: channel multiple of every width that is cut; by default, under a latency, that of
            the widths which LPNet has measured, and 1 otherwise.
        efficiency, target, and all other words: as in `WGatesPruner`; without `efficiency`, a
            target counts MACs.

    Attributes:
        decision: what the strategy answered, after `step()`.

    Raises:
        ConfigError: words or options that are wrong, all at once.
        TraceError, InfeasibleTargetError: before anything is changed.

    Example:
        >>> import torch
        >>> net = nn.Sequential(nn.Conv2d(1, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 2))
        >>> data = [(torch.randn(4, 1, 8, 8), torch.tensor([0, 1, 0, 1]))]
        >>> pruner = StrategyPruner(net, data[0][0], "taylor", data, pruning_ratio=0.5)
        >>> pruner.step()
        >>> net[0].out_channels
        4
    """

    decision: Decision

    def __init__(
        self,
        model: nn.Module,
        example_inputs: ExampleInputs,
        strategy: str,
        data: Iterable[Any] | None = None,
        *,
        options: Mapping[str, Any] | None = None,
        epochs: int = 1,
        training: TrainingSettings | None = None,
        loss: LossFunction | None = None,
        seed: int = 0,
        efficiency: Efficiency | None = None,
        target: float | None = None,
        pruning_ratio: float | None = None,
        pruning_ratio_dict: Mapping[Any, float] | None = None,
        global_pruning: bool = False,
        isomorphic: bool = False,
        max_pruning_ratio: float = 1.0,
        round_to: int | None = None,
        ignored_layers: Sequence[Any] | None = None,
        root_module_types: Sequence[type] | None = None,
        unwrapped_parameters: Any = None,
        min_channels: int = 1,
        min_fraction: float = 0.0,
        floors: Mapping[str, int] | None = None,
        caps: Mapping[str, int] | None = None,
        **others: Any,
    ) -> None:
        model = plain(model)
        problems = strategy_problems(strategy, options or {})
        if not problems:
            problems += _goal_problems(strategy, target is not None or efficiency is not None)
            problems += data_problems(strategy, data)
        if (steps := others.pop("iterative_steps", 1)) != 1:
            problems.append(f"iterative_steps {steps!r}: a strategy decides once; leave it at 1")
        problems += learning_problems(epochs=epochs, seed=seed, training=training, loss=loss)
        problems += round_to_problems(round_to)
        if not problems:
            self.strategy = make_strategy(strategy, options)
            problems += preparation_problems(
                self.strategy, strategy, options, model, example_inputs
            )
        self._name, self._data, self._epochs, self._seed = strategy, data, epochs, seed
        self._training, self._loss = training or TrainingSettings(), loss
        words = Words(
            efficiency=efficiency,
            target=target,
            pruning_ratio=pruning_ratio,
            pruning_ratio_dict=pruning_ratio_dict,
            global_pruning=global_pruning,
            isomorphic=isomorphic,
            max_pruning_ratio=max_pruning_ratio,
            ignored_layers=ignored_layers,
            root_module_types=root_module_types,
            unwrapped_parameters=unwrapped_parameters,
            min_channels=min_channels,
            min_fraction=min_fraction,
            floors=floors,
            caps=caps,
            others=others,
        )
        self._open(model, example_inputs, words, problems, grid=round_to)
        if isinstance(self.strategy, MetaPruningStrategy):
            mine = self.strategy.settings
            genes = Genes.of(self.space, self._grid, mine.least_share, mine.share_step)
            check_searchable(genes, self._goal.budget(self.space, 1), self._grid, seed)
            if mine.weights == "scratch":
                warnings.warn(f"{self._subject}: {_FRESH}", stacklevel=2)

    def regularize(self, model: nn.Module, loss: Any = None, **_: Any) -> None:
        """Refused: strategies learn in `step()`."""
        raise PlanError(
            f"{self._subject}.regularize: the strategy learns by itself in `step()`; take the call "
            "out of the loop, or use WGatesPruner, which learns in it"
        )

    def step(self, interactive: bool = False) -> Iterator[Any] | None:
        """Decide and remove; with `interactive=True` the groups come one by one.

        Raises:
            PlanError: done already, or the network changed since it was traced.
            TrainingError: the strategy's own; whatever is raised while it decides leaves network
                and pruner as they were.
        """
        if self.current_step:
            raise PlanError(
                f"{self._subject}.step: this network is pruned already; make a new pruner to prune more"
            )
        check_shapes(self.model, self.space)
        plan = self._decide()
        self.current_step = 1
        groups = self._removals(plan)
        if interactive:
            return groups
        for group in groups:
            group.prune()
        return None

    def _decide(self) -> PruningPlan:
        """Let the strategy decide; the network gets its weights once all has gone well."""
        device = next(self.model.parameters()).device
        epochs = self._epochs if self.strategy.has_phase else 0
        budget = self._goal.budget(self.space, 1)
        decision = self.strategy.decide(
            Task(
                copied(self.model),
                self.space,
                budget,
                self._inputs,
                [] if self._data is None else self._data,
                grid=self._grid,
                epochs=epochs,
                total_epochs=max(1, epochs),
                training=self._training,
                loss=self._loss,
                seed=self._seed,
                progress=False,
            )
        )
        scores = decision.scores
        widths = self._goal.widths(self.space, scores, 1)
        if widths is None:
            plan = plan_for_budget(
                self.space, scores, decision.widths, budget, self._grid, strategy=self._name
            )
        else:
            plan = PruningPlan.top(self.space, scores, widths, strategy=self._name)
        self.model.load_state_dict(decision.network.to(device).state_dict())
        self.decision = decision
        return plan

    def _removals(self, plan: PruningPlan) -> Iterator[Any]:
        yield from removals(self.model, plan, traced=self._trace)
        steps = self.strategy.finish(self.model, plan, self._inputs)
        apply_steps(self.model, steps)
        note = {**plan.note, "after": [dict(step) for step in steps]} if steps else plan.note
        self.plan = dataclasses.replace(plan, note=note)
        if self.decision.facts.get("weights") == "scratch":
            logger.warning("%s: %s", self._subject, _FRESH)

    def manual_prune_width(self, *_: Any, **__: Any) -> None:
        """Refused: a strategy decides all groups together."""
        raise PlanError(
            f"{self._subject}.manual_prune_width: use `floors` and `caps`, or `pruning_ratio_dict`"
        )

    def load_pruning_history(self, pruning_history: Any) -> None:
        """Refused: a plan is what lasts here."""
        raise PlanError(
            f"{self._subject}.load_pruning_history: save `pruner.plan` and carry it out with "
            "`wgates_plugin.remove`, or load the history into WGatesPruner"
        )
