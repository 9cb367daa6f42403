"""One writing process per file: a claim that the operating system ends with its process."""

from __future__ import annotations

import os
from pathlib import Path
from typing import IO
from weakref import WeakValueDictionary

from wgates_plugin.errors import FileInUseError

try:
    import fcntl
except ImportError:  # Windows, where nothing is locked
    fcntl = None  # type: ignore[assignment]


class Claim:
    """The right of this process to write a file, held while any object of it lives.

    Objects of one process share it. A claim ends with its last owner, or with the process, however
    that ends. Where the platform or the file system has no locks, it claims nothing.
    """

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self._process = os.getpid()

    @property
    def ours(self) -> bool:
        """Whether this process made it: a forked one inherits the object, and no right."""
        return self._process == os.getpid()

    def __del__(self) -> None:
        # Closing is enough, and an explicit unlock in a forked process would end its parent's.
        self._file.close()


_HELD: WeakValueDictionary[tuple[int, int], Claim] = WeakValueDictionary()
"""(device, inode) -> the claim that this process holds on it."""


def claim(path: str | Path) -> Claim:
    """Claim an existing file for writing by this process.

    Raises:
        FileInUseError: another process has claimed it.
        OSError: it cannot be opened for writing.
    """
    path = Path(path)
    file = path.open("rb+")
    status = os.fstat(file.fileno())
    key = (status.st_dev, status.st_ino)
    held = _HELD.get(key)
    if held is not None and held.ours:
        file.close()
        return held
    try:
        _lock(file)
    except BlockingIOError:
        file.close()
        raise FileInUseError(
            f"`{path}`: another process is writing it; wait until that one has ended, or use "
            "another file"
        ) from None
    _HELD[key] = made = Claim(file)
    return made


def _lock(file: IO[bytes]) -> None:
    """Raises BlockingIOError where another process holds the lock."""
    if fcntl is None:
        return
    try:
        fcntl.flock(file.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise
    except OSError:
        return  # a file system without locks
