"""Random plans, snapshots and slow twins that several test files share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from wgates_plugin import ChannelSpace, PruningPlan
from wgates_plugin import modules as kinds
from wgates_plugin.efficiency import MacsModel
from wgates_plugin.errors import ConfigError


class MeasuredMacs:
    """MACs, as if a latency model had been measured on multiples of `grid` alone."""

    name, unit = "latency", "ms"

    def __init__(self, space: ChannelSpace, *, grid: int) -> None:
        self.fingerprint, self.grid = space.fingerprint, grid
        self._macs = MacsModel(space)

    def __call__(self, widths: Tensor) -> Tensor:
        return self._macs(widths)


def options_named(error: ConfigError) -> list[str]:
    """The options that an error's problems begin with, sorted."""
    return sorted(problem.split(":")[0].split(" ")[0] for problem in error.problems)


def random_plan(space: ChannelSpace, seed: int) -> PruningPlan:
    """A random share of every group, at least one unit each."""
    generator = torch.Generator().manual_seed(seed)
    shares = 0.15 + 0.8 * torch.rand(len(space.groups), generator=generator)
    scores = torch.rand(space.total_units, generator=generator)
    kept = []
    for index, group in enumerate(space.groups):
        count = max(1, round(float(shares[index]) * group.units))
        order = scores[space.unit_slice(index)].argsort(descending=True)
        kept.append(tuple(sorted(order[:count].tolist())))
    return PruningPlan(space, tuple(kept))


def snapshot(network: nn.Module) -> dict[str, Any]:
    """Everything about a network that must be found again: modes, flags, hooks, names, values."""
    found: dict[str, Any] = {
        f"{name}.{key}": tuple(value) if hasattr(value, "keys") else value
        for name, module in network.named_modules()
        for key, value in vars(module).items()
    }
    for name, parameter in network.named_parameters():
        found[f"{name}: grad"] = (parameter.requires_grad, parameter.grad, id(parameter))
    for name, value in network.state_dict().items():
        found[f"{name}: value"] = value.clone().flatten().tolist()
    return found


def same_tensors(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[n], second[n]) for n in first)


class ActivationGates:
    """The slow twin of `Gating`: multiplies the feature map in front of every reader."""

    def __init__(self, network: nn.Module, space: ChannelSpace, source: Callable[[], Tensor]):
        self.handles = []
        found = dict(network.named_modules())
        for name, side in space.slots_of:
            if side == "out":
                continue
            index = torch.from_numpy(space.unit_index(name, "in"))

            def multiply(module: nn.Module, inputs: Any, index: Tensor = index) -> Any:
                gates = torch.cat([source(), torch.ones(1)])[index]
                if not isinstance(module, nn.Linear):
                    gates = gates.view(-1, *[1] * (inputs[0].dim() - 2))
                return (inputs[0] * gates, *inputs[1:])

            self.handles.append(found[name].register_forward_pre_hook(multiply))

    def __enter__(self) -> ActivationGates:
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self.handles:
            handle.remove()


def recount(network: nn.Module, inputs: Tensor) -> tuple[int, int]:
    """(MACs per image, parameters) counted by hooks on shapes alone, from the definitions."""
    macs = 0

    def count(module: nn.Module, args: Any, output: Tensor) -> None:
        nonlocal macs
        weight = module.weight
        batch = output.shape[0]
        if isinstance(
            module, kinds.TRANSPOSED
        ):  # each input value meets the kernel once per output
            macs += args[0].numel() // batch * weight.shape[1] * weight[0, 0].numel()
        else:  # each output value needs one pass over the weights of its channel
            macs += output.numel() // batch * weight[0].numel()

    weighted = [m for m in network.modules() if isinstance(m, kinds.WEIGHTED)]
    handles = [module.register_forward_hook(count) for module in weighted]
    with torch.no_grad():
        network.eval()(inputs)
    for handle in handles:
        handle.remove()
    return macs, sum(parameter.numel() for parameter in network.parameters())
