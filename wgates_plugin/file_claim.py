"""One writing process per file: a claim that the operating system ends with its process."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path
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

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor  # no file object: it could be closed before `__del__`
        self._process = os.getpid()

    @property
    def ours(self) -> bool:
        """Whether this process made it: a forked one inherits the object, and no right."""
        return self._process == os.getpid()

    def __del__(self) -> None:
        # Closing leaves the lock to forked processes that have the file open too; unlocking in one
        # of them would end this one's.
        if self.ours:
            _unlock(self._descriptor)
        os.close(self._descriptor)


_HELD: WeakValueDictionary[tuple[int, int], Claim] = WeakValueDictionary()
"""(device, inode) -> the claim that this process holds on it."""


def claim(path: str | Path) -> Claim:
    """Claim an existing file for writing by this process.

    Raises:
        FileInUseError: another process has claimed it.
        OSError: it cannot be opened for writing.
    """
    descriptor = os.open(path, os.O_RDWR)
    status = os.fstat(descriptor)
    key = (status.st_dev, status.st_ino)
    held = _HELD.get(key)
    if held is not None and held.ours:
        os.close(descriptor)
        return held
    try:
        _lock(descriptor)
    except BlockingIOError:
        os.close(descriptor)
        raise FileInUseError(
            f"`{path}`: another process is writing it; wait until that one has ended, or use "
            "another file"
        ) from None
    _HELD[key] = made = Claim(descriptor)
    return made


def _lock(descriptor: int) -> None:
    """Raises BlockingIOError where another process holds the lock."""
    if fcntl is None:
        return
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise
    except OSError:
        return  # a file system without locks


def _unlock(descriptor: int) -> None:
    if fcntl is not None:
        with suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_UN)
