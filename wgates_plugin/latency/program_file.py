"""A check of `torch.export` files before torch reads them, so that reading executes nothing.

`torch.export.load` is not safe on a file from elsewhere (torch 2.13): it unpickles tensors marked
`use_pickle`, falls back to full unpickling of sample inputs, evaluates symbolic expressions
through sympy, imports modules named by enums, compiles guard code and looks operators up anywhere
under `torch`, those that write files among them. Programs of fixed shapes made of operators that
compute need none of these, so any is refused.
"""

from __future__ import annotations

import io
import json
import re
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from wgates_plugin.errors import FileFormatError, first_line

_MEMBER = re.compile(
    r"data/weights/(weight_\d+|model_weights_config\.json)"
    r"|data/constants/(tensor_\d+|model_constants_config\.json)"
    r"|data/sample_inputs/model\.pt"
    r"|models/model\.json"
    r"|archive_format|archive_version|byteorder|version|\.data/(version|serialization_id)"
)
_OPERATOR = re.compile(r"torch\.ops\.([A-Za-z]\w*)\.(\w+)\.[A-Za-z]\w*")
_COMPUTE = ("aten", "prims", "quantized", "quantized_decomposed", "torchvision")
"""Namespaces whose operators compute and do nothing else, but for `_OPEN_FILES`."""

_OPEN_FILES = ("from_file", "save")
_OTHERS = (
    "_c10d_functional", "_c10d_functional_autograd", "_dtensor", "_native", "_quantized", "_test", "c10d",
    "debug_mode_ops", "debugprims", "export", "fbgemm", "image", "inductor", "inductor_prims", "mkl",
    "mkldnn", "mkldnn_prepacked", "onednn", "onnx", "prim", "profiler", "quantization", "rngprims", "rpc",
    "sparse", "static_runtime", "symm_mem", "torchaudio", "torio", "video_reader",
)  # fmt: skip
"""Further ones of torch 2.13 and its domain libraries. What is in none of these was registered by code
of the user's; it is taken as long as it is given no words, such as a path."""

_CONFIGS = ("data/weights/model_weights_config.json", "data/constants/model_constants_config.json")


def check_program_file(path: Path) -> None:
    """Refuse a .pt2 file that is damaged or whose loading would execute code.

    Raises:
        FileFormatError: naming the first thing that has no place in such a file.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            if archive.testzip() is not None:
                raise zipfile.BadZipFile("a checksum is wrong")
            problem = next(_problems(archive), None)
    except Exception as error:  # Damage has as many names as there are fields.
        raise FileFormatError(
            f"exported program `{path}`: not readable ({first_line(error)}); it is corrupt or was "
            "cut off, export it again"
        ) from error
    if problem is not None:
        raise FileFormatError(
            f"exported program `{path}`: {problem}; using it could execute code, so it is "
            "refused; export it again with this package"
        )


def _problems(archive: zipfile.ZipFile) -> Iterator[str]:
    names = archive.namelist()
    root = names[0].partition("/")[0] if names else ""
    members = {name.removeprefix(f"{root}/") for name in names}
    if len(members) != len(names):
        yield "it holds a member twice"
    for member in sorted(members):
        if not _MEMBER.fullmatch(member):
            yield f"it holds `{member}`, which no exported program of this package has"
    # Without this member torch takes the file for an older layout and reads it with pickle.
    if "archive_format" not in members:
        yield "it has no `archive_format`"
    for name in _CONFIGS:
        config = json.loads(archive.read(f"{root}/{name}"))
        for tensor, facts in config["config"].items():
            if facts.get("use_pickle") is not False or not re.fullmatch(
                r"(weight|tensor)_\d+", facts.get("path_name", "")
            ):
                yield f"tensor `{tensor}` is not stored as plain bytes"
    try:
        sample = io.BytesIO(archive.read(f"{root}/data/sample_inputs/model.pt"))
        torch.load(sample, weights_only=True)
    except Exception as error:  # Whatever torch raises, it would next unpickle without limits.
        yield f"its sample inputs are more than tensors ({type(error).__name__})"
    program = json.loads(archive.read(f"{root}/models/model.json"))
    if program.get("guards_code"):
        yield "it carries guard code"
    yield from _unsafe_parts(program)


def _unsafe_parts(value: Any) -> Iterator[str]:
    """Walk the program's JSON for expressions, foreign operators and enums."""
    if isinstance(value, dict):
        for key, item in value.items():
            if key in ("expr_str", "as_expr"):
                yield "it carries a symbolic expression"
            if key == "nodes" and isinstance(item, list):
                for node in item:
                    target = node.get("target") if isinstance(node, dict) else node
                    if not isinstance(target, str) or not _computes(target, node):
                        yield f"it calls `{target}`, which is not known to compute and do nothing else"
            yield from _unsafe_parts(item)
    elif isinstance(value, list):
        for item in value:
            yield from _unsafe_parts(item)
    elif isinstance(value, str) and ("__enum__" in value or "default_factory" in value):
        yield "its input or output structure names a Python class"


def _computes(target: str, node: Any) -> bool:
    """Whether an operator is known to compute and do nothing else, or is the user's own."""
    if target == "_operator.getitem":
        return True
    found = _OPERATOR.fullmatch(target)
    if found is None:
        return False
    namespace, name = found.groups()
    if namespace in _COMPUTE:
        return name not in _OPEN_FILES
    return namespace not in _OTHERS and not _has_words(node)


def _has_words(node: Any) -> bool:
    inputs = node.get("inputs") if isinstance(node, dict) else None
    return inputs is None or '"as_string' in json.dumps(inputs)
