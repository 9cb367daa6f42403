"""ONNX Runtime: the network exported to ONNX and run with every graph optimisation."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
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

_PURPOSE = "the runtime `onnxruntime`"
_FATAL_ONLY = 4
_CUDA = "CUDAExecutionProvider"
_KERNEL = "_kernel_time"


class OnnxRuntime(OnnxModelRuntime):
    """Runs `model.onnx`, all shapes fixed to the example's, float32; on a CUDA device without TF32.

    Intra-operator threads are `settings.threads`, operators run one after another. Several threads
    stop spinning when an inference ends: candidate and reference live side by side, and the idle
    one would take the processor from the other.
    """

    name: ClassVar[str] = "onnxruntime"
    library: ClassVar[str] = "onnxruntime"
    device_kinds: ClassVar[tuple[str, ...]] = ("cpu", "cuda")
    gpu_provider: ClassVar[str] = _CUDA

    def __init__(self, settings: RuntimeSettings | None = None) -> None:
        require("onnx", extra="onnx", purpose=_PURPOSE)
        self._ort = require("onnxruntime", extra="onnx", purpose=_PURPOSE)
        super().__init__(settings)
        provider = self.gpu_provider if self._on_cuda else "CPUExecutionProvider"
        if provider not in self._ort.get_available_providers():
            raise RuntimeUnavailableError(
                f"runtime `{self.name}`: device `{self.settings.device}` needs {provider}, which "
                "this build lacks; pip install onnxruntime-gpu, or use the runtime `onnxruntime` "
                "on device `cpu`"
            )

    @property
    def _on_cuda(self) -> bool:
        return self.settings.device.startswith("cuda")

    @property
    def _device_index(self) -> int:
        return torch.device(self.settings.device).index or 0

    def identity(self, example_inputs: ExampleInputs) -> dict[str, Any]:
        # The GPU build is a distribution of another name, the module knows its version in both.
        version = str(self._ort.__version__)
        return {**super().identity(example_inputs), "library_version": version}

    def session_of(
        self,
        model: bytes,
        example_inputs: ExampleInputs,
        *,
        initializers: Mapping[str, np.ndarray] | None = None,
        profile: Path | None = None,
    ) -> OnnxSession:
        """As in `OnnxModelRuntime`; refused where ONNX Runtime fell back from the GPU to the CPU.

        Args:
            profile: prefix of the file that takes the times of single kernels.
        """
        options = self._ort.SessionOptions()
        options.intra_op_num_threads = self.settings.threads
        options.inter_op_num_threads = 1
        options.execution_mode = self._ort.ExecutionMode.ORT_SEQUENTIAL
        options.graph_optimization_level = self._ort.GraphOptimizationLevel.ORT_ENABLE_ALL
        if self.settings.threads > 1:
            options.add_session_config_entry("session.force_spinning_stop", "1")
        options.log_severity_level = _FATAL_ONLY
        if profile is not None:
            options.enable_profiling = True
            options.profile_file_prefix = str(profile)
        if initializers:
            values = [self._ort.OrtValue.ortvalue_from_numpy(v) for v in initializers.values()]
            options.add_external_initializers(list(initializers), values)
        native = self._ort.InferenceSession(model, options, providers=self._providers())
        first = native.get_providers()[0]
        if self._on_cuda and first != self.gpu_provider:
            raise RuntimeUnavailableError(
                f"runtime `{self.name}`: device `{self.settings.device}` asked for, but the session "
                f"runs on {first}: {self.gpu_provider} could not be started; install the GPU "
                "libraries this onnxruntime-gpu was built for, or use the runtime `onnxruntime` on "
                "device `cpu`"
            )
        wanted = [((item.name,), item.shape) for item in native.get_inputs()]
        feeds = feeds_of(wanted, example_inputs, self.name)
        identity = self.identity(example_inputs)
        session = (
            CudaOnnxSession(native, feeds, identity=identity, device_index=self._device_index)
            if self._on_cuda
            else OnnxSession(native, feeds, identity=identity)
        )
        session.holds = dict(initializers or {})
        return session

    def _providers(self) -> list[Any]:
        """ONNX Runtime's execution providers, the wanted one first, with their options."""
        providers: list[Any] = ["CPUExecutionProvider"]
        if self._on_cuda:
            chosen = {"device_id": self._device_index}
            if self.settings.precision == "float32":
                chosen["use_tf32"] = 0  # its default is 1
            providers.insert(0, (_CUDA, chosen))
        return providers

    def at_float32(self) -> OnnxRuntime:
        return self

    def layer_times_ms(
        self,
        model: bytes,
        example_inputs: ExampleInputs,
        owners: Mapping[str, Sequence[str]],
        *,
        initializers: Mapping[str, np.ndarray] | None = None,
        runs: int = PROFILED_RUNS,
    ) -> dict[str, float]:
        """As in `OnnxModelRuntime`; empty on a GPU, where a node's time is that of its launch."""
        if self._on_cuda:
            return {}
        with tempfile.TemporaryDirectory() as folder:
            session = self.session_of(
                model, example_inputs, initializers=initializers, profile=Path(folder) / "profile"
            )
            with session:
                for _ in range(runs + 1):
                    session.run()
                events = json.loads(Path(session.end_profile()).read_text(encoding="utf-8"))
        kernels = [_kernel(event, owners) for event in events if _is_kernel(event)]
        each = len(kernels) // (runs + 1)
        if not each:
            return {}
        starts = range(each, len(kernels), each)
        return charge(merged([kernels[start : start + each] for start in starts]))


def _is_kernel(event: Mapping[str, Any]) -> bool:
    return event.get("cat") == "Node" and event["name"].endswith(_KERNEL)


def _kernel(event: Mapping[str, Any], owners: Mapping[str, Sequence[str]]) -> Kernel:
    # A fused kernel in blocked memory order is named after the tensor it makes.
    name = event["name"].removesuffix(_KERNEL).removesuffix("_nchwc")
    before = event["args"].get("op_name") == "ReorderInput"
    return Kernel(tuple(owners.get(name, ())), event["dur"] / 1e3, before)


class OnnxSession(BaseSession):
    """A native session and arrays to feed it."""

    def __init__(
        self, native: Any, feeds: Mapping[str, np.ndarray], *, identity: Mapping[str, Any]
    ) -> None:
        super().__init__(identity)
        self._native = native
        self._feeds = dict(feeds)
        self.holds: dict[str, np.ndarray] = {}
        """Arrays whose memory the native session may share, so they must live as long."""

    def _call(self) -> Sequence[Any]:
        if self._native is None:
            raise RuntimeError("this session is closed; load the network again")
        found: Sequence[Any] = self._native.run(None, self._feeds)
        return found

    def run(self) -> None:
        self._call()

    def outputs(self) -> list[Tensor]:
        return [torch.from_numpy(np.array(value, dtype=np.float32)) for value in self._call()]

    def end_profile(self) -> str:
        """Path of the profile of a session made with one, complete."""
        return str(self._native.end_profiling())

    def close(self) -> None:
        self._native, self._feeds, self.holds = None, {}, {}


class CudaOnnxSession(OnnxSession):
    """Inputs and outputs stay on the device, so that `run` times the network and not the bus."""

    def __init__(
        self,
        native: Any,
        feeds: Mapping[str, np.ndarray],
        *,
        identity: Mapping[str, Any],
        device_index: int = 0,
    ) -> None:
        super().__init__(native, feeds, identity=identity)
        self._binding = native.io_binding()
        for name, value in feeds.items():
            self._binding.bind_cpu_input(name, value)
        for output in native.get_outputs():
            self._binding.bind_output(output.name, "cuda", device_index)
        self._binding.synchronize_inputs()

    def run(self) -> None:
        if self._binding is None:
            raise RuntimeError("this session is closed; load the network again")
        self._native.run_with_iobinding(self._binding)
        self._binding.synchronize_outputs()

    def close(self) -> None:
        self._binding = None  # it keeps the native session and the arrays on the device
        super().close()
