"""TensorRT, through ONNX Runtime's provider: the ONNX model as an engine built for the GPU."""

from __future__ import annotations

import os
from typing import Any, ClassVar

from wgates_plugin.latency.base import RuntimeSettings
from wgates_plugin.latency.onnx_runtime import OnnxRuntime


class TensorRtRuntime(OnnxRuntime):
    """Runs `model.onnx` on a CUDA device through TensorRT; what TensorRT refuses runs on CUDA.

    An engine is built for each network while it is loaded, which takes seconds to minutes and is no
    part of latency. Float32 is asked for by default; on newer GPUs TensorRT then still multiplies in
    TF32 unless NVIDIA_TF32_OVERRIDE=0 is set in the environment; the identity says which. float16 lets
    it choose half precision layer by layer. The file itself is float32, compared with the network
    on the CPU.

    Args:
        settings: device "cuda[:index]" ("cuda" by default), precision float32 or float16.

    Raises:
        RuntimeUnavailableError: no CUDA device, or an ONNX Runtime without the provider.
    """

    name: ClassVar[str] = "tensorrt"
    device_kinds: ClassVar[tuple[str, ...]] = ("cuda",)
    precisions: ClassVar[tuple[str, ...]] = ("float32", "float16")
    gpu_provider: ClassVar[str] = "TensorrtExecutionProvider"

    def __init__(self, settings: RuntimeSettings | None = None) -> None:
        super().__init__(settings or RuntimeSettings(device="cuda"))

    def options(self) -> dict[str, Any]:
        if self.settings.precision != "float32":
            return {}
        return {"tf32": os.environ.get("NVIDIA_TF32_OVERRIDE") != "0"}

    def at_float32(self) -> OnnxRuntime:
        """ONNX Runtime on the CPU: an engine would cost minutes and rounds as it likes."""
        return OnnxRuntime()

    def _providers(self) -> list[Any]:
        half = self.settings.precision == "float16"
        chosen = {"device_id": self._device_index, "trt_fp16_enable": half}
        return [(self.gpu_provider, chosen), *super()._providers()]
