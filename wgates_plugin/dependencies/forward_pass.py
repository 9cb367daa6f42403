"""One forward pass of a network: torch-pruning's graph of it, and what hooks note beside it."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

import torch
import torch_pruning as tp
from torch import Tensor, nn

from wgates_plugin import modules as kinds
from wgates_plugin.calling import ExampleInputs, batch_length, call_with, shapes_of
from wgates_plugin.channels import Layer
from wgates_plugin.dependencies.channel_order import FixedViews
from wgates_plugin.dependencies.layer_record import layer_record
from wgates_plugin.errors import TraceError
from wgates_plugin.transforms.scatter import ScatterPruner

_NEIGHBOURLY = (nn.LocalResponseNorm, nn.CrossMapLRN2d)
"""Norms over neighbouring channels. They hold no parameter, so that the graph sees their arithmetic."""


class ForwardPass:
    """The run of a network in eval mode from which its channels are known.

    It leaves every parameter live: make it under `left_as_found`.

    Attributes:
        graph: torch-pruning's. layers: the records of what holds parameters.
        names: module -> name. order: name -> its place among all of them.
        last: modules that give out the network's output. reaching: those that it depends on.
        neighbourly: operation -> the norm over neighbouring channels that ended with it.
        cut_off: a layer ran without gradients. fixed_views: a view named its last size.

    Raises:
        TraceError: the network does not run, or cannot be followed.
    """

    def __init__(
        self,
        network: nn.Module,
        example_inputs: ExampleInputs,
        parameter_dims: Sequence[tuple[nn.Parameter, int]],
    ) -> None:
        self.network, self._example_inputs = network, example_inputs
        self.names = {module: name for name, module in network.named_modules()}
        self.order = {name: place for place, name in enumerate(self.names.values())}
        self.last: set[nn.Module] = set()
        self.reaching: set[nn.Module] = set()
        self.neighbourly: dict[Any, nn.Module] = {}
        self.cut_off = False
        self._views = FixedViews()
        self.layers, self.graph = self._describe_and_trace(parameter_dims)

    @property
    def fixed_views(self) -> bool:
        return self._views.seen

    def _describe_and_trace(
        self, parameter_dims: Sequence[tuple[nn.Parameter, int]]
    ) -> tuple[tuple[Layer, ...], tp.DependencyGraph]:
        """One forward pass: hooks note layer shapes while torch-pruning records the graph."""
        positions: dict[nn.Module, int] = {}
        given: list[tuple[nn.Module, Tensor]] = []
        images = batch_length(self._example_inputs)

        def note(module: nn.Module, inputs: Any, keywords: Any, output: Any) -> None:
            read = kinds.first_input(inputs, keywords)
            # A transposed convolution applies its kernel once per *input* position.
            met = read if isinstance(module, kinds.TRANSPOSED) else output
            self._refuse_unbatched(module, read, output)
            if isinstance(met, Tensor) and met.dim() > 1:
                channels = met.shape[-1] if isinstance(module, nn.Linear) else met.shape[1]
                here = _positions_per_image(met, images, channels)
                positions[module] = positions.get(module, 0) + here
            if isinstance(output, Tensor):
                history = [getattr(tensor, "grad_fn", None) for tensor in (read, output)]
                # Only the first layer reads what has no history: the images.
                self.cut_off = self.cut_off or (bool(given) and None in history)
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
            graph = self._build_graph(given, parameter_dims)
        self._refuse_silent([module for module in leaves if module not in positions])
        described = (
            layer_record(self.names[module], module, positions.get(module, 0)) for module in leaves
        )
        return tuple(described), graph

    def _note_neighbourly(self, module: nn.Module, _: Any, output: Tensor) -> None:
        if output.grad_fn is not None:
            self.neighbourly[output.grad_fn] = module

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

    def _refuse_silent(self, unmet: Sequence[nn.Module]) -> None:
        """`unmet`: the modules whose hooks noted nothing."""
        # An attention module reads its output projection's weight without calling it.
        read = {
            m
            for module in self.network.modules()
            if isinstance(module, nn.MultiheadAttention)
            for m in module.modules()
        }
        silent = [self.names[m] for m in unmet if m not in read and isinstance(m, kinds.WEIGHTED)]
        if silent:
            shown = ", ".join(f"`{name}`" for name in silent[:4])
            raise TraceError(
                f"{len(silent)} layers never run in eval mode ({shown}{' ...' * (len(silent) > 4)})"
                ", such as auxiliary heads, or are read without being called: the removal could not "
                "follow them; drop them "
                "(for example `network.AuxLogits = None`, `aux_logits=False`) before tracing"
            )

    def _run(self) -> Tensor:
        """The network's output on the example inputs.

        Raises:
            TraceError: it does not run on them, returns something else than one tensor, or one that
                carries no gradient.
        """
        try:
            with self._views:
                output = call_with(self.network, self._example_inputs)
        except TraceError:
            raise
        except Exception as error:
            shapes = shapes_of(self._example_inputs)
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

    def _build_graph(
        self,
        given: Sequence[tuple[nn.Module, Tensor]],
        parameter_dims: Sequence[tuple[nn.Parameter, int]],
    ) -> tp.DependencyGraph:
        """The graph behind the network's output and behind each tensor of `given`.

        `given` fills while the network runs: modules and what they gave out. Behind the output alone
        torch-pruning would miss a layer whose output is dropped, such as an auxiliary head, and cut
        the channels that it reads.
        """

        def run(*_: Any) -> list[Tensor]:
            output = self._run()
            # A last layer that also serves earlier is no end of the graph.
            self.last = {module for module, own in given if own.grad_fn is output.grad_fn}
            history = _history(output)
            self.reaching = {module for module, own in given if own.grad_fn in history}
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
                    example_inputs=self._example_inputs,
                    forward_fn=run,
                    unwrapped_parameters=list(parameter_dims),
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


def _as_its_own(_: nn.Module, __: Any, output: Tensor) -> Tensor:
    """A scatter with nothing to do returns its input, which would hide it from the graph."""
    return output.clone()


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


def _positions_per_image(met: Tensor, images: int | None, channels: int) -> int:
    """Positions per image of the example inputs. A network may fold frames into the batch; what is no
    multiple of it was not made of the images."""
    count = met.shape[0]
    return met.numel() // max(1, channels * (images if images and count % images == 0 else count))
