"""One gradient for the gates of all processes."""

from __future__ import annotations

from torch import Tensor, distributed


def mean_over_ranks(gradient: Tensor) -> Tensor:
    """The gradient's mean over all processes: no DistributedDataParallel knows of the gates' own."""
    if not (distributed.is_available() and distributed.is_initialized()):
        return gradient
    summed = gradient.clone()
    distributed.all_reduce(summed)
    return summed / distributed.get_world_size()
