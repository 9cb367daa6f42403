"""The NNI 3.0 door: a pruner for NNI's config lists and evaluators, removal of NNI's masks, experiments.

Importing this package needs `nni==3.0`; the rest of `wgates_plugin` does without.
"""

from wgates_plugin.integrations.nni.version import require_nni

require_nni()

from wgates_plugin.integrations.nni.config import make_config  # noqa: E402
from wgates_plugin.integrations.nni.evaluators import torch_evaluator  # noqa: E402
from wgates_plugin.integrations.nni.experiment import PRUNERS, build_pruner  # noqa: E402
from wgates_plugin.integrations.nni.model_speedup import ModelSpeedup, speedup  # noqa: E402
from wgates_plugin.integrations.nni.pruner import WGatesPruner  # noqa: E402
from wgates_plugin.integrations.nni.removal import remove  # noqa: E402
from wgates_plugin.integrations.nni.strategies import StrategyPruner  # noqa: E402

__all__ = [
    "PRUNERS",
    "ModelSpeedup",
    "StrategyPruner",
    "WGatesPruner",
    "build_pruner",
    "make_config",
    "remove",
    "speedup",
    "torch_evaluator",
]
