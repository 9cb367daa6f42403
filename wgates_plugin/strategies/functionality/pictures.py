"""Patterns as pictures: a row per cluster, a tile per filter, a frame around those that stay."""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import Tensor
from torch.nn import functional

from wgates_plugin.strategies.functionality.clustering import SILENT

TILE = 32
ROWS, TILES = 8, 12
"""Clusters and filters of each that are shown, the largest clusters and best filters first."""

PAPER = (255, 255, 255)
KEPT, CUT = (0, 150, 80), (200, 200, 200)
FRAME, GAP = 2, 2


def thumbnails(patterns: Tensor) -> Tensor | None:
    """Patterns (n, C, H, W) -> (n, 3, TILE, TILE) uint8, each with its own contrast, 0 as mid-grey.

    Three channels are shown as colours, any other number as their mean. None for inputs that are
    no images.
    """
    if patterns.ndim != 4:
        return None
    images = patterns.float()
    if images.shape[1] != 3:
        images = images.mean(1, keepdim=True).expand(-1, 3, -1, -1)
    images = functional.interpolate(images, size=(TILE, TILE), mode="nearest")
    largest = images.abs().flatten(1).max(1).values.clamp_min(1e-12).view(-1, 1, 1, 1)
    return (127.5 * (1 + images / largest)).round().to(torch.uint8).cpu()


def picture(tiles: Tensor, labels: Tensor, scores: Tensor, kept: Collection[int]) -> Tensor:
    """(H, W, 3) uint8: clusters by size downwards, filters by score to the right.

    Args:
        tiles: (n, 3, TILE, TILE). labels, scores: (n,). kept: units that stay, in a green frame.
    """
    rows = []
    for label in range(int(labels.max()) + 1 if len(labels) else 0):
        mine = torch.nonzero(labels == label)[:, 0]
        rows.append(mine[scores[mine].argsort(descending=True, stable=True)].tolist())
    rows.sort(key=lambda units: -len(units))
    silent = torch.nonzero(labels == SILENT)[:, 0].tolist()
    rows = (rows or [silent])[:ROWS]
    cell = TILE + 2 * FRAME
    width = min(TILES, max(len(units) for units in rows))
    canvas = torch.tensor(PAPER, dtype=torch.uint8).repeat(
        len(rows) * (cell + GAP) + GAP, width * (cell + GAP) + GAP, 1
    )
    for down, units in enumerate(rows):
        for right, unit in enumerate(units[:TILES]):
            top, left = GAP + down * (cell + GAP), GAP + right * (cell + GAP)
            colour = torch.tensor(KEPT if unit in kept else CUT, dtype=torch.uint8)
            canvas[top : top + cell, left : left + cell] = colour
            inner = canvas[top + FRAME : top + FRAME + TILE, left + FRAME : left + FRAME + TILE]
            inner.copy_(tiles[unit].permute(1, 2, 0))
    return canvas
