"""ExecuTorch: the network lowered to XNNPACK, as it runs on phones and small boards."""

from __future__ import annotations

import contextlib
import logging
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar
from weakref import WeakSet

import torch
from torch import Tensor, nn

from wgates_plugin.calling import informative
from wgates_plugin.errors import (
    ExportError,
    FileFormatError,
    RuntimeUnavailableError,
    first_line,
)
from wgates_plugin.files import atomic_path
from wgates_plugin.latency.base import (
    BaseRuntime,
    BaseSession,
    RuntimeSettings,
    check_file,
    flatten_outputs,
    frozen_copy,
    require,
    split_inputs,
)
from wgates_plugin.latency.onnx_export import check_agreement, cpu_tensors

if TYPE_CHECKING:
    from wgates_plugin.calling import ExampleInputs

_PURPOSE = "the runtime `executorch`"
_EXTRA = "executorch"
_OPEN: WeakSet[ExecuTorchSession] = WeakSet()
"""Sessions that hold the process's thread pool."""


class ExecuTorchRuntime(BaseRuntime):
    """Runs `model.pte`, all shapes fixed to the example's, float32, through the XNNPACK delegate.

    Operators that XNNPACK does not know run as ExecuTorch's portable kernels, which are slow.

    ExecuTorch has one thread pool per process, which heeds no other library's thread count, and
    loaded networks keep pointers into it. It is reset to `settings.threads` threads when a session
    is made while no other is open, and keeps them afterwards; sessions of different thread counts
    cannot be open together in one process. Sessions that other code made with ExecuTorch itself
    must be gone by then too.
    """

    name: ClassVar[str] = "executorch"
    artefact_name: ClassVar[str] = "model.pte"
    library: ClassVar[str] = "executorch"

    def __init__(self, settings: RuntimeSettings | None = None) -> None:
        with _quiet():
            require("executorch.exir", extra=_EXTRA, purpose=_PURPOSE)
            require("executorch.runtime", extra=_EXTRA, purpose=_PURPOSE)
        super().__init__(settings)

    def options(self) -> dict[str, Any]:
        return {"delegate": "xnnpack"}

    def load(self, network: nn.Module, example_inputs: ExampleInputs) -> ExecuTorchSession:
        return self._session(self._export(network, example_inputs), example_inputs)

    def save(self, network: nn.Module, example_inputs: ExampleInputs, path: str | Path) -> Path:
        """Write the lowered program after comparing what it computes with the network.

        Raises:
            ExportError: the network cannot be lowered, or the program computes something else.
        """
        program = self._export(network, example_inputs)
        with atomic_path(path) as part:
            part.write_bytes(program)
        return Path(path)

    def load_file(self, path: str | Path, example_inputs: ExampleInputs) -> ExecuTorchSession:
        path = check_file(path, self.name)
        try:
            return self._session(path.read_bytes(), example_inputs)
        except (ExportError, RuntimeUnavailableError):
            raise
        except Exception as error:
            raise FileFormatError(
                f"executorch artefact `{path}`: cannot be loaded ({error}); it is damaged, or made "
                "for another version, or with operators or types that this runtime lacks: export "
                "it again for this one"
            ) from error

    def _session(self, program: bytes, example_inputs: ExampleInputs) -> ExecuTorchSession:
        return ExecuTorchSession(
            program,
            _ordered(example_inputs),
            threads=self.settings.threads,
            identity=self.identity(example_inputs),
        )

    def _export(self, network: nn.Module, example_inputs: ExampleInputs) -> bytes:
        frozen = frozen_copy(network).to("cpu", torch.float32)
        inputs = _ordered(example_inputs)
        try:
            program = _lowered(_Positional(frozen, example_inputs), tuple(inputs.values()))
        except Exception as error:
            raise ExportError(
                "executorch: the network cannot be lowered "
                f"({type(error).__name__}: {first_line(error)}); remove the operation named, or "
                "choose another runtime"
            ) from error
        seen = informative(frozen, example_inputs)
        with self._session(program, seen) as session:
            check_agreement(session.outputs(), frozen, seen, subject="executorch")
        return program


class _Positional(nn.Module):
    """The network with its keyword inputs taken by position, in the order of `_ordered`."""

    def __init__(self, network: nn.Module, example_inputs: ExampleInputs) -> None:
        super().__init__()
        self.network = network
        self.names = sorted(split_inputs(example_inputs)[1])
        self.eval()

    def forward(self, *values: Tensor) -> Any:
        if self.names:
            return self.network(**dict(zip(self.names, values, strict=True)))
        return self.network(*values)


def _ordered(example_inputs: ExampleInputs) -> dict[str, Tensor]:
    """Float32 CPU inputs; keywords sorted, because a program knows positions only."""
    tensors = {name: value.contiguous() for name, value in cpu_tensors(example_inputs).items()}
    return dict(sorted(tensors.items())) if split_inputs(example_inputs)[1] else tensors


def _lowered(network: nn.Module, inputs: tuple[Tensor, ...]) -> bytes:
    with _quiet():
        from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
        from executorch.exir import to_edge_transform_and_lower

        with torch.random.fork_rng(devices=[]):
            program = torch.export.export(network, inputs)
            edge = to_edge_transform_and_lower(program, partitioner=[XnnpackPartitioner()])
            return bytes(edge.to_executorch().buffer)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep notes of ExecuTorch and of what it imports from the user's screen."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


def _give_threads(threads: int) -> None:
    """Make the process's thread pool `threads` threads wide.

    Raises:
        RuntimeUnavailableError: sessions with another count are open, or the pool stays as it is.
    """
    pool = require("executorch.extension.pybindings.portable_lib", extra=_EXTRA, purpose=_PURPOSE)
    found = pool._threadpool_get_thread_count()
    if found == threads:
        return
    if _OPEN:
        raise RuntimeUnavailableError(
            f"runtime `executorch`: {threads} threads asked for while {len(_OPEN)} sessions with "
            f"{found} are open; the thread pool is one per process: close them first, or measure "
            "in another process"
        )
    pool._unsafe_reset_threadpool(threads)
    found = pool._threadpool_get_thread_count()
    if found != threads:
        raise RuntimeUnavailableError(
            f"runtime `executorch`: its thread pool has {found} threads where {threads} were asked "
            f"for, and cannot be changed; ask for {found}"
        )


class ExecuTorchSession(BaseSession):
    """A loaded program and inputs for it.

    Raises:
        ExportError: the program takes other inputs.
    """

    def __init__(
        self,
        program: bytes,
        inputs: Mapping[str, Tensor],
        *,
        threads: int,
        identity: Mapping[str, Any],
    ) -> None:
        super().__init__(identity)
        from executorch.runtime import Runtime

        _give_threads(threads)
        loaded = Runtime.get().load_program(program)
        self._method: Any = loaded.load_method("forward")
        self._program: Any = loaded
        self._inputs = list(inputs.values())
        _check_inputs(self._method.metadata, inputs)
        _OPEN.add(self)

    def _call(self) -> Sequence[Any]:
        if self._method is None:
            raise RuntimeError("this session is closed; load the network again")
        found: Sequence[Any] = self._method.execute(self._inputs)
        return found

    def run(self) -> None:
        self._call()

    def outputs(self) -> list[Tensor]:
        return flatten_outputs(list(self._call()))

    def close(self) -> None:
        self._method, self._program, self._inputs = None, None, []
        _OPEN.discard(self)


def _check_inputs(metadata: Any, inputs: Mapping[str, Tensor]) -> None:
    wanted = [list(metadata.input_tensor_meta(i).sizes()) for i in range(metadata.num_inputs())]
    problems = [
        f"`{name}` is {list(tensor.shape)}, made for {shape}"
        for (name, tensor), shape in zip(inputs.items(), wanted, strict=False)
        if list(tensor.shape) != shape
    ]
    if len(wanted) != len(inputs):
        problems.append(f"{len(inputs)} inputs given, made for {len(wanted)}")
    if problems:
        raise ExportError(
            "executorch: the program does not take these example inputs: "
            + "; ".join(problems)
            + "; give inputs of the exported shapes in the same order, or export again"
        )
