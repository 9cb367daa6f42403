"""The decision that ends GDP's polarising: which channels are closed from here on."""

from __future__ import annotations

import dataclasses
import logging
from dataclasses import dataclass

import torch
from torch import Tensor

from wgates_plugin.channels import ChannelSpace
from wgates_plugin.efficiency.base import Budget
from wgates_plugin.strategies.base import Settle
from wgates_plugin.strategies.budgeting import fit_to_budget
from wgates_plugin.strategies.gdp.branches import Branches
from wgates_plugin.strategies.unit_scores import ranks_within

logger = logging.getLogger("wgates_plugin")

MUCH_ROOM = 0.1
"""Share of the budget that may stay unused without a word."""


@dataclass(frozen=True)
class Settling:
    """Closed channels on the grid, within the budget, floors and dead branches kept.

    The proximal steps have done most of it. What is over the budget is closed from the smallest
    gate up; what the budget or the grid leaves room for is opened again, the channel that closed
    last first (ours). Where all open groups are whole and there is room still, branches of
    `Branches.together` open again, the one that the task would miss most first (ours).

    Attributes:
        branches: those that closed; the ones that open again are taken out.
        steps: of the phase.
        measured: as `settle` of `Task`.
    """

    space: ChannelSpace
    budget: Budget
    grid: int
    branches: Branches
    steps: int
    measured: Settle | None

    def decide(
        self,
        x: Tensor,
        widths: tuple[int, ...],
        *,
        rigid: Tensor,
        closed_at: Tensor,
        fisher: Tensor,
    ) -> tuple[tuple[int, ...], Tensor]:
        """Widths (G,) that keep the budget, and the merits (total_units,) to choose channels by.

        Args:
            x: parameters of the gates, 0 where closed. widths: (G,) as open as they are.
            rigid: units whose gates cannot move: bool. closed_at: step in which each closed.
            fisher: what the task loses by each. All (total_units,).
        """
        # Gates that cannot move go by what closing them would cost the task (ours).
        ranks = ranks_within(self.space, fisher.cpu()).to(x)
        opened_so_far = torch.where(rigid, ranks, x.abs())
        merits = torch.where(x == 0, (closed_at + 1) / (self.steps + 1) - 1.0, opened_so_far)
        settled = self._fitted(merits, widths)
        together = self.branches.together(closed_at, fisher)
        while together and self._is_whole(settled):
            index = together.pop()
            self.branches.closed.remove(index)
            # Most of it closed in one step: what the task would miss most opens first.
            where = self.space.unit_slice(index)
            merits[where] = (closed_at[where] + ranks[where]) / (self.steps + 1) - 1.0
            settled = self._fitted(merits, widths)
        self._warn_of_room(settled)
        if self.measured is not None:
            found, _ = self.measured(merits.cpu(), settled)
            settled = tuple(
                least if index in self.branches.closed else width
                for index, (width, least) in enumerate(zip(found, self._least, strict=True))
            )
        return settled, merits

    def carry_out(
        self, x: Tensor, widths: tuple[int, ...], merits: Tensor, *, reopened: float
    ) -> None:
        """Close and open gates as decided, best merits first; `x` is written to.

        Args:
            reopened: parameter of a gate that is opened again.
        """
        for index, (group, width) in enumerate(zip(self.space.groups, widths, strict=True)):
            where = self.space.unit_slice(index)
            if index in self.branches.closed:
                x[where] = 0.0
                continue
            order = merits[where].argsort(descending=True, stable=True)
            opened, shut = (
                where.start + part for part in order.tensor_split([width // group.ties])
            )
            x[shut] = 0.0
            x[opened] = torch.where(x[opened] == 0, reopened, x[opened])

    @property
    def _least(self) -> tuple[int, ...]:
        return self.space.least_widths(self.grid)

    def _fitted(self, merits: Tensor, widths: tuple[int, ...]) -> tuple[int, ...]:
        """Widths (G,) near `widths` that keep the budget, closed branches at their least."""
        limits = [
            dataclasses.replace(group, cap=least) if index in self.branches.closed else group
            for index, (group, least) in enumerate(zip(self.space.groups, self._least, strict=True))
        ]
        space = dataclasses.replace(self.space, groups=tuple(limits))
        return fit_to_budget(space, merits.cpu(), widths, self.budget, self.grid)

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
