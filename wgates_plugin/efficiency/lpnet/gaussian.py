"""Numerics of Gaussian processes: factors, likelihood, learning parameters, choosing rows."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from wgates_plugin.efficiency.lpnet.data import LatencyData
from wgates_plugin.errors import MeasurementError

_RATE = 0.15


def at_most(data: LatencyData, most: int) -> LatencyData:
    """The newest quarter, where the optimiser is, and random ones of the rest."""
    if len(data) <= most:
        return data
    older, newest = len(data) - most // 4, torch.arange(len(data) - most // 4, len(data))
    order = torch.randperm(older, generator=torch.Generator().manual_seed(0))
    return data[torch.cat([order[: most - len(newest)].sort().values, newest])]


def some(rows: Tensor, most: int, seed: int) -> Tensor:
    """At most so many of `rows`, at random, in order."""
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed))
    return rows[order[:most].sort().values]


def root_of(covariance: Tensor) -> Tensor:
    """Cholesky factor (..., N, N), the diagonal raised a little where rounding forbids one.

    Raises:
        MeasurementError: there is none; the numbers the covariance was made of are no latencies.
    """
    root, failed = torch.linalg.cholesky_ex(covariance)
    size = covariance.diagonal(dim1=-2, dim2=-1).mean(-1)[..., None]
    for raised in (1e-10, 1e-8, 1e-6):
        if not failed.any():
            break
        more = torch.diag_embed((raised * size).expand(covariance.shape[:-1]))
        root, failed = torch.linalg.cholesky_ex(covariance + more)
    if not failed.any():
        return root
    raise MeasurementError(
        "LPNet: these measurements cannot be fitted (their covariance is not positive definite); "
        "look for impossible values among latencies and layer profiles"
    )


def unlikelihood(covariance: Tensor, wanted: Tensor) -> Tensor:
    """Negative log likelihood of `wanted` (..., N) under zero-mean Gaussians, summed."""
    root = root_of(covariance)
    solved = torch.cholesky_solve(wanted[..., None], root)[..., 0]
    return 0.5 * (wanted * solved).sum() + root.diagonal(dim1=-2, dim2=-1).log().sum()


def descend(loss: Callable[[], Tensor], parameters: list[Tensor], steps: int) -> None:
    """Adam on `parameters`, in place."""
    for parameter in parameters:
        parameter.requires_grad_(True)
    optimizer = torch.optim.Adam(parameters, lr=_RATE)
    with torch.enable_grad():
        for _ in range(steps):
            optimizer.zero_grad()
            value = loss()
            value.backward()
            optimizer.step()
    for parameter in parameters:
        parameter.requires_grad_(False)
