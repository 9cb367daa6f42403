"""The gates of one network under one budget, learned beside its weights."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from wgates_plugin.channels import ChannelSpace
from wgates_plugin.efficiency.base import Budget
from wgates_plugin.efficiency.constraint import make_constraint
from wgates_plugin.errors import ConfigError, TrainingError
from wgates_plugin.gating import Gating
from wgates_plugin.plan import PruningPlan
from wgates_plugin.strategies import budgeting
from wgates_plugin.strategies.wgates.functions import (
    positive_counts,
    surrogate,
    widths_of,
)
from wgates_plugin.strategies.wgates.scores import (
    SCORES,
    no_autocast,
    ranks_within,
    starting_offsets,
)
from wgates_plugin.strategies.wgates.settings import WGatesSettings

logger = logging.getLogger("wgates_plugin")

MOST_SKIPPED = 100
"""Updates without a finite gradient in a row: a loss scaler has found its scale long before."""


class WGates:
    """Gates of one network under one budget: the object that every door drives.

    Use: `attach()`; per training step, after `loss.backward()`, call `regularize()`; at the end
    `plan()` and `detach()`. Gates see the task's gradient through the weights they multiply, and the
    budget's through the widths they leave open.

    A gradient that is not finite (an overflow under a loss scaler, a bad batch) steps no gate; for a
    batch of which you skip the step yourself, call `discard()`. Scores are float32 under mixed precision.

    Args:
        average: called on the gates' gradient before use; several ranks pass their all-reduce here,
            which keeps gates and plan identical on all of them.
        steps: gate steps to come, needed for `start="open"` whose target slides.
        ranking: merit of each unit (total_units,) to start from, in place of filter norms.
        opening: widths (G,) to start from, in place of those that fit the budget.
        waiting: act only from the first training pass on; until then, evaluation sees the network
            as it is.
    """

    def __init__(
        self,
        network: nn.Module,
        space: ChannelSpace,
        budget: Budget,
        settings: WGatesSettings | None = None,
        *,
        steps: int | None = None,
        average: Callable[[Tensor], Tensor] | None = None,
        ranking: Tensor | None = None,
        opening: Sequence[int] | None = None,
        waiting: bool = False,
    ) -> None:
        self.network, self.space, self.budget = network, space, budget
        self.settings = settings or WGatesSettings()
        self.steps, self.average = steps, average
        if self.settings.start == "open" and not steps:
            raise ConfigError(
                "W-Gates", ['start="open" slides the target over the phase: give `steps`']
            )
        budgeting.check_feasible(space, budget, self.settings.grid)
        self.scores = SCORES[self.settings.scores](network, space)
        self._set_starting_point(ranking, opening)
        self.optimizer = torch.optim.Adam(self.scores.parameters(), lr=self.settings.learning_rate)
        self.constraint = make_constraint(
            self.settings.constraint, len(budget.limits), alpha=self.settings.alpha
        )
        self.gating = Gating(network, space, self._gates)
        self.step = 0
        self.balance = 0.0
        self.skipped = 0
        self._skipped_in_a_row = 0
        self._waiting = waiting
        self._leaf: Tensor | None = None
        self._live_scores: Tensor | None = None

    def _set_starting_point(self, ranking: Tensor | None, opening: Sequence[int] | None) -> None:
        self._full_cost = [
            float(limit.model(torch.tensor(self.space.full_widths, dtype=torch.float64)))
            for limit in self.budget.limits
        ]
        if self.settings.start == "open":
            return  # the constant offset of +0.25 opens every gate, where the surrogate is 1
        grid = self.settings.grid
        merits = self.scores.norms() if ranking is None else ranking
        if opening is None:
            ranks = ranks_within(self.space, merits)
            uniform = budgeting.uniform_widths(self.space, self.budget, grid)
            opening = budgeting.fit_to_budget(self.space, ranks, uniform, self.budget, grid)
        offsets = starting_offsets(
            self.space, merits, opening, grid=grid, spread=self.settings.spread
        )
        self.scores.offset.copy_(offsets)

    def attach(self) -> WGates:
        self.gating.attach()
        return self

    def detach(self) -> nn.Module:
        """Take the gates off and hand the plain network back."""
        self.discard()
        return self.gating.detach()

    def discard(self) -> None:
        """Forget the gradient collected since the last `regularize()`: for a batch that is skipped."""
        self._leaf = self._live_scores = None

    def _gates(self) -> Tensor:
        """Open gates as 0/1 (total_units,). In training a leaf collects their gradient."""
        if not (torch.is_grad_enabled() and self.network.training):
            with torch.no_grad():
                scores = self.scores()
                return torch.ones_like(scores) if self._waiting else self._open(scores)
        self._waiting = False
        if self._leaf is None:
            # Kept over several forward passes, so that accumulated gradients add up.
            self._live_scores = self.scores()
            self._leaf = self._open(self._live_scores.detach()).requires_grad_(True)
        return self._leaf

    def _open(self, scores: Tensor) -> Tensor:
        """The mask that the plan of these scores would leave, so that what trains is what stays."""
        gates = torch.zeros_like(scores)
        for index, width in enumerate(widths_of(self.space, scores, self.settings.grid)):
            group, start = self.space.groups[index], self.space.offsets[index]
            mine = scores[self.space.unit_slice(index)]
            order = torch.argsort(mine, descending=True, stable=True)
            gates[start + order[: width // group.ties]] = 1.0
        return gates

    def current_budget(self) -> Budget:
        """The budget of this step: the target itself, or the sliding one on its way down."""
        if self.settings.start != "open":
            return self.budget
        assert self.steps
        done = min(1.0, self.step / max(1.0, self.settings.slide_fraction * self.steps))
        return self.budget.scaled(
            [
                1.0 + (1.0 - done) * max(0.0, full / limit.target - 1.0)
                for full, limit in zip(self._full_cost, self.budget.limits, strict=True)
            ]
        )

    def regularize(self, *, scale: float = 1.0) -> dict[str, float]:
        """Add the budget's gradient to the task's, step the gates, and report the step.

        Call once per optimizer step, after `loss.backward()`. Where the gradient is not finite the
        gates stay as they are, which `skipped` counts.

        Args:
            scale: what the loss was multiplied by (`GradScaler.get_scale()`). A constant scale
                makes next to no difference, for gates step by Adam; one that changes does.

        Raises:
            TrainingError: no gradient reached the gates, or no finite one for 100 calls in a row.
        """
        leaf, scores = self._leaf, self._live_scores
        if leaf is None or scores is None or leaf.grad is None:
            raise TrainingError(
                "gates: no gradient reached them; run the attached network in train mode and call "
                "`loss.backward()` before `regularize()`"
            )
        self.discard()
        with no_autocast(leaf.device):
            task = leaf.grad if self.average is None else self.average(leaf.grad)
            task = task / scale
            # Averaged first, so that all ranks skip together.
            if not (torch.isfinite(task).all() and torch.isfinite(scores).all()):
                return self._skip(scores)
            violations, pull = self._efficiency_gradient(scores, task)
            gradient = (task + pull.to(task)) * surrogate(scores.detach())
            self.optimizer.zero_grad(set_to_none=True)
            scores.backward(gradient=gradient)
            self.optimizer.step()
        self.constraint.update(violations)
        self.step += 1
        self._skipped_in_a_row = 0
        return self._monitor(scores.detach(), violations)

    def _skip(self, scores: Tensor) -> dict[str, float]:
        """Report a step that was not made."""
        if self._skipped_in_a_row == 0:
            logger.warning(
                "gates: gradient not finite at gate step %d; this update is skipped", self.step
            )
        self.skipped += 1
        self._skipped_in_a_row += 1
        if self._skipped_in_a_row >= MOST_SKIPPED:
            raise TrainingError(
                f"gates: gradient not finite at gate step {self.step}, in {MOST_SKIPPED} calls in a "
                "row; look at the loss and the weights for values that are not finite"
            )
        widths = torch.tensor(
            widths_of(self.space, scores, self.settings.grid), dtype=torch.float64
        )
        return self._monitor(scores.detach(), self.current_budget().violations(widths))

    def _efficiency_gradient(self, scores: Tensor, task: Tensor) -> tuple[Tensor, Tensor]:
        """(violations (K,), gradient per unit (total_units,))."""
        widths = torch.tensor(
            widths_of(self.space, scores, self.settings.grid), dtype=torch.float64
        ).requires_grad_(True)
        violations = self.current_budget().violations(widths)
        pressure = self.constraint.pressure(violations)
        (plain,) = torch.autograd.grad(violations.sum(), widths, retain_graph=True)
        (pressed,) = torch.autograd.grad((violations * pressure).sum(), widths)
        # Multipliers get a scale of their own (ours): pressure 1 pushes as hard as the task pulls.
        # The averaged gradient, so that every rank finds the same scale.
        task_size = float(task.abs().mean())
        plain_size = float(self._per_unit(plain).abs().mean())
        ratio = task_size / plain_size if plain_size > 0 else 0.0
        self.balance = ratio if self.step == 0 else 0.95 * self.balance + 0.05 * ratio
        return violations.detach(), self._per_unit(pressed) * self.balance

    def _per_unit(self, by_group: Tensor) -> Tensor:
        """Gradient by width (G,) -> by gate (total_units,): a unit stands for `ties` channels."""
        repeats = torch.tensor([group.units for group in self.space.groups])
        ties = torch.tensor([float(group.ties) for group in self.space.groups])
        return (by_group * ties).repeat_interleave(repeats)

    def _monitor(self, scores: Tensor, violations: Tensor) -> dict[str, float]:
        counts = positive_counts(self.space, scores)
        return {
            "step": float(self.step),
            "violation": float(violations.max()),
            "open_share": sum(counts) / self.space.total_units,
            # Far from the threshold the surrogate all but vanishes: such gates are out of reach.
            "dead_share": float((scores.abs() > 0.475).float().mean()),
            "skipped": float(self.skipped),
        }

    @torch.no_grad()
    def unit_scores(self) -> Tensor:
        """The scores as they stand, (total_units,)."""
        return self.scores().detach().clone()

    def decided_scores(self) -> Tensor:
        """`unit_scores()`, to decide by.

        Raises:
            TrainingError: the network's weights are not finite, and say nothing.
        """
        scores = self.unit_scores()
        if not torch.isfinite(scores).all():
            bad = [
                group.name
                for index, group in enumerate(self.space.groups)
                if not torch.isfinite(scores[self.space.unit_slice(index)]).all()
            ]
            raise TrainingError(
                f"gates: the weights of {len(bad)} group(s) (`{bad[0]}`) are not finite, so that "
                "nothing can be decided by them; go back to weights from before the loss broke down"
            )
        return scores

    def widths(self) -> tuple[int, ...]:
        return widths_of(self.space, self.unit_scores(), self.settings.grid)

    def plan(self, budget: Budget | None = None) -> PruningPlan:
        """The decided plan: today's widths moved onto the budget, best scores kept.

        Raises:
            TrainingError: the network's weights are not finite.
        """
        scores = self.decided_scores()
        return budgeting.plan_for_budget(
            self.space,
            scores,
            widths_of(self.space, scores, self.settings.grid),
            budget or self.budget,
            self.settings.grid,
            strategy="wgates",
        )

    def state_dict(self) -> dict[str, Any]:
        """Everything a resumed gate phase needs; tensors and plain numbers only."""
        return {
            "scores": self.scores.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "constraint": self.constraint.state_dict(),
            "step": self.step,
            "balance": self.balance,
            "skipped": self.skipped,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.scores.load_state_dict(state["scores"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.constraint.load_state_dict(state["constraint"])
        self.step, self.balance = int(state["step"]), float(state["balance"])
        self.skipped = int(state.get("skipped", 0))
        self._waiting = self._waiting and self.step == 0
