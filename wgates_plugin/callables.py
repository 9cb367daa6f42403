"""Which callable an option is: told by its name or by what it holds, so that a resumed run can tell."""

from __future__ import annotations

import hashlib
import io
import pickle
import sys
from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor

from wgates_plugin.files import raw_bytes


def name_of(value: Any) -> str:
    """ "package.module:name" of what a module holds under that name; else "package.module:name#digest".

    The digest is of the pickled value, so that two instances, or two `functools.partial`, are the same
    as long as they hold the same. What cannot be pickled, such as a lambda, gets a bare "#".

    Raises:
        TypeError: no callable.
    """
    if not callable(value):
        raise TypeError(f"{value!r} is no plain value")
    named = value if hasattr(value, "__qualname__") else type(value)
    name = f"{named.__module__}:{named.__qualname__}"
    return name if _is_held_there(value) else f"{name}#{content_digest(value)}"


def untold(options: Mapping[str, Any]) -> Iterator[str]:
    """Options whose value no later process can tell from another one, as "`key` (name)"."""
    for key, value in options.items():
        if callable(value) and (name := name_of(value)).endswith("#"):
            yield f"`{key}` ({name[:-1]})"


def _is_held_there(value: Any) -> bool:
    found: Any = sys.modules.get(getattr(value, "__module__", None) or "")
    for part in getattr(value, "__qualname__", "<nothing>").split("."):
        found = getattr(found, part, None)
    return found is value


def content_digest(value: Any) -> str:
    """Of a pickled value; empty for what cannot be pickled."""
    try:
        return hashlib.sha256(_written(value)).hexdigest()[:16]
    except Exception:  # whatever an object's own `__reduce__` may raise
        return ""


def _written(value: Any) -> bytes:
    written = io.BytesIO()
    _ByContent(written, protocol=5).dump(value)
    return written.getvalue()


class _ByContent(pickle.Pickler):
    """Writes tensors by what is in them, for torch's own way names a storage after its address, and sets
    in an order of their own, for that of their items differs from process to process."""

    def persistent_id(self, value: Any) -> Any:
        if type(value) in (set, frozenset):
            return type(value).__name__, sorted(_written(item) for item in value)
        return None

    def reducer_override(self, value: Any) -> Any:
        if not isinstance(value, Tensor):
            return NotImplemented
        return bytes, (f"{value.dtype} {tuple(value.shape)} ".encode() + raw_bytes(value),)
