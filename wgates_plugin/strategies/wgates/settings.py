"""How W-Gates learn."""

from __future__ import annotations

from dataclasses import dataclass

from wgates_plugin.efficiency.constraint import CONSTRAINTS
from wgates_plugin.errors import ConfigError
from wgates_plugin.strategies.wgates.scores import SCORES

MOST_ROUNDS = 20
"""What closes in a round goes far behind what closes later; a float knows no more orders of magnitude."""


@dataclass(frozen=True)
class WGatesSettings:
    """How gates learn.

    Attributes:
        learning_rate: Adam's, for scale-free scores: one step moves a score by about this much.
        grid: channel multiple the runtime likes; widths are decided on it. None takes the one that the
            budget's latency model was measured on, 1 where it names none.
        start: "target" opens what the budget allows and then exchanges channels at constant cost
            (ours); "open" starts with every gate open and slides the target down.
        measuring: steps at the beginning, half of the phase at most, in which open gates are measured:
            their mean squared gradient says which channels and widths `start="target"` starts from
            (ours). 0 starts from filter norms at uniform widths.
        rounds: of measuring. After each the channels of least merit close, until the cost has come
            down evenly to the target's; 1 closes all at once, 20 is the most.
        price: how much the cost of a channel counts against its merit where channels close (ours): they
            close by merit over cost to this power. 1 is merit per cost; 0 looks at merits alone, which
            keeps few and expensive channels.
        slide_fraction: share of the gate phase over which the target slides, for `start="open"`.
        constraint: "augmented-lagrangian" (ours), or the paper's "linear" or "log" weighting.
        alpha: weight of the paper's forms.
        spread: largest initial distance of a score from the threshold, under 1/2.
        scores: "weights" computes scores from the filters' weights, as published; "free" learns one
            per unit, to compare with: same start, squash, optimizer and mean step.
    """

    learning_rate: float = 1e-3
    grid: int | None = None
    start: str = "target"
    measuring: int = 32
    rounds: int = 4
    price: float = 1.0
    slide_fraction: float = 0.7
    constraint: str = "augmented-lagrangian"
    alpha: float = 1.0
    spread: float = 0.4
    scores: str = "weights"

    def __post_init__(self) -> None:
        problems = []
        for name in ("learning_rate", "alpha", "price"):
            value = getattr(self, name)
            if not isinstance(value, (int, float)) or not 0 <= value < float("inf"):
                problems.append(f"{name} {value!r}: must be a finite number of 0 or more")
        if self.grid is not None and (not isinstance(self.grid, int) or self.grid < 1):
            problems.append(f"grid {self.grid!r}: must be a whole number from 1, or None")
        for name, least in (("measuring", 0), ("rounds", 1)):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                problems.append(f"{name} {value!r}: must be a whole number from {least}")
        if isinstance(self.rounds, int) and self.rounds > MOST_ROUNDS:
            problems.append(f"rounds {self.rounds}: must be {MOST_ROUNDS} or less")
        if self.start not in ("target", "open"):
            problems.append(f"start `{self.start}`: unknown; known: target, open")
        if self.constraint not in CONSTRAINTS:
            problems.append(f"constraint `{self.constraint}`: known: {', '.join(CONSTRAINTS)}")
        if self.scores not in SCORES:
            problems.append(f"scores `{self.scores}`: unknown; known: {', '.join(SCORES)}")
        if not 0 < self.spread < 0.5:
            problems.append(f"spread {self.spread}: must lie between 0 and 0.5")
        if not 0 < self.slide_fraction <= 1:
            problems.append(f"slide_fraction {self.slide_fraction}: must lie in (0, 1]")
        if problems:
            raise ConfigError("W-Gates settings", problems)
