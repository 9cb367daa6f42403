"""Projection onto the structure: blocks of one magnitude, blocks of zeros, and the rest as it is.

Pure functions of a weight. A `Structure` is what a projection decided; with it fixed, gradients and
weights are projected onto the linear space of weights that have it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from wgates_plugin.transforms.unification.blocks import BlockGrid
from wgates_plugin.transforms.unification.settings import UnificationSettings

KEPT, UNIFIED, PRUNED = 0, 1, 2
"""Kinds of a block."""


@dataclass(frozen=True, eq=False)
class Structure:
    """Kinds (blocks,) uint8, and signs (blocks, r * c) of the unified blocks' entries, +1 or -1.

    Signs are zero in other blocks and in virtual padding.
    """

    grid: BlockGrid
    kinds: Tensor
    signs: Tensor

    def fixed(self, weight: Tensor) -> Tensor:
        """The nearest tensor with this structure; exact: a unified block is magnitude times sign.

        Of a weight's gradient it is the steepest descent within the structure, the gradient of
        each block's one magnitude spread over its entries:
        `g <- sign * mean(sign * g)`, and 0 in pruned blocks.
        """
        blocks, signs = self.grid.split(weight), self.signs.to(weight)
        kinds = self.kinds.to(weight.device)[:, None]
        count = signs.abs().sum(1, keepdim=True).clamp_min(1)
        magnitude = (blocks * signs).sum(1, keepdim=True) / count  # (blocks, 1)
        blocks = torch.where(kinds == UNIFIED, signs * magnitude, blocks)
        blocks = blocks.masked_fill(kinds == PRUNED, 0.0)
        return self.grid.join(blocks, weight.shape)


@torch.no_grad()
def project(
    weight: Tensor, grid: BlockGrid, settings: UnificationSettings
) -> tuple[Tensor, Structure]:
    """The projection of a weight, and the structure it has (Lin et al., section 3).

    Unify: `w <- mean|w| * sign(w)`, error `sum (|w| - mean|w|)^2`; prune: `w <- 0`, error
    `sum w^2`. The wanted fraction of blocks with least error is taken, the lower block number
    first among equals; combined mode prunes first, then unifies survivors. `sign(0) = +1` (ours).
    """
    blocks, real = grid.split(weight.detach().cpu().double()), grid.real
    magnitudes = blocks.abs()
    count = real.sum(1)
    mean = magnitudes.sum(1) / count.clamp_min(1)
    prune_error = blocks.square().sum(1)
    unify_error = ((magnitudes - mean[:, None]) * real).square().sum(1)
    free = count > 0
    kinds = torch.zeros(len(blocks), dtype=torch.uint8)
    if settings.mode in ("prune", "combined"):
        chosen = _least(prune_error, free, settings.prune_fraction)
        kinds[chosen] = PRUNED
        free[chosen] = False
    if settings.mode in ("unify", "combined"):
        kinds[_least(unify_error, free, settings.unify_fraction)] = UNIFIED
    ones = torch.ones_like(blocks)
    signs = torch.where(blocks < 0, -ones, ones) * (real & (kinds == UNIFIED)[:, None])
    structure = Structure(grid, kinds, signs.to(torch.int8))
    # The mean is taken in the precision of the errors, then rounded once.
    unified = signs.to(weight.dtype) * mean.to(weight.dtype)[:, None]
    exact = grid.split(weight.detach().cpu())
    projected = torch.where((kinds == UNIFIED)[:, None], unified, exact)
    projected = projected.masked_fill((kinds == PRUNED)[:, None], 0.0)
    return grid.join(projected, weight.shape).to(weight.device), structure


def _least(errors: Tensor, free: Tensor, fraction: float) -> Tensor:
    """Numbers of the `fraction` of free blocks with the least error."""
    candidates = free.nonzero().flatten()
    count = int(fraction * len(candidates) + 0.5)
    order = errors[candidates].argsort(stable=True)
    return candidates[order[:count]]
