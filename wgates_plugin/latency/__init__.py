"""Runtimes and honest timing. A new runtime is one file here and one line in `RUNTIMES`."""

from __future__ import annotations

import difflib
from typing import Any

from wgates_plugin.errors import ConfigError, RuntimeUnavailableError
from wgates_plugin.latency.base import (
    BaseRuntime,
    BaseSession,
    Family,
    Runtime,
    RuntimeSettings,
    Session,
)
from wgates_plugin.latency.command import CommandRuntime
from wgates_plugin.latency.compiled import CompiledRuntime
from wgates_plugin.latency.cuda_graphs import CudaGraphsRuntime
from wgates_plugin.latency.eager import EagerRuntime
from wgates_plugin.latency.environment import describe_environment
from wgates_plugin.latency.executorch import ExecuTorchRuntime
from wgates_plugin.latency.grid import GridProbe, probe_grid
from wgates_plugin.latency.measurement import Measurement
from wgates_plugin.latency.onnx_runtime import OnnxRuntime
from wgates_plugin.latency.openvino import OpenVinoRuntime
from wgates_plugin.latency.options import option_problems
from wgates_plugin.latency.tensorrt import TensorRtRuntime
from wgates_plugin.latency.timing import measure

RUNTIMES: dict[str, type[BaseRuntime]] = {
    "eager": EagerRuntime,
    "compile": CompiledRuntime,
    "onnxruntime": OnnxRuntime,
    "openvino": OpenVinoRuntime,
    "executorch": ExecuTorchRuntime,
    "cuda-graphs": CudaGraphsRuntime,
    "tensorrt": TensorRtRuntime,
    "command": CommandRuntime,
}


def get_runtime(name: str, settings: RuntimeSettings | None = None, **options: Any) -> BaseRuntime:
    """The runtime called `name`; `options` are its own keyword arguments.

    Raises:
        RuntimeUnavailableError: no runtime has this name, or its device is not there.
        MissingExtraError: its library is not installed.
        ConfigError: the settings or options ask for what it does not have.
    """
    if name not in RUNTIMES:
        close = difflib.get_close_matches(str(name), RUNTIMES, n=2, cutoff=0.5)
        hint = f"did you mean {' or '.join(f'`{one}`' for one in close)}? " if close else ""
        raise RuntimeUnavailableError(
            f"runtime `{name}`: unknown; {hint}choose one of: {', '.join(RUNTIMES)}"
        )
    problems = option_problems(RUNTIMES[name], options)
    if problems:
        raise ConfigError(
            f"options of runtime `{name}`", [f"{key}: {words}" for key, words in problems.items()]
        )
    return RUNTIMES[name](settings, **options)


__all__ = [
    "RUNTIMES",
    "BaseRuntime",
    "BaseSession",
    "CommandRuntime",
    "CompiledRuntime",
    "CudaGraphsRuntime",
    "EagerRuntime",
    "ExecuTorchRuntime",
    "Family",
    "GridProbe",
    "Measurement",
    "OnnxRuntime",
    "OpenVinoRuntime",
    "Runtime",
    "RuntimeSettings",
    "Session",
    "TensorRtRuntime",
    "describe_environment",
    "get_runtime",
    "measure",
    "probe_grid",
]
