"""Dependencies between channels: torch-pruning's graph of a network, made into plain records."""

from __future__ import annotations

import dataclasses
import math
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from numbers import Integral
from typing import Any

import numpy as np
import torch
import torch_pruning as tp
from torch import Tensor, nn
from torch_pruning import ops as tp_ops

from wgates_plugin import modules as kinds
from wgates_plugin.calling import (
    ExampleInputs,
    batch_length,
    call_with,
    left_as_found,
    map_tensors,
    shapes_of,
)
from wgates_plugin.channel_order import FixedViews, is_certain
from wgates_plugin.channels import ChannelGroup, ChannelSpace, Layer, Slot
from wgates_plugin.errors import TraceError
from wgates_plugin.transforms.scatter import ScatterPruner
from wgates_plugin.untraceable import refuse_untraceable

_ATTENTION = (
    "`{}` is an attention: only whole heads could go, and its own head count would not follow"
)
_NEIGHBOURLY = (nn.LocalResponseNorm, nn.CrossMapLRN2d)
"""Norms over neighbouring channels. They hold no parameter, so that the graph sees their arithmetic."""


class DependencyTrace:
    """A torch-pruning dependency graph of one network, and the records made from it.

    Keeping the object lets surgery reuse the graph, so that trace plus removal trace once.
    """

    def __init__(
        self,
        network: nn.Module,
        example_inputs: ExampleInputs,
        *,
        parameter_dims: Sequence[tuple[nn.Parameter, int]] = (),
    ) -> None:
        """`parameter_dims` says which dimension of a bare parameter holds channels: the last one
        with more than one entry, unless it is named here."""
        refuse_untraceable(network, example_inputs)
        self.network = network
        self.example_inputs = example_inputs
        self._parameter_dims = tuple(parameter_dims)
        self.names = {module: name for name, module in network.named_modules()}
        self._fixed_views = FixedViews()
        self._cut_off = False
        self._last: set[nn.Module] = set()
        self._reaching: set[nn.Module] = set()
        self._neighbourly: dict[Any, nn.Module] = {}
        inferring = torch.is_inference_mode_enabled()
        with torch.inference_mode(False), left_as_found(network):
            if inferring:  # what was made under it enters no graph; a copy does
                self.example_inputs = map_tensors(Tensor.clone, example_inputs)
            network.eval()
            self.layers, self.graph = self._describe_and_trace()

    def _describe_and_trace(self) -> tuple[tuple[Layer, ...], tp.DependencyGraph]:
        """One forward pass: hooks note layer shapes while torch-pruning records the graph."""
        positions: dict[nn.Module, int] = {}
        given: list[tuple[nn.Module, Tensor]] = []
        images = batch_length(self.example_inputs)

        def note(module: nn.Module, inputs: Any, keywords: Any, output: Any) -> None:
            read = kinds.first_input(inputs, keywords)
            # A transposed convolution applies its kernel once per *input* position.
            met = read if isinstance(module, kinds.TRANSPOSED) else output
            self._refuse_unbatched(module, read, output)
            if isinstance(met, Tensor) and met.dim() > 1:
                channels = met.shape[-1] if isinstance(module, nn.Linear) else met.shape[1]
                positions[module] = positions.get(module, 0) + _per_image(met, images, channels)
            if isinstance(output, Tensor):
                history = [getattr(tensor, "grad_fn", None) for tensor in (read, output)]
                # Only the first layer reads what has no history: the images.
                self._cut_off = self._cut_off or (bool(given) and None in history)
                given.append((module, output))

        leaves = [m for m in self.names if any(p is not None for p in m._parameters.values())]
        with ExitStack() as hooks:
            for module in leaves:
                hooks.enter_context(module.register_forward_hook(note, with_kwargs=True))
            for module in self.names:
                if isinstance(module, kinds.Scatter):
                    hooks.enter_context(module.register_forward_hook(_as_its_own))
                elif isinstance(module, _NEIGHBOURLY):
                    hooks.enter_context(module.register_forward_hook(self._note_neighbourly))
            graph = self._build_graph(given)
        # An attention module reads its output projection's weight without calling it.
        read = {
            m
            for module in self.network.modules()
            if isinstance(module, nn.MultiheadAttention)
            for m in module.modules()
        }
        silent = [
            self.names[m]
            for m in leaves
            if m not in positions and m not in read and isinstance(m, kinds.WEIGHTED)
        ]
        if silent:
            shown = ", ".join(f"`{name}`" for name in silent[:4])
            raise TraceError(
                f"{len(silent)} layers never run in eval mode ({shown}{' ...' * (len(silent) > 4)})"
                ", such as auxiliary heads, or are read without being called: the removal could not "
                "follow them; drop them "
                "(for example `network.AuxLogits = None`, `aux_logits=False`) before tracing"
            )
        described = (
            _describe(self.names[module], module, positions.get(module, 0)) for module in leaves
        )
        return tuple(described), graph

    def _note_neighbourly(self, module: nn.Module, _: Any, output: Tensor) -> None:
        if output.grad_fn is not None:
            self._neighbourly[output.grad_fn] = module

    def _refuse_unbatched(self, module: nn.Module, read: Any, output: Any) -> None:
        if not isinstance(module, kinds.WEIGHTED):
            return
        met = max(
            (t for t in (read, output) if isinstance(t, Tensor)), key=Tensor.dim, default=None
        )
        batched = 2 if isinstance(module, nn.Linear) else module.weight.dim()
        if met is not None and met.dim() < batched:
            raise TraceError(
                f"module `{self.names[module]}`: meets a tensor of shape {tuple(met.shape)}, which "
                "has no dimension of images; give a batch, or that tensor one: `x.unsqueeze(0)`"
            )

    def _run(self) -> Tensor:
        """The network's output on the example inputs.

        Raises:
            TraceError: it does not run on them, returns something else than one tensor, or one that
                carries no gradient.
        """
        try:
            with self._fixed_views:
                output = call_with(self.network, self.example_inputs)
        except TraceError:
            raise
        except Exception as error:
            shapes = shapes_of(self.example_inputs)
            raise TraceError(
                f"example inputs of shape {shapes}: the network does not run on them "
                f"({type(error).__name__}: {error}); give one real batch"
            ) from error
        if not isinstance(output, Tensor):
            raise TraceError(
                f"network {type(self.network).__name__}: returns {type(output).__name__}, not a "
                "tensor; wrap it in a module that returns the tensor to be trained on"
            )
        if output.grad_fn is None:
            raise TraceError(
                f"network {type(self.network).__name__}: the output carries no gradient: detached, "
                "an argmax, or made under no_grad or inference_mode; let it return what is trained on"
            )
        return output

    def _build_graph(self, given: Sequence[tuple[nn.Module, Tensor]]) -> tp.DependencyGraph:
        """The graph behind the network's output and behind each tensor of `given`.

        `given` fills while the network runs: modules and what they gave out. Behind the output alone
        torch-pruning would miss a layer whose output is dropped, such as an auxiliary head, and cut
        the channels that it reads.
        """

        def run(*_: Any) -> list[Tensor]:
            output = self._run()
            # A last layer that also serves earlier is no end of the graph.
            self._last = {module for module, own in given if own.grad_fn is output.grad_fn}
            history = _history(output)
            self._reaching = {module for module, own in given if own.grad_fn in history}
            return [output, *(own for _, own in given if own.grad_fn is not None)]

        hooks = {module: set(module._forward_hooks) for module in self.network.modules()}
        try:
            # Frozen parameters make groups vanish without an error, hence all are live.
            for parameter in self.network.parameters():
                if parameter.is_floating_point():
                    parameter.requires_grad_(True)
            # The graph outlives this and holds its operations; a whole batch would hang on them.
            emptied = torch.autograd.graph.saved_tensors_hooks(
                lambda _: None, lambda _: torch.empty(0)
            )
            with warnings.catch_warnings(), torch.enable_grad(), emptied:
                warnings.simplefilter("ignore")
                return tp.DependencyGraph().build_dependency(
                    self.network,
                    example_inputs=self.example_inputs,
                    forward_fn=run,
                    unwrapped_parameters=list(self._parameter_dims),
                    customized_pruners={kinds.Scatter: ScatterPruner()},
                    verbose=False,
                )
        except TraceError:
            raise
        except Exception as error:
            raise TraceError(
                f"network {type(self.network).__name__}: torch-pruning cannot trace it "
                f"({type(error).__name__}: {error}); it holds an operation that cannot be followed, "
                "such as a channel shuffle; take a network without it, or trace a submodule that has "
                "none"
            ) from error
        finally:
            # torch-pruning leaves its hooks behind when the forward pass fails.
            for module, own in hooks.items():
                for key in set(module._forward_hooks) - own:
                    del module._forward_hooks[key]

    @property
    def keeps_channel_order(self) -> bool:
        """True when no operation may move channels unseen, and no layer runs without gradients."""
        return not self._cut_off and not self._fixed_views.seen and is_certain(self.graph)

    def space(
        self,
        *,
        ignored_layers: Sequence[nn.Module | str] = (),
        min_channels: int = 1,
        min_fraction: float = 0.0,
        floors: Mapping[str, int] | None = None,
        caps: Mapping[str, int] | None = None,
    ) -> ChannelSpace:
        """The records of this graph, unchecked; see `trace` for the arguments."""
        ignored, problems = self._resolve_ignored(ignored_layers)
        order = {name: index for index, name in enumerate(self.names.values())}
        found: list[ChannelGroup] = []
        excluded: dict[str, str] = {}
        # In whatever order the graph met them; sorted by name below.
        for raw in self._raw_groups():
            name, numbers = self._root_of(raw, order)
            reason = self._reason_to_exclude(raw, ignored)
            group = None if reason else self._record(name, raw, numbers)
            if group is None or isinstance(group, str):
                excluded[name] = reason or self._attention_of(name) or str(group)
            else:
                found.append(group)
        for module, name in self.names.items():
            if isinstance(module, nn.MultiheadAttention):
                excluded.setdefault(name, _ATTENTION.format(name))
        found.sort(key=lambda group: order[group.name])
        problems += _limit_problems(found, floors or {}, caps or {})
        if problems:
            raise TraceError("; ".join(problems))
        found = _with_limits(found, min_channels, min_fraction, floors or {}, caps or {})
        if not found:
            why = "; ".join(f"`{name}`: {reason}" for name, reason in excluded.items())
            raise TraceError(f"no prunable channel group in the network; {why or 'none was found'}")
        return ChannelSpace(tuple(found), self.layers, excluded)

    def _raw_groups(self) -> Iterator[Any]:
        """Every set of coupled channels, found from one of its layers.

        A layer that reads a concatenation holds the channels of several groups, which would be one if
        they were found from it; one that gives out a single channel may have it spread over many.
        Such layers wait for a second round, in which most have been met.
        """
        graph = self.graph
        roots = [module for module in graph.module2node if isinstance(module, kinds.WEIGHTED)]
        met: set[Any] = set()
        try:
            for last_round in (False, True):
                for root in roots:
                    channels = kinds.out_channels_of(root)
                    waits = not last_round and (channels == 1 or kinds.is_depthwise(root))
                    if root in met or waits:
                        continue
                    pruning = graph.get_pruner_of_module(root).prune_out_channels
                    raw = graph.get_pruning_group(root, pruning, list(range(channels)))
                    written = [
                        item for item in raw if graph.is_out_channel_pruning_fn(item.dep.handler)
                    ]
                    if not last_round and _holds_several(written, channels):
                        continue
                    met.update(item.dep.target.module for item in written)
                    yield raw
        except (IndexError, KeyError, AttributeError, RuntimeError, TypeError) as error:
            raise TraceError(
                f"network {type(self.network).__name__}: torch-pruning cannot follow its channels "
                f"({type(error).__name__}: {error}); it holds a layer that is not supported, such "
                "as a recurrent one"
            ) from error

    def _resolve_ignored(
        self, ignored_layers: Sequence[nn.Module | str]
    ) -> tuple[set[nn.Module], list[str]]:
        """The modules, children included, and what is wrong with the rest."""
        by_name = {name: module for module, name in self.names.items()}
        resolved: set[nn.Module] = set()
        unknown = []
        for layer in ignored_layers:
            module = by_name.get(layer) if isinstance(layer, str) else layer
            if not isinstance(module, nn.Module) or module not in self.names:
                unknown.append(repr(layer) if isinstance(layer, str) else type(layer).__name__)
                continue
            resolved.update(module.modules())
        if not unknown:
            return resolved, []
        words = (
            f"ignored_layers: {', '.join(unknown)} not in the network; give modules of it or their "
            "`named_modules()` names"
        )
        return resolved, [words]

    def _root_of(self, raw: Any, order: Mapping[str, int]) -> tuple[str, np.ndarray]:
        """The group's first producer (in module order) that covers all its channels, and its numbers.

        torch-pruning numbers channels by the layer where it met the group first; the array (C,)
        turns these numbers into those of the producer returned.
        """
        graph = self.graph
        current, channels = raw[0].dep.target.module, len(raw[0].idxs)
        wide_enough = [
            item
            for item in raw
            if isinstance(item.dep.target.module, kinds.WEIGHTED)
            and kinds.out_channels_of(item.dep.target.module) == channels
            and graph.is_out_channel_pruning_fn(item.dep.handler)
            and not kinds.is_depthwise(item.dep.target.module)
        ]
        wide_enough.sort(key=lambda item: order[self.names[item.dep.target.module]])
        numbers = np.arange(channels)
        for item in wide_enough:
            root = item.dep.target.module
            if root is current:
                break
            if len(set(item.root_idxs) - {None}) == channels:
                numbers[np.asarray(item.root_idxs)] = np.asarray(item.idxs)
                return self.names[root], numbers
        return self.names[current], numbers

    def _reason_to_exclude(self, raw: Any, ignored: set[nn.Module]) -> str | None:
        consumers = reaching = 0
        for item in raw:
            node, module = item.dep.target, item.dep.target.module
            is_out = self.graph.is_out_channel_pruning_fn(item.dep.handler)
            name = self.names.get(module, "")
            if mixer := self._neighbourly.get(node.grad_fn):
                return _mixes(self.names[mixer], mixer)
            if isinstance(module, nn.Parameter):
                return f"a bare parameter of shape {tuple(module.shape)} shares its channels"
            if isinstance(module, kinds.WEIGHTED) and not kinds.is_depthwise(module):
                if isinstance(module, kinds.TRANSPOSED) and module.groups > 1:
                    return f"`{name}` is a grouped transposed convolution"
                if not is_out:
                    consumers += 1
                    continue
                reaching += module in self._reaching
            elif isinstance(module, kinds.Scatter):
                if is_out:
                    return f"`{name}` gives its stream all of its channels"
                consumers += 1
                continue
            elif isinstance(module, kinds.INSTANCE_NORMS) and module.track_running_stats:
                return f"torch-pruning does not cut the running statistics of `{name}`"
            elif isinstance(module, nn.Module) and name and not _acts_per_channel(module):
                return _mixes(name, module)
            if module in ignored:
                return f"`{name}` is ignored"
            if node.type == tp_ops.OPTYPE.OUTPUT or not node.outputs or module in self._last:
                return "its channels are outputs of the network"
        if not consumers:
            return "no layer reads its channels"
        return None if reaching else "the network's output does not depend on its channels"

    def _attention_of(self, name: str) -> str | None:
        """Why an attention's queries, keys and values cannot be cut; None for another layer."""
        parent = name.rpartition(".")[0]
        owner = self.network.get_submodule(parent)
        if not hasattr(owner, "num_heads"):
            return None
        return _ATTENTION.format(parent)

    def _record(self, name: str, raw: Any, numbers: np.ndarray) -> ChannelGroup | str:
        """The group as a record, or the reason why it cannot be one.

        `numbers` (C,) turns the group's root indices into channels of the layer called `name`.
        """
        channels = len(numbers)
        ties = 1
        for item in raw:
            module = item.dep.target.module
            if isinstance(module, (*kinds.CONVS,)) and not kinds.is_depthwise(module):
                ties = math.lcm(ties, module.groups)
        if channels % ties or channels == ties:
            return f"{channels} channels tied over {ties} conv groups leave nothing to choose"
        units = channels // ties
        slots = []
        known: list[tuple[Any, np.ndarray]] = []
        for item in raw:
            module = item.dep.target.module
            if module not in self.names:
                continue
            weighted = isinstance(module, kinds.READERS) and not kinds.is_depthwise(module)
            is_out = self.graph.is_out_channel_pruning_fn(item.dep.handler)
            side = "out" if is_out or not weighted else "in"
            role = ("producer" if is_out else "consumer") if weighted else "passenger"
            size = kinds.channels_at(module, side)
            if size is None:  # a single-parameter PReLU has no channels of its own
                continue
            owner = _met_before(known, item, size)
            if owner is None:
                if size == 1 and max(item.idxs) > 0:
                    return (
                        f"`{self.names[module]}` has one channel, which is spread over all of them"
                    )
                if None in item.root_idxs or max(item.idxs) >= size:
                    return f"the channel order into `{self.names[module]}` is not known"
                owner = np.full(size, -1, dtype=np.int64)
                owner[np.asarray(item.idxs)] = numbers[np.asarray(item.root_idxs)] % units
                reached = np.bincount(owner[owner >= 0], minlength=units)
                if (reached != reached[0]).any():
                    return f"its channels do not reach `{self.names[module]}` evenly"
                known.append((item, owner))
            parts = int(getattr(module, "groups", 1)) if weighted else 1
            if (owner.reshape(parts, -1) != owner[: size // parts]).any():
                return f"the conv groups of `{self.names[module]}` would keep different channels"
            slots.append(Slot(self.names[module], side, role, owner))  # type: ignore[arg-type]
        order = {module_name: index for index, module_name in enumerate(self.names.values())}
        slots.sort(key=lambda slot: (order[slot.module], slot.side != "out"))
        return ChannelGroup(name, channels, ties, ties, channels, tuple(slots))


def _met_before(known: Sequence[tuple[Any, np.ndarray]], item: Any, size: int) -> np.ndarray | None:
    """The owners of an earlier item with the same indices: most layers of a group have them."""
    for other, owner in known:
        same = item.idxs == other.idxs and item.root_idxs == other.root_idxs
        if same and len(owner) == size:
            return owner
    return None


def _as_its_own(_: nn.Module, __: Any, output: Tensor) -> Tensor:
    """A scatter with nothing to do returns its input, which would hide it from the graph."""
    return output.clone()


def _holds_several(written: Sequence[Any], channels: int) -> bool:
    """Whether channels of narrower layers were concatenated to these. A narrower layer that reads one
    part of them (a split) is of the same group."""
    kinds_met = {item.dep.target.type for item in written}
    parted = {tp_ops.OPTYPE.SPLIT, tp_ops.OPTYPE.SLICE, tp_ops.OPTYPE.UNBIND}
    if tp_ops.OPTYPE.CONCAT not in kinds_met or kinds_met & parted:
        return False
    modules = [item.dep.target.module for item in written]
    return any(
        isinstance(module, kinds.WEIGHTED) and 1 < kinds.out_channels_of(module) < channels
        for module in modules
    )


def _mixes(name: str, module: nn.Module) -> str:
    return f"`{name}` ({type(module).__name__}) mixes channels outside a convolution"


def _acts_per_channel(module: nn.Module) -> bool:
    return kinds.is_depthwise(module) or isinstance(module, kinds.PER_CHANNEL)


def _per_image(met: Tensor, images: int | None, channels: int) -> int:
    """Positions per image of the example inputs. A network may fold frames into the batch; what is no
    multiple of it was not made of the images."""
    count = met.shape[0]
    return met.numel() // max(1, channels * (images if images and count % images == 0 else count))


def _history(tensor: Tensor) -> set[Any]:
    """Every operation that the tensor was made by."""
    seen: set[Any] = set()
    waiting: list[Any] = [tensor.grad_fn]
    while waiting:
        operation = waiting.pop()
        if operation is not None and operation not in seen:
            seen.add(operation)
            waiting += [before for before, _ in operation.next_functions]
    return seen


def _describe(name: str, module: nn.Module, positions: int) -> Layer:
    kind = kinds.layer_kind(module)
    parameters = sum(parameter.numel() for parameter in module.parameters(recurse=False))
    if kind in ("conv", "depthwise", "transposed", "linear"):
        weight: Tensor = module.weight  # type: ignore[assignment]
        groups = int(getattr(module, "groups", 1))
        return Layer(
            name,
            kind,
            kinds.in_channels_of(module),
            kinds.out_channels_of(module),
            groups,
            math.prod(weight.shape[2:]),
            positions,
            getattr(module, "bias", None) is not None,
            parameters,
        )
    channels = int(getattr(module, "num_features", 0) or getattr(module, "num_parameters", 0))
    return Layer(name, kind, channels, channels, 1, 0, positions, False, parameters)


def _limit_problems(
    groups: Sequence[ChannelGroup], floors: Mapping[str, int], caps: Mapping[str, int]
) -> list[str]:
    """Names that are no group, and widths that are no number of channels."""
    known = [group.name for group in groups]
    wrong = [f"`{name}` is no prunable group" for name in (*floors, *caps) if name not in known]
    wrong += [
        f"`{name}` has {width!r}, needs a whole number of channels"
        for name, width in (*floors.items(), *caps.items())
        if not isinstance(width, Integral)
    ]
    return [f"floors and caps: {'; '.join(wrong)}; groups: {', '.join(known)}"] if wrong else []


def _with_limits(
    groups: Sequence[ChannelGroup],
    min_channels: int,
    min_fraction: float,
    floors: Mapping[str, int],
    caps: Mapping[str, int],
) -> list[ChannelGroup]:
    problems, limited = [], []
    for group in groups:
        # 100 * 0.07 is a little more than 7 in floating point.
        wanted = max(min_channels, math.ceil(min_fraction * group.channels - 1e-9))
        wanted = floors.get(group.name, min(wanted, group.channels))
        cap = caps.get(group.name, group.channels)
        floor = math.ceil(max(1, wanted) / group.ties) * group.ties
        cap = int(cap) // group.ties * group.ties
        if not floor <= cap <= group.channels:
            problems.append(
                f"`{group.name}`: floor {floor} and cap {cap} of {group.channels} channels leave "
                "no width"
            )
        limited.append(
            dataclasses.replace(group, floor=floor, cap=cap, floor_is_own=group.name in floors)
        )
    if problems:
        raise TraceError(f"floors and caps: {'; '.join(problems)}")
    return limited
