"""The torch-pruning door: pruners for torch-pruning's own loops, importances for its own pruners."""

from wgates_plugin.integrations.torch_pruning.importance import GDPImportance, WGatesImportance
from wgates_plugin.integrations.torch_pruning.pruner import WGatesPruner
from wgates_plugin.integrations.torch_pruning.strategies import StrategyPruner
from wgates_plugin.strategies.gdp import GDPSettings, PolarisedGates

__all__ = [
    "GDPImportance",
    "GDPSettings",
    "PolarisedGates",
    "StrategyPruner",
    "WGatesImportance",
    "WGatesPruner",
]
