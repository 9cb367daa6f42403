"""Which channel multiple a runtime likes: widths between two multiples of it buy no time."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from wgates_plugin.errors import ConfigError
from wgates_plugin.latency.base import Runtime
from wgates_plugin.latency.timing import measure

_OUTER_CHANNELS = 32
_SIDE = 28
_ROUNDS = 6


@dataclass(frozen=True)
class GridProbe:
    """The channel multiple found and what was seen.

    Attributes:
        grid: the coarsest candidate between whose multiples nothing is won (`choose_grid`).
        evidence: (width, ms) of the probing network, ascending widths.
        candidates: multiples that were asked about, ascending.
        tolerance: relative time difference taken for noise.
        seconds: wall time spent.
        identity: the runtime's identity.
    """

    grid: int
    evidence: tuple[tuple[int, float], ...]
    candidates: tuple[int, ...]
    tolerance: float
    seconds: float
    identity: dict[str, Any]

    def to_json(self) -> dict[str, Any]:
        return {
            "grid": self.grid,
            "evidence": [list(pair) for pair in self.evidence],
            "candidates": list(self.candidates),
            "tolerance": self.tolerance,
            "seconds": self.seconds,
            "identity": self.identity,
        }


class _Chains(nn.Module):
    """1x1, 3x3, 1x1 convolutions of inner width w, once with a full and once a depthwise 3x3."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.full = self._chain(width, groups=1)
        self.depthwise = self._chain(width, groups=width)

    @staticmethod
    def _chain(width: int, *, groups: int) -> nn.Sequential:
        return nn.Sequential(
            nn.Conv2d(_OUTER_CHANNELS, width, 1),
            nn.ReLU(),
            nn.Conv2d(width, width, 3, padding=1, groups=groups),
            nn.ReLU(),
            nn.Conv2d(width, _OUTER_CHANNELS, 1),
        )

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.full(x), self.depthwise(x)


def probe_widths(candidates: Sequence[int]) -> list[int]:
    """Widths to time: two multiples of every candidate, one channel above them, where a coarse grid
    shows, and each candidate's step above them."""
    step = math.lcm(*candidates)
    return sorted({base + extra for base in (2 * step, 3 * step) for extra in (0, 1, *candidates)})


def choose_grid(
    latency_ms: Mapping[int, float], candidates: Sequence[int], *, tolerance: float = 0.08
) -> int:
    """The coarsest candidate g at which rounding up costs nothing:

        mean_w latency(w) / latency(ceil(w / g) * g) >= 1 - tolerance

    over the timed widths w off the grid of g whose next multiple was timed too. The mean, because
    a network rounds many layers at once, and because it outlives one disturbed timing. A candidate
    without such a pair proves nothing and is not chosen; 1 always holds.
    """
    best = 1
    for grid in sorted(candidates):
        pairs = [(width, -(-width // grid) * grid) for width in latency_ms if width % grid]
        ratios = [latency_ms[width] / latency_ms[up] for width, up in pairs if up in latency_ms]
        if ratios and statistics.mean(ratios) >= 1 - tolerance:
            best = grid
    return best


def probe_grid(
    runtime: Runtime,
    *,
    seconds: float = 5.0,
    candidates: Sequence[int] = (1, 2, 4, 8, 16, 32),
    tolerance: float = 0.08,
) -> GridProbe:
    """Find the runtime's channel multiple by timing small convolution chains at many widths.

    Weights and inputs come from a fixed seed and every width is timed against the same reference;
    the global random state is left as found.

    Args:
        seconds: time inside inferences, shared by all widths; loading comes on top.
        candidates: multiples to ask about.
        tolerance: relative time difference taken for noise.

    Raises:
        ConfigError: a candidate is no positive integer, or none is given.
    """
    ordered = tuple(sorted(set(candidates)))
    if not ordered or ordered[0] < 1:
        raise ConfigError("grid probe", [f"candidates: got {list(candidates)}, expected integers"])
    started = time.perf_counter()
    widths = probe_widths(ordered)
    share = seconds / len(widths)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        inputs = torch.randn(1, _OUTER_CHANNELS, _SIDE, _SIDE)
        networks = {width: _Chains(width).eval() for width in widths}
    evidence: dict[int, float] = {}
    reference = runtime.load(networks[widths[0]], inputs)
    try:
        first = measure(reference, seconds=share, min_rounds=_ROUNDS)
        evidence[widths[0]] = first.latency_ms
        for width in widths[1:]:
            session = runtime.load(networks[width], inputs)
            try:
                seen = measure(
                    session,
                    reference=reference,
                    reference_ms=first.latency_ms,
                    seconds=share,
                    min_rounds=_ROUNDS,
                )
            finally:
                session.close()
            evidence[width] = seen.latency_ms
    finally:
        reference.close()
    return GridProbe(
        grid=choose_grid(evidence, ordered, tolerance=tolerance),
        evidence=tuple(sorted(evidence.items())),
        candidates=ordered,
        tolerance=tolerance,
        seconds=time.perf_counter() - started,
        identity=runtime.identity(inputs),
    )
