"""Appending to a sample file: one process at a time, whole lines, after what it has read itself."""

from __future__ import annotations

import os
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from wgates_plugin.efficiency.samples.lines import cut_torn_end
from wgates_plugin.errors import FileFormatError, FileInUseError
from wgates_plugin.file_claim import Claim, claim
from wgates_plugin.files import append_line


class SampleWriter:
    """Appends lines to the file at `path`, of which `size` bytes were read.

    It claims the file with `begin`, or else with its first line, and until `release`.
    """

    def __init__(self, path: Path, size: int) -> None:
        self._path = path
        self._size: int | None = size
        self._claim: Claim | None = None

    def begin(self, mine: Claim) -> None:
        """Write from now on; a torn last line is cut off.

        Args:
            mine: this process's claim on the file.

        Raises:
            FileInUseError: others wrote it since it was read.
        """
        self._check_unchanged()
        cut_torn_end(self._path)
        self._size, self._claim = _size_of(self._path), mine

    def append(self, value: Mapping[str, Any]) -> None:
        """Write a line, whole or not at all.

        Raises:
            FileInUseError: another process writes the file, or wrote it since it was read.
            FileFormatError: it cannot be written, as on a full disk; it is as it was before.
        """
        if self._claim is None or not self._claim.ours:
            self.begin(claimed(self._path))
        self._check_unchanged()
        try:
            append_line(self._path, value)
        except BaseException as error:
            if self._size is not None:
                with suppress(OSError):
                    os.truncate(self._path, self._size)
            if isinstance(error, OSError):
                raise FileFormatError(
                    f"samples `{self._path}`: cannot be written ({error}); what was measured before "
                    "is kept. Make room for it, then start again: sampling goes on where it was"
                ) from error
            raise
        self._size = _size_of(self._path)

    def _check_unchanged(self) -> None:
        """Raises FileInUseError where the file is not what was read or written here."""
        if _size_of(self._path) != self._size:
            raise FileInUseError(
                f"samples `{self._path}`: written or removed by others since it was read here; "
                "open it again"
            )

    def release(self) -> None:
        """Let other processes write."""
        self._claim = None


def claimed(path: Path) -> Claim:
    """This process's claim on the file.

    Raises:
        FileInUseError: another process has claimed it. FileFormatError: it cannot be written.
    """
    try:
        return claim(path)
    except OSError as error:
        raise FileFormatError(
            f"samples `{path}`: cannot be written ({error}); check its permissions, or copy it"
        ) from error


def _size_of(path: Path) -> int | None:
    """Bytes; None where there is no such file."""
    return path.stat().st_size if path.exists() else None
