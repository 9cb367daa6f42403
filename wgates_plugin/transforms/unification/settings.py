"""What of a network is unified, how much, and how long it is trained for it."""

from __future__ import annotations

import math
from dataclasses import dataclass

from wgates_plugin.errors import ConfigError

MODES = ("prune", "unify", "combined")
"""Blocks to zero; blocks to one magnitude; first the one, then the other to what is left."""

BLOCKS: dict[str, tuple[int, int]] = {"4x4": (4, 4), "8x1": (8, 1), "1x8": (1, 8)}
"""Name -> (rows, columns) of a block of the kernel matrix (C_out, C_in * kh * kw)."""


@dataclass(frozen=True)
class UnificationSettings:
    """Settings of micro-structured weight unification (Lin, Jiang, Wang 2021, arXiv 2106.08301).

    Attributes:
        mode: one of `MODES`. block: one of `BLOCKS`.
        prune_fraction: share of each layer's blocks that become zero ("prune", "combined").
        unify_fraction: share of each layer's blocks that get one magnitude; of those that are not
            zero in mode "combined".
        rho: weight of the pull toward the structure, one number per round of ADMM.
        epochs_per_round: training between two updates of that structure.
        retrain_epochs: training after the structure is fixed. One learning-rate schedule runs
            over all these epochs.
        learning_rate: its peak; None takes the training's.
        ignored_layers: names of modules to leave alone, beside the first and the last layer.

    Raises:
        ConfigError: values out of range, all listed at once.
    """

    mode: str = "combined"
    block: str = "4x4"
    prune_fraction: float = 0.5
    unify_fraction: float = 1.0
    rho: tuple[float, ...] = (1e-3, 3e-3, 1e-2, 3e-2)
    epochs_per_round: int = 1
    retrain_epochs: int = 4
    learning_rate: float | None = None
    ignored_layers: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        problems = []
        if self.mode not in MODES:
            problems.append(f"mode is {self.mode!r}, choose from {', '.join(MODES)}")
        if self.block not in BLOCKS:
            problems.append(f"block is {self.block!r}, choose from {', '.join(BLOCKS)}")
        for name in ("prune_fraction", "unify_fraction"):
            share = getattr(self, name)
            if not _is_number(share) or not 0 <= share <= 1:
                problems.append(f"{name} is {share!r}, needs a number from 0 to 1")
        if not isinstance(self.rho, (tuple, list)) or not all(
            _is_number(value) and value > 0 for value in self.rho
        ):
            problems.append(f"rho is {self.rho!r}, needs a list of positive numbers, one per round")
        for name, least in (("epochs_per_round", 1), ("retrain_epochs", 0)):
            count = getattr(self, name)
            if not isinstance(count, int) or isinstance(count, bool) or count < least:
                problems.append(f"{name} is {count!r}, needs a whole number from {least}")
        rate = self.learning_rate
        if rate is not None and not (_is_number(rate) and rate > 0):
            problems.append(f"learning_rate is {rate!r}, needs a positive number or nothing")
        if isinstance(self.ignored_layers, str) or not all(
            isinstance(name, str) for name in self.ignored_layers
        ):
            problems.append(f"ignored_layers is {self.ignored_layers!r}, needs a list of names")
        if problems:
            raise ConfigError("unification settings", problems)

    @property
    def block_shape(self) -> tuple[int, int]:
        return BLOCKS[self.block]

    @property
    def admm_epochs(self) -> int:
        return len(self.rho) * self.epochs_per_round

    @property
    def total_epochs(self) -> int:
        return self.admm_epochs + self.retrain_epochs


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
