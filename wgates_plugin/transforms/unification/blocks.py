"""Small blocks of a layer's kernel matrix, and which layers have one."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import torch
from torch import Tensor, nn

from wgates_plugin.errors import ConfigError
from wgates_plugin.modules import WEIGHTED
from wgates_plugin.transforms.unification.settings import UnificationSettings


@dataclass(frozen=True, eq=False)
class BlockGrid:
    """Blocks of `block` = (r, c) entries over a kernel matrix (R, C): a weight, flattened from dim 1.

    `rows` (R,) and `columns` (C,) are ascending positions on the grid: 0, 1, 2, ... in a layer that
    was never cut. Positions that are missing, beyond a ragged edge or because their channels were
    removed, are virtual padding: they count in no sum and no mean. So cutting channels out of a
    network leaves every block the block it was.
    """

    rows: np.ndarray
    columns: np.ndarray
    block: tuple[int, int]

    @classmethod
    def over(cls, shape: tuple[int, ...] | torch.Size, block: tuple[int, int]) -> BlockGrid:
        """The grid of an uncut weight of this shape."""
        return cls(np.arange(shape[0]), np.arange(math.prod(shape[1:])), block)

    @cached_property
    def shape(self) -> tuple[int, int]:
        """Blocks down and across; the grid has their product."""
        down, across = (
            int(positions[-1]) // size + 1 if len(positions) else 0
            for positions, size in zip((self.rows, self.columns), self.block, strict=True)
        )
        return down, across

    @cached_property
    def _is_uncut(self) -> bool:
        return all(
            np.array_equal(positions, np.arange(len(positions)))
            for positions in (self.rows, self.columns)
        )

    @cached_property
    def real(self) -> Tensor:
        """Boolean (blocks, r * c): entries that exist, on the CPU."""
        return self.split(torch.ones(len(self.rows), len(self.columns))).bool()

    def split(self, weight: Tensor) -> Tensor:
        """The weight's entries by block (blocks, r * c), zero where there is none."""
        matrix = weight.flatten(1)
        (down, across), (r, c) = self.shape, self.block
        if matrix.shape == (down * r, across * c):
            padded = matrix
        else:
            padded = matrix.new_zeros(down * r, across * c)
            if self._is_uncut:
                padded[: matrix.shape[0], : matrix.shape[1]] = matrix
            else:
                rows, columns = self._places(matrix.device)
                padded[rows[:, None], columns[None, :]] = matrix
        return padded.view(down, r, across, c).transpose(1, 2).reshape(down * across, r * c)

    def join(self, blocks: Tensor, shape: torch.Size | tuple[int, ...]) -> Tensor:
        """What `split` took apart, as a weight of `shape`."""
        (down, across), (r, c) = self.shape, self.block
        padded = blocks.view(down, across, r, c).transpose(1, 2).reshape(down * r, across * c)
        if self._is_uncut:
            return padded[: len(self.rows), : len(self.columns)].reshape(shape)
        rows, columns = self._places(blocks.device)
        return padded[rows[:, None], columns[None, :]].reshape(shape)

    def _places(self, device: torch.device) -> tuple[Tensor, Tensor]:
        return torch.from_numpy(self.rows).to(device), torch.from_numpy(self.columns).to(device)

    def cut(self, shape: tuple[int, ...] | torch.Size, kept: Mapping[int, np.ndarray]) -> BlockGrid:
        """The grid of the weight of `shape` after keeping the indices `kept` of its dimensions."""
        columns = np.arange(len(self.columns)).reshape(tuple(shape[1:]))
        for dim, indices in kept.items():
            if dim > 0:
                columns = columns.take(indices, axis=dim - 1)
        rows = self.rows[kept[0]] if 0 in kept else self.rows
        return replace(self, rows=rows, columns=self.columns[columns.reshape(-1)])


def layer_grids(
    network: nn.Module, settings: UnificationSettings, *, skip_small: bool = False
) -> dict[str, BlockGrid]:
    """The grids of the layers to unify, by parameter name, in `named_modules()` order.

    Those are all convolutions and linear layers but the first, the last (ours: in that order), the
    ignored ones and those whose weight is frozen (`requires_grad` is false). A
    transposed convolution's matrix has its inputs as rows (ours).

    Args:
        skip_small: leave out layers that no block fits into, instead of refusing them; even all.

    Raises:
        ConfigError: an ignored layer does not exist, a block is larger than a layer's matrix, a
            weight is computed from others, or there is no layer left; all at once.
    """
    modules = dict(network.named_modules())
    problems = [
        f"ignored_layers: no module `{name}` in the network"
        for name in settings.ignored_layers
        if name not in modules
    ]
    weighted = [name for name, module in modules.items() if isinstance(module, WEIGHTED)]
    r, c = settings.block_shape
    grids: dict[str, BlockGrid] = {}
    for name in weighted[1:-1]:
        if any(name == one or name.startswith(f"{one}.") for one in settings.ignored_layers):
            continue
        weight = modules[name]._parameters.get("weight")
        if weight is None:
            problems.append(
                f"layer `{name}`: its weight is computed (weight_norm, spectral_norm, ...) and so "
                "cannot be given a structure; make it a plain one (for example with "
                "torch.nn.utils.parametrize.remove_parametrizations) or add it to ignored_layers"
            )
            continue
        if not weight.requires_grad:
            continue
        rows, columns = weight.shape[0], weight[0].numel()
        if rows >= r and columns >= c:
            grids[f"{name}.weight"] = BlockGrid.over(weight.shape, (r, c))
        elif not skip_small:
            problems.append(
                f"block {settings.block} is larger than the {rows}x{columns} kernel matrix of "
                f"layer `{name}`; choose another block or add the layer to ignored_layers"
            )
    if not problems and not grids and not skip_small:
        problems.append(
            f"no layer to unify among {len(weighted)} with weights: the first and the last are "
            "left alone, as are frozen ones, and no other one remains"
        )
    if problems:
        raise ConfigError("unification", problems)
    return grids
