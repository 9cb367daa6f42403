"""Exported files by their suffix: what they are, which runtime takes them, what input they carry."""

from __future__ import annotations

import io
import zipfile
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from wgates_plugin.errors import ConfigError, FileFormatError
from wgates_plugin.latency.base import BaseRuntime, require
from wgates_plugin.latency.program_file import check_program_file

ARTEFACTS: Mapping[str, str] = MappingProxyType(
    {
        ".onnx": "an ONNX model",
        ".pt2": "a torch.export program",
        ".pte": "an ExecuTorch program",
    }
)
WEIGHTS = (".safetensors", ".pt", ".pth", ".ckpt", ".bin")
"""Suffixes of files that hold tensors and no network."""

_COUNTED = {
    kind: getattr(torch, kind) for kind in ("bool", "uint8", "int8", "int16", "int32", "int64")
}
_OF_PTE = {0: "uint8", 1: "int8", 2: "int16", 3: "int32", 4: "int64", 11: "bool"}
"""Numbers that an ExecuTorch program has for types -> their names."""

_PATH_SUFFIXES = (*ARTEFACTS, *WEIGHTS, ".xml", ".tflite", ".engine", ".py", ".yaml", ".json")


class InputSide(NamedTuple):
    """One input of an exported file: its shape, 0 for a side that is left open, and its type."""

    shape: tuple[int, ...]
    dtype: torch.dtype = torch.float32


Inputs = dict[str, InputSide]


def looks_like_path(name: str) -> bool:
    """Whether a user who wrote `name` meant a file: by a suffix or a slash.

    >>> [looks_like_path(n) for n in ("model.onnx", "out/model", "resnet18", "timm:hub/net")]
    [True, True, False, False]
    """
    if ":" in name.removeprefix(Path(name).drive):
        return False
    return "/" in name or "\\" in name or Path(name).suffix.lower() in _PATH_SUFFIXES


def check_artefact(path: Path, runtime: BaseRuntime) -> None:
    """Refuse a file that, by its suffix, another runtime takes; others are left to the runtime.

    Raises:
        ConfigError: says what the file is, what the runtime takes and which runtimes take the file.
    """
    suffix, wanted = path.suffix.lower(), Path(runtime.artefact_name).suffix
    if suffix in ARTEFACTS and suffix != wanted:
        raise ConfigError(
            f"runtime `{runtime.name}`",
            [
                f"`{path}` is {ARTEFACTS[suffix]}; it takes {ARTEFACTS[wanted]} (`*{wanted}`). Use "
                f"a runtime that takes `*{suffix}`: {', '.join(_takers(suffix))}"
            ],
        )


def check_no_weights(path: Path) -> None:
    """Refuse a file of tensors where an exported network is needed.

    Raises:
        ConfigError: it is one by its suffix.
    """
    if path.suffix.lower() in WEIGHTS:
        raise ConfigError(
            f"file `{path}`",
            [
                "holds weights and no network; give the network's name and these as --weights, or "
                "an exported file such as model.onnx"
            ],
        )


def _takers(suffix: str) -> list[str]:
    from wgates_plugin.latency import RUNTIMES

    fixed = [
        name
        for name, kind in RUNTIMES.items()
        if Path(str(getattr(kind, "artefact_name", ""))).suffix == suffix
    ]
    return [*fixed, f"command (artefact={suffix[1:]})"]


def input_sides(path: Path) -> Inputs:
    """Input name -> shape and type as the exported file carries them; empty where it tells none.

    The type is float32 where it is none of integers or booleans: runtimes take no other floats.

    Raises:
        FileFormatError: the file is damaged, or reading it could execute code.
        MissingExtraError: the library that reads it is not installed.
    """
    readers = {".onnx": _of_onnx, ".pt2": _of_pt2, ".pte": _of_pte}
    reader = readers.get(path.suffix.lower())
    return {} if reader is None else reader(path)


def _of_onnx(path: Path) -> Inputs:
    onnx = require("onnx", extra="onnx", purpose=f"reading `{path}`")
    try:
        graph = onnx.load(str(path), load_external_data=False).graph
    except Exception as error:  # protobuf raises an error type of its own making
        raise FileFormatError(
            f"`{path}`: not readable as an ONNX model ({error}); it is corrupt or was cut off, "
            "export it again"
        ) from error
    weights = {tensor.name for tensor in graph.initializer}
    inputs = {}
    for value in graph.input:
        if value.name not in weights:
            kind = value.type.tensor_type
            shape = tuple(int(side.dim_value) for side in kind.shape.dim)
            name = onnx.TensorProto.DataType.Name(kind.elem_type).lower()
            inputs[value.name] = InputSide(shape, _COUNTED.get(name, torch.float32))
    return inputs


def _of_pt2(path: Path) -> Inputs:
    check_program_file(path)
    with zipfile.ZipFile(path) as archive:
        name = next(n for n in archive.namelist() if n.endswith("data/sample_inputs/model.pt"))
        sample: Any = torch.load(io.BytesIO(archive.read(name)), weights_only=True)
    args, kwargs = sample if isinstance(sample, tuple) and len(sample) == 2 else ((), {})
    named = {f"input_{index}": value for index, value in enumerate(args)} | dict(kwargs)
    if not all(isinstance(value, Tensor) for value in named.values()):
        return {}
    counted = _COUNTED.values()
    return {
        key: InputSide(tuple(value.shape), value.dtype if value.dtype in counted else torch.float32)
        for key, value in named.items()
    }


def _of_pte(path: Path) -> Inputs:
    runtime = require(
        "executorch.runtime", extra="executorch", purpose=f"reading `{path}`"
    ).Runtime.get()
    try:
        metadata = runtime.load_program(path.read_bytes()).load_method("forward").metadata
        each = [metadata.input_tensor_meta(index) for index in range(metadata.num_inputs())]
        inputs = [
            InputSide(tuple(one.sizes()), getattr(torch, _OF_PTE.get(one.dtype(), "float32")))
            for one in each
        ]
    except Exception as error:
        raise FileFormatError(
            f"`{path}`: not readable as an ExecuTorch program ({error}); it is corrupt, was cut off "
            "or is of another version, export it again"
        ) from error
    return {f"input_{index}": one for index, one in enumerate(inputs)}
