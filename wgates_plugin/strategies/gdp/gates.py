"""Polarising gates of one network under one budget (GDP, Guo et al., ICCV 2021).

Per step, the task moves `x` by its gradient through `g(x)`, the budget by a proximal step that leaves
exact zeros. What is ours is marked.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from wgates_plugin.calling import ExampleInputs, device_of
from wgates_plugin.channels import ChannelSpace
from wgates_plugin.efficiency.base import Budget, measured_grid
from wgates_plugin.efficiency.constraint import AugmentedLagrangian
from wgates_plugin.errors import TrainingError
from wgates_plugin.gating import Gating
from wgates_plugin.strategies.averaging import mean_over_ranks
from wgates_plugin.strategies.base import Settle
from wgates_plugin.strategies.budgeting import check_feasible, holds
from wgates_plugin.strategies.gdp.absorption import absorb, rigid_units
from wgates_plugin.strategies.gdp.branches import Branches
from wgates_plugin.strategies.gdp.budget_pull import BudgetPull
from wgates_plugin.strategies.gdp.gated_output import gated_output
from wgates_plugin.strategies.gdp.polarisation import (
    epsilon_at,
    smooth_l0,
    smooth_l0_slope,
    soft_threshold,
)
from wgates_plugin.strategies.gdp.settings import GDPSettings
from wgates_plugin.strategies.gdp.settling import Settling
from wgates_plugin.strategies.gdp.task_gradient import TaskGradient
from wgates_plugin.strategies.skipping import note_skipped
from wgates_plugin.strategies.unit_scores import widths_of
from wgates_plugin.verification import relative_error

LEAST_OPEN, REOPENED = 0.03, 1 / 3
"""In units of `sqrt(epsilon)`: gates of about 1/1000, and of 1/10."""


class PolarisedGates:
    """Gates of one network under one budget.

    Use: `attach()`; per training step, after `loss.backward()`, call `regularize()`; at the end
    `absorb()`, after which `unit_scores()` holds the gates' values, 0 for a closed channel, and the
    network computes without gates what it computed with them (what a `Scatter` reads keeps its closed
    channels until they are removed).

    A gradient that is not finite (an overflow under a loss scaler, a bad batch) steps no gate; for a
    batch of which you skip the step yourself, call `discard()`.

    Args:
        steps: gate steps to come.
        example_inputs: show whether a branch may close without cutting the network in two, and how
            much settling changes the output; without them no branch closes.
        average: called on the gates' gradient before use, which keeps gates identical on several
            ranks; by default the mean over all of them, where `torch.distributed` runs. Where one of
            them learns alone: `lambda gradient: gradient`.
        settle: as in `Task`: the widths of the decision are measured, so that the rest of the phase
            trains what stays. A closed branch is measured at its least width, which takes a little
            longer than its constant.
    """

    def __init__(
        self,
        network: nn.Module,
        space: ChannelSpace,
        budget: Budget,
        settings: GDPSettings | None = None,
        *,
        steps: int,
        example_inputs: ExampleInputs | None = None,
        average: Callable[[Tensor], Tensor] | None = None,
        settle: Settle | None = None,
    ) -> None:
        self.network, self.space, self.budget = network, space, budget
        self.settings = settings or GDPSettings()
        self.grid = self.settings.grid or measured_grid(budget)
        self.steps, self.example_inputs = max(1, steps), example_inputs
        self.average = average or mean_over_ranks
        self._measured = settle
        check_feasible(space, budget, self.grid)
        device = device_of(network)
        count = space.total_units
        self.x = torch.ones(count, device=device)
        self._rigid = rigid_units(network, space).to(device)
        may_close = self.settings.remove_branches and example_inputs is not None
        self.branches = Branches(
            space, space.least_widths(self.grid), self._output if may_close else None
        )
        self.gradient = TaskGradient(count, self.steps, device)
        self.constraint = AugmentedLagrangian(len(budget.limits))
        self.pull = BudgetPull(
            space,
            budget,
            self.constraint,
            self._rigid,
            grid=self.grid,
            steps=self.settings.decay_fraction * self.steps,
        )
        self.gating = Gating(network, space, self._gates)
        self.step = 0
        self.settled: tuple[int, ...] | None = None
        self.absorbed = False
        self.facts: dict[str, Any] = {}
        self._closed_at = torch.full((count,), -1, device=device)
        self.skipped = 0
        self._skipped_in_a_row = 0
        self._leaf: Tensor | None = None

    @property
    def epsilon(self) -> float:
        mine = self.settings
        return epsilon_at(
            self.step / self.steps,
            start=mine.epsilon_start,
            end=mine.epsilon_end,
            decay=mine.decay_fraction,
        )

    def attach(self) -> PolarisedGates:
        self.gating.attach()
        return self

    def detach(self) -> nn.Module:
        """Take the gates off and hand the plain network back, without them in its weights."""
        self.discard()
        return self.gating.detach()

    def discard(self) -> None:
        """Forget the gradient collected since the last `regularize()`: for a batch that is skipped."""
        self._leaf = None

    def absorb(self) -> nn.Module:
        """Take the gates off and multiply them into the kernels that read the channels, once."""
        if self.absorbed:
            return self.detach()
        self.settle()
        network = self.detach()
        self.absorbed = True
        return absorb(network, self.space, self.unit_scores())

    def output(self, *, closed_alone: bool = False) -> Tensor:
        """Eval-mode output on the example inputs under the gates, or under those that are 0 alone.

        Constant example inputs are replaced by noise, see `calling.informative`.
        """
        gates = self.unit_scores()
        return self._output((gates != 0).to(gates) if closed_alone else gates)

    def settle(self) -> None:
        """Decide the closed channels, if the phase ended before they were."""
        if self.settled is None:
            self._settle()

    @torch.no_grad()
    def unit_scores(self) -> Tensor:
        """The gates as they stand (total_units,), in [0, 1]; exactly 0 where closed."""
        smooth = smooth_l0(self.x, self.epsilon)
        return torch.where(self._rigid, (self.x != 0).to(smooth), smooth)

    def widths(self) -> tuple[int, ...]:
        """Open gates, as channels on the grid; the decision's once settled."""
        if self.settled is not None:
            return self.settled
        return widths_of(self.space, self.x.abs(), self.grid)

    def _gates(self) -> Tensor:
        if not (torch.is_grad_enabled() and self.network.training):
            return self.unit_scores()
        if self._leaf is None:
            # Kept over several forward passes, so that accumulated gradients add up.
            self._leaf = self.unit_scores().requires_grad_(True)
        return self._leaf

    def regularize(self, *, scale: float = 1.0) -> dict[str, float]:
        """Step the gates by the task's gradient and the budget, and report the step.

        Call once per optimizer step, after `loss.backward()`. Where the gradient is not finite the
        gates stay as they are, which `skipped` counts.

        Args:
            scale: what the loss was multiplied by (`GradScaler.get_scale()`, before
                `scaler.update()` changes it). A constant scale makes no difference: gates step by the
                gradient's relative size, and add nothing to the weights' gradient.

        Raises:
            TrainingError: no gradient reached the gates, or no finite one for 100 calls in a row.
        """
        leaf = self._leaf
        if leaf is None or leaf.grad is None:
            raise TrainingError(
                "gates: no gradient reached them; run the attached network in train mode and call "
                "`loss.backward()` before `regularize()`"
            )
        self.discard()
        task = self.average(leaf.grad) / scale
        # Averaged first, so that all ranks skip together.
        if not torch.isfinite(task).all():
            self.skipped += 1
            self._skipped_in_a_row += 1
            note_skipped(self.step, self._skipped_in_a_row)
            return self._monitor()
        self._skipped_in_a_row = 0
        before, epsilon = self.x, self.epsilon
        # A step size that carries `x` from open to closed within the phase, however long (ours).
        rate = self.settings.travel / self.steps
        slope = torch.where(self._rigid, 0.0, smooth_l0_slope(before, epsilon))
        learning = (before != 0) & ~self._rigid
        self.gradient.add(task, self.unit_scores(), learning, self.step)
        moved = before - rate * slope * self.gradient.push()
        if self.settled is None:
            # Once the open gates keep the final limits, nothing more need close (ours).
            if not holds(self.budget, self.widths()):
                pull = self.pull(
                    before,
                    self.unit_scores(),
                    epsilon=epsilon,
                    step=self.step,
                    may_close=self.branches.may_close(),
                )
                moved = soft_threshold(moved, rate * pull / self.gradient.curvature(learning))
            moved = self.branches.spare(before, moved, epsilon**0.5)
        else:
            least = LEAST_OPEN * epsilon**0.5  # what is open must be able to come back
            moved = torch.where((before != 0) & (moved.abs() < least), least, moved)
        # Beyond 1 the gate gains nothing and would only have further to fall (ours).
        self.x = moved.clamp(-1.0, 1.0)
        self._closed_at[(before != 0) & (self.x == 0)] = self.step
        self.step += 1
        if self.settled is None and self.step >= self.settings.settle_fraction * self.steps:
            self._settle()
        return self._monitor()

    def _output(self, gates: Tensor, seed: int | None = None) -> Tensor:
        """Eval-mode output under these gates, on the example inputs or on noise of their shape."""
        assert self.example_inputs is not None
        return gated_output(self.gating, gates, self.example_inputs, seed)

    @torch.no_grad()
    def _settle(self) -> None:
        """Close and open gates as `Settling` decides.

        How much that changes the output is kept in `facts`.
        """
        before, closed = self.unit_scores(), self.x == 0
        settling = Settling(
            self.space, self.budget, self.grid, self.branches, self.steps, self._measured
        )
        settled, merits = settling.decide(
            self.x,
            self.widths(),
            rigid=self._rigid,
            closed_at=self._closed_at,
            fisher=self.gradient.fisher,
        )
        settling.carry_out(self.x, settled, merits, reopened=REOPENED * self.epsilon**0.5)
        self.settled = settled
        self.facts = {
            "closed": int((self.x == 0).sum()),
            "closed_by_the_budget_alone": int((~closed & (self.x == 0)).sum()),
            "opened_again": int((closed & (self.x != 0)).sum()),
            "closed_branches": self.branches.names,
        }
        if self.example_inputs is not None:
            now = self._output(self.unit_scores())
            self.facts["output_change_at_settling"] = relative_error(now, self._output(before))

    def _monitor(self) -> dict[str, float]:
        widths = torch.tensor(self.widths(), dtype=torch.float64)
        gates = self.unit_scores()
        return {
            "step": float(max(0, self.step - 1)),
            "violation": float(self.budget.excess(widths)),
            "open_share": float((self.x != 0).float().mean()),
            "undecided_share": float(((gates > 0.05) & (gates < 0.95)).float().mean()),
            "multiplier": float(self.constraint.multipliers.max()),
            "skipped": float(self.skipped),
        }

    def state_dict(self) -> dict[str, Any]:
        """Everything a resumed phase needs; tensors and plain values only."""
        return {
            "x": self.x,
            "mean": self.gradient.mean,
            "fisher": self.gradient.fisher,
            "closed_at": self._closed_at,
            "size": self.gradient.size,
            "step": self.step,
            "skipped": self.skipped,
            "constraint": self.constraint.state_dict(),
            "settled": None if self.settled is None else list(self.settled),
            "dead": list(self.branches.closed),
            "needed": list(self.branches.needed),
            "facts": self.facts,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        device = self.x.device
        self.x = state["x"].to(device)
        self.gradient.mean = state["mean"].to(device)
        self.gradient.fisher = state["fisher"].to(device)
        self.gradient.size = float(state["size"])
        self._closed_at = state["closed_at"].to(device).clone()
        self.step = int(state["step"])
        self.skipped = int(state.get("skipped", 0))
        self.constraint.load_state_dict(state["constraint"])
        self.settled = None if state["settled"] is None else tuple(state["settled"])
        self.branches.closed, self.branches.needed = list(state["dead"]), list(state["needed"])
        self.facts = dict(state["facts"])
