"""Runtimes whose artefact is an ONNX model: export, agreement, and one export for a family of widths."""

from __future__ import annotations

import warnings
from abc import abstractmethod
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from wgates_plugin.calling import informative
from wgates_plugin.errors import ExportError, FileFormatError, RuntimeUnavailableError
from wgates_plugin.files import atomic_path
from wgates_plugin.latency.base import (
    BaseRuntime,
    BaseSession,
    Family,
    ResizeFamily,
    check_file,
    frozen_copy,
    require,
)
from wgates_plugin.latency.layer_times import PROFILED_RUNS
from wgates_plugin.latency.onnx_export import (
    check_agreement,
    cpu_tensors,
    describe_failure,
    export_checked,
    export_dynamo,
    export_torchscript,
)
from wgates_plugin.latency.onnx_template import OnnxTemplate, Sliced

if TYPE_CHECKING:
    from wgates_plugin.calling import ExampleInputs
    from wgates_plugin.channels import ChannelSpace

_FED = ("undefined", "float", "bool", "uint8", "int8", "int16", "int32", "int64")
"""ONNX's names for the types of inputs that example inputs can have."""


class OnnxModelRuntime(BaseRuntime):
    """A runtime of serialised ONNX models, all shapes fixed to the example's."""

    artefact_name: ClassVar[str] = "model.onnx"

    @abstractmethod
    def at_float32(self) -> OnnxModelRuntime:
        """The same runtime computing in float32, for comparing numbers."""

    @abstractmethod
    def session_of(
        self,
        model: bytes,
        example_inputs: ExampleInputs,
        *,
        initializers: Mapping[str, np.ndarray] | None = None,
    ) -> BaseSession:
        """A session of a serialised model.

        Args:
            initializers: values of the initializers that the model only declares (as external).

        Raises:
            ExportError: the model's inputs are not the example's.
            RuntimeUnavailableError: the runtime would not compute as its settings say.
        """

    @abstractmethod
    def layer_times_ms(
        self,
        model: bytes,
        example_inputs: ExampleInputs,
        owners: Mapping[str, Sequence[str]],
        *,
        initializers: Mapping[str, np.ndarray] | None = None,
        runs: int = PROFILED_RUNS,
    ) -> dict[str, float]:
        """Layer name -> ms by the runtime's own profile of `runs` inferences.

        Args:
            owners: node or tensor name of the model -> layers it may belong to.
        """

    def load(self, network: nn.Module, example_inputs: ExampleInputs) -> BaseSession:
        return self.session_of(self._export(network, example_inputs), example_inputs)

    def save(self, network: nn.Module, example_inputs: ExampleInputs, path: str | Path) -> Path:
        """Write the ONNX model after comparing it, as the runtime computes it, with the network.

        Raises:
            ExportError: no exporter gives a model that agrees.
        """
        model = self._export(network, example_inputs)
        with atomic_path(path) as part:
            part.write_bytes(model)
        return Path(path)

    def load_file(self, path: str | Path, example_inputs: ExampleInputs) -> BaseSession:
        path = check_file(path, self.name)
        try:
            return self.session_of(_whole_model(path, example_inputs), example_inputs)
        except (ExportError, RuntimeUnavailableError):
            raise
        except Exception as error:
            reason = str(error).strip().split("\n")[-1]
            raise FileFormatError(
                f"{self.name} artefact `{path}`: cannot be loaded ({reason}); it is damaged, or made "
                "for another version, or with operators or types that this runtime lacks: export "
                "it again for this one"
            ) from error

    def family(
        self, network: nn.Module, space: ChannelSpace, example_inputs: ExampleInputs
    ) -> Family:
        return OnnxFamily(self, network, space, example_inputs)

    def _export(self, network: nn.Module, example_inputs: ExampleInputs) -> bytes:
        exact = self.at_float32()
        seen = informative(network, example_inputs)

        def run(model: bytes) -> list[Tensor]:
            with exact.session_of(model, seen) as session:
                return session.outputs()

        return export_checked(network, seen, run)


def feeds_of(
    wanted: Iterable[tuple[Collection[str], Iterable[int]]],
    example_inputs: ExampleInputs,
    runtime: str,
) -> dict[str, np.ndarray]:
    """Input name -> array, for a model's inputs as (names, shape).

    Names must match; an unused input has no counterpart in the model.

    Raises:
        ExportError: an input is missing or of another shape.
    """
    tensors = cpu_tensors(example_inputs)
    feeds: dict[str, np.ndarray] = {}
    problems = []
    for names, shape in wanted:
        name = next((name for name in names if name in tensors), None)
        if name is None:
            problems.append(f"`{min(names, default='')}` is not among the example inputs")
        elif list(tensors[name].shape) != list(shape):
            problems.append(f"`{name}` is {list(tensors[name].shape)}, made for {list(shape)}")
        else:
            feeds[name] = np.ascontiguousarray(tensors[name].numpy())
    if problems:
        raise ExportError(
            f"{runtime}: the model does not take these example inputs: {'; '.join(problems)}; give "
            "inputs of the exported names and shapes, or export again"
        )
    return feeds


def _whole_model(path: Path, example_inputs: ExampleInputs) -> bytes:
    """The model with all its weights, those that lie in files beside it included, and with the
    example's sides where its inputs leave them open.

    Raises:
        ExportError: an input is of a type that is not fed.
    """
    onnx = require("onnx", extra="onnx", purpose="reading ONNX files")
    serialised = path.read_bytes()
    model = onnx.load_from_string(serialised)
    _check_types(onnx, path, model.graph)
    outside = any(
        tensor.data_location == onnx.TensorProto.EXTERNAL for tensor in model.graph.initializer
    )
    if outside:
        model = onnx.load(path)
    tensors, closed = cpu_tensors(example_inputs), False
    for value in model.graph.input:
        sides = value.type.tensor_type.shape.dim
        if value.name not in tensors or len(sides) != tensors[value.name].ndim:
            continue  # told when the session is made
        for side, given in zip(sides, tensors[value.name].shape, strict=True):
            if side.dim_value < 1:
                side.dim_value, closed = given, True
    whole: bytes = model.SerializeToString() if outside or closed else serialised
    return whole


def _check_types(onnx: ModuleType, path: Path, graph: Any) -> None:
    """Raises ExportError where an input takes other floats than float32, or no numbers."""
    weights = {tensor.name for tensor in graph.initializer}
    types = {
        value.name: onnx.TensorProto.DataType.Name(value.type.tensor_type.elem_type).lower()
        for value in graph.input
        if value.name not in weights
    }
    problems = [f"`{name}` is {kind}" for name, kind in types.items() if kind not in _FED]
    if problems:
        raise ExportError(
            f"ONNX model `{path}`: input {', '.join(problems)}; this package feeds float32, and whole "
            "numbers where a model takes them: export it with such inputs, whatever it computes in"
        )


class OnnxFamily:
    """Sessions at any widths from one template, or the slow way where the template is no good.

    The template is compared once, at half widths, with the network that `surgery.resize` gives.
    Where they disagree (a shape frozen into the graph as a constant, for example) a RuntimeWarning
    says so and every session is resized, exported and checked by itself.
    """

    def __init__(
        self,
        runtime: OnnxModelRuntime,
        network: nn.Module,
        space: ChannelSpace,
        example_inputs: ExampleInputs,
    ) -> None:
        self._runtime = runtime
        self._network = frozen_copy(network).to("cpu", torch.float32)
        self._space = space
        self._example_inputs = example_inputs
        self._slow = ResizeFamily(runtime, self._network, space, example_inputs)
        self._template: OnnxTemplate | None = None
        self._latest: tuple[tuple[OnnxTemplate, tuple[int, ...]], Sliced] | None = None
        reasons = []
        for exporter in (export_torchscript, export_dynamo):
            try:
                template = OnnxTemplate(self._network, example_inputs, exporter=exporter)
                self._check(template)
                self._template = template
                return
            except RuntimeUnavailableError:
                raise
            except Exception as error:
                reasons.append(describe_failure(exporter, error))
        warnings.warn(
            f"{runtime.name}: one export cannot serve all widths of this network ("
            + "; ".join(reasons)
            + "); every latency sample is exported by itself, which is slower but as exact",
            RuntimeWarning,
            stacklevel=3,
        )

    @property
    def from_template(self) -> bool:
        """Whether sessions come from the template."""
        return self._template is not None

    def session(self, widths: Sequence[int]) -> BaseSession:
        if self._template is None:
            return self._slow.session(widths)
        graph, beside = self._sliced(self._template, widths)
        return self._runtime.session_of(graph, self._example_inputs, initializers=beside)

    def layer_times_ms(
        self, widths: Sequence[int], *, runs: int = PROFILED_RUNS
    ) -> dict[str, float]:
        """Layer name -> ms at `widths` by the runtime's own profile; empty without a template.

        An export of its own names weights as it likes, so its kernels have no known layer.
        """
        if self._template is None:
            return {}
        graph, beside = self._sliced(self._template, widths)
        return self._runtime.layer_times_ms(
            graph, self._example_inputs, self._template.owners, initializers=beside, runs=runs
        )

    def _sliced(self, template: OnnxTemplate, widths: Sequence[int]) -> Sliced:
        """The template at `widths`; a sample asks for the same ones twice."""
        from wgates_plugin.surgery import resize_map

        wanted = (template, tuple(widths))
        if self._latest is None or self._latest[0] != wanted:
            change = resize_map(self._network, self._space, widths)
            self._latest = wanted, template.at(change)
        return self._latest[1]

    def _check(self, template: OnnxTemplate) -> None:
        from wgates_plugin.surgery import resize

        widths = self._space.half_widths()
        smaller = resize(self._network, self._space, widths).eval()
        graph, beside = self._sliced(template, widths)
        exact, seen = self._runtime.at_float32(), informative(smaller, self._example_inputs)
        with exact.session_of(graph, seen, initializers=beside) as session:
            check_agreement(session.outputs(), smaller, seen)
