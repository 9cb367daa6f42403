"""The gates of one network under one budget, learned beside its weights."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from wgates_plugin.channels import ChannelSpace
from wgates_plugin.efficiency.base import Budget, measured_grid
from wgates_plugin.efficiency.constraint import make_constraint
from wgates_plugin.errors import ConfigError, TrainingError
from wgates_plugin.gating import Gating
from wgates_plugin.plan import PruningPlan
from wgates_plugin.strategies import budgeting
from wgates_plugin.strategies.averaging import mean_over_ranks
from wgates_plugin.strategies.base import Settle
from wgates_plugin.strategies.skipping import note_skipped
from wgates_plugin.strategies.unit_scores import open_mask, positive_counts, widths_of
from wgates_plugin.strategies.wgates.functions import by_gate, surrogate
from wgates_plugin.strategies.wgates.scores import SCORES, no_autocast
from wgates_plugin.strategies.wgates.settings import WGatesSettings
from wgates_plugin.strategies.wgates.starting import Opening, StartingPoint


class WGates:
    """Gates of one network under one budget: the object that every door drives.

    Use: `attach()`; per training step, after `loss.backward()`, call `regularize()`; at the end
    `plan()` and `detach()`. Gates see the task's gradient through the weights they multiply, and the
    budget's through the widths they leave open.

    A gradient that is not finite (an overflow under a loss scaler, a bad batch) steps no gate; for a
    batch of which you skip the step yourself, call `discard()`. Scores are float32 under mixed precision.

    Args:
        average: called on the gates' gradient before use, which keeps gates and plan identical on
            several ranks; by default the mean over all of them, where `torch.distributed` runs. Where
            one of them learns alone: `lambda gradient: gradient`.
        steps: gate steps to come: half of them at most is spent on measuring. Needed for
            `start="open"`, whose target slides.
        ranking: merit of each unit (total_units,) to start from; nothing is measured then.
        carried: scores (total_units,) of an earlier phase, which hold until something is measured.
        compared: merits (total_units,) of that phase which compare between groups, for `opening`.
        opening: from such merits, or a `ranking`, to the widths (G,) to start from, in place of those
            that fit the budget.
        settle: as in `Task`: where gates start to learn, their widths are measured first, and the
            budget is put right.
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
        carried: Tensor | None = None,
        compared: Tensor | None = None,
        opening: Opening | None = None,
        settle: Settle | None = None,
        waiting: bool = False,
    ) -> None:
        self.network, self.space, self.budget = network, space, budget
        self.settings = settings or WGatesSettings()
        self.grid = self.settings.grid or measured_grid(budget)
        self.steps, self.average, self._settle = steps, average or mean_over_ranks, settle
        if self.settings.start == "open" and not steps:
            raise ConfigError(
                "W-Gates", ['start="open" slides the target over the phase: give `steps`']
            )
        budgeting.check_feasible(space, budget, self.grid)
        self.scores = SCORES[self.settings.scores](network, space)
        self.starting = StartingPoint(
            space,
            budget,
            self.settings,
            self.scores.norms,
            grid=self.grid,
            steps=steps,
            ranking=ranking,
            carried=carried,
            compared=compared,
            opening=opening,
        )
        self.merits = self.starting.merits
        self._descent = budgeting.Descent(space, budget)
        if not self.merits.wanted:
            self._leave_open()
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

    def _leave_open(self) -> None:
        """Go to the starting point; the scores' own offset of +0.25 opens every gate."""
        if self.settings.start == "target":
            self._hold_measured()
            self.scores.offset.copy_(self.starting.offsets())

    def _hold_measured(self) -> None:
        """What is learned at widths that a measurement then cuts is lost: measure them first."""
        if self._settle is not None:
            self.budget = self.starting.settle(self._settle)

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
        """The mask of these scores; caps would close channels that are yet to be measured."""
        if self.merits.wanted:
            return self.starting.opened().to(scores, copy=True)  # a leaf is made of it
        return open_mask(self.space, scores, self.grid)

    def current_budget(self) -> Budget:
        """The budget of this step: the target itself, or the sliding one on its way down."""
        if self.settings.start != "open":
            return self.budget
        assert self.steps
        return self._descent.at(self.step / max(1.0, self.settings.slide_fraction * self.steps))

    @property
    def reached(self) -> bool:
        """Whether a gradient came since the last `regularize()` or `discard()`."""
        return self._leaf is not None and self._leaf.grad is not None

    def regularize(self, *, scale: float = 1.0) -> dict[str, float]:
        """Add the budget's gradient to the task's, step the gates, and report the step.

        Call once per optimizer step, between `loss.backward()` and `optimizer.step()`. What moves
        the scores is added to the `.grad` of the weights that they are computed from. Where the
        gradient is not finite the gates stay as they are, which `skipped` counts.

        Args:
            scale: what the loss was multiplied by (`GradScaler.get_scale()`): the gates' gradient is
                divided by it, and the weights' must be so already (`scaler.unscale_(optimizer)`).

        Raises:
            TrainingError: no gradient reached the gates, or no finite one for 100 calls in a row; or
                the weights changed since the forward pass.
        """
        leaf, scores = self._leaf, self._live_scores
        if leaf is None or scores is None or leaf.grad is None:
            raise TrainingError(
                "gates: no gradient reached them; run the attached network in train mode and call "
                "`loss.backward()` before `regularize()`"
            )
        self.discard()
        with no_autocast(leaf.device):
            task = self.average(leaf.grad) / scale
            # Averaged first, so that all ranks skip together.
            if not (torch.isfinite(task).all() and torch.isfinite(scores).all()):
                return self._skip(scores)
            if self.merits.wanted:
                return self._measure(scores, task)
            violations, pull = self._efficiency_gradient(scores, task)
            gradient = (task + pull.to(task)) * surrogate(scores.detach())
            self.optimizer.zero_grad(set_to_none=True)
            _send_back(scores, gradient)
            self.optimizer.step()
        self.constraint.update(violations)
        self.step += 1
        self._skipped_in_a_row = 0
        return self._monitor(scores.detach(), violations)

    def _skip(self, scores: Tensor) -> dict[str, float]:
        """Report a step that was not made."""
        self.skipped += 1
        self._skipped_in_a_row += 1
        note_skipped(self.step, self._skipped_in_a_row)
        return self._unmoved(scores, self.starting.opened() if self.merits.wanted else None)

    def _measure(self, scores: Tensor, gradient: Tensor) -> dict[str, float]:
        """A step in which open gates are looked at, and none learns."""
        opened = self.starting.opened()
        self.merits.add(gradient, opened)
        self.step += 1
        self._skipped_in_a_row = 0
        record = self._unmoved(scores, opened)
        if not self.merits.wanted:
            self._leave_open()
        return record

    def _unmoved(self, scores: Tensor, opened: Tensor | None) -> dict[str, float]:
        """The report of a step that moved no score; `opened` (0/1) is what is open while measuring."""
        if opened is not None:
            scores = scores * (2.0 * opened.to(scores) - 1.0)
        widths = torch.tensor(widths_of(self.space, scores, self.grid), dtype=torch.float64)
        return self._monitor(scores.detach(), self.current_budget().violations(widths))

    def _efficiency_gradient(self, scores: Tensor, task: Tensor) -> tuple[Tensor, Tensor]:
        """(violations (K,), gradient per unit (total_units,))."""
        widths = torch.tensor(
            widths_of(self.space, scores, self.grid), dtype=torch.float64
        ).requires_grad_(True)
        violations = self.current_budget().violations(widths)
        pressure = self.constraint.pressure(violations)
        (plain,) = torch.autograd.grad(violations.sum(), widths, retain_graph=True)
        (pressed,) = torch.autograd.grad((violations * pressure).sum(), widths)
        # Multipliers get a scale of their own (ours): pressure 1 pushes as hard as the task pulls.
        # The averaged gradient, so that every rank finds the same scale.
        task_size = float(task.abs().mean())
        plain_size = float(by_gate(self.space, plain).abs().mean())
        ratio = task_size / plain_size if plain_size > 0 else 0.0
        first = self.step == self.merits.done
        self.balance = ratio if first else 0.95 * self.balance + 0.05 * ratio
        return violations.detach(), by_gate(self.space, pressed) * self.balance

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

    @property
    def only_measured(self) -> bool:
        """Whether every step so far went into measuring, none into learning."""
        return 0 < self.step == self.merits.done

    def warning(self, subject: str, steps: str) -> str | None:
        """What a door warns of before it decides: no gate learned. `steps` is its name for `steps`."""
        if not self.only_measured:
            return None
        return (
            f"{subject}: all {self.step} gate steps were spent on measuring open gates, none learned: "
            f"the channels are decided by that measurement alone. Pass {steps}={self.step} (at most "
            "half of them is then measured), or lower `settings=WGatesSettings(measuring=...)`"
        )

    def learned(self, scores: Tensor, widths: Sequence[int]) -> dict[str, Any]:
        """What learning changed of the starting point, for the report.

        In a phase of a few hundred steps that is little: what was measured then decides.

        Args:
            scores: (total_units,) decided by. widths: (G,) decided on.
        """
        facts: dict[str, Any] = {
            "steps_measured": self.merits.done,
            "steps_learned": self.step - self.merits.done,
        }
        if self.settings.start == "target":
            first, now = (
                PruningPlan.top(self.space, ranking.cpu(), widths).mask
                for ranking in (self.starting.offsets(), scores)
            )
            facts["units_kept"] = int(now.sum())
            facts["units_exchanged_by_learning"] = int((now & ~first).sum())
        return facts

    @torch.no_grad()
    def unit_scores(self) -> Tensor:
        """The scores as they stand, (total_units,); while measuring, where they would start now."""
        offset = self.starting.offsets().to(self.scores.offset) if self.merits.wanted else None
        return self.scores(offset).detach().clone()

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
        return widths_of(self.space, self.unit_scores(), self.grid)

    def plan(self, budget: Budget | None = None) -> PruningPlan:
        """The decided plan: today's widths moved onto the budget, best scores kept.

        Raises:
            TrainingError: the network's weights are not finite.
        """
        scores = self.decided_scores()
        return budgeting.plan_for_budget(
            self.space,
            scores,
            widths_of(self.space, scores, self.grid),
            budget or self.budget,
            self.grid,
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
            "start": self.starting.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.scores.load_state_dict(state["scores"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.constraint.load_state_dict(state["constraint"])
        self.step, self.balance = int(state["step"]), float(state["balance"])
        self.skipped = int(state["skipped"])
        self.starting.load_state_dict(state["start"])
        if self.settings.start == "target" and not self.merits.wanted:
            self._hold_measured()
        self._waiting = self._waiting and self.step == 0


def _send_back(scores: Tensor, gradient: Tensor) -> None:
    """`scores.backward(gradient)`.

    Raises:
        TrainingError: the weights are others than those that the scores were computed from.
    """
    try:
        scores.backward(gradient=gradient)
    except RuntimeError as error:
        if "modified by an inplace operation" not in str(error):
            raise
        raise TrainingError(
            "gates: the weights changed between the forward pass and `regularize()`, which adds to "
            "their gradient; call it between `loss.backward()` and `optimizer.step()` (under a "
            "GradScaler between `scaler.unscale_(optimizer)` and `scaler.step(optimizer)`)"
        ) from error
