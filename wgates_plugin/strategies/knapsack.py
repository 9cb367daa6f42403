"""Widths as a knapsack: the most saliency that the budget has room for.

After HALP (Shen et al., "Structural Pruning via Latency-Saliency Knapsack", NeurIPS 2022): a channel's
worth is the first-order change of the loss without it, its price what the latency model says, and
an integer program picks. Written afresh on our efficiency models, on which a layer's cost depends on
two widths; departures from the paper are marked (ours).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from wgates_plugin.channels import ChannelSpace
from wgates_plugin.efficiency.base import Budget
from wgates_plugin.errors import ConfigError
from wgates_plugin.latency.base import require
from wgates_plugin.strategies import budgeting
from wgates_plugin.strategies.base import Decision, Strategy, Task
from wgates_plugin.strategies.criteria.repaired import TaylorImportance
from wgates_plugin.strategies.criteria.scores import batches_problems, criterion_scores
from wgates_plugin.training.evaluation import cross_entropy

SCALES = ("loss", "group")
_PURPOSE = "the strategy `knapsack`"
_CORRECTIONS = 3
_LEAST_GAIN = 1e-9
# A limit in nodes, not in seconds: the answer must not hang on how busy the machine is.
_SOLVER = {"mip_rel_gap": 1e-6, "node_limit": 500}
# Of relative prices. At 1, rounding the solver's near-integers breaks rows by more than its fixed
# tolerance of 1e-6; it then solves again, and says so on standard output.
_PRICE_SCALE = 1e-2
_TOLERANCE = 1e-6 / _PRICE_SCALE
_ROWS = 4096


@dataclass(frozen=True)
class KnapsackSettings:
    """How saliency is weighed and how far the search goes.

    Attributes:
        scale: "loss" compares channels of all groups by the loss they are worth, as published;
            "group" brings each group to a mean of 1 first.
        choices: most widths offered per group in one round; closer ones as the search narrows.
        rounds: most rounds from each of the two starting points. A round's integer program is
            linearised where the one before arrived, and solved up to three times, with less room
            where true costs break the budget.
        batches: of training data for the saliency; None takes all.
    """

    scale: str = "loss"
    choices: int = 32
    rounds: int = 30
    batches: int | None = None

    def __post_init__(self) -> None:
        problems = []
        if self.scale not in SCALES:
            problems.append(f"scale `{self.scale}`: unknown; known: {', '.join(SCALES)}")
        for name, least in (("choices", 3), ("rounds", 0)):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                problems.append(f"{name} {value!r}: must be a whole number from {least}")
        problems += batches_problems(self.batches)
        if problems:
            raise ConfigError("knapsack settings", problems)


@dataclass(frozen=True)
class Packed:
    """Widths (G,) and the shares of all saliency they keep: packed, and by the greedy fit alone.

    `programs` counts the integer programs that were solved.
    """

    widths: tuple[int, ...]
    kept: float
    kept_greedily: float
    programs: int


class KnapsackStrategy(Strategy):
    """Taylor saliency, and the widths that keep most of it within the budget."""

    settings_type = KnapsackSettings
    has_phase = False
    trains_weights = False
    summary = "most first-order saliency under the budget, by integer programs (Shen et al., 2022)"
    settings: KnapsackSettings

    def decide(self, task: Task) -> Decision:
        require("scipy.optimize", extra="knapsack", purpose=_PURPOSE)
        budgeting.check_feasible(task.space, task.budget, task.grid)
        saliency = taylor_saliency(task, scale=self.settings.scale, batches=self.settings.batches)
        packed = pack(
            task.space,
            saliency,
            task.budget,
            task.grid,
            choices=self.settings.choices,
            rounds=self.settings.rounds,
        )
        facts = {
            "saliency_kept": packed.kept,
            "saliency_kept_greedily": packed.kept_greedily,
            "integer_programs": packed.programs,
        }
        return Decision(task.network, saliency, packed.widths, facts=facts)


def taylor_saliency(task: Task, *, scale: str, batches: int | None = None) -> Tensor:
    """Loss that a unit is worth to first order, (total_units,) float64 on the CPU, 0 or more.

    `sum |w * dL/dw|`, the mean over batches as in the paper, over all that goes with the unit (ours):
    every coupled filter but depthwise ones, the weights that read it, and its BatchNorm scale, where
    the paper takes BatchNorm's scale and shift alone. Of a grouped convolution that reads it, the
    weights count once for each conv group, as in torch-pruning.
    """
    raw = TaylorImportance(group_reduction="sum", normalizer=None)
    found = criterion_scores(
        task.network,
        task.space,
        raw,
        task.train_loader,
        loss=task.loss or cross_entropy,
        seed=task.seed,
        batches=batches,
    )
    found = task.average(found.to(task.device)).cpu().double()
    # The criterion gives the mean of tied channels; they go together.
    ties = torch.tensor([float(group.ties) for group in task.space.groups])
    units = torch.tensor([group.units for group in task.space.groups])
    found = found * ties.repeat_interleave(units)
    if scale == "group":
        means = [found[task.space.unit_slice(g)].mean() for g in range(len(units))]
        found = found / torch.stack(means).clamp_min(1e-300).repeat_interleave(units)
    return found


def kept_saliency(space: ChannelSpace, saliency: Tensor, widths: Sequence[int]) -> float:
    """Sum over the most salient units of each group at `widths` (G,)."""
    tables = saliency_by_width(space, saliency)
    return sum(
        float(table[width // group.ties])
        for table, width, group in zip(tables, widths, space.groups, strict=True)
    )


def saliency_by_width(space: ChannelSpace, saliency: Tensor) -> list[Tensor]:
    """Per group, what its best 0, 1, ... units are worth together: (units + 1,)."""
    tables = []
    for index in range(len(space.groups)):
        best = saliency[space.unit_slice(index)].double().sort(descending=True).values
        tables.append(torch.cat([best.new_zeros(1), best.cumsum(0)]))
    return tables


def pack(
    space: ChannelSpace,
    saliency: Tensor,
    budget: Budget,
    grid: int = 1,
    *,
    choices: int = 32,
    rounds: int = 30,
) -> Packed:
    """Widths that keep the most saliency (total_units,), none of it negative, within the budget.

    One width of each group is a multiple-choice knapsack, `max sum_g S_g(n_g)` such that
    `cost_k(n) <= target_k` for each limit. Costs are not sums over groups: each round takes them
    linearised around the widths it stands at, one group moved at a time (the paper freezes the widths
    of the layers before), and offers widths within a radius that halves when the true costs give the
    gain away (ours). It starts at two greedy fits, from one threshold and from uniform widths, and never
    ends below them (ours). `rounds` holds for each start.

    Raises:
        MissingExtraError: scipy is not installed.
        InfeasibleTargetError: even the least widths break the budget.
    """
    budgeting.check_feasible(space, budget, grid)
    optimize = require("scipy.optimize", extra="knapsack", purpose=_PURPOSE)
    total = max(float(saliency.double().sum()), 1e-300)

    def fitted(widths: Sequence[int]) -> tuple[int, ...]:
        return budgeting.fit_to_budget(space, saliency, widths, budget, grid)

    def worth(widths: Sequence[int]) -> float:
        return kept_saliency(space, saliency, widths) / total

    starts = [
        fitted(budgeting.threshold_widths(space, saliency, budget, grid)),
        fitted(budgeting.uniform_widths(space, budget, grid)),
    ]
    programs = 0
    arrived = []
    for start in dict.fromkeys(starts):
        here, radius = start, 1.0
        rounds_left = rounds
        while rounds_left:
            rounds_left -= 1
            program = _Program(space, saliency, budget, grid, here, radius, choices)
            there = fitted(program.solve(optimize))
            programs += program.solved
            if worth(there) > worth(here) + _LEAST_GAIN:
                here = there
            elif program.nearest:
                break
            else:
                radius /= 2
        arrived.append(here)
    best = max(arrived, key=worth)
    return Packed(best, worth(best), max(map(worth, starts)), programs)


class _Program:
    """One round: the integer program around `here` (G,), `solved` so many times so far."""

    def __init__(
        self,
        space: ChannelSpace,
        saliency: Tensor,
        budget: Budget,
        grid: int,
        here: tuple[int, ...],
        radius: float,
        choices: int,
    ) -> None:
        self.budget, self.here, self.solved = budget, here, 0
        allowed = space.allowed_widths(grid)
        self.offered = [
            _around(mine, mine.index(width), radius, choices)
            for mine, width in zip(allowed, here, strict=True)
        ]
        self.nearest = all(int(radius * len(mine)) <= 1 for mine in allowed)
        tables = saliency_by_width(space, saliency)
        worth = torch.cat(
            [
                table[torch.tensor(mine) // group.ties]
                for table, mine, group in zip(tables, self.offered, space.groups, strict=True)
            ]
        )
        self.worth = worth / worth.abs().max().clamp_min(1e-300)
        rows = torch.tensor(here, dtype=torch.float64).repeat(len(worth), 1)
        places = [g for g, mine in enumerate(self.offered) for _ in mine]
        rows[torch.arange(len(worth)), places] = torch.tensor(
            [width for mine in self.offered for width in mine], dtype=torch.float64
        )
        now = self._violations(rows.new_tensor([here]))[0]
        self.slack = -now
        self.prices = self._violations(rows) - now  # (N, K), relative to the targets

    @torch.no_grad()
    def _violations(self, rows: Tensor) -> Tensor:
        return torch.cat([self.budget.violations(part) for part in rows.split(_ROWS)]).cpu()

    def solve(self, optimize: ModuleType) -> tuple[int, ...]:
        """Widths (G,), which may break the true budget; `here` where nothing else is found.

        Where the true costs break it, the error of the linearisation is held back and the program
        solved again.
        """
        slack, found = self.slack.clone(), self.here
        for _ in range(_CORRECTIONS):
            picked = self._solve_within(slack, optimize)
            if picked is None:
                return found
            found = picked
            over = self._violations(torch.tensor([picked], dtype=torch.float64))[0].clamp_min(0)
            if not over.any():
                return found
            slack = slack - over - _TOLERANCE * (over > 0)
        return found

    def _solve_within(self, slack: Tensor, optimize: ModuleType) -> tuple[int, ...] | None:
        self.solved += 1
        count = len(self.worth)
        one_each = torch.zeros(len(self.offered), count, dtype=torch.float64)
        ends = torch.tensor([len(mine) for mine in self.offered]).cumsum(0).tolist()
        starts = [0, *ends[:-1]]
        for row, (start, end) in enumerate(zip(starts, ends, strict=True)):
            one_each[row, start:end] = 1.0
        answer: Any = optimize.milp(
            (-self.worth).numpy(),
            integrality=[1] * count,
            bounds=optimize.Bounds(0, 1),
            constraints=[
                optimize.LinearConstraint(one_each.numpy(), 1, 1),
                optimize.LinearConstraint(
                    _PRICE_SCALE * self.prices.T.numpy(),
                    -float("inf"),
                    _PRICE_SCALE * slack.numpy(),
                ),
            ],
            options=_SOLVER,
        )
        if answer.x is None:
            return None
        return tuple(
            mine[int(answer.x[start:end].argmax())]
            for mine, start, end in zip(self.offered, starts, ends, strict=True)
        )


def _around(allowed: list[int], place: int, radius: float, choices: int) -> list[int]:
    """At most `choices` of the widths within `radius` of the whole range, `place` and both ends in."""
    reach = max(1, int(radius * len(allowed)))
    low, high = max(0, place - reach), min(len(allowed) - 1, place + reach)
    step = max(1.0, (high - low) / max(1, choices - 2))
    picked = {place} | {min(high, round(low + k * step)) for k in range(choices - 1)}
    return [allowed[k] for k in sorted(picked)]
