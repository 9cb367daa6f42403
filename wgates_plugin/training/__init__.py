"""Training on Lightning Fabric, evaluation, batch-norm recalibration and distillation."""

from wgates_plugin.training.distillation import distillation_loss
from wgates_plugin.training.engine import StepContext, Trainer
from wgates_plugin.training.evaluation import Evaluation, evaluate
from wgates_plugin.training.launch import default_fabric
from wgates_plugin.training.recalibration import recalibrate_batchnorm
from wgates_plugin.training.settings import TrainingSettings, learning_rate_at

__all__ = [
    "Evaluation",
    "StepContext",
    "Trainer",
    "TrainingSettings",
    "default_fabric",
    "distillation_loss",
    "evaluate",
    "learning_rate_at",
    "recalibrate_batchnorm",
]
