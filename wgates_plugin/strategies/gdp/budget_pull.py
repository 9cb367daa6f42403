"""What the budget asks of each gate."""

from __future__ import annotations

import torch
from torch import Tensor

from wgates_plugin.channels import ChannelSpace
from wgates_plugin.efficiency.base import Budget
from wgates_plugin.efficiency.constraint import Constraint
from wgates_plugin.strategies.budgeting import Descent
from wgates_plugin.strategies.unit_scores import per_unit


class BudgetPull:
    """Lambda times the marginal cost of each unit, with limits on their way to the target (ours).

    The cost is a product of neighbouring widths; the paper optimises one factor at a time with the
    others frozen, here each takes its own gradient with all others as they stand (ours). Widths are
    sums of gates over what an open gate is worth at this epsilon (ours).

    Args:
        constraint: turns violations into lambda; every call is a dual step.
        rigid: units (total_units,) whose gates are 0 or 1, which nothing pulls: bool.
        steps: in which the limits come down from today's cost to the wanted one.
    """

    def __init__(
        self,
        space: ChannelSpace,
        budget: Budget,
        constraint: Constraint,
        rigid: Tensor,
        *,
        grid: int,
        steps: float,
    ) -> None:
        self.space, self.constraint = space, constraint
        self._rigid, self._steps = rigid, steps
        ties = torch.tensor([float(group.ties) for group in space.groups])
        self._ties = per_unit(space, ties).to(rigid.device)
        self._least = torch.tensor(space.least_widths(grid), dtype=torch.float64)
        self._descent = Descent(space, budget)

    def __call__(
        self, x: Tensor, gates: Tensor, *, epsilon: float, step: int, may_close: Tensor
    ) -> Tensor:
        """(total_units,), 0 or more.

        Args:
            x, gates: parameters and values of the gates, (total_units,).
            may_close: groups (G,) that may close altogether: bool.
        """
        shares = gates * torch.where(self._rigid, 1.0, 1.0 + epsilon)
        sums = [
            shares[self.space.unit_slice(index)].sum() * group.ties
            for index, group in enumerate(self.space.groups)
        ]
        open_now = torch.stack(sums).detach().double().cpu()
        widths = open_now.maximum(self._least).requires_grad_(True)
        violations = self._descent.at(step / self._steps).violations(widths)
        pressure = self.constraint.pressure(violations)
        (plain,) = torch.autograd.grad(violations.sum(), widths, retain_graph=True)
        (pressed,) = torch.autograd.grad((violations * pressure).sum(), widths)
        self.constraint.update(violations)
        by_unit, reference = (
            per_unit(self.space, value).to(x) * self._ties for value in (pressed, plain)
        )
        # Multipliers get a scale of their own (ours): at 1 the budget pulls as hard as the task.
        scale = float(reference[x != 0].abs().mean()) if bool((x != 0).any()) else 0.0
        # At its least width a group saves nothing by closing more, unless all of it may close (ours).
        saves = per_unit(self.space, (open_now > self._least) | may_close).to(x)
        pull = by_unit.clamp_min(0) * saves / max(scale, 1e-30)
        return torch.where(self._rigid, 0.0, pull)
