"""Importances of torch-pruning 1.6.1, repaired."""

from __future__ import annotations

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
