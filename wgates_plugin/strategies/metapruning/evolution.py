"""The evolutionary search, as ask and tell: which widths to judge next, and the best so far."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from wgates_plugin.efficiency.base import Budget
from wgates_plugin.errors import FileFormatError, RunFolderError
from wgates_plugin.strategies.metapruning.genes import (
    Genes,
    Widths,
    crossed,
    draw_within,
    within,
)
from wgates_plugin.strategies.metapruning.settings import MetaPruningSettings

KIND = "metapruning-population"
_TRIES = 20
_ANEW = "delete `population.pt` in the run folder to search anew"


class Evolution:
    """MetaPruning's search (section 3.3, algorithm 1), deterministic by its seed.

    `ask` names the candidates of this generation that have no error yet; when all have one, it makes
    the next generation: mutations and crossovers of the best parents of all generations, filled up
    with random draws as far as children repeat themselves. No candidate comes twice and none is over
    the budget, by the budget's own models. It ends with `generations`, or when nothing new can
    be drawn.

    Each generation has random numbers of its own, of (seed, generation): so the state is the
    candidates and their errors, plain JSON.

    Args:
        about: what else makes this run's errors comparable, as JSON, such as a digest of the
            weights that are judged. It goes into the identity that a stored state must match.

    Example:
        >>> from wgates_plugin import trace
        >>> from wgates_plugin.efficiency import Budget, Limit, MacsModel
        >>> from torch import nn
        >>> net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3))
        >>> space = trace(net, torch.zeros(1, 3, 8, 8))
        >>> search = Evolution(
        ...     Genes.of(space), Budget.of(Limit(MacsModel(space), 9000)), MetaPruningSettings()
        ... )
        >>> while candidates := search.ask():
        ...     for widths in candidates:
        ...         search.tell(widths, error=1 / widths[0])
        >>> search.best
        ((5,), 0.2)
    """

    def __init__(
        self,
        genes: Genes,
        budget: Budget,
        settings: MetaPruningSettings,
        *,
        grid: int = 1,
        seed: int = 0,
        about: dict[str, Any] | None = None,
    ) -> None:
        self.genes, self.budget, self.settings, self.seed = genes, budget, settings, seed
        self.generations: list[dict[Widths, float | None]] = []
        self.exhausted = False
        self.identity = {
            "space": genes.space.fingerprint,
            "budget": _describe(budget, genes),
            "grid": grid,
            "alleles": [sorted(set(mine)) for mine in genes.alleles],
            "seed": seed,
            "settings": [
                settings.population,
                settings.parents,
                settings.mutations,
                settings.crossovers,
                settings.mutation_probability,
            ],
            **(about or {}),
        }

    @property
    def errors(self) -> dict[Widths, float]:
        """All candidates judged so far, in the order they were asked for."""
        return {
            widths: error
            for generation in self.generations
            for widths, error in generation.items()
            if error is not None
        }

    @property
    def best(self) -> tuple[Widths, float]:
        """The widths of least error; of equal ones those asked for first."""
        errors = self.errors
        widths = min(errors, key=errors.__getitem__)
        return widths, errors[widths]

    def ask(self) -> list[Widths]:
        """Candidates to judge now; none when the search is over."""
        if self.generations:
            open_ones = [w for w, error in self.generations[-1].items() if error is None]
            if open_ones:
                return open_ones
        if self.exhausted or len(self.generations) >= self.settings.generations:
            return []
        fresh = self._next_generation()
        if not fresh:
            self.exhausted = True
            return []
        self.generations.append(dict.fromkeys(fresh))
        return fresh

    def tell(self, widths: Sequence[int], error: float) -> None:
        """The error of a candidate that was asked for; the lower the better.

        Raises:
            ValueError: it was not asked for, or the error is no number.
        """
        row = tuple(widths)
        if not self.generations or row not in self.generations[-1]:
            raise ValueError(f"evolution: widths {row} were not asked for in this generation")
        if math.isnan(error):
            raise ValueError(f"evolution: the error of widths {row} is not a number")
        self.generations[-1][row] = float(error)

    def _next_generation(self) -> list[Widths]:
        settings = self.settings
        rng = np.random.default_rng([self.seed, len(self.generations)])
        seen = set(self.errors)
        found: list[Widths] = []
        if seen:
            errors = self.errors
            parents = sorted(errors, key=errors.__getitem__)[: settings.parents]

            def parent() -> Widths:
                return parents[rng.integers(len(parents))]

            probability = settings.mutation_probability
            for count, child in (
                (settings.mutations, lambda: self.genes.mutated(parent(), probability, rng)),
                (settings.crossovers, lambda: crossed(parent(), parent(), rng)),
            ):
                found += self._children(child, count, seen | set(found))
        missing = settings.population - len(found)
        return found + draw_within(self.genes, self.budget, missing, rng, seen | set(found))

    def _children(self, make: Callable[[], Widths], count: int, seen: set[Widths]) -> list[Widths]:
        """Up to `count` new children within the budget; gives up after many that are not."""
        found: dict[Widths, None] = {}
        for _ in range(_TRIES):
            if len(found) >= count:
                break
            made = dict.fromkeys(row for row in (make() for _ in range(count)) if row not in seen)
            rows = [row for row in made if row not in found]
            if rows:
                fits = within(self.budget, rows)
                found |= dict.fromkeys(r for r, fit in zip(rows, fits, strict=True) if fit)
        return list(found)[:count]

    def to_json(self) -> dict[str, Any]:
        return {
            "kind": KIND,
            "version": 1,
            "identity": self.identity,
            "generations": [
                [[list(widths), error] for widths, error in generation.items()]
                for generation in self.generations
            ],
        }

    def load_json(self, state: Any) -> None:
        """Go on from what `to_json` gave.

        Raises:
            FileFormatError: no population. RunFolderError: one of another run; names what differs.
        """
        if not isinstance(state, dict) or state.get("kind") != KIND or state.get("version") != 1:
            raise FileFormatError(
                "population: the stored state is no population of a version this package reads; "
                f"{_ANEW}"
            )
        theirs = state.get("identity")
        if not isinstance(theirs, dict):
            raise FileFormatError(
                f"population: its identity is {theirs!r:.60}, not a mapping; {_ANEW}"
            )
        keys = {**self.identity, **theirs}
        changed = sorted(k for k in keys if self.identity.get(k) != theirs.get(k))
        if changed:
            raise RunFolderError(
                f"population: belongs to another run (different: {', '.join(changed)}), and its "
                "errors do not compare with this run's; choose another run folder, or delete it "
                "to search anew"
            )
        try:
            generations = [
                {self._widths(widths): _error(error) for widths, error in generation}
                for generation in state["generations"]
            ]
            if list(map(len, generations)) != list(map(len, state["generations"])):
                raise ValueError("a candidate comes twice in one generation")
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            raise FileFormatError(
                f"population: a field is missing or wrong ({error!r}); {_ANEW}"
            ) from None
        self.generations = generations

    def _widths(self, row: Any) -> Widths:
        """A stored candidate; one that could have been asked for.

        Raises:
            ValueError: it has another length, or a width that no gene can mean.
        """
        alleles = self.identity["alleles"]
        fits = isinstance(row, (list, tuple)) and len(row) == len(alleles)
        if not fits or not all(
            type(w) is int and w in a for w, a in zip(row, alleles, strict=True)
        ):
            raise ValueError(f"widths {row!r:.80} are none that this search can ask for")
        return tuple(row)


def _error(value: Any) -> float | None:
    """A stored error; None of a candidate that is not judged yet.

    Raises:
        ValueError: it is no number.
    """
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, (int, float)) or math.isnan(value):
        raise ValueError(f"error {value!r:.40} is not a number")
    return float(value)


def _describe(budget: Budget, genes: Genes) -> list[list[Any]]:
    """Limits by name, unit, target and two costs, which tell a refitted model from the old one."""
    ends = torch.tensor([genes.least, genes.space.full_widths], dtype=torch.float64)
    return [
        [limit.model.name, limit.model.unit, float(limit.target), limit.model(ends).tolist()]
        for limit in budget.limits
    ]
