"""One layer's kernel as a function of the widths around it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor, nn

Slices = Mapping[int, np.ndarray]
"""Dimension -> kept indices, ascending; other dimensions stay whole."""


class KernelGenerator(nn.Module):
    """`kernel(e) = base + relu(first(e)) @ table`, reshaped (MetaPruning, section 3.1).

    A fully connected layer (shares -> hidden), a rectifier, and a fully connected layer (hidden ->
    all weights of the kernel), `table` being its weight and `base` its bias. The second one is held
    in the kernel's shape, so that a cropped kernel is computed from the cropped table alone:
    cropping the rows of a fully connected layer is cropping what it puts out.

    Where `bases < hidden`, a linear map (hidden -> bases) stands between, which bounds the rank of
    the second layer and its memory to `bases` times the kernel (ours).

    Args:
        kernel: a fresh kernel; `base` starts as a copy. The table starts with the kernel's own spread
            (ours), so that networks without BatchNorm start in scale too.
        inputs: length of the encoding.
    """

    def __init__(self, kernel: Tensor, inputs: int, hidden: int, bases: int) -> None:
        super().__init__()
        self.first = nn.Linear(inputs, hidden)
        self.mix = nn.Linear(hidden, bases, bias=False) if bases < hidden else nn.Identity()
        spread = float(kernel.detach().square().mean().sqrt())
        self.base = nn.Parameter(kernel.detach().clone())
        self.table = nn.Parameter(torch.randn(bases, *kernel.shape) * (spread / math.sqrt(bases)))

    def forward(self, encoding: Tensor, slices: Slices) -> Tensor:
        """Encoding (inputs,) -> the kernel, cropped to `slices`."""
        amounts = self.mix(torch.relu(self.first(encoding)))  # (hidden,) -> (bases,)
        base = crop(self.base, slices)
        table = crop(self.table, {dim + 1: indices for dim, indices in slices.items()})
        # (bases,) @ (bases, kernel's weights) -> (kernel's weights,)
        made: Tensor = base + (amounts @ table.flatten(1)).view(base.shape)
        return made


def bases_for(weights: int, hidden: int, largest_table: int | None) -> int:
    """Bases for a kernel of so many weights: `hidden`, or as many as the limit leaves, at least 1.

    >>> bases_for(9 * 64 * 64, 32, 2**23), bases_for(9 * 512 * 512, 32, 2**23)
    (32, 3)
    """
    if largest_table is None:
        return hidden
    return max(1, min(hidden, largest_table // weights))


def crop(value: Tensor, slices: Slices) -> Tensor:
    """`value` at the kept indices; a view where these are the leading ones."""
    for dim, indices in slices.items():
        if int(indices[-1]) == len(indices) - 1:
            value = value.narrow(dim, 0, len(indices))
        else:
            value = value.index_select(dim, torch.from_numpy(indices).to(value.device))
    return value


def shares_of(widths: Sequence[int], full: Sequence[int], device: torch.device) -> Tensor:
    """Widths (G,) relative to the full ones."""
    pairs = zip(widths, full, strict=True)
    return torch.tensor([width / most for width, most in pairs], device=device)
