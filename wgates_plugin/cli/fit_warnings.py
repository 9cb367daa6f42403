"""When a fit is too poor to set a target by, and what to do about it."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from wgates_plugin.efficiency.lpnet import LPNet

POOR_MEAN, POOR_HALF_WIDTH, POOR_WORST = 0.05, 0.15, 0.3
"""Relative errors on unseen networks. The pipeline aims 2 % under a target and corrects by
measuring; what is off by more than these leaves it little to correct with."""

FEW = 40


def fit_warnings(lpnet: LPNet, *, there: int | None = None, grid: int = 1) -> list[str]:
    """What a user of this LPNet should know; empty for a good fit.

    Args:
        there: how many different networks there are on the grid that was sampled; None for many.
    """
    found = lpnet.report
    assert found is not None
    poor = []
    if found.mape > POOR_MEAN:
        poor.append(f"{found.mape:.0%} off on average")
    if found.worst > POOR_WORST:
        poor.append(f"{found.worst:.0%} at the worst")
    if found.half_width_90 is None:
        poor.append("without a 90 % interval, which needs 9 measurements")
    elif found.half_width_90 > POOR_HALF_WIDTH:
        poor.append(f"sure to +-{found.half_width_90:.0%} only")
    if not poor:
        return []
    more = FEW if found.samples < FEW else 2 * found.samples
    start = (
        f"this LPNet is {', '.join(poor)}; a target in milliseconds that it sets may be missed by "
        "as much. "
    )
    if there is not None and found.samples >= there:
        finer = f"take a finer one (--grid {grid // 2}), or " if grid > 1 else ""
        return [
            f"{start}All {there} networks on the grid of {grid} are measured: {finer}measure longer "
            "each (--seconds)"
        ]
    return [
        f"{start}Run "
        f"the same command with --samples {more}: the {found.samples} measured ones are kept"
        + (
            ""
            if found.samples < FEW
            else ". Or measure longer each (--seconds), on a quiet machine"
        )
    ]
