"""Clusters of filters by their patterns: k-means, as many clusters as the silhouette prefers."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from wgates_plugin.latency.base import require

DIMENSIONS = 64
"""Principal axes of the patterns that k-means sees; distances elsewhere are exact."""

STARTS = 4
SAME = 1e-4
"""Distance below which two patterns are one."""

SILENT = -1
"""Label of units whose pattern is empty: nothing the filter could be given excites it."""


@dataclass(frozen=True, eq=False)
class Clusters:
    """labels (n,), from 0 or `SILENT`; how well they separate, -1..1, None where it has no meaning."""

    labels: Tensor
    silhouette: float | None


def load_sklearn() -> Any:
    """scikit-learn's clustering.

    Raises:
        MissingExtraError: it is not installed.
    """
    purpose = "strategy `functionality`"
    require("sklearn", extra="functionality", purpose=purpose)
    return require("sklearn.cluster", extra="functionality", purpose=purpose)


def likeness(patterns: Tensor) -> Tensor:
    """Cosine between the patterns of any two units: (n, ...) -> (n, n), float64 on the CPU.

    Patterns are standardised to unit norm. They are not centred: brighter or darker than grey is a
    part of what a filter looks for (ours). An empty pattern stays empty.
    """
    rows = patterns.flatten(1).cpu().double()  # not every device has doubles
    size = rows.norm(dim=1, keepdim=True)
    rows = torch.where(size > 0, rows / size.clamp_min(1e-30), torch.zeros_like(rows))
    return rows @ rows.T


def distances(cosines: Tensor) -> Tensor:
    """(n, n) cosines -> Euclidean distances of the standardised patterns, 0 to 2."""
    own = cosines.diagonal()
    found = (own[:, None] + own[None, :] - 2 * cosines).clamp_min(0).sqrt()
    return found.fill_diagonal_(0)


def cluster(cosines: Tensor, *, largest: int, tried: int, seed: int) -> Clusters:
    """k-means over the patterns behind `cosines` (n, n), K of the best mean silhouette.

    K runs over a coarse geometric row from 2 to `largest` and then around the best of them.
    """
    labels = torch.full((len(cosines),), SILENT)
    heard = torch.nonzero(cosines.diagonal() > 0)[:, 0]
    if not len(heard):
        return Clusters(labels, None)
    apart = distances(cosines[heard][:, heard])
    points = _coordinates(cosines[heard][:, heard])
    # A unit is different when none before it has its pattern, but for rounding.
    different = 1 + int((apart[1:] + _later(len(heard))[1:]).min(1).values.gt(SAME).sum())
    most = min(largest, different, len(heard) - 1)
    if different == 1 or most < 2:
        alone = 1 if different == 1 else len(heard)
        labels[heard] = torch.arange(len(heard)) % alone
        return Clusters(labels, None)
    best, value = _search(points, apart.numpy(), most, tried, seed)
    # Numbered by first appearance, so that the numbers do not depend on k-means' own.
    _, first, inverse = np.unique(best, return_index=True, return_inverse=True)
    labels[heard] = torch.from_numpy(np.argsort(np.argsort(first))[inverse])
    return Clusters(labels, value)


def _later(count: int) -> Tensor:
    """(n, n): infinite for units that do not come before the row's, else 0."""
    return torch.full((count, count), torch.inf, dtype=torch.float64).triu()


def _search(
    points: np.ndarray, apart: np.ndarray, most: int, tried: int, seed: int
) -> tuple[np.ndarray, float]:
    sklearn = load_sklearn()
    score = require(
        "sklearn.metrics", extra="functionality", purpose="strategy `functionality`"
    ).silhouette_score
    found: dict[int, tuple[float, np.ndarray]] = {}

    def attempt(count: int) -> None:
        if count in found:
            return
        means = sklearn.KMeans(count, n_init=STARTS, random_state=seed)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # fewer distinct points than clusters
            labels = means.fit_predict(points)
        separable = 2 <= len(set(labels.tolist())) < len(labels)
        value = float(score(apart, labels, metric="precomputed")) if separable else -1.0
        found[count] = (value, labels)

    def winner() -> int:
        return max(found, key=lambda count: (found[count][0], -count))

    coarse = sorted({round(k) for k in np.geomspace(2, most, tried).tolist()})
    for count in coarse:
        attempt(count)
    place = coarse.index(winner())
    low, high = coarse[max(0, place - 1)], coarse[min(len(coarse) - 1, place + 1)]
    for count in sorted({round(k) for k in np.linspace(low, high, tried + 2).tolist()}):
        attempt(count)
    value, labels = found[winner()]
    return labels, value


def _coordinates(cosines: Tensor) -> np.ndarray:
    """Principal coordinates (n, d) of the patterns: as far apart as they are, but for small axes."""
    values, vectors = torch.linalg.eigh(cosines)
    axes = values.argsort(descending=True)[:DIMENSIONS]
    axes = axes[values[axes] > 1e-9]
    found: np.ndarray = (vectors[:, axes] * values[axes].sqrt()).numpy()
    return found
