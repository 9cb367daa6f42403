"""Network Slimming as a strategy: BatchNorm scales trained towards zero, the largest stay.

Liu et al., "Learning Efficient Convolutional Networks through Network Slimming" (ICCV 2017): the
training loss plus `sparsity * sum |gamma|` (eq. 1) by its subgradient, then one threshold over the
scales of all layers. A group of coupled layers goes by the mean of its scales (ours; the paper selects
channels before each layer instead). Weight decay leaves the scales alone here (ours).
"""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from wgates_plugin.errors import ConfigError
from wgates_plugin.strategies import budgeting
from wgates_plugin.strategies.base import Decision, Strategy, Task
from wgates_plugin.strategies.criteria import importance_scores
from wgates_plugin.strategies.criteria.repaired import BNScaleImportance
from wgates_plugin.strategies.phase import drop_frozen, run_phase
from wgates_plugin.training import StepContext

logger = logging.getLogger("wgates_plugin")


@dataclass(frozen=True)
class SlimSettings:
    """How scales are trained.

    Attributes:
        sparsity: weight of the scales' L1 norm in the loss; the paper's value is for 160 epochs.
    """

    sparsity: float = 1e-4

    def __post_init__(self) -> None:
        if not (math.isfinite(self.sparsity) and self.sparsity >= 0):
            raise ConfigError("slim", [f"sparsity is {self.sparsity!r}, needs 0 or more"])


class SlimStrategy(Strategy):
    """A phase of training with L1 on the scales of the prunable channels; frozen weights leave the
    scales to learn alone."""

    settings_type = SlimSettings
    summary: ClassVar[str] = "BatchNorm scales trained towards zero (Liu et al., ICCV 2017)"
    settings: SlimSettings

    def decide(self, task: Task) -> Decision:
        network, space = task.network, task.space
        budgeting.check_feasible(space, task.budget, task.grid)
        inside = {slot.module for group in space.groups for slot in group.slots}
        scales = [
            module.weight
            for name, module in network.named_modules()
            if name in inside
            and isinstance(module, nn.modules.batchnorm._BatchNorm)
            and module.affine  # one without scales has nothing to learn
        ]
        importance = BNScaleImportance(normalizer=None)
        scores = importance_scores(network, space, importance)  # says what has no scale
        if task.epochs == 0:
            logger.warning(
                "slim: without epochs the scales are not trained towards zero; those of the network "
                "as it is decide. Give it epochs, or choose `bn-scale`, which needs none"
            )
            return Decision(network, scores, _widths(task, scores))
        trainer = task.trainer(network, "slim")

        @torch.no_grad()
        def step(_: StepContext) -> dict[str, float]:
            for scale in scales:
                if scale.grad is not None:
                    scale.grad.add_(scale.sign(), alpha=self.settings.sparsity)
            drop_frozen(task, network, scales)
            return {"scales": float(torch.cat([s.detach().abs() for s in scales]).mean())}

        monitor = run_phase(self, task, trainer, {"network": network}, step)
        scores = importance_scores(network, space, importance)
        return Decision(network, scores, _widths(task, scores), monitor, trainer.history)


def _widths(task: Task, scores: Tensor) -> tuple[int, ...]:
    """Of one threshold over all scores, then of what the budget has room for."""
    start = budgeting.threshold_widths(task.space, scores, task.budget, task.grid)
    return budgeting.fit_to_budget(task.space, scores, start, task.budget, task.grid)
