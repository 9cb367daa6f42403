"""A second process, for what only one at a time may do."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from wgates_plugin import file_claim

needs_locks = pytest.mark.skipif(file_claim.fcntl is None, reason="the platform has no such locks")


class Other:
    """Another process that holds the lock of a file, as a second writer would."""

    CODE = (
        "import fcntl, sys\n"
        "file = open(sys.argv[1], 'rb+')\n"
        "fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)\n"
        "print('held', flush=True)\n"
        "sys.stdin.read()\n"
    )

    def __init__(self, path: Path) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-S", "-c", self.CODE, str(path)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        assert self.process.stdout is not None
        self.holds = self.process.stdout.readline() == "held\n"

    def __enter__(self) -> Other:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.communicate()
