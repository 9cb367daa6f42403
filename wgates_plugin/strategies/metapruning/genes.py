"""The widths that may be drawn: one gene per channel group, its alleles shares of the group."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

import numpy as np
import torch

from wgates_plugin.channels import ChannelSpace
from wgates_plugin.efficiency.base import Budget
from wgates_plugin.errors import InfeasibleTargetError
from wgates_plugin.strategies.budgeting import check_feasible, holds

Widths = tuple[int, ...]

_BATCH = 64
_BATCHES = 32


def shares(least: float = 0.10, step: float = 0.03) -> list[float]:
    """`least`, `least + step`, ... up to 1 (MetaPruning, section 3.3: 31 of them).

    >>> len(shares()), shares()[0], shares()[-1]
    (31, 0.1, 1.0)
    """
    count = int((1.0 - least) / step + 1e-9)
    found = [round(least + step * index, 9) for index in range(count + 1)]
    return found if found[-1] == 1.0 else [*found, 1.0]


@dataclass(frozen=True, eq=False)
class Genes:
    """Per group, the width of each share: on the grid, above the floor, under the cap.

    Several shares of a narrow group may mean one width, which is then as likely as they are together.
    """

    space: ChannelSpace
    alleles: tuple[tuple[int, ...], ...]

    @classmethod
    def of(
        cls, space: ChannelSpace, grid: int = 1, least_share: float = 0.10, share_step: float = 0.03
    ) -> Genes:
        wanted = shares(least_share, share_step)
        alleles = []
        for group in space.groups:
            allowed = group.allowed_widths(grid)
            alleles.append(
                tuple(
                    min(allowed, key=lambda w: (abs(w - share * group.channels), w))
                    for share in wanted
                )
            )
        return cls(space, tuple(alleles))

    @property
    def least(self) -> Widths:
        return tuple(mine[0] for mine in self.alleles)

    @property
    def size(self) -> int:
        """Number of different width vectors, within the budget or not."""
        product = 1
        for mine in self.alleles:
            product *= len(set(mine))
        return product

    def draw(self, rng: np.random.Generator) -> Widths:
        """A share for every gene, uniformly."""
        return tuple(mine[rng.integers(len(mine))] for mine in self.alleles)

    def mutated(self, widths: Widths, probability: float, rng: np.random.Generator) -> Widths:
        """Each gene drawn anew with `probability`."""
        fresh = self.draw(rng)
        changed = rng.random(len(widths)) < probability
        return tuple(
            new if change else old for old, new, change in zip(widths, fresh, changed, strict=True)
        )

    def narrowed(self, widths: Widths, budget: Budget, rng: np.random.Generator) -> Widths | None:
        """`widths` with genes chosen at random lowered step by step until `budget` holds."""
        now = list(widths)
        while not holds(budget, now):
            movable = [g for g, mine in enumerate(self.alleles) if now[g] > mine[0]]
            if not movable:
                return None
            gene = movable[rng.integers(len(movable))]
            now[gene] = max(width for width in self.alleles[gene] if width < now[gene])
        return tuple(now)


def crossed(first: Widths, second: Widths, rng: np.random.Generator) -> Widths:
    """Each gene from one of two parents."""
    chosen = rng.random(len(first)) < 0.5
    return tuple(a if take else b for a, b, take in zip(first, second, chosen, strict=True))


def within(budget: Budget, rows: list[Widths]) -> list[bool]:
    """Which widths keep the budget, as its models predict it."""
    found: list[bool] = (budget.excess(torch.tensor(rows, dtype=torch.float64)) <= 0).tolist()
    return found


def draw_within(
    genes: Genes,
    budget: Budget,
    count: int,
    rng: np.random.Generator,
    seen: Collection[Widths] = (),
) -> list[Widths]:
    """Up to `count` new and different widths within the budget; fewer where there are no more.

    Uniform draws, of which those over the budget are rejected. A tight budget may leave next to
    none: what is missing after some thousand draws is made from over-budget ones by lowering genes
    at random (ours).
    """
    known, found = set(seen), list[Widths]()

    def take(row: Widths) -> None:
        if row not in known and len(found) < count:
            known.add(row)
            found.append(row)

    for _ in range(_BATCHES):
        if len(found) >= count:
            return found
        rows = [genes.draw(rng) for _ in range(_BATCH)]
        for row, fits in zip(rows, within(budget, rows), strict=True):
            if fits:
                take(row)
    for _ in range(4 * count):
        if len(found) >= count:
            break
        narrowed = genes.narrowed(genes.draw(rng), budget, rng)
        if narrowed is not None:
            take(narrowed)
    return found


def check_searchable(genes: Genes, budget: Budget, grid: int, seed: int) -> None:
    """Refuse a budget that no widths of the search space keep, before anything is trained.

    Raises:
        InfeasibleTargetError: with the cost of the least shares, and what to do.
    """
    check_feasible(genes.space, budget, grid)
    if draw_within(genes, budget, 1, np.random.default_rng(seed)):
        return
    least = torch.tensor(genes.least, dtype=torch.float64)
    raise InfeasibleTargetError(
        f"metapruning: no candidate keeps the budget; at the least shares: {budget.describe(least)}; "
        "lower `least_share` (the floors would allow less), or ask for more"
    )
