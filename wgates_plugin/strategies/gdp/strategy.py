"""GDP as a strategy: gates polarise in a phase of training, and are absorbed at its end.

Guo et al., "GDP: Stabilized Neural Network Pruning via Gates with Differentiable Polarization"
(ICCV 2021). The gates themselves are in `gates.py`.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import nn

from wgates_plugin.calling import ExampleInputs
from wgates_plugin.errors import SurgeryError
from wgates_plugin.plan import PruningPlan
from wgates_plugin.strategies.base import Decision, Strategy, Task
from wgates_plugin.strategies.gdp.gates import PolarisedGates
from wgates_plugin.strategies.gdp.settings import GDPSettings
from wgates_plugin.strategies.phase import drop_frozen, run_phase
from wgates_plugin.strategies.without_learning import largest_filters
from wgates_plugin.training import StepContext
from wgates_plugin.transforms import Step, constant_branches
from wgates_plugin.verification import TOLERANCE, relative_error


class GDPStrategy(Strategy):
    """Gates of `strategies.gdp.gates`, driven by the task's training loop."""

    settings_type = GDPSettings
    summary = (
        "gates polarise to exact zeros and are absorbed, no fine-tuning owed (Guo et al., 2021)"
    )
    settings: GDPSettings

    def decide(self, task: Task) -> Decision:
        network = task.network
        settings = dataclasses.replace(self.settings, grid=task.grid)
        if task.epochs == 0:
            return largest_filters(task, "gdp")
        gates = PolarisedGates(
            network,
            task.space,
            task.budget,
            settings,
            steps=task.steps,
            example_inputs=task.example_inputs,
            average=task.average,
            settle=task.settle,
        )
        trainer = task.trainer(network, "gates")

        def step(_: StepContext) -> dict[str, float]:
            record = gates.regularize()
            drop_frozen(task, network)
            return record

        gates.attach()
        try:
            monitor = run_phase(self, task, trainer, {"network": network, "gates": gates}, step)
            gates.settle()  # a phase that was cut short must not be absorbed as it stands
            gated = gates.output()
            gates.absorb()
            error = _absorption_error(gates.output(closed_alone=True), gated)
        finally:
            gates.detach()
        scores = gates.unit_scores().cpu()
        facts: dict[str, Any] = {
            **gates.facts,
            "absorption_error": error,
            "least_open_gate": float(scores[scores > 0].min()),
        }
        return Decision(
            network,
            scores,
            gates.widths(),
            monitor,
            trainer.history,
            facts,
            learned=task.train_weights,
        )

    def finish(
        self, network: nn.Module, plan: PruningPlan, example_inputs: ExampleInputs
    ) -> list[Step]:
        """Leave only their constant of branches that closed altogether."""
        if not self.settings.remove_branches:
            return []
        return constant_branches.find(network, plan.space, example_inputs)


def _absorption_error(absorbed: torch.Tensor, gated: torch.Tensor) -> float:
    """How far the network is from what it computed with gates, relative to the largest output.

    Raises:
        SurgeryError: further than rounding goes, 1e-5 or a few steps of a coarser type of number.
    """
    error = relative_error(absorbed, gated)
    allowed = max(TOLERANCE, 8 * torch.finfo(gated.dtype).eps)
    if not error <= allowed:
        raise SurgeryError(
            f"gdp: with the gates absorbed into the weights the outputs differ by {error:.1e} "
            f"relative, allowed are {allowed:.1e}; leave out layers whose weights are computed or "
            "shared with `ignored_layers`, or choose another strategy"
        )
    return error
