"""What a data set is to this package, and what was asked of it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Data:
    """Loaders of (inputs, targets) batches, and one input to trace and time with.

    `example_input` is (1, C, H, W), or a tuple of tensors for networks with several inputs.
    `classes` is None if a factory did not tell.
    """

    train_loader: Iterable[Any]
    val_loader: Iterable[Any]
    classes: int | None
    example_input: Tensor | tuple[Tensor, ...]
    name: str


@dataclass(frozen=True)
class DataRequest:
    """What `load_data` was asked for. `root_given`: the root is the user's own, and no other is read."""

    name: str
    batch_size: int
    image_size: int | None
    limit: int | None
    seed: int
    root: Path
    root_given: bool = False


def chosen_indices(count: int, limit: int | None, seed: int) -> Tensor:
    """Indices of at most `limit` of `count` samples, drawn with `seed`, in ascending order."""
    if limit is None or limit >= count:
        return torch.arange(count)
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
    return order[:limit].sort().values
