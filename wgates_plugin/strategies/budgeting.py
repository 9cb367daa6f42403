"""From scores to widths that keep a budget, on the grid. Shared by every strategy."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from wgates_plugin.channels import ChannelSpace
from wgates_plugin.efficiency.base import Budget
from wgates_plugin.efficiency.belonging import check_models
from wgates_plugin.errors import InfeasibleTargetError
from wgates_plugin.plan import PruningPlan


def nothing_to_remove(space: ChannelSpace, budget: Budget) -> str | None:
    """Why no channel has to go, for a door to warn of; None where some must."""
    full = torch.tensor(space.full_widths, dtype=torch.float64)
    if space.capped or float(budget.excess(full)) > 0:
        return None
    return f"the network is within its budget as it is ({budget.describe(full)}); nothing will be removed"


def check_feasible(space: ChannelSpace, budget: Budget, grid: int = 1) -> None:
    """Refuse a budget that even the least allowed widths break.

    Raises:
        ConfigError: a limit's model was made for another network.
        InfeasibleTargetError: names the limit, the least reachable cost and the target.
    """
    check_models(space, budget)
    least = torch.tensor(space.least_widths(grid), dtype=torch.float64)
    for limit in budget.limits:
        cost = float(limit.model(least))
        if cost > limit.target:
            raise InfeasibleTargetError(
                f"{limit.model.name}: target {limit.target:.6g} {limit.model.unit} is out of reach; "
                f"the least allowed widths still cost {cost:.6g}; ask for more, lower the floors, "
                "use a finer grid, or start from a smaller network"
            )


def uniform_widths(space: ChannelSpace, budget: Budget, grid: int = 1) -> tuple[int, ...]:
    """The same share of channels in every group, as large as the budget allows, on the grid."""
    check_feasible(space, budget, grid)
    low, high = 0.0, 1.0

    def at(share: float) -> tuple[int, ...]:
        # Nearest allowed width, so that coarse grids do not bias narrow groups upwards.
        return tuple(
            min(group.allowed_widths(grid), key=lambda w: (abs(w - share * group.channels), w))
            for group in space.groups
        )

    if holds(budget, at(high)):
        return at(high)
    for _ in range(20):
        middle = (low + high) / 2
        if holds(budget, at(middle)):
            low = middle
        else:
            high = middle
    return at(low)


def threshold_widths(
    space: ChannelSpace, scores: Tensor, budget: Budget, grid: int = 1
) -> tuple[int, ...]:
    """Widths (G,) of one threshold over all scores, the lowest that keeps the budget.

    Least widths where no threshold does.
    """
    ordered = scores.double().sort().values

    def at(place: int) -> tuple[int, ...]:
        above = scores.double() >= ordered[place] if place < len(ordered) else scores != scores
        widths = []
        for index, group in enumerate(space.groups):
            width = int(above[space.unit_slice(index)].sum()) * group.ties
            allowed = group.allowed_widths(grid)
            widths.append(max((w for w in allowed if w <= width), default=allowed[0]))
        return tuple(widths)

    low, high = 0, len(ordered)  # a higher threshold keeps fewer channels
    while low < high:
        middle = (low + high) // 2
        if holds(budget, at(middle)):
            high = middle
        else:
            low = middle + 1
    return at(low)


class Descent:
    """A budget that comes down from the whole network's cost to its target, limit by limit (ours)."""

    def __init__(self, space: ChannelSpace, budget: Budget) -> None:
        full = torch.tensor(space.full_widths, dtype=torch.float64)
        self.budget = budget
        self._over = [
            max(0.0, float(limit.model(full)) / limit.target - 1.0) for limit in budget.limits
        ]

    def at(self, done: float) -> Budget:
        """The budget when `done`, from 0 to 1, of the way is behind."""
        left = 1.0 - min(1.0, done)
        return self.budget.scaled([1.0 + left * over for over in self._over])


def holds(budget: Budget, widths: Sequence[int]) -> bool:
    return float(budget.excess(torch.tensor(widths, dtype=torch.float64))) <= 0


def fit_to_budget(
    space: ChannelSpace,
    scores: Tensor,
    widths: Sequence[int],
    budget: Budget,
    grid: int = 1,
) -> tuple[int, ...]:
    """Move `widths` (G,) by single grid steps until the budget holds and no step fits any more.

    Each step closes the channels of least score per cost saved, or opens those of most score per
    cost added: the greedy rule for the knapsack that budgeted pruning is.

    Args:
        scores: merit of each unit (total_units,); only the order and differences matter.

    Raises:
        InfeasibleTargetError: even the least widths break the budget.
    """
    check_feasible(space, budget, grid)
    merits = _merits(space, scores)
    allowed = space.allowed_widths(grid)
    place = [
        min(range(len(mine)), key=lambda k: (abs(mine[k] - width), k))
        for mine, width in zip(allowed, widths, strict=True)
    ]

    def now() -> list[int]:
        return [mine[k] for mine, k in zip(allowed, place, strict=True)]

    def candidates(direction: int) -> tuple[list[int], Tensor]:
        movable = [g for g in range(len(place)) if 0 <= place[g] + direction < len(allowed[g])]
        rows = []
        for g in movable:
            row = now()
            row[g] = allowed[g][place[g] + direction]
            rows.append(row)
        return movable, torch.tensor(rows, dtype=torch.float64)

    def worth(g: int, direction: int) -> float:
        ties = space.groups[g].ties
        first, second = allowed[g][place[g]] // ties, allowed[g][place[g] + direction] // ties
        return float(merits[g][min(first, second) : max(first, second)].sum())

    excess = float(budget.excess(torch.tensor(now(), dtype=torch.float64)))
    while excess > 0:
        movable, rows = candidates(-1)
        costs = budget.excess(rows)
        saved = [max(excess - float(cost), 1e-9) for cost in costs]
        best = min(range(len(movable)), key=lambda i: worth(movable[i], -1) / saved[i])
        place[movable[best]] -= 1
        excess = float(costs[best])
    while True:
        movable, rows = candidates(+1)
        if not movable:
            break
        costs = budget.excess(rows)
        fitting = [i for i in range(len(movable)) if float(costs[i]) <= 0]
        if not fitting:
            break
        best = max(
            fitting, key=lambda i: worth(movable[i], +1) / max(float(costs[i]) - excess, 1e-9)
        )
        place[movable[best]] += 1
        excess = float(costs[best])
    return tuple(now())


def _merits(space: ChannelSpace, scores: Tensor) -> list[Tensor]:
    """Per group, positive merits in descending order: where a channel stands within its group.

    Scores of different layers are comparable only as far as the strategy made them so; they are
    shifted to be positive, so that another channel is never worth less than none.
    """
    scores = scores.detach().double().cpu()
    shifted = scores - scores.min() + 1e-3 * (scores.max() - scores.min()).clamp_min(1e-12)
    return [
        shifted[space.unit_slice(index)].sort(descending=True).values
        for index in range(len(space.groups))
    ]


def plan_for_budget(
    space: ChannelSpace,
    scores: Tensor,
    widths: Sequence[int],
    budget: Budget,
    grid: int = 1,
    **note: object,
) -> PruningPlan:
    """`fit_to_budget`, then the highest scores of each group at these widths."""
    return PruningPlan.top(
        space, scores, fit_to_budget(space, scores, widths, budget, grid), **note
    )
