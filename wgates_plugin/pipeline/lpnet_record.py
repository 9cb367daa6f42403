"""How well LPNet predicts the widths that a job came by, beside those that it never saw."""

from __future__ import annotations

from typing import Any

import torch

from wgates_plugin.efficiency.lpnet import COVERAGE, LPNet
from wgates_plugin.efficiency.lpnet.held_out import interval_rows
from wgates_plugin.efficiency.samples.file import SampleFile


def visited_error(lpnet: LPNet, visited: SampleFile | None) -> float | None:
    """Mean relative error of `lpnet` on the visited widths, None when there are none."""
    if not visited:
        return None
    return float(lpnet.relative_errors(*_tensors(visited)).abs().mean())


@torch.no_grad()
def predictions(lpnet: LPNet, visited: SampleFile | None) -> list[dict[str, Any]]:
    """Measured against predicted latency with the 90 % interval: sampled sub-networks as they
    were predicted unseen, visited ones by `lpnet` as it is."""
    held_out = lpnet.held_out
    rows = held_out.rows("sampled")
    if visited:
        widths, measured = _tensors(visited)
        known = lpnet.interval(widths) if held_out.most_coverage >= COVERAGE else None
        rows += interval_rows("visited", measured, lpnet(widths), known)
    return rows


def _tensors(visited: SampleFile) -> tuple[torch.Tensor, torch.Tensor]:
    """Widths (N, G) and measured milliseconds (N,)."""
    return (
        torch.tensor(visited.widths, dtype=torch.float64),
        torch.tensor(visited.latencies_ms, dtype=torch.float64),
    )
