"""Repaired torch-pruning 1.6.1 importances, and the gradients they need."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch_pruning.dependency.dependency import Dependency
from torch_pruning.dependency.group import Group
from torch_pruning.pruner import function
from torch_pruning.pruner.importance import (
    BNScaleImportance as ShippedBNScale,
)
from torch_pruning.pruner.importance import (
    FPGMImportance as ShippedFPGM,
)
from torch_pruning.pruner.importance import (
    GroupHessianImportance,
    GroupMagnitudeImportance,
    GroupTaylorImportance,
)

from wgates_plugin import modules as kinds
from wgates_plugin.calling import call_with, device_of, left_as_found, map_tensors
from wgates_plugin.errors import TrainingError
from wgates_plugin.training.evaluation import (
    IGNORED,
    all_ignored,
    images_in,
    images_of,
    logits_of,
    one_number,
    unpack,
)

LossFunction = Callable[[Tensor, Any], Tensor]


def mean_one(scores: Tensor) -> Tensor:
    """Scores of one group (n,), none of them negative, over their mean: torch-pruning's "mean".

    Where all are 0 they stay 0, which torch-pruning turns into no numbers: channels that the loss does
    not feel are the first to go.
    """
    return scores / scores.mean().clamp_min(torch.finfo(scores.dtype).tiny)


class _MeanOne(GroupMagnitudeImportance):
    """Whose normaliser "mean" is `mean_one`."""

    def _normalize(self, group_importance: Tensor, normalizer: Any) -> Tensor:
        if normalizer == "mean":
            return mean_one(group_importance)
        found: Tensor = super()._normalize(group_importance, normalizer)
        return found


class BNScaleImportance(_MeanOne, ShippedBNScale):
    """Mean size of a channel's BatchNorm scales.

    As shipped, channels are counted by the first BatchNorm's scales, of which there are more where it
    comes behind a flatten or a concatenation of the same channels.
    """

    def _reduce(self, group_imp: list[Tensor], group_idxs: list[list[int]]) -> Tensor:
        known = [index for index, mine in enumerate(group_idxs) if None not in mine]
        roots = torch.tensor([root for index in known for root in group_idxs[index]])
        sizes = torch.cat([group_imp[index] for index in known])
        total = sizes.new_zeros(int(roots.max()) + 1)
        roots = roots.to(sizes.device)
        count = total.index_add(0, roots, torch.ones_like(sizes))
        return total.index_add(0, roots, sizes) / count.clamp_min(1)


class FPGMImportance(_MeanOne, ShippedFPGM):
    """Distance of a filter from all others of its layer; those near the geometric median go first.

    As shipped, weights are squared before distances are taken, so that a filter and its negative
    count as one, and grouped convolutions raise an error.
    """

    @torch.no_grad()
    def __call__(self, group: Any, **_: Any) -> Tensor | None:
        distances, roots = [], []
        for item in group:
            module = item.dep.target.module
            if not isinstance(module, kinds.WEIGHTED) or kinds.is_depthwise(module):
                continue
            out_dim, in_dim = kinds.channel_dims(module)
            is_out = item.dep.handler.__name__ == "prune_out_channels"
            rows = module.weight.transpose(0, out_dim if is_out else in_dim).flatten(1)
            if not is_out:
                rows = rows.repeat(kinds.in_channels_of(module) // len(rows), 1)
            rows = rows[list(item.idxs)]
            distances.append(torch.cdist(rows[None], rows[None])[0].sum(0))
            roots.append(item.root_idxs)
        if not distances:
            return None
        found: Tensor = self._normalize(self._reduce(distances, roots), self.normalizer)
        return found


class TaylorImportance(_MeanOne, GroupTaylorImportance):
    """First-order Taylor importance, BatchNorm included.

    As shipped, the branch for BatchNorm asks for GroupNorm's pruning function, so that scales and
    their gradients never count.
    """

    def __call__(self, group: Any) -> Tensor | None:
        seen = Group()
        for item in group:
            dep = item.dep
            if dep.handler == function.prune_batchnorm_out_channels:
                dep = Dependency(
                    dep.trigger, function.prune_groupnorm_out_channels, dep.source, dep.target
                )
            # Copied, for torch-pruning sorts these in place without their root indices.
            seen.add_dep(dep, list(item.idxs))
            seen[len(seen.items) - 1].root_idxs = item.root_idxs
        found: Tensor | None = super().__call__(seen)
        return found


class HessianImportance(_MeanOne, GroupHessianImportance):
    """Diagonal Fisher importance over all samples.

    As shipped, squared gradients are looked up by name but kept by parameter, so that each sample
    overwrites the one before.
    """

    def accumulate_grad(self, model: nn.Module) -> None:
        for parameter in model.parameters():
            if parameter.grad is not None:
                squared = parameter.grad.detach().square()
                if parameter in self._accu_grad:
                    self._accu_grad[parameter] += squared
                    self._counter[parameter] += 1
                else:
                    self._accu_grad[parameter] = squared
                    self._counter[parameter] = 1


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
