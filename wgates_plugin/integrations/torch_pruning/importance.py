"""W-Gates' soft scores as a torch-pruning importance, and torch-pruning's history in our terms."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch_pruning as tp
from torch import Tensor, nn

from wgates_plugin.channels import ChannelSpace, Side
from wgates_plugin.errors import PlanError
from wgates_plugin.strategies.gdp.gates import PolarisedGates
from wgates_plugin.strategies.wgates import WGates

History = Sequence[Sequence[Any]]
"""torch-pruning's own form: `[module name, is output side, indices]` per pruned group."""


def units_left(space: ChannelSpace, history: History) -> np.ndarray:
    """Which units of `space` are left after a pruning history: bool (total_units,).

    Raises:
        PlanError: the history is not of this network, or removes what no group owns.
    """
    left = np.ones(space.total_units + 1, dtype=bool)  # last: channels no group owns
    for entry in history:
        try:
            name, is_out, indices = entry
            side: Side = "out" if is_out else "in"
            index = space.unit_index(str(name), side)
            chosen = [int(value) for value in indices]
        except (TypeError, ValueError):
            raise PlanError(
                f"pruning history: {entry!r} is no (module name, is output side, indices)"
            ) from None
        if index is None:
            raise PlanError(
                f"pruning history: prunes `{name}`, which is in no group of this network; it is "
                "for another network, or for other `ignored_layers`"
            )
        present = index[left[index]]
        if chosen and not (min(chosen) >= 0 and max(chosen) < len(present)):
            raise PlanError(
                f"pruning history: removes channel {max(chosen)} of `{name}`, which has "
                f"{len(present)} at that point; it is for another network"
            )
        gone = present[chosen]
        if (gone == space.total_units).any():
            raise PlanError(f"pruning history: removes channels of `{name}` that no group owns")
        left[gone] = False
    return left[:-1]


class WGatesImportance(tp.importance.Importance):
    """Learned soft scores for any torch-pruning pruner: local, global or isomorphic.

    A score lies between 0 and 1, and a gate is open above 1/2, in every group alike: scores can be
    ranked over all layers, for as many channels as the gates learned to leave open. Learn with the
    ratio and the scope (`global_pruning`, `isomorphic`) of the pruner that is to rank by them, or
    with a target. They are read off once, when this is made. Groups the gates do not know
    (`ignored_layers` of theirs, norms over all channels) get None, which torch-pruning skips.

    Args:
        gates: fitted gates, or a `WGatesPruner` whose gates learned.

    Raises:
        PlanError: the gates never learned, or were used up; or, when called, the network is another
            one or was changed by other means than torch-pruning.

    Example:
        >>> from wgates_plugin.integrations.torch_pruning import WGatesPruner
        >>> net = nn.Sequential(nn.Conv2d(1, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 2))
        >>> x, y = torch.randn(4, 1, 8, 8), torch.tensor([0, 1, 0, 1])
        >>> learner = WGatesPruner(net, x, pruning_ratio=0.5)
        >>> nn.functional.cross_entropy(net(x), y).backward()
        >>> _ = learner.regularize(net)
        >>> importance = WGatesImportance(learner)
        >>> _ = learner.detach()
        >>> pruner = tp.pruner.BasePruner(net, (x,), importance, pruning_ratio=0.25,
        ...     ignored_layers=[net[3]], in_channel_groups={}, out_channel_groups={})
        >>> pruner.step()
        >>> net[0].out_channels
        6
    """

    def __init__(self, gates: Any) -> None:
        if getattr(gates, "current_step", 0) >= getattr(gates, "iterative_steps", 1):
            raise PlanError(
                "WGatesImportance: this pruner has removed its channels; make it before `step()`"
            )
        gates = getattr(gates, "gates", gates)
        if not isinstance(gates, WGates):
            raise PlanError(
                f"WGatesImportance: got {type(gates).__name__}; give fitted `WGates`, or a "
                "`WGatesPruner` before its `step()`"
            )
        if gates.step == 0:
            raise PlanError(
                "WGatesImportance: the gates never learned; train with `regularize` first"
            )
        self._set(gates.space, gates.unit_scores(), 0)

    @classmethod
    def _of(cls, space: ChannelSpace, scores: Tensor, skip: int) -> WGatesImportance:
        """Of any scores; the first `skip` entries of the history are in `space` already."""
        made = cls.__new__(cls)
        made._set(space, scores, skip)
        return made

    def _set(self, space: ChannelSpace, scores: Tensor, skip: int) -> None:
        self.space, self._skip = space, skip
        self.scores = scores.detach().cpu().double() + 0.5
        self._seen = -1
        self._left = np.ones(space.total_units, dtype=bool)

    def __call__(self, group: Any) -> Tensor | None:
        graph = group._DG
        if graph is None:
            raise PlanError(f"{type(self).__name__}: the group belongs to no dependency graph")
        history = graph.pruning_history()[self._skip :]
        if len(history) != self._seen:
            self._left, self._seen = units_left(self.space, history), len(history)
        # torch-pruning asks for parts of a group too; its root indices are channel numbers.
        place = {root: position for position, root in enumerate(group[0].idxs)}
        channels = len(place)
        total, count = torch.zeros(channels, dtype=torch.float64), torch.zeros(channels)
        for item in group:
            units = self._units_of(item, graph)
            roots = item.root_idxs
            if units is None or any(root is None for root in roots):
                continue
            owned = units < self.space.total_units
            if not owned.all():
                return None  # part of the group cannot be removed exactly
            where = torch.tensor([place[root] for root in roots])
            total.scatter_add_(0, where, self.scores[torch.from_numpy(units)])
            count.scatter_add_(0, where, torch.ones(len(roots)))
        if not bool((count > 0).all()):
            return None
        return (total / count).float()

    def _units_of(self, item: Any, graph: Any) -> np.ndarray | None:
        """The unit of each of the item's channels; None for what is not in our records."""
        module = item.dep.target.module
        name = graph._module2name.get(module) if isinstance(module, nn.Module) else None
        if name is None:
            return None
        side: Side = "out" if graph.is_out_channel_pruning_fn(item.dep.handler) else "in"
        index = self.space.unit_index(name, side)
        if index is None:
            return None
        present = index[np.append(self._left, True)[index]]
        size = graph.get_out_channels(module) if side == "out" else graph.get_in_channels(module)
        if size != len(present):
            raise PlanError(
                f"{type(self).__name__}: `{name}` has {size} channels, its scores know {len(present)}; "
                "the network changed since the gates learned, or is another one"
            )
        return np.asarray(present[np.asarray(item.idxs, dtype=np.int64)])


class GDPImportance(WGatesImportance):
    """Polarised gates for any torch-pruning pruner: local, global or isomorphic.

    A score is a gate's value, from 0 (closed) to 1, in every group alike. Absorb the gates first
    (`gates.absorb()`): the network then computes by itself what it computed with them, and cutting
    channels of score 0 changes nothing.

    Args:
        gates: `PolarisedGates` that learned.

    Raises:
        PlanError: they never learned, or were not absorbed; and as `WGatesImportance` when called.

    Example:
        >>> from wgates_plugin import trace
        >>> from wgates_plugin.efficiency import Budget, Limit, MacsModel
        >>> net = nn.Sequential(nn.Conv2d(1, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 2))
        >>> x, y = torch.randn(4, 1, 8, 8), torch.tensor([0, 1, 0, 1])
        >>> space = trace(net, x)
        >>> half = MacsModel(space)(torch.tensor([4]))
        >>> gates = PolarisedGates(net, space, Budget.of(Limit(MacsModel(space), float(half))), steps=1)
        >>> nn.functional.cross_entropy(gates.attach().network(x), y).backward()
        >>> _ = gates.regularize()
        >>> net = gates.absorb()
        >>> pruner = tp.pruner.BasePruner(net, (x,), GDPImportance(gates), pruning_ratio=0.5,
        ...     ignored_layers=[net[3]], in_channel_groups={}, out_channel_groups={})
        >>> before = net(x)
        >>> pruner.step()
        >>> net[0].out_channels, bool((net(x) - before).abs().max() < 1e-5)
        (4, True)
    """

    def __init__(self, gates: PolarisedGates) -> None:
        if not isinstance(gates, PolarisedGates):
            raise PlanError(
                f"GDPImportance: got {type(gates).__name__}; give `PolarisedGates` that learned"
            )
        if gates.step == 0:
            raise PlanError("GDPImportance: the gates never learned; train with `regularize` first")
        if not gates.absorbed:
            raise PlanError(
                "GDPImportance: the gates are not absorbed, so that the network does not compute "
                "what they learned; call `gates.absorb()` when their phase is over, then make this"
            )
        self._set(gates.space, gates.unit_scores() - 0.5, 0)
