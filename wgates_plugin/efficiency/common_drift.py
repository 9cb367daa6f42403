"""The drift that samples have in common: a machine that has changed its speed since the baseline."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

MOST_COMMON_DRIFT = 0.025
"""Relative. Ratios do not feel a drift that all samples have in common, milliseconds do."""


def common_drift(drifts: Sequence[float]) -> float:
    """The drift that samples have in common: their median, or 1 where they lie on both sides.

    >>> common_drift([0.96, 0.97, 0.95]), common_drift([0.9, 1.1, 1.05]), common_drift([])
    (0.96, 1.0, 1.0)
    """
    if not drifts or min(drifts) <= 1.0 <= max(drifts):
        return 1.0
    return statistics.median(drifts)
