"""GDP as a strategy: gates polarise in a phase of training, and are absorbed at its end.

Guo et al., "GDP: Stabilized Neural Network Pruning via Gates with Differentiable Polarization"
(ICCV 2021). The gates themselves are in `gates.py`.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import nn

from wgates_plugin.calling import ExampleInputs, call_with, left_as_found
from wgates_plugin.plan import PruningPlan
from wgates_plugin.strategies.base import Decision, Strategy, Task
from wgates_plugin.strategies.budgeting import fit_to_budget, uniform_widths
from wgates_plugin.strategies.gdp.gates import GDPSettings, PolarisedGates
from wgates_plugin.strategies.phase import run_phase
from wgates_plugin.strategies.wgates import WeightScores, ranks_within
from wgates_plugin.training import StepContext
from wgates_plugin.training.evaluation import to_device
from wgates_plugin.transforms import Step, constant_branches
from wgates_plugin.verification import relative_error


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
            return _without_learning(task)
        gates = PolarisedGates(
            network,
            task.space,
            task.budget,
            settings,
            steps=task.steps,
            example_inputs=task.example_inputs,
            average=task.average,
        )
        trainer = task.trainer(network, "gates")

        def step(_: StepContext) -> dict[str, float]:
            record = gates.regularize()
            if not task.train_weights:
                for parameter in network.parameters():
                    parameter.grad = None
            return record

        gates.attach()
        try:
            monitor = run_phase(task, trainer, {"network": network, "gates": gates}, step)
            gated = _eval_output(network, task.example_inputs)
            gates.absorb()
        finally:
            gates.detach()
        scores = gates.unit_scores().cpu()
        facts: dict[str, Any] = {
            **gates.facts,
            "absorption_error": relative_error(_eval_output(network, task.example_inputs), gated),
            "least_open_gate": float(scores[scores > 0].min()),
        }
        return Decision(network, scores, gates.widths(), monitor, trainer.history, facts)

    def finish(
        self, network: nn.Module, plan: PruningPlan, example_inputs: ExampleInputs
    ) -> list[Step]:
        """Leave only their constant of branches that closed altogether."""
        if not self.settings.remove_branches:
            return []
        return constant_branches.find(network, plan.space, example_inputs)


def _without_learning(task: Task) -> Decision:
    """No gate can polarise in no time: the largest filters at uniform widths (ours)."""
    ranks = ranks_within(task.space, WeightScores(task.network, task.space).norms()).cpu()
    uniform = uniform_widths(task.space, task.budget, task.grid)
    widths = fit_to_budget(task.space, ranks, uniform, task.budget, task.grid)
    return Decision(task.network, ranks, widths, facts={"learned": False})


@torch.no_grad()
def _eval_output(network: nn.Module, example_inputs: ExampleInputs) -> torch.Tensor:
    with left_as_found(network):
        network.eval()
        device = next(network.parameters()).device
        output: torch.Tensor = call_with(network, to_device(example_inputs, device))
    return output
