"""A training loop as NNI's users write it, and its evaluator."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import nni
import torch
from networks import CLASSES, example
from nni.compression import TorchEvaluator
from torch import Tensor, nn

Batch = tuple[Tensor, Tensor]


def batch(seed: int, *, size: int = 8) -> Batch:
    labels = torch.randint(CLASSES, (8,), generator=torch.Generator().manual_seed(seed))
    return example(8, size, seed), labels


def training_step(given: Batch, model: nn.Module) -> Tensor:
    images, labels = given
    scores = model(images)
    scores = scores.flatten(2).mean(2) if scores.dim() > 2 else scores
    return nn.functional.cross_entropy(scores, labels % scores.shape[1])


def training_func(size: int = 8) -> Callable[..., None]:
    def train(
        model: nn.Module,
        optimizers: torch.optim.Optimizer,
        training_step: Callable[..., Any],
        lr_schedulers: Any = None,
        max_steps: int | None = None,
        max_epochs: int | None = None,
    ) -> None:
        model.train()
        for seed in range(max_steps or 4 * (max_epochs or 1)):
            optimizers.zero_grad()
            training_step(batch(seed, size=size), model).backward()
            optimizers.step()

    return train


def evaluator(model: nn.Module, *, size: int = 8, **options: Any) -> TorchEvaluator:
    optimizer = nni.trace(torch.optim.SGD)(model.parameters(), lr=0.02)
    return TorchEvaluator(training_func(size), optimizer, training_step, **options)
