"""Whole files or none: atomic writes, and JSON that is checked when read back."""

from __future__ import annotations

import json
import os
import secrets
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from wgates_plugin.errors import FileFormatError


def from_home(path: str | Path) -> Path:
    """The path with a leading `~` written out.

    Raises:
        ValueError: there is no such home.
    """
    try:
        return Path(path).expanduser()
    except RuntimeError as error:
        raise ValueError(f"{error}; write the path out") from error


@contextmanager
def atomic_path(path: str | Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`; it replaces `path` only if the block succeeds.

    A file that was there keeps its mode, another gets that of any new file.
    """
    path = Path(os.path.realpath(path))  # a link stays, and what it leads to is replaced
    with _part_beside(path) as part:
        mode = (path if path.exists() else part).stat().st_mode
        yield part
        _settle(part)
        if part.stat().st_mode != mode:  # some libraries put another file in the part's place
            part.chmod(stat.S_IMODE(mode))
        os.replace(part, path)


@contextmanager
def _part_beside(path: Path) -> Iterator[Path]:
    """A temporary file in the folder of `path`, which is made; gone afterwards unless moved."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.parent / f".{path.name}.{secrets.token_hex(4)}.part"
    part.touch(exist_ok=False)  # with the rights of any new file, which `tempfile` would not give
    try:
        yield part
    finally:
        part.unlink(missing_ok=True)


def _settle(part: Path) -> None:
    """Bring what was written to disk."""
    with part.open("rb+") as file:  # Windows brings nothing to disk that is open for reading alone
        os.fsync(file.fileno())


def write_text(path: str | Path, text: str) -> None:
    """Write `text` to `path` atomically (UTF-8)."""
    with atomic_path(path) as part:
        part.write_text(text, encoding="utf-8")


def create_text(path: str | Path, text: str) -> None:
    """Write `text` to `path` atomically (UTF-8), unless there is a file already."""
    path = Path(path)
    with _part_beside(path) as part:
        part.write_text(text, encoding="utf-8")
        _settle(part)
        try:
            os.link(part, path)
        except FileExistsError:
            return
        except OSError:  # a file system without hard links
            if not path.exists():
                os.replace(part, path)


def write_json(path: str | Path, value: Any) -> None:
    """Write `value` as indented JSON, atomically. Not-a-number is refused."""
    write_text(path, json.dumps(value, indent=1, allow_nan=False) + "\n")


def read_json(path: str | Path, *, kind: str) -> Any:
    """Read a JSON file; `kind` names it in errors.

    Raises:
        FileFormatError: the file is missing, truncated or no JSON.
    """
    path = Path(path)
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise FileFormatError(f"{kind} `{path}`: no such file; check the path") from None
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise FileFormatError(
            f"{kind} `{path}`: not readable as JSON ({error}); it is corrupt or was cut off, "
            "delete it and make it again"
        ) from error


def append_line(path: str | Path, value: Any) -> None:
    """Append `value` as one JSON line and flush it to disk; a torn last line is closed first."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    line = json.dumps(value, allow_nan=False) + "\n"
    if path.exists() and path.stat().st_size:
        with path.open("rb") as file:
            file.seek(-1, os.SEEK_END)
            if file.read(1) != b"\n":
                line = "\n" + line
    with path.open("a", encoding="utf-8") as file:
        file.write(line)
        file.flush()
        os.fsync(file.fileno())


def raw_bytes(tensor: torch.Tensor) -> bytes:
    """A tensor's values as they lie in memory, in row-major order; not its shape and type."""
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def save_tensors(
    path: str | Path, tensors: dict[str, torch.Tensor], metadata: dict[str, str] | None = None
) -> None:
    """Write named tensors as safetensors, atomically. Tied tensors are stored once each."""
    plain = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    with atomic_path(path) as part:
        save_file(plain, str(part), metadata=metadata)


def load_tensors(path: str | Path, *, kind: str) -> dict[str, torch.Tensor]:
    """Read tensors written by `save_tensors`.

    Raises:
        FileFormatError: the file is missing or not readable as safetensors.
    """
    path = Path(path)
    try:
        return load_file(str(path))
    except FileNotFoundError:
        raise FileFormatError(f"{kind} `{path}`: no such file; check the path") from None
    except OSError as error:
        raise FileFormatError(
            f"{kind} `{path}`: cannot be read ({error}); check the path"
        ) from error
    except (SafetensorError, ValueError) as error:
        raise FileFormatError(
            f"{kind} `{path}`: not readable as safetensors ({error}); it is corrupt or was cut "
            "off, delete it and make it again"
        ) from error
