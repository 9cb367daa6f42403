"""From clusters and contributions to one score per unit, whose order says who goes first."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from wgates_plugin.strategies.functionality.clustering import SILENT

SHARPNESS = 8
"""One pattern stands in for another only where they are nearly the same: by half at cosine 0.92."""


def rank(cosines: Tensor, labels: Tensor, contribution: Tensor, *, repeats: str) -> Tensor:
    """Scores (n,) of one group: representatives in (1, 2], repeats in (0, 1], silent units 0.

    Of each cluster the unit of greatest contribution represents it, so that down to as many units
    as clusters every cluster keeps one (Qin et al., section 3.4). Representatives count by the
    contribution of their whole cluster, for they are to stand in for it (ours). The others:
    repeats="contribution" by their own contribution, as in the paper; repeats="coverage" by what
    they add to what the units before them cover, see `covered_in_order` (ours). All are relative to
    the layer's greatest contribution, or to the greatest gain where that is more: a gain is a sum over
    units. So a layer of many repeats has many low scores.

    Args:
        cosines: (n, n) between patterns. labels: (n,) cluster or `SILENT`.
        contribution: (n,), 0 or more.
    """
    scores = torch.zeros(len(labels), dtype=torch.float64)
    weight = contribution.double()
    weight = (weight / weight.max().clamp_min(1e-30)).clamp_min(1e-6)
    chosen = representatives(labels, contribution)
    if not chosen:
        return scores
    carried = torch.stack([weight[labels == labels[unit]].sum() for unit in chosen])
    scores[chosen] = 1 + carried / carried.max()
    rest = labels != SILENT
    rest[chosen] = False
    if repeats == "contribution":
        scores[rest] = weight[rest]
        return scores
    greatest = 1.0
    for unit, gain in covered_in_order(cosines, weight, chosen, rest):
        greatest = max(greatest, gain)  # the first gain, for gains only fall
        scores[unit] = max(gain / greatest, 1e-9)
    return scores


def covered_in_order(
    cosines: Tensor, weight: Tensor, first: list[int], rest: Tensor
) -> Iterator[tuple[int, float]]:
    """Units of `rest` with what each adds, the greatest gain first.

    A set of units S covers `sum_v weight_v * max(0, max_{u in S} cos(u, v))^SHARPNESS`: each unit's
    contribution as far as a unit that stays does the same. `S` starts as `first` and grows by the
    unit of greatest gain. So the copy of a unit that stays adds nothing, and a unit with copies counts
    with the contribution of all, which share the loss's gradient between them.
    """
    likeness = cosines.clamp(0, 1) ** SHARPNESS
    covered = likeness[first].max(0).values
    # Gains only fall as S grows: an old gain is a bound, looked at again when it leads.
    bounds = (weight * (likeness - covered).clamp_min(0)).sum(1)
    bounds[~rest] = -1
    left = int(rest.sum())
    while left:
        unit = int(bounds.argmax())
        gain = float((weight * (likeness[unit] - covered).clamp_min(0)).sum())
        bounds[unit] = gain
        if gain < float(bounds.max()):
            continue
        yield unit, gain
        covered = torch.maximum(covered, likeness[unit])
        bounds[unit] = -1
        left -= 1


def representatives(labels: Tensor, contribution: Tensor) -> list[int]:
    """The unit of greatest contribution of each cluster, by cluster; of equals, the first."""
    found = []
    for label in range(int(labels.max()) + 1 if len(labels) else 0):
        mine = torch.nonzero(labels == label)[:, 0]
        found.append(int(mine[contribution[mine].argmax()]))
    return found
