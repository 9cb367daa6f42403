"""What torch-pruning ships flawed: criteria that are not offered, importances that are not taken."""

from __future__ import annotations

from torch_pruning.pruner.importance import (
    GroupHessianImportance,
    GroupTaylorImportance,
    OBDCImportance,
)

from wgates_plugin.strategies.criteria.repaired import HessianImportance, TaylorImportance

REFUSED: dict[str, str] = {
    "obdc": (
        "torch-pruning's OBDCImportance prepares attention groups only and raises a TypeError on "
        "every other one, so that no convolutional network gets a score; use `hessian`"
    ),
    "growing-reg": (
        "torch-pruning's GrowingRegPruner is a regulariser, not an importance, and its BatchNorm "
        "step adds to a copy of the gradient and so does nothing; use `group-norm`"
    ),
}
"""Name -> why it is not offered."""

_FLAWED: tuple[tuple[type, str], ...] = (
    (TaylorImportance, ""),  # repaired ones come first: they are subclasses
    (HessianImportance, ""),
    (
        GroupTaylorImportance,
        "torch-pruning's Taylor importance looks for GroupNorm where it means BatchNorm and leaves "
        'every BatchNorm out; use the criterion "taylor"',
    ),
    (
        GroupHessianImportance,
        "torch-pruning's Hessian importance keeps the last gradient only instead of accumulating "
        'them; use the criterion "hessian"',
    ),
    (OBDCImportance, REFUSED["obdc"]),
)


def flaw_of(importance: object) -> str:
    """Why an importance is not taken as torch-pruning ships it; empty for one that is."""
    return next((reason for kind, reason in _FLAWED if isinstance(importance, kind)), "")
