"""The gradients of the loss that some criteria need."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch_pruning.pruner.importance import GroupHessianImportance

from wgates_plugin.calling import call_with, device_of, left_as_found, map_tensors
from wgates_plugin.errors import TrainingError
from wgates_plugin.strategies.criteria.repaired import HessianImportance
from wgates_plugin.training.engine import LossFunction
from wgates_plugin.training.evaluation import (
    IGNORED,
    all_ignored,
    images_in,
    images_of,
    logits_of,
    one_number,
    unpack,
)


@contextmanager
def gradients_of(
    network: nn.Module, data: Iterable[Any], loss: LossFunction, importance: Any
) -> Iterator[None]:
    """Gradients of the loss over `data` in eval mode, while within; the network's own come back.

    Taylor gets the mean size of its batches' gradients, so that `|w * gradient|` is the mean of what
    each batch says: with their signs they all but cancel in a trained network. Only a `multivariable`
    one, which sums products within a filter, gets the gradient of the mean over batches. Hessian takes
    the mean square of each sample's, which is run by itself; a sample without a loss, for all of its
    labels are ignored, is left out.

    Raises:
        TrainingError: no batch, no sample with a label, or the loss is not finite.
    """
    parameters = list(network.parameters())
    own = [parameter.grad for parameter in parameters]
    with left_as_found(network):
        try:
            network.eval().requires_grad_(True)
            for parameter in parameters:
                parameter.grad = None
            signed = getattr(importance, "multivariable", False)
            sums = [torch.zeros_like(parameter) for parameter in parameters]
            batches = 0
            for batch in data:
                _accumulate(network, batch, loss, importance, batches)
                batches += 1
                for parameter, total in zip(parameters, sums, strict=True):
                    # A layer the loss does not reach has no say, rather than no gradient.
                    if parameter.grad is not None:
                        total += parameter.grad if signed else parameter.grad.abs()
                    parameter.grad = None
            if not batches:
                raise TrainingError("criterion: `data` gave no batch; give (inputs, targets) pairs")
            if isinstance(importance, HessianImportance) and not importance._accu_grad:
                raise TrainingError(
                    f"criterion: the labels of all samples are ones to ignore ({IGNORED}); check the "
                    "data set"
                )
            for parameter, total in zip(parameters, sums, strict=True):
                parameter.grad = total / batches
            yield
        finally:
            for parameter, grad in zip(parameters, own, strict=True):
                parameter.grad = grad


def _accumulate(
    network: nn.Module, batch: Any, loss: LossFunction, importance: Any, number: int
) -> None:
    device = device_of(network)
    inputs, targets = unpack(map_tensors(lambda tensor: tensor.to(device), batch))
    parts = [(inputs, targets)]
    by_sample = isinstance(importance, GroupHessianImportance)
    if by_sample:
        count = images_in(inputs)
        rows = [slice(row, row + 1) for row in range(count)]
        parts = [(images_of(inputs, row, count), images_of(targets, row, count)) for row in rows]
    for sample, (images, labels) in enumerate(parts):
        network.zero_grad()
        with torch.enable_grad():
            logits = logits_of(call_with(network, images), network)
            if by_sample and (not logits.ndim or len(logits) != 1):
                # A network that squeezes loses a batch of one.
                doubled = map_tensors(lambda t: torch.cat([t, t]) if t.ndim else t, images)
                logits = logits_of(call_with(network, doubled), network)[:1]
            value = one_number(loss(logits, labels), "criterion")
        if by_sample and all_ignored(labels) and (value == 0 or value.isnan()):
            continue
        if not torch.isfinite(value):
            where = f"sample {sample} of batch {number}" if by_sample else f"batch {number}"
            raise TrainingError(
                f"criterion: the loss is {float(value.detach())} on {where} of `data` (both counted "
                "from 0); check its inputs, its labels and your loss"
            )
        value.backward()
        if by_sample:
            importance.accumulate_grad(network)
