"""LPNet: latency from widths. `model.py` is the door; `layers.py` and `mlp.py` are its two structures."""

from wgates_plugin.efficiency.lpnet.compatibility import check_choice
from wgates_plugin.efficiency.lpnet.data import LEAST_SAMPLES, weighted_names
from wgates_plugin.efficiency.lpnet.fit_report import FitReport
from wgates_plugin.efficiency.lpnet.held_out import COVERAGE, HeldOut
from wgates_plugin.efficiency.lpnet.model import LPNet
from wgates_plugin.efficiency.lpnet.structure import STRUCTURES
from wgates_plugin.efficiency.lpnet.upper_bound import UpperBound

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
