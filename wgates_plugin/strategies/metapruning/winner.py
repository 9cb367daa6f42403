"""The winner's network: initialised anew at its widths, or of the trained network's best channels."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from wgates_plugin.calling import copied
from wgates_plugin.channels import ChannelSpace
from wgates_plugin.strategies.criteria import criterion_scores
from wgates_plugin.strategies.metapruning.pruning_net import initialised
from wgates_plugin.surgery import resize, resize_map


def from_scratch(
    network: nn.Module, space: ChannelSpace, widths: Sequence[int], seed: int
) -> nn.Module:
    """A copy of `network` whose leading channels are a freshly initialised network of `widths`.

    Initial weights depend on a layer's fan-in. So the small network is initialised, not a cut of the
    full one, and lies in the leading channels of a freshly initialised full one (ours): should
    measurements settle on other widths by a few channels, these are there too.
    """
    where = next(network.parameters()).device
    full = initialised(copied(network).cpu(), seed)
    change = resize_map(full, space, widths)
    small = initialised(resize(full, space, widths), seed)
    held = full.state_dict()
    with torch.no_grad():
        for name, value in small.state_dict().items():
            slices = {
                dim: torch.from_numpy(indices)
                for dim, indices in change.tensors.get(name, {}).items()
            }
            _put(held[name], slices, value)
    return full.to(where)


def _put(target: Tensor, slices: dict[int, Tensor], value: Tensor) -> None:
    """Write `value` into `target` at kept indices of its first two dimensions."""
    if not slices:
        target.copy_(value)
    elif target.dim() == 1:
        target[slices[0]] = value
    else:
        rows, columns = (slices.get(dim, torch.arange(target.shape[dim])) for dim in (0, 1))
        target[rows[:, None], columns[None, :]] = value


def leading_scores(space: ChannelSpace) -> Tensor:
    """Merits (total_units,) that prefer the leading channels: 1 for the first, down to 1/n."""
    return torch.cat([1.0 - torch.arange(group.units) / group.units for group in space.groups])


def inherited_scores(network: nn.Module, space: ChannelSpace) -> Tensor:
    """Merits (total_units,) by the L1 norm of the trained filters, as ranks within each group.

    Ranks (ours) leave the search's widths alone: norms of different layers would not compare.
    """
    norms = criterion_scores(network, space, "l1").double()
    scores = torch.empty(space.total_units)
    for index, group in enumerate(space.groups):
        mine = space.unit_slice(index)
        order = norms[mine].argsort(descending=True, stable=True)
        ranks = torch.empty(group.units)
        ranks[order] = 1.0 - torch.arange(group.units) / group.units
        scores[mine] = ranks
    return scores
