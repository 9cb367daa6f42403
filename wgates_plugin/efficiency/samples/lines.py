"""Lines of a sample file on disk: whole ones, a torn end, and the header."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from wgates_plugin.channels import ChannelSpace
from wgates_plugin.errors import FileFormatError

logger = logging.getLogger("wgates_plugin")

KIND = "latency-samples"
VERSION = 2


def new_header(space: ChannelSpace, identity: Mapping[str, Any]) -> str:
    """The first line of a file of samples of this network on this runtime."""
    header = {
        "kind": KIND,
        "version": VERSION,
        "fingerprint": space.fingerprint,
        "identity": identity,
    }
    return json.dumps(header, allow_nan=False) + "\n"


def content_of(path: Path) -> bytes:
    """Raises FileFormatError where the file cannot be read."""
    try:
        return path.read_bytes()
    except OSError as error:
        raise FileFormatError(
            f"samples `{path}`: cannot be read ({error}); check the path"
        ) from error


def complete_lines(content: bytes) -> list[bytes]:
    """The lines; the last one only where it is whole, with or without its line end."""
    lines = content.split(b"\n")
    if not _is_json(lines[-1]):
        lines.pop()
    return lines


def _is_json(line: bytes) -> bool:
    try:
        json.loads(line)
    except (ValueError, RecursionError):
        return False
    return True


def cut_torn_end(path: Path) -> None:
    """End the file after its last whole line, so that the next one starts on its own."""
    with path.open("rb+") as file:
        content = file.read()
        head, _, last = content.rpartition(b"\n")
        if not last:
            return
        if _is_json(last):
            file.write(b"\n")
        else:
            logger.info("samples `%s`: the last line was cut off in mid-write; dropped", path)
            file.truncate(len(head) + 1)
        file.flush()
        os.fsync(file.fileno())


def read_header(path: Path, lines: Sequence[bytes]) -> dict[str, Any]:
    """Raises FileFormatError where the first line is no header, or of another version."""
    try:
        header = json.loads(lines[0])
        if header["kind"] != KIND:
            raise ValueError(f"kind {header['kind']!r}")
        version = header["version"]
        if version == VERSION and not (
            isinstance(header["fingerprint"], str) and isinstance(header["identity"], dict)
        ):
            raise ValueError("fingerprint or identity")
        if version == VERSION and not isinstance(header["identity"].get("library"), str | None):
            raise ValueError("the identity's library")
    except (IndexError, KeyError, TypeError, ValueError, RecursionError) as error:
        raise FileFormatError(
            f"samples `{path}` line 1: no readable header ({error!r}); "
            "delete the file and sample again"
        ) from error
    if version != VERSION:
        raise FileFormatError(
            f"samples `{path}` line 1: version {version!r}, this package reads {VERSION}; "
            "delete the file and sample again"
        )
    return dict(header)


def check_header(
    path: Path, header: Mapping[str, Any], space: ChannelSpace, identity: Mapping[str, Any]
) -> None:
    """Raises FileFormatError where the samples are of another network or another runtime."""
    if header["fingerprint"] != space.fingerprint:
        raise FileFormatError(
            f"samples `{path}` line 1: measured on another network (fingerprint "
            f"{header['fingerprint']}, this one has {space.fingerprint}); use another file"
        )
    theirs = header["identity"]
    if theirs != identity:
        names = [n for n in {**theirs, **identity} if theirs.get(n) != identity.get(n)]
        differences = ", ".join(
            f"{n}: {theirs.get(n)!r} is {identity.get(n)!r} here" for n in names
        )
        raise FileFormatError(
            f"samples `{path}` line 1: measured on another runtime ({differences}); "
            "use another file per runtime"
        )
