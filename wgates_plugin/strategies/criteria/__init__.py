"""Channel scores by torch-pruning's importances, and plans from them under our budgets and floors.

Every criterion scores channels of a torch-pruning group; scores are added up by root index and
averaged over tied conv groups, which gives one score per unit of a `ChannelSpace`. The groups are
made from the space's records, so that nothing is traced. Some criteria do not compute what their
papers say in torch-pruning 1.6.1: they are repaired here (see `repaired.py`) or refused.

No criterion counts the weights of depthwise convolutions, which lose their channels with their group
all the same: torch-pruning's importances know the pruning functions of dense and grouped
convolutions, linear layers and norms only, so that `group-norm`, `lamp`, `taylor` and `hessian` pass
them over in silence. The repaired ones do as well, so that scores stay comparable with theirs.
"""

from wgates_plugin.strategies.criteria.plan import plan_by_criterion
from wgates_plugin.strategies.criteria.repaired import HessianImportance, TaylorImportance
from wgates_plugin.strategies.criteria.scores import criterion_scores, importance_scores
from wgates_plugin.strategies.criteria.table import CRITERIA, Criterion

__all__ = [
    "CRITERIA",
    "Criterion",
    "HessianImportance",
    "TaylorImportance",
    "criterion_scores",
    "importance_scores",
    "plan_by_criterion",
]
