"""A program of the user's that runs the exported file elsewhere: a phone over adb, a board over ssh."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

import numpy as np
import torch
from pydantic import AfterValidator, Field
from torch import Tensor, nn

from wgates_plugin.calling import informative
from wgates_plugin.errors import ConfigError, ExportError, RuntimeUnavailableError
from wgates_plugin.latency.base import (
    BaseRuntime,
    BaseSession,
    RuntimeSettings,
    check_file,
    frozen_copy,
)
from wgates_plugin.latency.eager import EagerRuntime
from wgates_plugin.latency.executorch import ExecuTorchRuntime
from wgates_plugin.latency.onnx_export import check_agreement, cpu_tensors
from wgates_plugin.latency.onnx_runtime import OnnxRuntime
from wgates_plugin.latency.options import option_problems
from wgates_plugin.latency.program import Call, Program, checked_command

if TYPE_CHECKING:
    from wgates_plugin.calling import ExampleInputs

_EXPORTERS: dict[str, type[BaseRuntime]] = {
    "onnx": OnnxRuntime,
    "pt2": EagerRuntime,
    "pte": ExecuTorchRuntime,
}


class CommandRuntime(BaseRuntime):
    """Hands the exported file to a program, which runs it and prints the times as JSON.

    These words of `command` are replaced before it is run (no shell is involved):

        {model}      path of the exported file; required
        {reference}  path of a second file, to be run in turn with the first, round by round
        {inputs}     path of an .npz with the inputs by name
        {outputs}    path where the program writes an .npz with the outputs, in order
        {rounds}     inferences it shall time; it must print as many times
        {threads} {precision} {device}  of the settings, passed on as they are

    It prints, alone or as the last line, `{"samples_ms": [...]}`: milliseconds of one inference
    each, with `"reference_samples_ms"` as long beside it where the command has `{reference}`.
    `latency_ms` serves as another name for `samples_ms`. `"library"`, a text such as "tflite 2.19",
    says what ran the file, and is shown with the times.

    With `{reference}` one run gives candidate and reference side by side, so that a device whose
    speed drifts slows both. Without it the program runs once for each in turn.

    The file is compared with the network on this machine before it is sent, by the runtime that
    exports it. `outputs` are the program's where the command has `{outputs}`, else that runtime's.

    Args:
        settings: threads and precision as the program takes them; the file itself is float32.
        command: the program and its arguments.
        device_name: what it runs on; part of the identity, so that devices are not mixed up.
        artefact: what is exported: "onnx", "pt2" (`torch.export`) or "pte" (ExecuTorch).
        rounds: inferences per run of the program.
        timeout_s: longest wall time of one run; then the program and its children are killed.
            What it started as a daemon, such as the server of adb, is not waited for and lives on.
        retries: further tries after a failed run.

    Raises:
        ConfigError: an option makes no sense.
        RuntimeUnavailableError: there is no such program.
        MissingExtraError: the library that exports is not installed.
    """

    name: ClassVar[str] = "command"
    library: ClassVar[str] = "torch"
    """Of the export, as far as it can be told here; what runs on the device only the program knows."""
    device_kinds: ClassVar[tuple[str, ...]] = ("cpu", "gpu", "npu", "dsp")
    precisions: ClassVar[tuple[str, ...]] = ("float32", "bfloat16", "float16", "int8")
    runs_here: ClassVar[bool] = False
    examples: ClassVar[Mapping[str, str]] = MappingProxyType(
        {
            "command": 'command=["python", "on_phone.py", "{model}", "{rounds}"], a program that '
            'prints {"samples_ms": [...]} as its last line',
            "device_name": "device_name=phone",
        }
    )

    def __init__(
        self,
        settings: RuntimeSettings | None = None,
        *,
        command: Annotated[list[str], AfterValidator(checked_command)],
        device_name: Annotated[str, Field(min_length=1)],
        artefact: Literal["onnx", "pt2", "pte"] = "onnx",
        rounds: Annotated[int, Field(ge=1)] = 50,
        timeout_s: Annotated[float, Field(gt=0)] = 600.0,
        retries: Annotated[int, Field(ge=0)] = 1,
    ) -> None:
        given = {
            "command": command,
            "device_name": device_name,
            "artefact": artefact,
            "rounds": rounds,
            "timeout_s": timeout_s,
            "retries": retries,
        }
        problems = option_problems(type(self), given)
        if problems:
            raise ConfigError("runtime `command`", [f"{k}: {v}" for k, v in problems.items()])
        super().__init__(settings)
        if shutil.which(command[0]) is None:
            raise RuntimeUnavailableError(
                f"runtime `command`: there is no program `{command[0]}`; give its full path, or "
                "make it executable"
            )
        self.artefact, self.device_name, self.rounds = artefact, device_name, rounds
        self.exporter = _EXPORTERS[artefact](RuntimeSettings())
        self.program = Program(tuple(command), timeout_s=timeout_s, retries=retries)

    @property
    def artefact_name(self) -> str:  # type: ignore[override]
        return self.exporter.artefact_name

    def identity(self, example_inputs: ExampleInputs) -> dict[str, Any]:
        return {
            **super().identity(example_inputs),
            "library": None,
            "library_version": None,
            "device_name": self.device_name,
        }

    def options(self) -> dict[str, Any]:
        return {
            "command": list(self.program.command),
            "artefact": self.artefact,
            "rounds": self.rounds,
        }

    def load(self, network: nn.Module, example_inputs: ExampleInputs) -> CommandSession:
        folder = _folder()
        try:
            path = self.save(network, example_inputs, Path(folder.name) / self.artefact_name)
            return self._session(path, example_inputs, folder)
        except BaseException:
            folder.cleanup()
            raise

    def save(self, network: nn.Module, example_inputs: ExampleInputs, path: str | Path) -> Path:
        """Export, after comparing what the file computes on this machine with the network.

        Raises:
            ExportError: the network cannot be exported, or the file computes something else.
        """
        path = Path(path)
        self.exporter.save(network, example_inputs, path)
        if self.artefact == "pt2":  # the others compare while they export
            plain = frozen_copy(network).to("cpu", torch.float32)
            seen = informative(plain, example_inputs)
            with self.exporter.load_file(path, seen) as session:
                check_agreement(session.outputs(), plain, seen, subject="pt2")
        return path

    def load_file(self, path: str | Path, example_inputs: ExampleInputs) -> CommandSession:
        path = check_file(path, self.name)
        self.exporter.load_file(path, example_inputs).close()  # damaged or made for other inputs
        return self._session(path.resolve(), example_inputs, _folder())

    def _session(
        self, path: Path, example_inputs: ExampleInputs, folder: tempfile.TemporaryDirectory[str]
    ) -> CommandSession:
        return CommandSession(self, path, example_inputs, folder)


def _folder() -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory(prefix="wgates-command-")


class CommandSession(BaseSession):
    """A file and inputs for the program, and times it printed that nobody has asked for yet."""

    timed_elsewhere = True

    def __init__(
        self,
        runtime: CommandRuntime,
        path: Path,
        example_inputs: ExampleInputs,
        folder: tempfile.TemporaryDirectory[str],
    ) -> None:
        super().__init__(runtime.identity(example_inputs))
        self._runtime, self._example_inputs = runtime, example_inputs
        self._folder: tempfile.TemporaryDirectory[str] | None = folder
        self.path = path
        self._inputs = Path(folder.name) / "inputs.npz"
        self._outputs = Path(folder.name) / "outputs.npz"
        arrays = {name: tensor.numpy() for name, tensor in cpu_tensors(example_inputs).items()}
        np.savez(self._inputs, **arrays)  # type: ignore[arg-type]
        self._left_ms: list[float] = []
        self._partner: CommandSession | None = None
        self._leads = True

    def elapsed_ms(self) -> float:
        """The next time the program printed; where none is left, it is run again."""
        self._refuse_closed()
        if not self._left_ms:
            self._more()
        return self._left_ms.pop(0)

    @contextmanager
    def paired(self, reference: BaseSession) -> Iterator[None]:
        """Within, both sessions take their times from runs of both, where the command can."""
        together = (
            "reference" in self._runtime.program.placeholders
            and isinstance(reference, CommandSession)
            and reference is not self
        )
        if not together:
            yield
            return
        assert isinstance(reference, CommandSession)
        both = ((self, reference), (reference, self))
        for mine, other in both:
            mine._partner, mine._left_ms = other, []
        self._leads, reference._leads = True, False
        try:
            yield
        finally:
            for mine, _ in both:
                mine._partner, mine._left_ms = None, []

    def forget(self) -> None:
        """Begin with a run of its own: what is left of an earlier one met the machine as it was then."""
        self._left_ms = []
        if self._partner is not None:
            self._partner._left_ms = []

    def _more(self) -> None:
        if self._partner is not None and not self._leads:
            self._partner._more()
            return
        other = self._partner or self
        call = self._call(self._runtime.rounds, reference=other.path)
        samples, reference_samples = self._runtime.program.times(call)
        self._left_ms += samples
        if self._partner is not None:
            self._partner._left_ms += reference_samples

    def _call(self, rounds: int, *, reference: Path) -> Call:
        settings = self._runtime.settings
        return Call(
            model=self.path,
            reference=reference,
            inputs=self._inputs,
            outputs=self._outputs,
            rounds=rounds,
            threads=settings.threads,
            precision=settings.precision,
            device=settings.device,
        )

    @property
    def reported_library(self) -> str | None:
        """What the program said it ran the file with."""
        return self._runtime.program.library

    def run(self) -> None:
        """The program, for a single round."""
        self._refuse_closed()
        self._runtime.program.times(self._call(1, reference=self.path))

    def outputs(self) -> list[Tensor]:
        self._refuse_closed()
        if "outputs" not in self._runtime.program.placeholders:
            with self._runtime.exporter.load_file(self.path, self._example_inputs) as session:
                return session.outputs()
        self._outputs.unlink(missing_ok=True)
        self.run()
        try:
            return _arrays(self._outputs)
        except Exception as error:  # numpy raises whatever the program's bytes make it raise
            raise ExportError(
                f"command `{self._runtime.program.shown}`: its outputs are not readable "
                f"({type(error).__name__}: {error}); write them to {{outputs}} as an .npz of plain "
                "arrays"
            ) from error

    def _refuse_closed(self) -> None:
        if self._folder is None:
            raise RuntimeError("this session is closed; load the network again")

    def close(self) -> None:
        if self._folder is not None:
            self._folder.cleanup()
        self._folder, self._left_ms = None, []


def _arrays(path: Path) -> list[Tensor]:
    """Arrays of an .npz in order, as float32. Raises whatever numpy does on a damaged file."""
    with path.open("rb") as file:
        found = np.load(file, allow_pickle=False)
        if not isinstance(found, np.lib.npyio.NpzFile):
            raise ValueError("a lone array")
        if not found.files:
            raise ValueError("no arrays")
        return [torch.from_numpy(np.array(found[name], dtype=np.float32)) for name in found.files]
