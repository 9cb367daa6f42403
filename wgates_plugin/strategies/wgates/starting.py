"""Where the scores of `start="target"` begin: what opens first, and how wide."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from wgates_plugin.channels import ChannelSpace
from wgates_plugin.efficiency.base import Budget
from wgates_plugin.plan import PruningPlan
from wgates_plugin.strategies import budgeting
from wgates_plugin.strategies.base import Settle
from wgates_plugin.strategies.unit_scores import positive_counts, ranks_within
from wgates_plugin.strategies.wgates.measuring import GateMerits
from wgates_plugin.strategies.wgates.scores import starting_offsets
from wgates_plugin.strategies.wgates.settings import WGatesSettings

Opening = Callable[[Tensor], Sequence[int]]
"""From merits (total_units,) to the widths (G,) to start from."""

CHEAPEST = 1e-3
"""Least price of a unit, relative to the dearest: some groups cost next to nothing."""


class StartingPoint:
    """Offsets of the scores at the target (ours), from the best that is known of the channels.

    That is what open gates measured; before they did, or if nothing is to be measured, a given
    `ranking`, the scores `carried` over from an earlier phase, or else filter norms. Only what was
    measured or carried compares between groups, and then says how wide they open too; the others
    open uniform widths. An `opening` says how wide in their place: from what was measured, else
    from what is `compared` already, else from the ranks of what is known.

    Args:
        steps: gate steps to come, None if not known. The rest as in `WGates`.
    """

    def __init__(
        self,
        space: ChannelSpace,
        budget: Budget,
        settings: WGatesSettings,
        norms: Callable[[], Tensor],
        *,
        grid: int = 1,
        steps: int | None = None,
        ranking: Tensor | None = None,
        carried: Tensor | None = None,
        compared: Tensor | None = None,
        opening: Opening | None = None,
    ) -> None:
        self.space, self.budget, self.settings, self.grid = space, budget, settings, grid
        measuring = settings.measuring if ranking is None and settings.start == "target" else 0
        most = measuring if steps is None else min(measuring, steps // 2)
        self.merits = GateMerits(most, settings.rounds)
        self._descent = budgeting.Descent(space, budget)
        self._opened = 0, torch.ones(space.total_units)
        self._compares = ranking is None and carried is not None
        known = carried if ranking is None else ranking
        # Norms of now: a wrapper of another library may withhold the weights later.
        self._known = (norms() if known is None else known).detach().cpu()
        compared = ranking if compared is None else compared  # its values, as an opening takes them
        self._compared = None if compared is None else compared.detach().cpu()
        self._opening = opening
        self._settled: tuple[int, ...] | None = None
        self._found: tuple[int, Tensor] | None = None

    @property
    def compared(self) -> Tensor | None:
        """Merits (total_units,) that compare between groups, on the CPU; None where none are known."""
        measured = self.merits.mean()
        return self._compared if measured is None else measured

    def opened(self) -> Tensor:
        """0/1 (total_units,), on the CPU: what is open while gates are measured, less in each round."""
        now = self.merits.round
        if self._opened[0] != now and self.merits.wanted:
            merits = self.merits.mean()
            assert merits is not None
            plan = PruningPlan.top(self.space, merits, self._on_the_way(merits, now))
            self.merits.close(plan.mask)
            self._opened = now, plan.mask.float()
        return self._opened[1]

    def _on_the_way(self, merits: Tensor, rounds: int) -> tuple[int, ...]:
        """Widths (G,) after so many rounds, from those of the whole network to those to start from."""
        done = rounds / self.merits.rounds
        if self._opening is None:
            return self._affordable(merits, self._descent.at(done))
        return tuple(
            min(group.allowed_widths(self.grid), key=lambda w: abs(w - aim))
            for group, width in zip(self.space.groups, self._opening(merits), strict=True)
            for aim in [group.channels + done * (width - group.channels)]
        )

    def offsets(self) -> Tensor:
        """Offsets (total_units,) to start from, by what is known so far; on the CPU."""
        done = self.merits.done
        if self._found is None or self._found[0] != done:
            self._found = done, self._offsets()
        return self._found[1]

    def settle(self, settle: Settle) -> Budget:
        """Start from widths that `settle` measured; returns the budget that is exact there."""
        self._settled, self.budget = settle(*self._wanted())
        self._found = None
        return self.budget

    def _offsets(self) -> Tensor:
        ranking, widths = self._wanted()
        return starting_offsets(
            self.space, ranking, widths, grid=self.grid, spread=self.settings.spread
        )

    def _wanted(self) -> tuple[Tensor, tuple[int, ...]]:
        """The ranking (total_units,) within groups and the widths (G,) to open by it."""
        ranking = self.merits.mean()
        if ranking is None:
            ranking = self._known if self._compares else ranks_within(self.space, self._known)
        return ranking, self._widths(ranking) if self._settled is None else self._settled

    def _widths(self, ranking: Tensor) -> tuple[int, ...]:
        space, budget, grid = self.space, self.budget, self.grid
        if self._opening is not None:
            return tuple(self._opening(ranking if self.compared is None else self.compared))
        if self.merits.done:
            return self._affordable(ranking, budget)
        widths = space.full_widths
        if not self._compares:
            widths = budgeting.uniform_widths(space, budget, grid)
        return budgeting.fit_to_budget(space, ranking, widths, budget, grid)

    def _affordable(self, merits: Tensor, budget: Budget) -> tuple[int, ...]:
        """Widths (G,) of one threshold over all merits for their price, and what the budget has left."""
        worth = merits / self._prices() ** self.settings.price
        widths = budgeting.threshold_widths(self.space, worth, budget, self.grid)
        return budgeting.fit_to_budget(self.space, merits, widths, budget, self.grid)

    def _prices(self) -> Tensor:
        """What a unit costs (total_units,) float64, relative to the dearest; the same for all of a group.

        It is the mean over the units that the group could still close, from the widths that are open.
        """
        # Caps do not hold yet: what is to be measured is open.
        counts = positive_counts(self.space, self._opened[1])
        now = [n * group.ties for n, group in zip(counts, self.space.groups, strict=True)]
        least = self.space.least_widths(self.grid)
        # Row 0 is what is open; in row g + 1 group g is at its least.
        rows = torch.tensor(now, dtype=torch.float64).repeat(len(now) + 1, 1)
        rows[range(1, len(now) + 1), range(len(now))] = torch.tensor(
            [min(pair) for pair in zip(now, least, strict=True)], dtype=torch.float64
        )
        with torch.no_grad():
            costs = self.budget.excess(rows).cpu().double()
        closing = [
            max(1, (width - lowest) // group.ties)
            for width, lowest, group in zip(now, least, self.space.groups, strict=True)
        ]
        prices = (costs[0] - costs[1:]) / torch.tensor(closing, dtype=torch.float64)
        prices = (prices / prices.max().clamp_min(1e-300)).clamp_min(CHEAPEST)
        return prices.repeat_interleave(torch.tensor([g.units for g in self.space.groups]))

    def state_dict(self) -> dict[str, Any]:
        """Tensors and plain numbers; what was known depends on weights that learn on."""
        return {
            "merits": self.merits.state_dict(),
            "known": self._known,
            "compares": self._compares,
            "compared": self._compared,
            "opening": None if self._settled is None else list(self._settled),
            "round": self._opened[0],
            "opened": self._opened[1],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        opening, compared = state["opening"], state.get("compared")
        self.merits.load_state_dict(state["merits"])
        self._known, self._compares = state["known"].cpu(), bool(state["compares"])
        self._compared = None if compared is None else compared.cpu()
        self._settled = None if opening is None else tuple(int(width) for width in opening)
        self._opened = int(state["round"]), state["opened"].cpu()
        self._found = None
