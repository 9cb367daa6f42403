"""LPNet: latency from widths. `model.py` is the door, each structure a file of its own."""

from wgates_plugin.efficiency.lpnet.data import LEAST_SAMPLES, weighted_names
from wgates_plugin.efficiency.lpnet.held_out import COVERAGE, HeldOut
from wgates_plugin.efficiency.lpnet.model import (
    STRUCTURES,
    FitReport,
    LPNet,
    UpperBound,
    check_choice,
)

__all__ = [
    "COVERAGE",
    "LEAST_SAMPLES",
    "STRUCTURES",
    "FitReport",
    "HeldOut",
    "LPNet",
    "UpperBound",
    "check_choice",
    "weighted_names",
]
