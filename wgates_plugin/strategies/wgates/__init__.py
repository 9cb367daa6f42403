"""W-Gates: each filter's own weights decide whether it stays.

Li et al., "Joint-optimized channel pruning: W-Gates" (ECCV Workshops 2020, arXiv 2007.02066).
One linear map per producing layer, shared by its filters, scores each filter from its flattened
weights; a binary step opens or closes the channel; latency or another cost of the open widths is
differentiated along with the task loss. Before they learn, gates are measured in rounds, which close
those of least merit until the target is reached (ours). Departures from the paper are marked (ours).
"""

from wgates_plugin.strategies.wgates.gates import WGates
from wgates_plugin.strategies.wgates.scores import (
    WeightScores,
    filter_scores,
    starting_offsets,
)
from wgates_plugin.strategies.wgates.settings import WGatesSettings
from wgates_plugin.strategies.wgates.strategy import WGatesStrategy

__all__ = [
    "WGates",
    "WGatesSettings",
    "WGatesStrategy",
    "WeightScores",
    "filter_scores",
    "starting_offsets",
]
