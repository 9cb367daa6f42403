"""Gates on a running network: each closed channel reads as zero wherever it is read.

A gate acts on its *consumers*, by multiplying the slice of their weight that reads the channel. That
computes the same function, and the same gradient with respect to the gate, as multiplying the feature
map, at the cost of weights instead of feature maps. Acting on the producer would be wrong: a
BatchNorm behind it turns the zero into its shift again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from wgates_plugin import modules as kinds
from wgates_plugin.channels import ChannelSpace
from wgates_plugin.errors import PlanError

GateSource = Callable[[], Tensor]
"""Returns all gates as one vector (total_units,); called once per forward pass of the network."""


class Gating:
    """Attaches gates to a network through hooks; `detach` leaves no trace.

    Parameter names, the state dict and the optimizer's view of the network stay as they are: the
    gated weight shadows the parameter only while its module runs. A deep copy of the network, made
    while gates are attached, is the plain network: its hooks are `inert`.

    Attributes:
        inert: whether this is what a deep copy's hooks belong to, which do nothing.

    Example:
        >>> from wgates_plugin import trace
        >>> net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3))
        >>> space = trace(net, torch.zeros(1, 3, 8, 8))
        >>> with Gating(net, space, lambda: torch.ones(space.total_units)):
        ...     net(torch.zeros(1, 3, 8, 8)).shape
        torch.Size([1, 4, 4, 4])
    """

    inert = False
    _extended: Tensor | None = None

    def __init__(self, network: nn.Module, space: ChannelSpace, source: GateSource) -> None:
        self.network = network
        self.space = space
        self.source = source
        self._handles: list[Any] = []
        self._indices: dict[nn.Module, Tensor] = {}

    @property
    def attached(self) -> bool:
        return bool(self._handles)

    def attach(self) -> Gating:
        """Hook the network's consumers. A second call does nothing."""
        self._refuse_inert()
        if self.attached:
            return self
        found = dict(self.network.named_modules())
        self._handles.append(self.network.register_forward_pre_hook(self._open))
        self._handles.append(self.network.register_forward_hook(self._close, always_call=True))
        for name, side in self.space.slots_of:
            module = found.get(name)
            if module is None:
                self.detach()
                raise PlanError(f"module `{name}`: not in the network; trace this network first")
            if side == "out":
                continue
            index = self.space.unit_index(name, "in")
            assert index is not None
            if isinstance(module, kinds.Scatter):
                self._indices[module] = torch.from_numpy(index).to(module.index.device)
                self._handles.append(module.register_forward_pre_hook(self._gate_input))
                continue
            weight = module.weight
            assert isinstance(weight, Tensor)
            self._indices[module] = torch.from_numpy(index).to(weight.device)
            self._handles.append(module.register_forward_pre_hook(self._shadow))
            self._handles.append(module.register_forward_hook(self._unshadow, always_call=True))
        return self

    def detach(self) -> nn.Module:
        """Remove every hook and return the plain network."""
        self._refuse_inert()
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._unshadow_all()
        self._indices.clear()
        self._extended = None
        return self.network

    @contextmanager
    def answering(self, gates: Tensor) -> Iterator[nn.Module]:
        """Within, the network runs under `gates` (total_units,), be its own attached or not."""
        self._refuse_inert()
        source, attached = self.source, self.attached
        self.source = lambda: gates
        try:
            yield self.attach().network
        finally:
            self.source = source
            if not attached:
                self.detach()

    def __enter__(self) -> Gating:
        return self.attach()

    def __exit__(self, *_: object) -> None:
        self.detach()

    def __deepcopy__(self, memo: dict[int, Any]) -> Gating:
        twin = type(self).__new__(type(self))  # without a source, nor anything else to be copied
        twin.inert, twin._handles, twin._indices = True, [], {}
        return twin

    def _refuse_inert(self) -> None:
        if self.inert:
            raise PlanError(
                "gates: a deep copy of them, which acts on nothing; copy the network alone, which is "
                "plain then, and make new gates for it"
            )

    def _unshadow_all(self) -> None:
        """Ctrl-C inside a layer skips its hooks, and would leave the gated weight in place."""
        for module in self._indices:
            self._unshadow(module)

    def _open(self, *_: Any) -> None:
        if self.inert:
            return
        self._unshadow_all()
        gates = self.source()
        self._extended = torch.cat([gates, gates.new_ones(1)])

    def _close(self, *_: Any) -> None:
        self._extended = None

    def _shadow(self, module: nn.Module, _: Any) -> None:
        if self.inert:
            return
        parameter = module._parameters["weight"]
        assert parameter is not None
        module.__dict__["weight"] = gated_weight(module, parameter, self._gates_of(module))

    def _gates_of(self, module: nn.Module) -> Tensor:
        """Gates (C_in,) of the channels that `module` reads."""
        if self._extended is None:
            raise PlanError(
                "gates: a gated layer ran outside its network's forward; call the whole network, "
                "without activation checkpointing"
            )
        return self._extended[self._indices[module]]

    def _gate_input(self, module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """A reader without weights: its feature map (N, C, ...) takes the gates (C,) itself."""
        if self.inert:
            return inputs
        gates = self._gates_of(module).to(inputs[0].dtype)
        return (inputs[0] * gates.view(-1, *[1] * (inputs[0].dim() - 2)), *inputs[1:])

    @staticmethod
    def _unshadow(module: nn.Module, *_: Any) -> None:
        module.__dict__.pop("weight", None)


def gated_weight(module: nn.Module, weight: Tensor, gates: Tensor) -> Tensor:
    """The weight times the gates (C_in,) of the channels it reads; same shape as the weight."""
    _, in_dim = kinds.channel_dims(module)
    groups = int(getattr(module, "groups", 1))
    gates = gates.to(weight.dtype)
    trailing = [1] * (weight.dim() - 2)
    if groups == 1:
        shape = [1, -1] if in_dim == 1 else [-1, 1]
        return weight * gates.view(*shape, *trailing)
    # (C_out, C_in/groups, ...) -> (groups, C_out/groups, C_in/groups, ...): own gates per conv group
    split = weight.view(groups, weight.shape[0] // groups, *weight.shape[1:])
    return (split * gates.view(groups, 1, -1, *trailing)).view_as(weight)
