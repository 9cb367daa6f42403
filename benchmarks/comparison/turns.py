"""Several runs on one machine: whoever measures has it alone, the others stand still meanwhile.

`python benchmarks/comparison/turns.py SCRATCH COMMAND...` runs any command as one of them.
"""

from __future__ import annotations

import hashlib
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

try:
    import fcntl
except ImportError:  # not on Windows
    fcntl = None  # type: ignore[assignment]


def folder_of(scratch: Path) -> Path:
    """Where the processes that work in a scratch folder sign up: on this machine, for the scratch
    folder may be shared by several, whose process numbers say nothing here."""
    name = hashlib.sha256(str(scratch.resolve()).encode()).hexdigest()[:16]
    user = os.getuid() if hasattr(os, "getuid") else "user"
    return Path(tempfile.gettempdir()) / f"wgates-workers-{user}-{name}"


class Turns:
    """Processes that are known by a file in a folder; POSIX only, elsewhere nobody is stopped.

    A process is stopped by signal with all its children, wherever it is but for one place: it holds
    the lock while it measures. Whoever waits for the lock may stand still as well. A file left by a
    process that was killed stands for nobody, whoever has its number now.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)

    def call(self, command: Sequence[str], *, environment: Mapping[str, str] | None = None) -> int:
        """Run a command as one of the processes; returns its exit status."""
        with self._lock():  # it begins when nobody measures, and can be stopped from then on
            process = subprocess.Popen(
                command, env=environment, process_group=None if fcntl is None else 0
            )
            known = self.folder / f"{process.pid}.worker"
            known.write_text(_started(process.pid))
        try:
            return process.wait()
        finally:
            known.unlink(missing_ok=True)
            with self._lock():  # nobody measures now; some may stand still for one that was killed
                self._signal(signal.SIGCONT)

    def interrupt(self) -> None:
        """End all others as Ctrl-C does, which does not reach them: each has a group of its own."""
        with self._lock():
            self._signal(signal.SIGINT)
            self._signal(signal.SIGCONT)

    @contextmanager
    def alone(self) -> Iterator[None]:
        """All others stand still."""
        with self._lock():
            self._signal(signal.SIGSTOP)
            try:
                yield
            finally:
                self._signal(signal.SIGCONT)

    @contextmanager
    def _lock(self) -> Iterator[None]:
        if fcntl is None:
            yield
            return
        with (self.folder / "lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield

    def _signal(self, which: int) -> None:
        if fcntl is None:
            return
        for path in self.folder.glob("*.worker"):
            number = int(path.stem)
            if number == os.getpid():
                continue
            try:
                if path.read_text() != _started(number):
                    raise ProcessLookupError
                os.killpg(number, which)
            except (ProcessLookupError, PermissionError):
                path.unlink(missing_ok=True)
            except FileNotFoundError:
                pass  # it has just ended


def _started(number: int) -> str:
    """When a process began, as Linux counts it; empty where that is not said."""
    try:
        return Path(f"/proc/{number}/stat").read_text().rpartition(")")[2].split()[19]
    except (OSError, IndexError):
        return ""


if __name__ == "__main__":
    sys.exit(Turns(folder_of(Path(sys.argv[1]))).call(sys.argv[2:]))
