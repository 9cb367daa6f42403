"""The machine and the libraries a measurement was taken with. No host name, path or date."""

from __future__ import annotations

import copy
import functools
import importlib.metadata
import os
import platform
from pathlib import Path
from typing import Any

import torch

_LIBRARIES = (
    "torch",
    "numpy",
    "torchvision",
    "torch-pruning",
    "onnx",
    "onnxruntime",
    "onnxruntime-gpu",
    "onnxscript",
    "openvino",
    "executorch",
)


def library_version(distribution: str) -> str | None:
    """Version of an installed distribution, without importing it; None when it is not there."""
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


@functools.cache
def cpu_name() -> str:
    """The processor's model name as the operating system gives it."""
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").split("\n"):
            if line.lower().startswith(("model name", "hardware")):
                return line.partition(":")[2].strip()
    except OSError:
        pass  # Only Linux has the file.
    return platform.processor() or platform.machine() or "unknown"


def usable_cores() -> int:
    """Cores this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def device_name(device: str) -> str:
    """Name of the chip behind a torch device string such as "cpu" or "cuda:0"."""
    if device.startswith("cuda") and torch.cuda.is_available():
        return torch.cuda.get_device_name(torch.device(device))
    return cpu_name() if device == "cpu" else device


@functools.cache
def _unchanging() -> dict[str, Any]:
    libraries = {name: version for name in _LIBRARIES if (version := library_version(name))}
    values: dict[str, Any] = {
        "cpu": cpu_name(),
        # One model name can cover chips whose widest vectors differ, above all in virtual machines.
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "machine": platform.machine(),
        "os": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "libraries": libraries,
    }
    if torch.cuda.is_available():
        values["gpu"] = torch.cuda.get_device_name()
        values["cuda"] = torch.version.cuda
        values["cudnn"] = torch.backends.cudnn.version()
    return values


def describe_environment() -> dict[str, Any]:
    """Processor, cores, operating system, Python and library versions, as plain JSON values."""
    return {**copy.deepcopy(_unchanging()), "cores": usable_cores()}
