"""Branches that no longer read anything, left as the constant that they add.

When every kernel of a convolution is zero, it gives out its bias, whatever comes in; so do the layers
right behind it, up to the place where the branch joins others. There a constant per channel, kept as
the bias of a layer, takes the branch's place, and what only fed the branch becomes `Hollow`
(Guo et al., "GDP", ICCV 2021, remove whole blocks so; how it is found and carried out is ours).

Nothing is known here of architectures. The layers behind are followed by the very tensors that go
from one module to the next, and every step is carried out on a copy and compared before it is taken.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from wgates_plugin import modules as kinds
from wgates_plugin.calling import (
    ExampleInputs,
    call_with,
    copied,
    device_of,
    left_as_found,
    map_tensors,
)
from wgates_plugin.channels import ChannelSpace
from wgates_plugin.errors import PlanError
from wgates_plugin.training.evaluation import images_in, to_device
from wgates_plugin.verification import TOLERANCE, relative_error

Step = Mapping[str, Any]
REPLACEABLE = (*kinds.CONVS, nn.Linear)
ELEMENTWISE = (nn.ReLU, nn.ReLU6, nn.SiLU, nn.Hardswish, nn.GELU, nn.LeakyReLU, nn.ELU, nn.Sigmoid)


class Hollow(nn.Module):
    """(N, ...) -> zeros of one channel, in the shape that the layer it replaces had given out.

    A fresh tensor: whatever follows may write into it without touching the stream it came from.
    """

    def __init__(self, strides: Sequence[int], *, last: bool = False) -> None:
        super().__init__()
        self.strides, self.last = tuple(strides), last

    def forward(self, inputs: Tensor) -> Tensor:
        return _emptied(inputs, self.strides, self.last)

    def extra_repr(self) -> str:
        return f"strides={self.strides}"


def _emptied(inputs: Tensor, strides: Sequence[int], last: bool) -> Tensor:
    if last:  # a linear layer's channels
        return torch.zeros_like(inputs[..., :1])
    thin = inputs[:, :1]
    for dim, stride in enumerate(strides, start=2):
        if stride > 1:
            thin = thin[tuple([slice(None)] * dim + [slice(None, None, stride)])]
    return torch.zeros_like(thin)


class _Constant:
    """(N, ...) -> (N, C, ...): one trainable constant per channel, in a tensor of its own.

    It is the bias of a layer that reads one empty channel, so that tracing, pruning and every runtime
    know it for what it is.
    """

    spatial: tuple[int, ...]

    def forward(self, inputs: Tensor) -> Tensor:
        empty = _emptied(inputs, self.spatial, isinstance(self, nn.Linear))
        found: Tensor = super().forward(empty)  # type: ignore[misc]
        return found


class Constant1d(_Constant, nn.Conv1d):
    """Constants over (N, C, T)."""


class Constant2d(_Constant, nn.Conv2d):
    """Constants over (N, C, H, W)."""


class Constant3d(_Constant, nn.Conv3d):
    """Constants over (N, C, D, H, W)."""


class ConstantLinear(_Constant, nn.Linear):
    """Constants over (N, ..., C)."""


def _constant_of(value: Tensor, name: str, module: nn.Module) -> nn.Module:
    """A constant (C,) in the place of a convolution or linear layer."""
    made: Constant1d | Constant2d | Constant3d | ConstantLinear
    spatial: tuple[int, ...] = ()
    if isinstance(module, nn.Linear):
        made = ConstantLinear(1, value.numel())
    else:
        spatial = _strides(name, module)
        kind = (Constant1d, Constant2d, Constant3d)[_dims(module) - 1]
        made = kind(1, value.numel(), 1)
    made.spatial = spatial
    made.to(value)
    with torch.no_grad():
        made.weight.zero_()
        assert made.bias is not None
        made.bias.copy_(value)
    return made.train(module.training)


def apply(network: nn.Module, *, chain: Sequence[str], hollow: Sequence[str]) -> nn.Module:
    """Replace one branch, in place.

    Args:
        chain: modules that give out a constant, in running order, first the one without kernels. The
            last of them with kernels becomes the constant.
        hollow: modules that nothing else reads.

    Raises:
        PlanError: the network has no such modules, or they are of another kind.
    """
    found = dict(network.named_modules())
    missing = [name for name in (*chain, *hollow) if name not in found]
    weighted = [name for name in chain if isinstance(found.get(name), REPLACEABLE)]
    if missing or not weighted:
        raise PlanError(
            f"plan: step `constant_branches` names `{(missing or ['nothing'])[0]}`, which is not in "
            "this network"
        )
    value = _value([found[name] for name in chain])
    # A stateless module may serve elsewhere too; on constants it does no harm, see `find`.
    replaced = [name for name in (*hollow, *chain) if not isinstance(found[name], ELEMENTWISE)]
    made = {
        name: _constant_of(value, name, found[name])
        if name == weighted[-1]
        else _hollow_of(name, found[name])
        for name in replaced
    }
    for name, module in made.items():
        parent, _, key = name.rpartition(".")
        setattr(network.get_submodule(parent), key, module)
    return network


def find(network: nn.Module, space: ChannelSpace, example_inputs: ExampleInputs) -> list[Step]:
    """Steps that take the place of all branches without kernels; the network is left as it is.

    `space` names the network's modules; its widths may be those from before channels were removed. A
    branch stays as it is where its constant cannot be shown: the outputs before and after must agree
    to `TOLERANCE` on noise of the inputs' shape.
    """
    found = dict(network.named_modules())
    inputs = _noise(network, example_inputs)
    silent = [name for name in _readers(space) if _is_silent(found.get(name))]
    if not silent:
        return []
    steps: list[Step] = []
    current = copied(network)
    expected = _output(current, inputs)
    done: set[str] = set()
    chains = _chains(network, inputs, silent)
    for name in silent:
        if name in done or name not in chains:
            continue
        for length in range(len(chains[name]), 0, -1):
            chain = chains[name][:length]
            if isinstance(found[chain[-1]], ELEMENTWISE):
                continue
            hollow = _only_feeding(network, space, chain, done)
            step = {"transform": "constant_branches", "chain": chain, "hollow": hollow}
            trial = copied(current)
            if _carries(trial, step, inputs, expected):
                current = trial
                steps.append(step)
                done |= {*chain, *hollow}
                break
    return steps


def _carries(
    network: nn.Module, step: Mapping[str, Any], inputs: ExampleInputs, expected: Tensor
) -> bool:
    """Carry out the step; does the network compute the same?"""
    try:
        apply(network, chain=step["chain"], hollow=step["hollow"])
        output = _output(network, inputs)
    except (PlanError, RuntimeError, ValueError, IndexError, TypeError):
        return False
    if output.shape != expected.shape or not bool(torch.isfinite(output).all()):
        return False
    return relative_error(output, expected) <= TOLERANCE


def _readers(space: ChannelSpace) -> list[str]:
    return [name for name, side in space.slots_of if side == "in"]


def _is_silent(module: nn.Module | None) -> bool:
    """A layer whose every kernel is exactly zero."""
    if not isinstance(module, REPLACEABLE):
        return False
    return not bool((module.weight != 0).any())


def _chains(
    network: nn.Module, inputs: ExampleInputs, silent: Sequence[str]
) -> dict[str, list[str]]:
    """Silent module -> the modules behind it that give out a constant, in running order."""
    names = {module: name for name, module in network.named_modules()}
    leaves = [
        module
        for module in names
        if not list(module.children()) and not isinstance(module, torch.jit.ScriptModule)
    ]
    runs: list[tuple[str, int, int, bool]] = []
    alive: list[Any] = []  # keeps tensors, so that no identity is given twice

    def note(module: nn.Module, given: Any, output: Any) -> None:
        if len(given) == 1 and isinstance(given[0], Tensor) and isinstance(output, Tensor):
            alive.extend((given[0], output))
            runs.append((names[module], id(given[0]), id(output), _is_flat(output, module)))

    with ExitStack() as hooks:
        for module in leaves:
            hooks.enter_context(module.register_forward_hook(note))
        _output(network, inputs)
    times = {name: sum(run[0] == name for run in runs) for name in {run[0] for run in runs}}
    found = dict(network.named_modules())
    chains: dict[str, list[str]] = {}
    for place, (name, _, tensor, flat) in enumerate(runs):
        if name not in silent or times[name] > 1 or not flat:
            continue
        chains[name] = [name]
        while True:
            readers = [i for i in range(place + 1, len(runs)) if runs[i][1] == tensor]
            # A tensor read twice (by a squeeze-and-excitation, say) ends the chain; one that is
            # changed in place stays the same tensor, and its reader comes first.
            if not readers or (len(readers) > 1 and runs[readers[0]][2] != tensor):
                break
            place = readers[0]
            other, _, tensor, flat = runs[place]
            followed = isinstance(found[other], ELEMENTWISE) or (
                isinstance(found[other], (*REPLACEABLE, *kinds.BATCH_NORMS)) and times[other] == 1
            )
            if not flat or not followed:
                break
            chains[name].append(other)
    return chains


def _is_flat(output: Tensor, module: nn.Module) -> bool:
    """Is it one number per channel over all images and positions?"""
    dim = output.dim() - 1 if isinstance(module, nn.Linear) else min(1, output.dim() - 1)
    rows = output.detach().transpose(0, dim).flatten(1)
    return relative_error(rows, rows[:, :1].expand_as(rows)) <= 1e-6


def _only_feeding(
    network: nn.Module, space: ChannelSpace, chain: Sequence[str], done: set[str]
) -> list[str]:
    """Modules of the groups that nothing reads but the chain, or modules found so before."""
    found = dict(network.named_modules())
    gone = {*chain, *done}
    hollow: list[str] = []
    changed = True
    while changed:
        changed = False
        for group in space.groups:
            readers = {slot.module for slot in group.slots_as("consumer")}
            if not readers <= gone:
                continue
            for slot in group.slots:
                whole = slot.role != "consumer" and bool((slot.units >= 0).all())
                if whole and slot.module not in gone and slot.module in found:
                    hollow.append(slot.module)
                    gone.add(slot.module)
                    changed = True
    return hollow


def _value(modules: Sequence[nn.Module]) -> Tensor:
    """What the chain gives out, (C,), computed by its own modules from the first one's bias."""
    first = modules[0]
    weight: Tensor = first.weight  # type: ignore[assignment]
    count = kinds.out_channels_of(first)
    bias: Tensor | None = first.bias  # type: ignore[assignment]
    value = weight.new_zeros(count) if bias is None else bias.detach().clone()
    value = value.view(1, count, *[1] * _dims(first))
    with torch.no_grad():
        for module in modules[1:]:
            if isinstance(module, kinds.CONVS) and max(module.kernel_size) > 1:
                raise PlanError("plan: step `constant_branches` holds a kernel larger than 1x1")
            was = module.training
            value = module.eval()(value.clone())
            module.train(was)
    return value.flatten()


def _dims(module: nn.Module) -> int:
    """Number of spatial dimensions of a weighted module."""
    return int(module.weight.dim()) - 2  # type: ignore[operator]


def _strides(name: str, module: nn.Module) -> tuple[int, ...]:
    """Strides of a convolution whose output has the size of its input but for them.

    Raises:
        PlanError: it takes border off, or the padding is larger than the kernel needs.
    """
    assert isinstance(module, kinds.CONVS)
    padding = module.padding
    same = padding == "same" or (
        not isinstance(padding, str)
        and all(
            2 * pad == dilation * (size - 1)
            for pad, dilation, size in zip(
                padding, module.dilation, module.kernel_size, strict=True
            )
        )
    )
    if not same:
        raise PlanError(f"plan: step `constant_branches`: `{name}` changes the size by its border")
    return tuple(module.stride)


def _hollow_of(name: str, module: nn.Module) -> nn.Module:
    """What takes the place of a module that only feeds a constant."""
    if isinstance(module, nn.Linear):
        return Hollow((), last=True)
    if isinstance(module, kinds.CONVS):
        return Hollow(_strides(name, module))
    if isinstance(module, kinds.PER_CHANNEL):
        return nn.Identity()
    raise PlanError(f"plan: step `constant_branches` cannot hollow `{name}` ({type(module)})")


def _noise(network: nn.Module, example_inputs: ExampleInputs) -> ExampleInputs:
    """Two images of noise per image of the example inputs, on the network's device."""
    generator = torch.Generator().manual_seed(0)
    count = images_in(example_inputs)

    def change(value: Tensor) -> Tensor:
        by_image = value.dim() and len(value) == count
        twice = torch.cat([value, value]) if by_image else value
        if not value.is_floating_point():
            return twice
        return torch.randn(twice.shape, generator=generator).to(twice)

    changed: ExampleInputs = map_tensors(change, to_device(example_inputs, device_of(network)))
    return changed


@torch.no_grad()
def _output(network: nn.Module, inputs: ExampleInputs) -> Tensor:
    with left_as_found(network):
        network.eval()
        output: Tensor = call_with(network, inputs)
    return output.clone()
