"""torch.compile: the exported network compiled by inductor for the processor it runs on."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import nn

from wgates_plugin.errors import ExportError, RuntimeUnavailableError, first_line
from wgates_plugin.latency.base import Family, ResizeFamily, RuntimeSettings, split_inputs
from wgates_plugin.latency.eager import CudaEagerSession, EagerRuntime, EagerSession

if TYPE_CHECKING:
    from wgates_plugin.calling import ExampleInputs
    from wgates_plugin.channels import ChannelSpace

_NO_COMPILER = ("InvalidCxxCompiler", "CppCompileError", "TritonMissing")


class CompiledRuntime(EagerRuntime):
    """Runs what inductor makes of the `torch.export` program, all shapes fixed to the example's.

    What is delivered is the program, as the runtime `eager` writes it; `load_file` compiles it.
    Compiling happens while loading and is no part of latency; a session tells how long it took in
    `compile_seconds` (little where torch's cache on disk knows the program already).

    Inductor writes the thread count into the code it makes, so the code is made for
    `settings.threads` and runs under no other count. On a CUDA device it is made at float32 with
    TF32 off, and runs so.

    Args:
        settings, channels_last: as for `eager`.
        freezing: treat weights as constants, folded and laid out once (inductor's `freezing`).
            Torch's own default is not to, which on a processor costs a new layout per inference.
    """

    name: ClassVar[str] = "compile"

    def __init__(
        self,
        settings: RuntimeSettings | None = None,
        *,
        channels_last: bool = False,
        freezing: bool = True,
    ) -> None:
        super().__init__(settings, channels_last=channels_last)
        self.freezing = freezing

    def options(self) -> dict[str, Any]:
        return {**super().options(), "freezing": self.freezing}

    def load(self, network: nn.Module, example_inputs: ExampleInputs) -> EagerSession:
        """The network exported and compiled.

        Raises:
            ExportError: torch cannot export or compile the network.
            RuntimeUnavailableError: the compiler that inductor calls is missing or broken.
        """
        args, kwargs = split_inputs(self._moved(example_inputs))
        prepared = self._prepared(network)
        try:
            program = torch.export.export(prepared, args, kwargs)
        except Exception as error:
            raise ExportError(
                "compile: torch.export cannot export the network "
                f"({type(error).__name__}: {error}); remove control flow that depends on values, "
                "or choose another runtime"
            ) from error
        return self._session(program.module(), example_inputs)

    def load_delivered(
        self, path: str | Path, network: nn.Module, example_inputs: ExampleInputs
    ) -> EagerSession:
        return self.load_file(path, example_inputs)

    def family(
        self, network: nn.Module, space: ChannelSpace, example_inputs: ExampleInputs
    ) -> Family:
        return ResizeFamily(self, network, space, example_inputs)

    def _session(self, network: Callable[..., Any], example_inputs: ExampleInputs) -> EagerSession:
        from torch._inductor import config
        from torch._inductor.codecache import PyCodeCache

        # An exported program's module has code of its own, so every session has its own entry in
        # dynamo's cache: hundreds of widths meet no recompile limit and do not disturb each other.
        kind = CudaCompiledSession if self.settings.device.startswith("cuda") else CompiledSession
        session = kind(
            torch.compile(network, backend="inductor", dynamic=False),
            self._moved(example_inputs),
            settings=self.settings,
            identity=self.identity(example_inputs),
        )
        started = time.perf_counter()
        before = len(PyCodeCache.modules)
        try:
            threads = self.settings.threads
            with config.patch({"cpp.threads": threads, "freezing": self.freezing}):
                session.run()
        except Exception as error:
            raise _explained(error) from error
        session.compile_seconds = time.perf_counter() - started
        session.generated = PyCodeCache.modules[before:]
        return session


def _explained(error: Exception) -> Exception:
    if any(type(cause).__name__ in _NO_COMPILER for cause in _causes(error)):
        return RuntimeUnavailableError(
            "runtime `compile`: inductor finds no working compiler "
            f"({first_line(error)}); install g++ or clang++ (for CUDA: triton), "
            "or name one in the environment variable CXX"
        )
    return ExportError(
        f"compile: torch.compile fails on this network ({type(error).__name__}: {error}); choose "
        "another runtime"
    )


def _causes(error: BaseException) -> Iterator[BaseException]:
    seen: set[int] = set()
    following: list[BaseException | None] = [error]
    while following:
        cause = following.pop()
        if cause is None or id(cause) in seen:
            continue
        seen.add(id(cause))
        yield cause
        following += [cause.__cause__, cause.__context__, getattr(cause, "inner_exception", None)]


class CompiledSession(EagerSession):
    """Runs under its own settings always: under others, dynamo would compile once more."""

    compile_seconds = 0.0
    """Time from the first call to its end, which compiling fills."""

    generated: Sequence[ModuleType] = ()
    """Modules of inductor's making. Torch keeps them as long as the process lives."""

    def close(self) -> None:
        super().close()
        for module in self.generated:
            for name, value in list(vars(module).items()):
                if isinstance(value, torch.Tensor):  # frozen weights
                    delattr(module, name)
        self.generated = ()

    def _call(self) -> Any:
        if self._is_active():
            return super()._call()
        with self.active():
            return super()._call()


class CudaCompiledSession(CompiledSession, CudaEagerSession):
    """The same on a CUDA device, timed by its events."""
