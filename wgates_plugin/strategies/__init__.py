"""Strategies: whatever turns a network, data and a budget into a plan."""

from wgates_plugin.strategies.base import Decision, Strategy, Task
from wgates_plugin.strategies.budgeting import (
    fit_to_budget,
    plan_for_budget,
    threshold_widths,
    uniform_widths,
)
from wgates_plugin.strategies.criteria import CRITERIA, importance_scores, plan_by_criterion
from wgates_plugin.strategies.table import STRATEGIES, make_strategy
from wgates_plugin.strategies.wgates import WGates, WGatesSettings

__all__ = [
    "CRITERIA",
    "STRATEGIES",
    "Decision",
    "Strategy",
    "Task",
    "WGates",
    "WGatesSettings",
    "fit_to_budget",
    "importance_scores",
    "make_strategy",
    "plan_by_criterion",
    "plan_for_budget",
    "threshold_widths",
    "uniform_widths",
]
