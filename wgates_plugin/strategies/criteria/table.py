"""The table of criteria: name -> importance, and what it computes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch_pruning as tp

from wgates_plugin.strategies.criteria.repaired import (
    BNScaleImportance,
    FPGMImportance,
    HessianImportance,
    TaylorImportance,
    mean_one,
)


@dataclass(frozen=True)
class Criterion:
    """One entry of the table.

    Attributes:
        make: builds the importance.
        paper: what it computes.
        needs_data: gradients have to be taken first.
    """

    make: Callable[[], Any]
    paper: str
    needs_data: bool = False


CRITERIA: dict[str, Criterion] = {
    "l1": Criterion(
        lambda: tp.importance.GroupMagnitudeImportance(
            p=1, group_reduction="first", normalizer=mean_one
        ),
        "L1 norm of the filters of the group's first producer (Li et al., ICLR 2017)",
    ),
    "l2": Criterion(
        lambda: tp.importance.GroupMagnitudeImportance(
            p=2, group_reduction="first", normalizer=mean_one
        ),
        "squared L2 norm of the filters of the group's first producer",
    ),
    "group-norm": Criterion(
        lambda: tp.importance.GroupMagnitudeImportance(p=2, normalizer=mean_one),
        "squared L2 norm over all coupled layers (DepGraph, Fang et al., CVPR 2023)",
    ),
    "fpgm": Criterion(
        FPGMImportance,
        "distance from the other filters of the layer (He et al., CVPR 2019), over coupled layers",
    ),
    "lamp": Criterion(
        tp.importance.LAMPImportance, "layer-adaptive magnitude (Lee et al., ICLR 2021)"
    ),
    "bn-scale": Criterion(
        BNScaleImportance,
        "BatchNorm scales (Network Slimming, Liu et al., ICCV 2017)",
    ),
    "random": Criterion(tp.importance.RandomImportance, "chance"),
    "taylor": Criterion(
        TaylorImportance, "first-order loss change (Molchanov et al., CVPR 2019)", needs_data=True
    ),
    "hessian": Criterion(
        HessianImportance,
        "second-order loss change, diagonal Fisher (Optimal Brain Damage)",
        needs_data=True,
    ),
}
"""Name -> criterion."""
