"""Training the PruningNet: every step at widths of its own."""

from __future__ import annotations

from typing import Any

import numpy as np

from wgates_plugin.strategies.base import Strategy, Task
from wgates_plugin.strategies.metapruning.genes import Genes
from wgates_plugin.strategies.metapruning.pruning_net import PruningNet
from wgates_plugin.strategies.phase import run_phase
from wgates_plugin.training import StepContext


def train(
    strategy: Strategy, task: Task, pruning_net: PruningNet, genes: Genes
) -> tuple[list[dict[str, float]], list[dict[str, Any]]]:
    """Stochastic width training for `task.epochs` (MetaPruning, section 3.2), in place, resumable.

    Widths are drawn over all shares, within the budget or not, and are the same on all processes.

    Returns: numbers of each step, and records of the epochs.
    """
    trainer = task.trainer(pruning_net, "pruning net", total_epochs=task.epochs)
    total = sum(task.space.full_widths)

    def draw(where: StepContext) -> None:
        # Of (seed, step) alone, so that an interruption changes nothing.
        pruning_net.widths = genes.draw(np.random.default_rng([task.seed, where.step]))

    def step(where: StepContext) -> dict[str, float]:
        return {"step": where.step, "width_share": sum(pruning_net.widths) / total}

    monitor = run_phase(strategy, task, trainer, {"network": pruning_net}, step, before=draw)
    return monitor, trainer.history
