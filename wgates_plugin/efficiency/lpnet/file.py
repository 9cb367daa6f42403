"""LPNet's file: tensors, and a description as JSON, in one safetensors file."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from wgates_plugin.errors import FileFormatError
from wgates_plugin.files import atomic_path

IN_RUN_FOLDER = "lpnet.safetensors"
"""What LPNet's file is called in the folder of a run."""

_VERSION = 2


def lpnet_file(path: Path) -> Path:
    """The file that is meant: `path`, or the one in the run folder `path`.

    Raises:
        FileFormatError: a folder without one.
    """
    if not path.is_dir():
        return path
    file = path / IN_RUN_FOLDER
    if not file.is_file():
        raise FileFormatError(
            f"LPNet `{path}`: a folder without `{IN_RUN_FOLDER}`; give a file that `wgates fit-lpnet` "
            "wrote, or the folder of a run with a latency target"
        )
    return file


def write(path: str | Path, about: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    """Make the file of a description and tensors, atomically."""
    described = {"kind": "lpnet", "version": _VERSION, **about}
    whole = {name: tensor.contiguous().clone() for name, tensor in tensors.items()}
    with atomic_path(path) as part:
        save_file(whole, str(part), metadata={"about": json.dumps(described)})


def read(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The description and the tensors of a file that `write` made.

    Raises:
        FileFormatError: missing, corrupt or of another kind.
    """
    try:
        with safe_open(str(path), framework="pt") as file:
            about: dict[str, Any] = json.loads((file.metadata() or {}).get("about", "null"))
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError, json.JSONDecodeError) as error:
        raise FileFormatError(
            f"LPNet `{path}`: cannot be read ({error}); it is missing, corrupt or cut off, fit "
            "it again"
        ) from error
    known = isinstance(about, dict) and about.get("kind") == "lpnet"
    if not known or about.get("version") != _VERSION:
        raise FileFormatError(
            f"LPNet `{path}`: the file is no LPNet of version {_VERSION}; fit it again"
        )
    fields = ("fingerprint", "structure", "correction", "report", "space")
    if missing := [name for name in fields if name not in about]:
        raise FileFormatError(f"LPNet `{path}`: lacks {', '.join(missing)}; fit it again")
    return about, tensors
