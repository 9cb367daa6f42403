"""W-Gates as a strategy: gates and weights learn together in a phase of training."""

from __future__ import annotations

import dataclasses

from wgates_plugin.strategies.base import Decision, Strategy, Task
from wgates_plugin.strategies.phase import drop_frozen, run_phase
from wgates_plugin.strategies.wgates.gates import WGates
from wgates_plugin.strategies.wgates.settings import WGatesSettings
from wgates_plugin.strategies.without_learning import largest_filters
from wgates_plugin.training import StepContext


class WGatesStrategy(Strategy):
    """Gates of `strategies.wgates`, driven by the task's training loop."""

    settings_type = WGatesSettings
    summary = "each filter's own weights decide, through a learned binary gate (Li et al., 2020)"
    settings: WGatesSettings

    def decide(self, task: Task) -> Decision:
        network = task.network
        if task.epochs == 0 and self.settings.start == "open":  # nothing tells filters apart
            return largest_filters(task, "wgates")
        gates = WGates(
            network,
            task.space,
            task.budget,
            dataclasses.replace(self.settings, grid=task.grid),
            steps=max(1, task.steps),
            average=task.average,
            settle=task.settle if task.epochs else None,
        )
        if task.epochs == 0:
            return Decision(network, gates.decided_scores().cpu(), gates.widths())
        trainer = task.trainer(network, "gates")

        def step(_: StepContext) -> dict[str, float]:
            record = gates.regularize()
            drop_frozen(task, network)
            return record

        gates.attach()
        try:
            monitor = run_phase(self, task, trainer, {"network": network, "gates": gates}, step)
        finally:
            gates.detach()
        scores, widths = gates.decided_scores().cpu(), gates.widths()
        facts = gates.learned(scores, widths)
        return Decision(
            network,
            scores,
            widths,
            monitor,
            trainer.history,
            facts,
            learned=task.train_weights,
        )
