"""Polarising gates of one network under one budget (GDP, Guo et al., ICCV 2021).

Per step, the task moves `x` by its gradient through `g(x)`, the budget by a proximal step that leaves
exact zeros. What is ours is marked.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from wgates_plugin.calling import (
    ExampleInputs,
    call_with,
    device_of,
    informative,
    left_as_found,
    map_tensors,
)
from wgates_plugin.channels import ChannelSpace
from wgates_plugin.efficiency.base import Budget, measured_grid
from wgates_plugin.efficiency.constraint import AugmentedLagrangian
from wgates_plugin.errors import ConfigError, TrainingError
from wgates_plugin.gating import Gating
from wgates_plugin.strategies.averaging import mean_over_ranks
from wgates_plugin.strategies.base import Settle
from wgates_plugin.strategies.budgeting import Descent, check_feasible, fit_to_budget
from wgates_plugin.strategies.gdp.absorption import absorb, rigid_units
from wgates_plugin.strategies.gdp.branches import Branches
from wgates_plugin.strategies.gdp.polarisation import (
    epsilon_at,
    smooth_l0,
    smooth_l0_slope,
    soft_threshold,
)
from wgates_plugin.strategies.skipping import note_skipped
from wgates_plugin.strategies.wgates.functions import positive_counts
from wgates_plugin.strategies.wgates.scores import ranks_within
from wgates_plugin.training.evaluation import to_device
from wgates_plugin.verification import relative_error

logger = logging.getLogger("wgates_plugin")

MEMORY = 0.05
"""Share of the phase over which the gates' gradient and its size are averaged, 10 steps at least."""

LEAST_OPEN, REOPENED = 0.03, 1 / 3
"""In units of `sqrt(epsilon)`: gates of about 1/1000, and of 1/10."""

WIDEST = 30.0
"""Bound on a gate's curvature over the mean of all, and on its inverse."""

MUCH_ROOM = 0.1
"""Share of the budget that may stay unused without a word."""

LARGEST_PUSH = 5.0
"""Bound on a gate's gradient over the mean size of all: one batch's outlier opens no gate alone."""


@dataclass(frozen=True)
class GDPSettings:
    """How gates polarise.

    Attributes:
        epsilon_start, epsilon_end: of the gate `x^2 / (x^2 + epsilon)`, decayed geometrically.
        decay_fraction: share of the phase over which epsilon decays and the limit on the cost comes
            down from today's cost to the wanted one.
        settle_fraction: share of the phase after which the closed channels are those of the
            decision, on the grid and within the budget; the rest of the phase trains what is left.
        travel: sum of all step sizes of `x`, in gates' gradients of mean size.
        remove_branches: let every channel of a residual branch close, whatever floor all groups have;
            only its constant stays. Not where the group has a floor of its own.
        grid: channel multiple the runtime likes; widths are decided on it. None takes the one that the
            budget's latency model was measured on, 1 where it names none.
    """

    epsilon_start: float = 0.1
    epsilon_end: float = 1e-4
    decay_fraction: float = 0.6
    settle_fraction: float = 0.8
    travel: float = 4.0
    remove_branches: bool = True
    grid: int | None = None

    def __post_init__(self) -> None:
        problems = []
        if not 0 < self.epsilon_end <= self.epsilon_start < float("inf"):
            problems.append(
                f"epsilon_end is {self.epsilon_end}, epsilon_start {self.epsilon_start}; needs "
                "0 < epsilon_end <= epsilon_start"
            )
        if not 0 < self.decay_fraction <= self.settle_fraction <= 1:
            problems.append(
                f"settle_fraction is {self.settle_fraction}, decay_fraction {self.decay_fraction}; "
                "needs 0 < decay_fraction <= settle_fraction <= 1"
            )
        if not 0 < self.travel < float("inf"):
            problems.append(f"travel is {self.travel}, needs a positive finite number")
        if self.grid is not None and (not isinstance(self.grid, int) or self.grid < 1):
            problems.append(f"grid is {self.grid!r}, needs a whole number from 1, or None")
        if problems:
            raise ConfigError("GDP settings", problems)


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
        self._ties = _per_unit(space, [float(group.ties) for group in space.groups]).to(device)
        least = space.least_widths(self.grid)
        self._least = torch.tensor(least, dtype=torch.float64)
        may_close = self.settings.remove_branches and example_inputs is not None
        self.branches = Branches(space, least, self._output if may_close else None)
        self._descent = Descent(space, budget)
        self.constraint = AugmentedLagrangian(len(budget.limits))
        self.gating = Gating(network, space, self._gates)
        self.step = 0
        self.settled: tuple[int, ...] | None = None
        self.absorbed = False
        self.facts: dict[str, Any] = {}
        self._closed_at = torch.full((count,), -1, device=device)
        self._mean = torch.zeros(count, device=device)
        self._fisher = torch.zeros(count, device=device)
        self._size = 0.0
        self.skipped = 0
        self._skipped_in_a_row = 0
        self._leaf: Tensor | None = None
        self._forced: Tensor | None = None

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
        counts = positive_counts(self.space, self.x.abs())
        return tuple(
            group.round_up(count * group.ties, self.grid)
            for group, count in zip(self.space.groups, counts, strict=True)
        )

    def _gates(self) -> Tensor:
        if self._forced is not None:
            return self._forced
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
        moved = before - rate * slope * self._smoothed(task)
        if self.settled is None:
            if not self._keeps_the_budget():
                pull = torch.where(self._rigid, 0.0, self._pull(epsilon))
                moved = soft_threshold(moved, rate * pull / self._curvature())
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

    def _smoothed(self, task: Tensor) -> Tensor:
        """Running mean of the gates' gradient over its running mean size (ours): about 1 in size."""
        open_ones = (self.x != 0) & ~self._rigid
        size = float(task[open_ones].abs().mean()) if bool(open_ones.any()) else 0.0
        new = 1.0 / min(self.step + 1.0, max(10.0, MEMORY * self.steps))
        self._size += new * (size - self._size)
        self._mean = self._mean + new * (task - self._mean)
        loss_at_stake = (task * self.unit_scores()).square()
        self._fisher = self._fisher + new * (loss_at_stake - self._fisher)
        relative = self._mean / max(self._size, 1e-30)
        return relative.clamp(-LARGEST_PUSH, LARGEST_PUSH)

    def _curvature(self) -> Tensor:
        """The metric of the proximal step, (total_units,), 1 for a gate like most others (ours).

        The mean square of `g dL/dg` estimates what closing a gate costs the task (Fisher
        information, as in Theis et al., arXiv 1801.05787). In this metric gates close in the order of
        cost saved per loss caused. A plain step would take the dearest channels first, whatever they
        are worth: behind a BatchNorm the loss cannot feel that all gates of a group fall alike.
        """
        open_ones = (self.x != 0) & ~self._rigid
        if not bool(open_ones.any()):
            return torch.ones_like(self.x)
        middle = float(self._fisher[open_ones].mean())
        return (self._fisher / max(middle, 1e-30)).clamp(1.0 / WIDEST, WIDEST)

    def _pull(self, epsilon: float) -> Tensor:
        """What the budget asks of each unit, (total_units,): lambda times its marginal cost.

        The cost is a product of neighbouring widths; the paper optimises one factor at a time with
        the others frozen, here each takes its own gradient with all others as they stand (ours).
        Widths are sums of gates over what an open gate is worth at this epsilon (ours).
        """
        shares = self.unit_scores() * torch.where(self._rigid, 1.0, 1.0 + epsilon)
        sums = [
            shares[self.space.unit_slice(index)].sum() * group.ties
            for index, group in enumerate(self.space.groups)
        ]
        open_now = torch.stack(sums).detach().double().cpu()
        widths = open_now.maximum(self._least).requires_grad_(True)
        violations = self._current_budget().violations(widths)
        pressure = self.constraint.pressure(violations)
        (plain,) = torch.autograd.grad(violations.sum(), widths, retain_graph=True)
        (pressed,) = torch.autograd.grad((violations * pressure).sum(), widths)
        self.constraint.update(violations)
        by_unit, reference = (
            _per_unit(self.space, value).to(self.x) * self._ties for value in (pressed, plain)
        )
        # Multipliers get a scale of their own (ours): at 1 the budget pulls as hard as the task.
        scale = float(reference[self.x != 0].abs().mean()) if bool((self.x != 0).any()) else 0.0
        # At its least width a group saves nothing by closing more, unless all of it may close (ours).
        saves = (open_now > self._least) | self.branches.may_close()
        return by_unit.clamp_min(0) * _per_unit(self.space, saves).to(self.x) / max(scale, 1e-30)

    def _keeps_the_budget(self) -> bool:
        """Do the open gates keep the final limits? Then nothing more need close (ours)."""
        return float(self.budget.excess(torch.tensor(self.widths(), dtype=torch.float64))) <= 0

    def _current_budget(self) -> Budget:
        """The limits of this step, on their way from today's cost to the target (ours)."""
        return self._descent.at(self.step / (self.settings.decay_fraction * self.steps))

    @torch.no_grad()
    def _output(self, gates: Tensor, seed: int | None = None) -> Tensor:
        """Eval-mode output under these gates, on the example inputs or on noise of their shape."""
        assert self.example_inputs is not None
        generator = torch.Generator().manual_seed(seed or 0)

        def noise(value: Tensor) -> Tensor:
            if seed is None or not value.is_floating_point():
                return value
            return torch.randn(value.shape, generator=generator).to(value)

        attached = self.gating.attached
        inputs = to_device(self.example_inputs, self.x.device)
        inputs = map_tensors(noise, informative(self.network, inputs))
        self._forced = gates
        try:
            with left_as_found(self.network):
                self.network.eval()
                self.gating.attach()
                output: Tensor = call_with(self.network, inputs)
        finally:
            self._forced = None
            if not attached:
                self.gating.detach()
        return output

    @torch.no_grad()
    def _settle(self) -> None:
        """Decide the closed channels: on the grid, within the budget, floors and dead branches kept.

        The proximal steps have done most of it. What is over the budget is closed from the smallest
        gate up; what the budget or the grid leaves room for is opened again at 1/10, the channel that
        closed last first (ours). Where all open groups are whole and there is room still, branches of
        `Branches.together` open again, the one that the task would miss most first (ours). How much that
        changes the output is kept in `facts`.
        """
        before = self.unit_scores()
        closed = self.x == 0
        # Gates that cannot move go by what closing them would cost the task (ours).
        ranks = ranks_within(self.space, self._fisher.cpu()).to(self.x)
        opened_so_far = torch.where(self._rigid, ranks, self.x.abs())
        merits = torch.where(closed, (self._closed_at + 1) / (self.steps + 1) - 1.0, opened_so_far)
        settled = self._fitted(merits)
        together = self.branches.together(self._closed_at, self._fisher)
        while together and self._is_whole(settled):
            index = together.pop()
            self.branches.closed.remove(index)
            # Most of it closed in one step: what the task would miss most opens first.
            where = self.space.unit_slice(index)
            merits[where] = (self._closed_at[where] + ranks[where]) / (self.steps + 1) - 1.0
            settled = self._fitted(merits)
        self._warn_of_room(settled)
        if self._measured is not None:
            measured, _ = self._measured(merits.cpu(), settled)
            settled = tuple(
                int(self._least[index]) if index in self.branches.closed else width
                for index, width in enumerate(measured)
            )
        for index, (group, width) in enumerate(zip(self.space.groups, settled, strict=True)):
            where = self.space.unit_slice(index)
            if index in self.branches.closed:
                self.x[where] = 0.0
                continue
            order = merits[where].argsort(descending=True, stable=True)
            opened, shut = (
                where.start + part for part in order.tensor_split([width // group.ties])
            )
            self.x[shut] = 0.0
            revived = REOPENED * self.epsilon**0.5
            self.x[opened] = torch.where(closed[opened], revived, self.x[opened])
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

    def _fitted(self, merits: Tensor) -> tuple[int, ...]:
        """Widths (G,) that keep the budget, closed branches at their least."""
        limits = [
            dataclasses.replace(group, cap=int(self._least[index]))
            if index in self.branches.closed
            else group
            for index, group in enumerate(self.space.groups)
        ]
        space = dataclasses.replace(self.space, groups=tuple(limits))
        return fit_to_budget(space, merits.cpu(), self.widths(), self.budget, self.grid)

    def _is_whole(self, widths: tuple[int, ...]) -> bool:
        """Is every group but closed branches as wide as it may be? Then what is left is room."""
        allowed = self.space.allowed_widths(self.grid)
        return all(
            width == mine[-1] or index in self.branches.closed
            for index, (width, mine) in enumerate(zip(widths, allowed, strict=True))
        )

    def _warn_of_room(self, widths: tuple[int, ...]) -> None:
        excess = float(self.budget.excess(torch.tensor(widths, dtype=torch.float64)))
        if self.branches.closed and self._is_whole(widths) and excess < -MUCH_ROOM:
            logger.warning(
                "gdp: the branches %s closed altogether, which leaves %.0f %% of the budget unused with "
                "all other channels open; if they are needed, give the phase more steps (it has %d), or "
                "set `remove_branches` to false",
                ", ".join(f"`{name}`" for name in self.branches.names),
                -100 * excess,
                self.steps,
            )

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
            "mean": self._mean,
            "fisher": self._fisher,
            "closed_at": self._closed_at,
            "size": self._size,
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
        self.x, self._mean = state["x"].to(device), state["mean"].to(device)
        self._fisher = state["fisher"].to(device)
        self._closed_at = state["closed_at"].to(device).clone()
        self._size, self.step = float(state["size"]), int(state["step"])
        self.skipped = int(state.get("skipped", 0))
        self.constraint.load_state_dict(state["constraint"])
        self.settled = None if state["settled"] is None else tuple(state["settled"])
        self.branches.closed, self.branches.needed = list(state["dead"]), list(state["needed"])
        self.facts = dict(state["facts"])


def _per_unit(space: ChannelSpace, by_group: Any) -> Tensor:
    """A value per group (G,) -> per unit (total_units,)."""
    repeats = torch.tensor([group.units for group in space.groups])
    return torch.as_tensor(by_group).detach().repeat_interleave(repeats)
