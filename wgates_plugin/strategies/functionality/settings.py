"""Options of functionality-oriented pruning."""

from __future__ import annotations

import math
from dataclasses import dataclass

from wgates_plugin.errors import ConfigError

REPEATS = ("coverage", "contribution")
QUOTAS = ("functions", "uniform")


@dataclass(frozen=True)
class FunctionalitySettings:
    """How patterns are made, clustered and ranked. All numbers are our choice (ours).

    Steps are small and few: longer ascents end in different patterns for filters that differ by a
    per cent. Time grows with `steps`, `side` squared, `producers`, `batches`, `largest_k`, `tried`.

    Attributes:
        steps: of gradient ascent per filter. step: their size, in standard deviations of the data.
        decay: share of the distance from grey that a step takes back. blur: sigma in pixels, 0 off.
        noise: of the common start, in standard deviations of the data.
        side: largest side of the patterns, in pixels; larger inputs are made smaller.
        memory_gib: what the activations of one batch of filters may take.
        producers: layers looked at per channel group, spread from its first to its last.
        batches: of training data for the contribution index.
        largest_k: most clusters tried. tried: numbers of clusters tried, coarse and then fine.
        repeats: who goes first of those that are no representative: "contribution", the least one of
            the whole layer as in the paper, or "coverage", the one whose function and contribution
            those that stay cover best.
        quotas: widths from the scores of all layers together ("functions") or the same share of
            each layer ("uniform").
        pictured: groups whose patterns are pictured.
    """

    steps: int = 20
    step: float = 0.02
    decay: float = 0.02
    blur: float = 0.5
    noise: float = 0.5
    side: int = 64
    memory_gib: float = 2.0
    producers: int = 2
    batches: int = 4
    largest_k: int = 256
    tried: int = 12
    repeats: str = "coverage"
    quotas: str = "functions"
    pictured: int = 6

    def __post_init__(self) -> None:
        problems = [
            f"{key} is {getattr(self, key)!r}, needs a whole number of {least} or more"
            for key, least in (
                ("steps", 1),
                ("side", 1),
                ("producers", 1),
                ("batches", 1),
                ("largest_k", 2),
                ("tried", 1),
                ("pictured", 0),
            )
            if isinstance(getattr(self, key), bool)
            or not isinstance(getattr(self, key), int)
            or getattr(self, key) < least
        ]
        problems += [
            f"{key} is {getattr(self, key)!r}, needs a finite number above 0"
            for key in ("step", "noise", "memory_gib")
            if not (math.isfinite(getattr(self, key)) and getattr(self, key) > 0)
        ]
        if not 0 <= self.decay < 1:
            problems.append(f"decay is {self.decay!r}, needs 0 <= decay < 1")
        if not (math.isfinite(self.blur) and self.blur >= 0):
            problems.append(f"blur is {self.blur!r}, needs a finite number of 0 or more")
        if self.repeats not in REPEATS:
            problems.append(f"repeats is {self.repeats!r}, choose from {', '.join(REPEATS)}")
        if self.quotas not in QUOTAS:
            problems.append(f"quotas is {self.quotas!r}, choose from {', '.join(QUOTAS)}")
        if problems:
            raise ConfigError("functionality", problems)
