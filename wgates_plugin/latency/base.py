"""What a runtime is: it identifies itself, runs a network, saves it, and runs it from the file."""

from __future__ import annotations

import importlib
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType, ModuleType
from typing import TYPE_CHECKING, Any, ClassVar, Protocol, Self

import torch
from torch import Tensor, nn

from wgates_plugin.calling import copied
from wgates_plugin.errors import (
    ConfigError,
    ExportError,
    FileFormatError,
    MissingExtraError,
    RuntimeUnavailableError,
)
from wgates_plugin.latency.environment import device_name, library_version, usable_cores
from wgates_plugin.latency.measurement import Measurement as Measurement

if TYPE_CHECKING:
    from wgates_plugin.calling import ExampleInputs
    from wgates_plugin.channels import ChannelSpace


@dataclass(frozen=True)
class RuntimeSettings:
    """How a runtime executes.

    Attributes:
        threads: threads within one operator.
        device: "cpu", or "cuda" / "cuda:1" where the runtime knows it.
        precision: number format of weights and activations.
    """

    threads: int = 1
    device: str = "cpu"
    precision: str = "float32"

    def __post_init__(self) -> None:
        problems = []
        if not isinstance(self.threads, int) or isinstance(self.threads, bool) or self.threads < 1:
            problems.append(f"threads: got {self.threads!r}, expected an integer of at least 1")
        for name in ("device", "precision"):
            if not isinstance(getattr(self, name), str) or not getattr(self, name):
                problems.append(f"{name}: got {getattr(self, name)!r}, expected a name")
        if problems:
            raise ConfigError("runtime settings", problems)


class Session(Protocol):
    """A network made ready to run on fixed inputs.

    Some members are optional; `timing.measure` uses them where they exist:
    `active()` returns a context in which `run` executes under the session's settings (thread
    count), and `elapsed_ms()` runs one inference and returns its milliseconds by a clock that knows
    better than the wall's (CUDA events). `timed_elsewhere` is true where that clock is another
    machine's, so that what happens to this process says nothing about it, and
    `paired(reference)` returns a context in which both sessions' times come from common runs;
    `forget()` then drops times that were taken in them and not asked for yet, since sessions that
    warmed up for different numbers of inferences would no longer get pairs.
    """

    def run(self) -> None:
        """One inference on the fixed inputs; returns when it is done."""

    def outputs(self) -> list[Tensor]:
        """Outputs of one inference, flattened, as float32 CPU tensors."""

    def close(self) -> None:
        """Free what the session holds; it cannot run any more."""


class Family(Protocol):
    """One network at any widths, made ready quickly: for latency samples.

    `layer_times_ms(widths, *, runs)` is optional: layer name -> ms by the runtime's own profile,
    empty where it cannot tell; `layer_times.charge` says what a layer's time takes in.
    """

    def session(self, widths: Sequence[int]) -> Session:
        """The network at `widths` (G,), one per channel group, in the order of the space."""


class Runtime(Protocol):
    """What executes a network when time is taken.

    Laws: the caller's network, the random state and global thread counts are left as found;
    `load` and `load_file` after `save` compute what the network computes in eval mode; nothing
    that is loaded executes code from the file.
    """

    @property
    def name(self) -> str: ...

    @property
    def settings(self) -> RuntimeSettings: ...

    @property
    def artefact_name(self) -> str:
        """Usual file name of the deployable artefact, such as "model.onnx"."""

    def identity(self, example_inputs: ExampleInputs) -> dict[str, Any]:
        """What distinguishes latencies taken here from others, as plain JSON values."""

    def load(self, network: nn.Module, example_inputs: ExampleInputs) -> Session:
        """The network, in eval mode, ready to run on `example_inputs`."""

    def save(
        self, network: nn.Module, example_inputs: ExampleInputs, path: str | Path
    ) -> Path | None:
        """Write the deployable artefact to `path`; None where the runtime has none."""

    def load_file(self, path: str | Path, example_inputs: ExampleInputs) -> Session:
        """What `save` wrote, ready to run from the file alone."""

    def load_delivered(
        self, path: str | Path, network: nn.Module, example_inputs: ExampleInputs
    ) -> Session:
        """What `save` wrote of `network`, run as `load` runs networks: comparable with those."""

    def family(
        self, network: nn.Module, space: ChannelSpace, example_inputs: ExampleInputs
    ) -> Family:
        """Sessions of the network at many widths."""


class BaseSession(ABC):
    """A Session with nothing to set while it is active; usable in a `with` statement."""

    def __init__(self, identity: Mapping[str, Any]) -> None:
        self.identity = dict(identity)

    @abstractmethod
    def run(self) -> None:
        """One inference on the fixed inputs."""

    @abstractmethod
    def outputs(self) -> list[Tensor]:
        """Outputs of one inference as float32 CPU tensors."""

    def active(self) -> AbstractContextManager[None]:
        return nullcontext()

    @abstractmethod
    def close(self) -> None:
        """Free what the session holds; it cannot run any more."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class BaseRuntime(ABC):
    """What all runtimes share. A subclass names its facts and implements the abstract methods.

    Raises:
        ConfigError: the settings ask for a device kind or precision the runtime does not have, or
            for more threads than this process may use cores.
        RuntimeUnavailableError: the device is not there.
    """

    name: ClassVar[str]
    artefact_name: ClassVar[str]
    library: ClassVar[str]
    """Distribution whose version is part of the identity."""
    device_kinds: ClassVar[tuple[str, ...]] = ("cpu",)
    precisions: ClassVar[tuple[str, ...]] = ("float32",)
    examples: ClassVar[Mapping[str, str]] = MappingProxyType({})
    """Option -> how it may look, for error messages."""
    runs_here: ClassVar[bool] = True
    """Whether networks run on this machine, so that its cores limit the threads."""

    def __init__(self, settings: RuntimeSettings | None = None) -> None:
        self.settings = settings or RuntimeSettings()
        problems = []
        if not self.takes_device(self.settings.device):
            known = ", ".join(self.device_kinds)
            problems.append(f"device: got {self.settings.device!r}, choose one of: {known}")
        if self.settings.precision not in self.precisions:
            known = ", ".join(self.precisions)
            problems.append(f"precision: got {self.settings.precision!r}, choose one of: {known}")
        if self.runs_here and self.settings.device == "cpu":
            problems += too_many_threads(self.settings.threads)
        if problems:
            raise ConfigError(f"runtime `{self.name}`", problems)
        kind, _, index = self.settings.device.partition(":")
        there = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if kind == "cuda" and int(index or 0) >= there:
            instead = "use device `cpu`" if "cpu" in self.device_kinds else "choose another runtime"
            what = f"only {there} of them" if there else "no CUDA device"
            raise RuntimeUnavailableError(
                f"runtime `{self.name}`: device `{self.settings.device}` asked for, but torch "
                f"finds {what}; {instead} or a machine that has one"
            )

    @classmethod
    def takes_device(cls, device: str) -> bool:
        """Whether it is of a kind that this runtime knows, with a number at most; one CPU has none."""
        kind, colon, index = device.partition(":")
        numbered = kind != "cpu" and index.isascii() and index.isdecimal()
        return kind in cls.device_kinds and (not colon or numbered)

    def identity(self, example_inputs: ExampleInputs) -> dict[str, Any]:
        tensors = named_tensors(example_inputs)
        first = next(iter(tensors.values()))
        return {
            "runtime": self.name,
            "library": self.library,
            "library_version": library_version(self.library),
            "device": self.settings.device,
            "device_name": device_name(self.settings.device),
            "threads": self.settings.threads,
            "precision": self.settings.precision,
            "batch": int(first.shape[0]) if first.ndim else 1,
            "inputs": {name: list(tensor.shape) for name, tensor in tensors.items()},
            "options": self.options(),
        }

    def options(self) -> dict[str, Any]:
        """Further choices that change latency, as plain JSON values."""
        return {}

    @abstractmethod
    def load(self, network: nn.Module, example_inputs: ExampleInputs) -> BaseSession: ...

    @abstractmethod
    def save(
        self, network: nn.Module, example_inputs: ExampleInputs, path: str | Path
    ) -> Path | None: ...

    @abstractmethod
    def load_file(self, path: str | Path, example_inputs: ExampleInputs) -> BaseSession: ...

    def load_delivered(
        self, path: str | Path, network: nn.Module, example_inputs: ExampleInputs
    ) -> BaseSession:
        return self.load_file(path, example_inputs)

    def family(
        self, network: nn.Module, space: ChannelSpace, example_inputs: ExampleInputs
    ) -> Family:
        return ResizeFamily(self, network, space, example_inputs)


class Loads(Protocol):
    """Whatever makes a network ready to run."""

    def load(self, network: nn.Module, example_inputs: ExampleInputs) -> BaseSession: ...


class ResizeFamily:
    """The plain way to a family: resize the network, then load it like any other."""

    def __init__(
        self,
        runtime: Loads,
        network: nn.Module,
        space: ChannelSpace,
        example_inputs: ExampleInputs,
    ) -> None:
        self.runtime = runtime
        self.network = network
        self.space = space
        self.example_inputs = example_inputs

    def session(self, widths: Sequence[int]) -> BaseSession:
        from wgates_plugin.surgery import resize

        smaller = resize(self.network, self.space, widths)
        return self.runtime.load(smaller, self.example_inputs)


def too_many_threads(threads: int) -> list[str]:
    """What is wrong with this many threads on this machine's processor, if anything."""
    cores = usable_cores()
    if threads <= cores:
        return []
    return [
        f"threads: got {threads}, but this process may use {cores} core{'s' if cores > 1 else ''}; "
        f"ask for at most {cores}"
    ]


def require(library: str, *, extra: str, purpose: str) -> ModuleType:
    """Import an optional library.

    Raises:
        MissingExtraError: it is not installed; the message has the install command.
    """
    try:
        return importlib.import_module(library)
    except ImportError as error:
        raise MissingExtraError(library, extra, purpose) from error


def frozen_copy(network: nn.Module) -> nn.Module:
    """A deep copy in eval mode that needs no gradients; the original is only read."""
    return copied(network).eval().requires_grad_(False)


def split_inputs(example_inputs: ExampleInputs) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Example inputs as positional and keyword arguments of the network's `forward`."""
    if isinstance(example_inputs, Mapping):
        return (), dict(example_inputs)
    if isinstance(example_inputs, Tensor):
        return (example_inputs,), {}
    return tuple(example_inputs), {}


def named_tensors(example_inputs: ExampleInputs) -> dict[str, Tensor]:
    """Example inputs by name: keywords keep theirs, positions become `input_0`, `input_1`, ...

    Raises:
        ExportError: an input is no tensor, or there is none.
    """
    args, kwargs = split_inputs(example_inputs)
    named = {**{f"input_{index}": value for index, value in enumerate(args)}, **kwargs}
    wrong = [f"`{k}` ({type(v).__name__})" for k, v in named.items() if not isinstance(v, Tensor)]
    if wrong or not named:
        raise ExportError(
            f"example inputs: {', '.join(wrong) or 'none given'}; a runtime takes tensors only, "
            "give a tensor, a tuple of tensors, or a dict of keyword -> tensor"
        )
    return named


def check_file(path: str | Path, runtime: str) -> Path:
    """`path` as a Path.

    Raises:
        FileFormatError: there is no such file.
    """
    path = Path(path)
    if not path.is_file():
        raise FileFormatError(
            f"{runtime} artefact `{path}`: no such file; check the path or export again"
        )
    return path


def flatten_outputs(value: Any) -> list[Tensor]:
    """Tensors of a network's output in order, through tuples, lists and mappings; None is skipped.

    Raises:
        ExportError: the output holds something else.
    """
    return [tensor.detach().to("cpu", torch.float32).clone() for tensor in _leaves(value)]


def _leaves(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from _leaves(item)
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from _leaves(item)
    elif value is not None:
        raise ExportError(
            f"network output: found a {type(value).__name__}; return tensors, or tuples, lists "
            "and dicts of tensors"
        )
