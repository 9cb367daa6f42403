"""Torch eager: the network as PyTorch itself runs it, on the CPU or on a CUDA device."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from wgates_plugin.errors import ExportError, FileFormatError, first_line
from wgates_plugin.files import atomic_path
from wgates_plugin.latency.base import (
    BaseRuntime,
    BaseSession,
    Family,
    ResizeFamily,
    RuntimeSettings,
    check_file,
    flatten_outputs,
    frozen_copy,
    named_tensors,
    split_inputs,
)
from wgates_plugin.latency.layer_times import PROFILED_RUNS, hooked_times
from wgates_plugin.latency.program_file import check_program_file
from wgates_plugin.latency.tf32 import exact_float32, tf32_allowed

if TYPE_CHECKING:
    from wgates_plugin.calling import ExampleInputs
    from wgates_plugin.channels import ChannelSpace

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def _program_of(path: str | Path) -> torch.export.ExportedProgram:
    path = check_file(path, "eager")
    check_program_file(path)
    try:
        with path.open("rb") as file:
            return torch.export.load(file)
    except Exception as error:
        raise FileFormatError(
            f"eager artefact `{path}`: torch cannot load it ({type(error).__name__}: {error}); "
            "it was written by another torch version or is corrupt, export it again"
        ) from error


class EagerRuntime(BaseRuntime):
    """Runs `network(*example_inputs)` under `torch.inference_mode`; saves a `torch.export` program.

    On a CUDA device float32 means float32: TF32, which torch allows for convolutions by default, is
    off while a session is active.

    Args:
        settings: device "cpu" or "cuda[:index]", precision float32, bfloat16 or float16.
        channels_last: keep 4-dimensional weights and inputs in NHWC memory order.
    """

    name: ClassVar[str] = "eager"
    artefact_name: ClassVar[str] = "model.pt2"
    library: ClassVar[str] = "torch"
    device_kinds: ClassVar[tuple[str, ...]] = ("cpu", "cuda")
    precisions: ClassVar[tuple[str, ...]] = tuple(_DTYPES)

    def __init__(
        self, settings: RuntimeSettings | None = None, *, channels_last: bool = False
    ) -> None:
        super().__init__(settings)
        self.channels_last = channels_last

    def options(self) -> dict[str, Any]:
        return {"channels_last": self.channels_last}

    def load(self, network: nn.Module, example_inputs: ExampleInputs) -> EagerSession:
        return self._session(self._prepared(network), example_inputs)

    def save(self, network: nn.Module, example_inputs: ExampleInputs, path: str | Path) -> Path:
        """Write a `torch.export` program of fixed shapes.

        Raises:
            ExportError: torch cannot export the network.
        """
        args, kwargs = split_inputs(self._moved(example_inputs))
        try:
            program = torch.export.export(self._prepared(network), args, kwargs)
        except Exception as error:
            raise ExportError(
                f"eager: torch.export cannot export the network ({type(error).__name__}: {error}); "
                "remove control flow that depends on values, or choose another runtime"
            ) from error
        # Eval-mode programs specialise on the example's shapes; what is recorded beside them
        # (stack traces) names source files of this machine.
        for node in program.graph.nodes:
            node.meta.pop("stack_trace", None)
        # torch.export.save insists on the suffix for paths; a file object may have any name.
        with atomic_path(path) as part, part.open("wb") as file, warnings.catch_warnings():
            # Said of weights in channels_last order, which are stored whole all the same.
            warnings.filterwarnings("ignore", message="No complete tensor found")
            torch.export.save(program, file)
        return Path(path)

    def load_file(self, path: str | Path, example_inputs: ExampleInputs) -> EagerSession:
        return self._session(_program_of(path).module(), example_inputs)

    def load_delivered(
        self, path: str | Path, network: nn.Module, example_inputs: ExampleInputs
    ) -> EagerSession:
        """The network's own code with the weights of the file.

        Networks run as modules in this runtime. The program in the file makes the same calls of its
        operations with another overhead: a fifth more for networks of under a millisecond.

        Raises:
            FileFormatError: the file is not readable, or of another network.
        """
        program = _program_of(path)
        prepared = self._prepared(network)
        try:
            prepared.load_state_dict(program.state_dict)
        except RuntimeError as error:
            raise FileFormatError(
                f"eager artefact `{path}`: its weights are not those of the network given "
                f"({first_line(error)}); export that network again"
            ) from error
        return self._session(prepared, example_inputs)

    def family(
        self, network: nn.Module, space: ChannelSpace, example_inputs: ExampleInputs
    ) -> Family:
        return EagerFamily(self, network, space, example_inputs)

    def layer_times_ms(
        self, network: nn.Module, example_inputs: ExampleInputs, *, runs: int = PROFILED_RUNS
    ) -> dict[str, float]:
        """Layer name -> ms of the network on the CPU; empty elsewhere, where calls only queue."""
        if self.settings.device != "cpu":
            return {}
        prepared = self._prepared(network)
        args, kwargs = split_inputs(self._moved(example_inputs))
        with self._session(prepared, example_inputs).active():
            return hooked_times(prepared, lambda: prepared(*args, **kwargs), runs=runs)

    def _prepared(self, network: nn.Module) -> nn.Module:
        dtype = _DTYPES[self.settings.precision]
        moved = frozen_copy(network).to(torch.device(self.settings.device), dtype)
        if self.channels_last:
            for parameter in moved.parameters():
                if parameter.ndim == 4:
                    parameter.data = parameter.data.contiguous(memory_format=torch.channels_last)
        return moved

    def _moved(self, example_inputs: ExampleInputs) -> ExampleInputs:
        named_tensors(example_inputs)
        args, kwargs = split_inputs(example_inputs)
        if kwargs:
            return {name: self._moved_tensor(value) for name, value in kwargs.items()}
        return tuple(self._moved_tensor(value) for value in args)

    def _moved_tensor(self, tensor: Tensor) -> Tensor:
        dtype = _DTYPES[self.settings.precision] if tensor.is_floating_point() else tensor.dtype
        moved = tensor.detach().to(torch.device(self.settings.device), dtype, copy=True)
        if self.channels_last and moved.ndim == 4:
            moved = moved.contiguous(memory_format=torch.channels_last)
        return moved

    def _session(self, network: Callable[..., Any], example_inputs: ExampleInputs) -> EagerSession:
        kind = CudaEagerSession if self.settings.device.startswith("cuda") else EagerSession
        return kind(
            network,
            self._moved(example_inputs),
            settings=self.settings,
            identity=self.identity(example_inputs),
        )


class EagerFamily(ResizeFamily):
    """Resized networks, and where they spend their time."""

    runtime: EagerRuntime
    _latest: tuple[tuple[int, ...], nn.Module] | None = None

    def session(self, widths: Sequence[int]) -> BaseSession:
        return self.runtime.load(self._resized(widths), self.example_inputs)

    def layer_times_ms(
        self, widths: Sequence[int], *, runs: int = PROFILED_RUNS
    ) -> dict[str, float]:
        return self.runtime.layer_times_ms(self._resized(widths), self.example_inputs, runs=runs)

    def _resized(self, widths: Sequence[int]) -> nn.Module:
        """The network at `widths`; a sample asks for the same one twice."""
        from wgates_plugin.surgery import resize

        if self._latest is None or self._latest[0] != tuple(widths):
            self._latest = tuple(widths), resize(self.network, self.space, widths)
        return self._latest[1]


class EagerSession(BaseSession):
    """A callable network and inputs that already lie where it runs."""

    def __init__(
        self,
        network: Callable[..., Any],
        inputs: ExampleInputs,
        *,
        settings: RuntimeSettings,
        identity: Mapping[str, Any],
    ) -> None:
        super().__init__(identity)
        self._network: Callable[..., Any] | None = network
        self._args, self._kwargs = split_inputs(inputs)
        self._settings = settings

    @contextmanager
    def active(self) -> Iterator[None]:
        """Torch's global thread count is the session's inside, and what it was after."""
        before = torch.get_num_threads()
        torch.set_num_threads(self._settings.threads)
        try:
            yield
        finally:
            torch.set_num_threads(before)

    def _is_active(self) -> bool:
        """Whether torch's global settings are the session's at the moment."""
        return torch.get_num_threads() == self._settings.threads

    def _call(self) -> Any:
        if self._network is None:
            raise RuntimeError("this session is closed; load the network again")
        with torch.inference_mode():
            return self._network(*self._args, **self._kwargs)

    def run(self) -> None:
        self._call()

    def outputs(self) -> list[Tensor]:
        with self.active():
            return flatten_outputs(self._call())

    def close(self) -> None:
        self._network, self._args, self._kwargs = None, (), {}


class CudaEagerSession(EagerSession):
    """Kernels are only queued by a call, so each inference waits for its end, or for its events.

    Events and waiting belong to a device, so the session's is the current one meanwhile.
    """

    @contextmanager
    def active(self) -> Iterator[None]:
        """The session's thread count and device are torch's inside; at float32 TF32 is off."""
        exact = exact_float32() if self._exact else nullcontext()
        with super().active(), self._device(), exact:
            yield

    def _is_active(self) -> bool:
        return super()._is_active() and not (self._exact and tf32_allowed())

    @property
    def _exact(self) -> bool:
        return self._settings.precision == "float32"

    def _device(self) -> AbstractContextManager[Any]:
        return torch.cuda.device(torch.device(self._settings.device))

    def run(self) -> None:
        with self._device():
            self._call()
            torch.cuda.synchronize()

    def elapsed_ms(self) -> float:
        with self._device():
            start = torch.cuda.Event(enable_timing=True)
            end = torch.cuda.Event(enable_timing=True)
            torch.cuda.synchronize()
            start.record()
            self._call()
            end.record()
            end.synchronize()
            return float(start.elapsed_time(end))
