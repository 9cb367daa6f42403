"""OpenVINO: the network exported to ONNX, compiled by OpenVINO for the CPU."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from wgates_plugin.errors import RuntimeUnavailableError
from wgates_plugin.latency.base import (
    BaseSession,
    RuntimeSettings,
    require,
)
from wgates_plugin.latency.layer_times import PROFILED_RUNS, Kernel, charge, merged
from wgates_plugin.latency.onnx_model import OnnxModelRuntime, feeds_of

if TYPE_CHECKING:
    from wgates_plugin.calling import ExampleInputs

_PURPOSE = "the runtime `openvino`"
_PRECISION_HINTS = {"float32": "f32", "bfloat16": "bf16", "float16": "f16"}


class OpenVinoRuntime(OnnxModelRuntime):
    """Runs `model.onnx` on OpenVINO's CPU device, all shapes fixed to the example's.

    OpenVINO's own default computes in bfloat16 where the processor can; here it computes in
    float32 unless `settings.precision` asks for less, and the identity says which. A precision that
    the processor lacks is refused, where OpenVINO itself would quietly take another. The file itself
    is compared with the network at float32.

    Raises:
        RuntimeUnavailableError: while loading: OpenVINO would compute in another precision here.
    """

    name: ClassVar[str] = "openvino"
    library: ClassVar[str] = "openvino"
    precisions: ClassVar[tuple[str, ...]] = tuple(_PRECISION_HINTS)

    def __init__(self, settings: RuntimeSettings | None = None) -> None:
        require("onnx", extra="onnx", purpose=_PURPOSE)
        self._openvino = require("openvino", extra="openvino", purpose=_PURPOSE)
        super().__init__(settings)
        self._core = self._openvino.Core()
        self._latest: tuple[bytes, Any] | None = None  # a sample compiles the same model twice

    def session_of(
        self,
        model: bytes,
        example_inputs: ExampleInputs,
        *,
        initializers: Mapping[str, np.ndarray] | None = None,
    ) -> OpenVinoSession:
        """As in `OnnxModelRuntime`; refused where OpenVINO would compute in another precision."""
        compiled = self._compiled(model, initializers, profile=False)
        feeds = self._feeds(compiled, example_inputs)
        return OpenVinoSession(compiled, feeds, identity=self.identity(example_inputs))

    def layer_times_ms(
        self,
        model: bytes,
        example_inputs: ExampleInputs,
        owners: Mapping[str, Sequence[str]],
        *,
        initializers: Mapping[str, np.ndarray] | None = None,
        runs: int = PROFILED_RUNS,
    ) -> dict[str, float]:
        compiled = self._compiled(model, initializers, profile=True)
        names = {
            operation.get_friendly_name(): _original_names(operation)
            for operation in compiled.get_runtime_model().get_ops()
        }
        profiles = []
        feeds = self._feeds(compiled, example_inputs)
        with OpenVinoSession(compiled, feeds, identity={}) as session:
            for _ in range(runs + 1):
                session.run()
                profiles.append(
                    [
                        _kernel(record, names.get(record.node_name, ()), owners)
                        for record in session.profile()
                        if record.status == record.Status.EXECUTED
                    ]
                )
        return charge(merged(profiles[1:]))

    def _feeds(self, compiled: Any, example_inputs: ExampleInputs) -> dict[str, np.ndarray]:
        wanted = [
            (
                item.names,
                [side.get_length() if side.is_static else -1 for side in item.partial_shape],
            )
            for item in compiled.inputs
        ]
        return feeds_of(wanted, example_inputs, self.name)

    def at_float32(self) -> OpenVinoRuntime:
        return OpenVinoRuntime(dataclasses.replace(self.settings, precision="float32"))

    def _compiled(
        self, model: bytes, initializers: Mapping[str, np.ndarray] | None, *, profile: bool
    ) -> Any:
        if self._latest is None or self._latest[0] is not model:
            whole = _with_values(model, initializers) if initializers else model
            self._latest = model, self._core.read_model(whole)
        settings = {
            "INFERENCE_PRECISION_HINT": _PRECISION_HINTS[self.settings.precision],
            "INFERENCE_NUM_THREADS": self.settings.threads,
            "PERFORMANCE_HINT": "LATENCY",
            "NUM_STREAMS": "1",
            # Pinning would bind the caller's own thread to one core, for good.
            "ENABLE_CPU_PINNING": False,
            "PERF_COUNT": profile,
        }
        compiled = self._core.compile_model(self._latest[1], "CPU", settings)
        self._check_precision(compiled)
        return compiled

    def _check_precision(self, compiled: Any) -> None:
        """The hint is only a hint: a processor without float16 takes bfloat16, or float32."""
        asked = self.settings.precision
        hint = compiled.get_property("INFERENCE_PRECISION_HINT").get_type_name()
        if hint != _PRECISION_HINTS[asked]:
            known = {hint: precision for precision, hint in _PRECISION_HINTS.items()}
            found = known.get(hint, hint)
            instead = found if hint in known else "float32"
            raise RuntimeUnavailableError(
                f"runtime `openvino`: precision `{asked}` asked for, but on this processor OpenVINO "
                f"would compute in {found}; ask for precision `{instead}`"
            )


def _with_values(model: bytes, initializers: Mapping[str, np.ndarray]) -> bytes:
    """The model with its declared initializers inside: OpenVINO reads external ones from disk."""
    onnx = require("onnx", extra="onnx", purpose=_PURPOSE)
    whole = onnx.load_from_string(model)
    for tensor in whole.graph.initializer:
        if tensor.name in initializers:
            del tensor.external_data[:]
            tensor.data_location = onnx.TensorProto.DEFAULT
            tensor.raw_data = initializers[tensor.name].tobytes()
    return bytes(whole.SerializeToString())


def _original_names(operation: Any) -> tuple[str, ...]:
    info = operation.get_rt_info()
    if "originalLayersNames" not in info:
        return ()
    names = info["originalLayersNames"]
    return tuple(str(getattr(names, "value", names)).split(","))


def _kernel(record: Any, names: Sequence[str], owners: Mapping[str, Sequence[str]]) -> Kernel:
    found = next((tuple(owners[name]) for name in names if owners.get(name)), ())
    return Kernel(found, record.real_time.total_seconds() * 1e3, record.node_type == "Reorder")


class OpenVinoSession(BaseSession):
    """One inference request whose input tensors are set once."""

    def __init__(
        self, compiled: Any, feeds: Mapping[str, np.ndarray], *, identity: Mapping[str, Any]
    ) -> None:
        super().__init__(identity)
        openvino = require("openvino", extra="openvino", purpose=_PURPOSE)
        self._compiled = compiled
        self._request = compiled.create_infer_request()
        self._feeds = dict(feeds)  # the request reads their memory
        for name, value in self._feeds.items():
            self._request.set_tensor(name, openvino.Tensor(value, shared_memory=True))

    def run(self) -> None:
        if self._request is None:
            raise RuntimeError("this session is closed; load the network again")
        self._request.infer()

    def outputs(self) -> list[Tensor]:
        self.run()
        values = [
            self._request.get_output_tensor(i).data for i in range(len(self._compiled.outputs))
        ]
        return [torch.from_numpy(np.array(value, dtype=np.float32)) for value in values]

    def profile(self) -> Sequence[Any]:
        """Per-kernel records of the last inference, for a model compiled with counters."""
        found: Sequence[Any] = self._request.profiling_info
        return found

    def close(self) -> None:
        self._request, self._compiled, self._feeds = None, None, {}
