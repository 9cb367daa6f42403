"""Any strategy of this package as an NNI pruner."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from nni.compression.utils import Evaluator
from torch import Tensor, nn

from wgates_plugin.calling import ExampleInputs, copied
from wgates_plugin.errors import ConfigError, PlanError
from wgates_plugin.integrations.nni.asked import Efficiency, ratios_decide
from wgates_plugin.integrations.nni.base import TracedPruner
from wgates_plugin.integrations.nni.choices import ConfigList
from wgates_plugin.integrations.nni.evaluators import example_of
from wgates_plugin.integrations.nni.gates import load_wrapped, unwrapped_state
from wgates_plugin.integrations.nni.masks import Masks
from wgates_plugin.integrations.strategy_checks import (
    data_problems,
    learning_problems,
    preparation_problems,
)
from wgates_plugin.strategies.base import Decision, Task
from wgates_plugin.strategies.budgeting import plan_for_budget
from wgates_plugin.strategies.table import make_strategy, strategy_problems
from wgates_plugin.targets import Target
from wgates_plugin.training.engine import LossFunction
from wgates_plugin.training.settings import TrainingSettings

NEED_A_TARGET: dict[str, str] = {
    "metapruning": (
        "`metapruning` searches widths and hands over freshly initialised weights; a sparse_ratio "
        "leaves no widths to search, so that trained weights would be thrown away for nothing; "
        "give a `target` and no sparse_ratio, or another strategy"
    )
}
"""Strategy -> why it is refused under ratios."""


class StrategyPruner(TracedPruner):
    """A strategy by name: `compress()` lets it decide on `data` and gives masks in NNI's form.

    It decides on the weights that the network has when `compress()` is called. What it learns, it
    learns in a training of its own; the weights it trained are those of the network afterwards
    (`metapruning`'s are fresh ones). `WGatesPruner` learns in the evaluator's training instead.

    Args:
        strategy: a key of `wgates_plugin.strategies.STRATEGIES`, or "package.module:Class"; its own
            settings are `options`.
        data: batches (inputs, targets), with a length. Criteria by weights alone look at none.
        epochs, training: of its phase; without effect where it does not learn.
        loss: a function of logits and targets: what its phase minimises, and whose gradients "taylor",
            "hessian" and "knapsack" rank by. By default cross-entropy.
        grid: channel multiple that widths keep to, under a target; by default, under a latency, that
            of the widths which LPNet has measured.
        model, config_list, example_inputs, efficiency, target, min_channels: as in `WGatesPruner`;
            example inputs are by default the first images of the first batch.

    Attributes:
        decision: what the strategy answered, after `compress()`.

    Raises:
        ConfigError, TraceError, InfeasibleTargetError: before the network is wrapped.
    """

    decision: Decision

    def __init__(
        self,
        model: nn.Module,
        config_list: ConfigList,
        strategy: str,
        data: Iterable[Any],
        *,
        options: Mapping[str, Any] | None = None,
        epochs: int = 1,
        training: TrainingSettings | None = None,
        loss: LossFunction | None = None,
        seed: int = 0,
        grid: int | None = None,
        example_inputs: ExampleInputs | None = None,
        efficiency: Efficiency | None = None,
        target: float | Target | None = None,
        min_channels: int = 1,
    ) -> None:
        problems = strategy_problems(strategy, options or {})
        if not problems:
            problems += data_problems(strategy, data, traced_on=example_inputs is None)
        problems += learning_problems(epochs=epochs, seed=seed, training=training, loss=loss)
        if strategy in NEED_A_TARGET and ratios_decide(efficiency, target):
            problems.append(NEED_A_TARGET[strategy])
        if not problems:
            self.strategy, self._name = make_strategy(strategy, options), strategy
            if example_inputs is None:
                example_inputs = example_of(data, model)
            problems += preparation_problems(
                self.strategy, strategy, options, model, example_inputs
            )
            # NNI's wrappers take the parameters away; the strategy gets this, with the weights of then.
            self._plain = copied(model)
            self._example = example_inputs
        self._data, self._epochs, self._seed = data, epochs, seed
        self._training, self._loss = training or TrainingSettings(), loss
        super().__init__(
            model,
            config_list,
            None,
            None,
            example_inputs=example_inputs,
            efficiency=efficiency,
            target=target,
            grid=grid,
            min_channels=min_channels,
            problems=problems,
        )

    def compress(
        self, max_steps: int | None = None, max_epochs: int | None = None
    ) -> tuple[nn.Module, Masks]:
        """Let the strategy decide; returns the model and its masks.

        Raises:
            ConfigError: a duration is given, which `epochs` already says.
            PlanError: compressed already, or the network changed since it was traced.
        """
        if max_steps is not None or max_epochs is not None:
            raise ConfigError(
                "StrategyPruner.compress",
                ["max_steps, max_epochs: the strategy learns for its own `epochs`; leave them out"],
            )
        self._check_ready()
        self._decide()
        return self.bound_model, self.get_masks()

    def _decide(self) -> None:
        self.update_masks(self.generate_masks())

    def _calculate_metrics(
        self, data: dict[str, dict[str, Tensor]]
    ) -> dict[str, dict[str, Tensor]]:
        """What the strategy decides: its weights are the network's from here on, its scores answer."""
        epochs = self._epochs if self.strategy.has_phase else 0
        network = copied(self._plain).to(next(self.bound_model.parameters()).device)
        network.load_state_dict(
            unwrapped_state(self.bound_model, network.state_dict()), strict=False
        )
        self.decision = self.strategy.decide(
            Task(
                network,
                self.space,
                self.budget,
                self._example,
                self._data,
                grid=self._grid,
                epochs=epochs,
                total_epochs=max(1, epochs),
                training=self._training,
                loss=self._loss,
                seed=self._seed,
                progress=False,
            )
        )
        load_wrapped(self.bound_model, self.decision.network.state_dict())
        return self._by_layer(self.decision.scores, data)

    def _generate_sparsity(self, metrics: dict[str, dict[str, Tensor]]) -> Masks:
        """The plan that the decision stands for under the budget, as masks."""
        plan = plan_for_budget(
            self.space,
            self.decision.scores,
            self.decision.widths,
            self.budget,
            self._grid,
            strategy=self._name,
        )
        return self._masks_of(plan)

    def _fuse_preprocess(self, evaluator: Evaluator) -> None:
        """As the first link of a chain: decide, unless `compress` did; masks work by themselves."""
        if self.plan is None:
            self._check_unchanged()
            self._decide()

    def _fuse_postprocess(self, evaluator: Evaluator) -> None:
        pass

    @classmethod
    def from_compressor(cls, *_: Any, **__: Any) -> StrategyPruner:
        """Refused: the strategy would have to train a network that another one has masked."""
        raise PlanError(
            "StrategyPruner.from_compressor: unwrap the first pruner, remove what it masked, and "
            "make this one of the smaller network; WGatesPruner can be chained"
        )
