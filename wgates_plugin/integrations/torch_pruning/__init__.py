"""The torch-pruning door: pruners for torch-pruning's own loops, importances for its own pruners."""

from wgates_plugin.integrations.torch_pruning.importance import GDPImportance, WGatesImportance
from wgates_plugin.integrations.torch_pruning.pruner import WGatesPruner
from wgates_plugin.integrations.torch_pruning.strategies import StrategyPruner

__all__ = ["GDPImportance", "StrategyPruner", "WGatesImportance", "WGatesPruner"]
