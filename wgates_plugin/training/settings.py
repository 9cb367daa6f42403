"""How a network is trained: the settings, and the learning rate as a pure function of the step."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import nn
from torch.optim import Optimizer

from wgates_plugin.errors import ConfigError, TrainingError

OPTIMIZERS = ("sgd", "adamw")

# Left out on purpose: "16-mixed" scales the loss, and gates, which live outside the network and
# have an optimizer of their own, would see the scaled gradients; "*-true" would convert the
# user's weights in place.
PRECISIONS = ("32-true", "bf16-mixed")


@dataclass(frozen=True)
class TrainingSettings:
    """Settings of one training schedule.

    `learning_rate` is the peak; `warmup_epochs` may be a fraction. `weight_decay` is not applied
    to biases and norm parameters. `label_smoothing` belongs to the default loss and is ignored
    when a loss is passed to the trainer. `gradient_clip` is the largest L2 norm of all gradients.
    `accelerator` and `precision` are Lightning Fabric's words; "auto" takes a GPU if there is one.

    Raises:
        ConfigError: values out of range, all listed at once.
    """

    epochs: int = 1
    learning_rate: float = 0.05
    momentum: float = 0.9
    weight_decay: float = 5e-4
    optimizer: str = "sgd"
    warmup_epochs: float = 0.0
    label_smoothing: float = 0.0
    gradient_clip: float | None = None
    precision: str = "32-true"
    channels_last: bool = False
    accelerator: str = "auto"
    distillation_weight: float = 0.0
    distillation_temperature: float = 2.0

    def __post_init__(self) -> None:
        whole = isinstance(self.epochs, int) and not isinstance(self.epochs, bool)
        checks = {
            f"epochs is {self.epochs!r}, needs a whole number of 0 or more": (
                whole and self.epochs >= 0
            ),
            f"learning_rate is {self.learning_rate!r}, needs a positive finite number": (
                _finite(self.learning_rate) and self.learning_rate > 0
            ),
            f"momentum is {self.momentum!r}, needs 0 <= momentum < 1": (
                _finite(self.momentum) and 0 <= self.momentum < 1
            ),
            f"weight_decay is {self.weight_decay!r}, needs 0 or more": (
                _finite(self.weight_decay) and self.weight_decay >= 0
            ),
            f"optimizer is {self.optimizer!r}, choose from {', '.join(OPTIMIZERS)}": (
                self.optimizer in OPTIMIZERS
            ),
            f"warmup_epochs is {self.warmup_epochs!r}, needs 0 or more": (
                _finite(self.warmup_epochs) and self.warmup_epochs >= 0
            ),
            f"label_smoothing is {self.label_smoothing!r}, needs 0 <= label_smoothing < 1": (
                _finite(self.label_smoothing) and 0 <= self.label_smoothing < 1
            ),
            f"gradient_clip is {self.gradient_clip!r}, needs a positive number or None": (
                self.gradient_clip is None
                or (_finite(self.gradient_clip) and self.gradient_clip > 0)
            ),
            f"precision is {self.precision!r}, choose from {', '.join(PRECISIONS)}": (
                self.precision in PRECISIONS
            ),
            f"distillation_weight is {self.distillation_weight!r}, needs 0 to 1": (
                _finite(self.distillation_weight) and 0 <= self.distillation_weight <= 1
            ),
            f"distillation_temperature is {self.distillation_temperature!r}, needs more than 0": (
                _finite(self.distillation_temperature) and self.distillation_temperature > 0
            ),
        }
        problems = [problem for problem, passed in checks.items() if not passed]
        if problems:
            raise ConfigError("training settings", problems)


def _finite(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def learning_rate_at(
    step: int, *, steps_per_epoch: int, total_epochs: int, settings: TrainingSettings
) -> float:
    """The learning rate of global step `step` (from 0): linear warm-up, then half a cosine.

    lr(t) = peak * (1 + cos(pi * (t - w) / (T - w))) / 2, with t and T counted in steps and w the
    warm-up (Loshchilov and Hutter 2017, "SGDR", eq. 5, one cycle). It depends on nothing but its
    arguments, so a later phase continues the schedule with a new optimizer.

    >>> settings = TrainingSettings(epochs=2, learning_rate=0.1)
    >>> [round(learning_rate_at(s, steps_per_epoch=2, total_epochs=2, settings=settings), 4)
    ...  for s in range(5)]
    [0.1, 0.0854, 0.05, 0.0146, 0.0]
    """
    total = total_epochs * steps_per_epoch
    warmup = min(settings.warmup_epochs * steps_per_epoch, float(total))
    if step < warmup:
        return settings.learning_rate * min(1.0, (step + 1) / warmup)
    progress = min(1.0, (step - warmup) / max(total - warmup, 1e-9))
    return settings.learning_rate * 0.5 * (1.0 + math.cos(math.pi * progress))


def build_optimizer(network: nn.Module, settings: TrainingSettings) -> Optimizer:
    """The optimizer over the trainable parameters; vectors and scalars get no weight decay.

    Biases, norm scales and shifts and PReLU slopes are exactly the parameters of one dimension.

    Raises:
        TrainingError: nothing in the network requires a gradient.
    """
    trainable = [parameter for parameter in network.parameters() if parameter.requires_grad]
    if not trainable:
        raise TrainingError(
            f"network `{type(network).__name__}`: no parameter requires a gradient, so there is "
            "nothing to train; set requires_grad on the parameters to train"
        )
    groups = [
        {"params": part, "weight_decay": decay}
        for part, decay in (
            ([p for p in trainable if p.ndim > 1], settings.weight_decay),
            ([p for p in trainable if p.ndim <= 1], 0.0),
        )
        if part
    ]
    if settings.optimizer == "adamw":
        return torch.optim.AdamW(groups, lr=settings.learning_rate)
    nesterov = settings.momentum > 0
    return torch.optim.SGD(
        groups, lr=settings.learning_rate, momentum=settings.momentum, nesterov=nesterov
    )


def all_finite(tensors: Iterable[torch.Tensor]) -> bool:
    """True when no tensor holds an infinity or not-a-number; one device synchronisation."""
    found = [tensor for tensor in tensors if tensor.numel()]
    return not found or bool(torch.isfinite(torch.stack(torch._foreach_norm(found)).sum()))
