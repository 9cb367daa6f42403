"""Latency-targeted channel pruning: milliseconds in, a smaller exported network out."""

from wgates_plugin.channels import ChannelGroup, ChannelSpace
from wgates_plugin.efficiency import Budget, Limit, LPNet, MacsModel, ParametersModel
from wgates_plugin.gating import Gating
from wgates_plugin.pipeline import PruningResult, prune_to_target
from wgates_plugin.plan import PruningPlan
from wgates_plugin.strategies import WGates, WGatesSettings
from wgates_plugin.surgery import rebuild, remove
from wgates_plugin.targets import LatencyTarget, MacsTarget, ParametersTarget, PruningSettings
from wgates_plugin.tracing import trace
from wgates_plugin.training import TrainingSettings

__all__ = [
    "Budget",
    "ChannelGroup",
    "ChannelSpace",
    "Gating",
    "LPNet",
    "LatencyTarget",
    "Limit",
    "MacsModel",
    "MacsTarget",
    "ParametersModel",
    "ParametersTarget",
    "PruningPlan",
    "PruningResult",
    "PruningSettings",
    "TrainingSettings",
    "WGates",
    "WGatesSettings",
    "prune_to_target",
    "rebuild",
    "remove",
    "trace",
]
