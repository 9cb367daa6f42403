"""How GDP's gates polarise."""

from __future__ import annotations

from dataclasses import dataclass

from wgates_plugin.errors import ConfigError


@dataclass(frozen=True)
class GDPSettings:
    """How gates polarise.

    Attributes:
        epsilon_start, epsilon_end: of the gate `x^2 / (x^2 + epsilon)`, decayed geometrically.
        decay_fraction: share of the phase over which epsilon decays and the limit on the cost comes
            down from today's cost to the wanted one.
        settle_fraction: share of the phase after which the closed channels are those of the
            decision, on the grid and within the budget; the rest of the phase trains what is left.
        travel: sum of all step sizes of `x`, in gates' gradients of mean size.
        remove_branches: let every channel of a residual branch close, whatever floor all groups have;
            only its constant stays. Not where the group has a floor of its own.
        grid: channel multiple the runtime likes; widths are decided on it. None takes the one that the
            budget's latency model was measured on, 1 where it names none.
    """

    epsilon_start: float = 0.1
    epsilon_end: float = 1e-4
    decay_fraction: float = 0.6
    settle_fraction: float = 0.8
    travel: float = 4.0
    remove_branches: bool = True
    grid: int | None = None

    def __post_init__(self) -> None:
        problems = []
        if not 0 < self.epsilon_end <= self.epsilon_start < float("inf"):
            problems.append(
                f"epsilon_end is {self.epsilon_end}, epsilon_start {self.epsilon_start}; needs "
                "0 < epsilon_end <= epsilon_start"
            )
        if not 0 < self.decay_fraction <= self.settle_fraction <= 1:
            problems.append(
                f"settle_fraction is {self.settle_fraction}, decay_fraction {self.decay_fraction}; "
                "needs 0 < decay_fraction <= settle_fraction <= 1"
            )
        if not 0 < self.travel < float("inf"):
            problems.append(f"travel is {self.travel}, needs a positive finite number")
        if self.grid is not None and (not isinstance(self.grid, int) or self.grid < 1):
            problems.append(f"grid is {self.grid!r}, needs a whole number from 1, or None")
        if problems:
            raise ConfigError("GDP settings", problems)
