"""Efficiency models: widths -> cost, differentiable."""

from wgates_plugin.efficiency.base import Budget, EfficiencyModel, Limit
from wgates_plugin.efficiency.counts import MacsModel, ParametersModel
from wgates_plugin.efficiency.lpnet import LPNet

__all__ = ["Budget", "EfficiencyModel", "LPNet", "Limit", "MacsModel", "ParametersModel"]
