"""What a strategy that learns decides when it is given no epochs to learn in."""

from __future__ import annotations

import logging

from wgates_plugin.strategies.base import Decision, Task
from wgates_plugin.strategies.budgeting import fit_to_budget, uniform_widths
from wgates_plugin.strategies.filters import filter_norms, producers_of
from wgates_plugin.strategies.unit_scores import ranks_within

logger = logging.getLogger("wgates_plugin")


def largest_filters(task: Task, strategy: str) -> Decision:
    """The filters of largest norm at uniform widths, with a warning (ours); nothing has said more."""
    logger.warning(
        "%s: without epochs it learns nothing; the filters of largest norm stay, the same share of "
        "every group. Give it epochs, or choose a strategy that needs none",
        strategy,
    )
    norms = filter_norms(producers_of(task.network, task.space), task.space.total_units)
    ranks = ranks_within(task.space, norms).cpu()
    uniform = uniform_widths(task.space, task.budget, task.grid)
    widths = fit_to_budget(task.space, ranks, uniform, task.budget, task.grid)
    return Decision(task.network, ranks, widths, facts={"learned": False})
