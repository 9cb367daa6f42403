"""torch-pruning's importances as strategies: no phase of their own, all epochs are fine-tuning."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from wgates_plugin.errors import ConfigError
from wgates_plugin.strategies.base import Decision, Strategy, Task
from wgates_plugin.strategies.criteria.plan import SCOPES, decide_by_criterion
from wgates_plugin.strategies.criteria.scores import batches_problems
from wgates_plugin.strategies.criteria.table import CRITERIA
from wgates_plugin.training.evaluation import cross_entropy


@dataclass(frozen=True)
class CriterionSettings:
    """How a criterion's scores become widths.

    Attributes:
        scope: "global" ranks all groups together; "local" takes the same share of each, which are
            uniform widths; "isomorphic" takes the same share of each set of groups of one structure,
            ranked together.
        batches: of training data for gradients; None takes all. Of no effect on criteria that need
            none.
    """

    scope: str = "global"
    batches: int | None = None

    def __post_init__(self) -> None:
        problems = batches_problems(self.batches)
        if self.scope not in SCOPES:
            known = ", ".join(SCOPES)
            problems.insert(0, f"scope `{self.scope}`: unknown; known: {known}")
        if problems:
            raise ConfigError("criterion", problems)


class CriterionStrategy(Strategy):
    """Channels that one of `CRITERIA` rates highest, at widths that keep the budget."""

    settings_type = CriterionSettings
    has_phase = False
    trains_weights = False
    criterion: ClassVar[str]
    settings: CriterionSettings

    def decide(self, task: Task) -> Decision:
        plan, scores = decide_by_criterion(
            task.network,
            task.space,
            self.criterion,
            task.budget,
            task.grid,
            task.train_loader,
            scope=self.settings.scope,
            loss=task.loss or cross_entropy,
            seed=task.seed,
            batches=self.settings.batches,
        )
        return Decision(task.network, scores.cpu(), plan.widths)


def criterion_strategies() -> dict[str, type[CriterionStrategy]]:
    """One strategy per criterion, by the criterion's name."""
    return {
        name: type(
            f"{name.title().replace('-', '')}Strategy",
            (CriterionStrategy,),
            {"criterion": name, "summary": found.paper},
        )
        for name, found in CRITERIA.items()
    }
