"""Running a user's program that times inferences, and not believing everything it prints."""

from __future__ import annotations

import contextlib
import difflib
import json
import math
import os
import re
import reprlib
import shlex
import signal
import subprocess
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import IO, Any

from wgates_plugin.errors import MeasurementError

_PLACEHOLDER = re.compile(r"\{(\w+)\}")
_SLACK = 1.05
_STDERR_LINES = 10
_KEYS = ("samples_ms", "latency_ms")
_LEAST_MS = 1e-6
"""A nanosecond, which is a few ticks of a processor's clock."""
_GRACE_S = 5.0
"""How long a killed program may take to be gone."""


@dataclass(frozen=True)
class Call:
    """What the placeholders of one run stand for."""

    model: Path
    reference: Path
    inputs: Path
    outputs: Path
    rounds: int
    threads: int
    precision: str
    device: str


PLACEHOLDERS = tuple(field.name for field in fields(Call))


def checked_command(command: list[str]) -> list[str]:
    """The command as it is.

    Raises:
        ValueError: it is empty, has no `{model}`, or a misspelt placeholder.
    """
    if not command or not command[0]:
        raise ValueError("needs a program and its arguments")
    found = [name for word in command for name in _PLACEHOLDER.findall(word)]
    # Other words in braces may belong to the program, as in awk.
    for name in found:
        close = difflib.get_close_matches(name, PLACEHOLDERS, n=1, cutoff=0.75)
        if name not in PLACEHOLDERS and close:
            raise ValueError(f"{{{name}}} is no placeholder; did you mean {{{close[0]}}}?")
    if "model" not in found:
        known = " ".join(f"{{{name}}}" for name in PLACEHOLDERS)
        raise ValueError(f"needs {{model}} where the file's path goes; placeholders: {known}")
    return command


class Program:
    """A command with placeholders.

    Attributes:
        timeout_s: longest wall time of one run. retries: further tries after a failed one.
        library: what the program said it ran the file with; None until then, or if it did not.
    """

    def __init__(self, command: tuple[str, ...], *, timeout_s: float, retries: int) -> None:
        self.command, self.timeout_s, self.retries = command, timeout_s, retries
        self.shown = shlex.join(command)
        self.library: str | None = None
        found = {name for word in command for name in _PLACEHOLDER.findall(word)}
        self.placeholders = found & set(PLACEHOLDERS)

    def times(self, call: Call) -> tuple[list[float], list[float]]:
        """(times of the model, times of the reference), ms; the latter empty without `{reference}`.

        Raises:
            MeasurementError: every try failed; the message has the last one's reason.
        """
        for _ in range(self.retries + 1):
            try:
                return self._once(call)
            except _Failed as failure:
                reason = str(failure)
        tries = "once" if self.retries == 0 else f"{self.retries + 1} times"
        raise MeasurementError(
            f"command `{self.shown}`: tried {tries}, failed each time; the last time {reason}"
        )

    def _once(self, call: Call) -> tuple[list[float], list[float]]:
        started = time.perf_counter()
        output = self._run([self._filled(word, call) for word in self.command])
        wall_ms = (time.perf_counter() - started) * 1e3
        printed = _object_in(output)
        samples = _series(printed, _KEYS)
        if "rounds" in self.placeholders and len(samples) != call.rounds:
            raise _Failed(
                f"it printed {len(samples)} times where {call.rounds} rounds were asked for; print "
                "one time per round"
            )
        other = _series(printed, ("reference_samples_ms",)) if self._paired else []
        if self._paired and len(other) != len(samples):
            raise _Failed(
                f"it printed {len(samples)} samples_ms and {len(other)} reference_samples_ms; "
                "print one pair per round"
            )
        total_ms = sum(samples) + sum(other)
        if total_ms > _SLACK * wall_ms:
            raise _Failed(
                f"it printed times of {total_ms:.4g} ms together, but ran for {wall_ms:.4g} ms only; "
                "print milliseconds per inference"
            )
        library = printed.get("library")
        self.library = library[:80] if isinstance(library, str) and library else None
        return samples, other

    @property
    def _paired(self) -> bool:
        return "reference" in self.placeholders

    @staticmethod
    def _filled(word: str, call: Call) -> str:
        def value(found: re.Match[str]) -> str:
            return str(getattr(call, found[1])) if found[1] in PLACEHOLDERS else found[0]

        return _PLACEHOLDER.sub(value, word)

    def _run(self, words: list[str]) -> str:
        """Standard output of a run that went well.

        Into files and not through pipes: a daemon that the program leaves behind keeps its ends of
        pipes open, and reading them to their end would wait for the daemon.
        """
        with tempfile.TemporaryFile() as output, tempfile.TemporaryFile() as errors:
            try:
                process = subprocess.Popen(
                    words,
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=errors,
                    start_new_session=True,
                )
            except OSError as error:
                raise _Failed(f"it could not be started ({error}); check its path") from error
            try:
                status = process.wait(timeout=self.timeout_s)
            except subprocess.TimeoutExpired:
                _kill(process)
                raise _Failed(
                    f"it did not end within {self.timeout_s:g} s and was killed; check the "
                    "connection to the device, or raise timeout_s"
                ) from None
            except BaseException:  # Ctrl-C does not reach a process group of its own
                _kill(process)
                raise
            if status:
                lines = _text(errors).strip().splitlines()[-_STDERR_LINES:]
                last = "\n".join(lines) or "(nothing)"
                raise _Failed(
                    f"it ended with exit status {status}; run it by hand to see why; its standard "
                    f"error ends with:\n{last}"
                )
            return _text(output)


class _Failed(Exception):
    """One try went wrong; the text goes on after "the last time"."""


def _text(file: IO[bytes]) -> str:
    file.seek(0)
    return file.read().decode("utf-8", errors="replace")


def _kill(process: subprocess.Popen[bytes]) -> None:
    """End the program and what it started, daemons excepted."""
    if hasattr(os, "killpg"):
        with contextlib.suppress(ProcessLookupError):  # it ended meanwhile
            os.killpg(process.pid, signal.SIGKILL)
    else:
        process.kill()
    with contextlib.suppress(subprocess.TimeoutExpired):  # it hangs in the kernel
        process.wait(timeout=_GRACE_S)


def _object_in(output: str) -> Mapping[str, Any]:
    """The JSON object that is the whole output or its last line."""
    last = output.strip().split("\n")[-1]
    for text in (output, last):
        try:
            value = json.loads(text)
        except (ValueError, RecursionError):
            continue
        if isinstance(value, dict):
            return value
    shown = last.strip()[:200]
    raise _Failed(
        f"it printed no JSON object ({'nothing at all' if not shown else f'last line: {shown}'}); "
        'print {"samples_ms": [...]} as the last line'
    )


def _series(printed: Mapping[str, Any], keys: tuple[str, ...]) -> list[float]:
    key = next((key for key in keys if key in printed), None)
    if key is None:
        raise _Failed(f"its JSON has no `{keys[0]}` (it has: {', '.join(printed) or 'nothing'})")
    values = printed[key]
    if not isinstance(values, list) or not values:
        raise _Failed(f"its `{key}` is {_shown(values)}; print a list of times in milliseconds")
    for value in values:
        if not _is_finite(value) or value <= 0:
            raise _Failed(f"its `{key}` holds {_shown(value)}; print finite positive milliseconds")
        if value < _LEAST_MS:
            raise _Failed(
                f"its `{key}` holds {_shown(value)}, less than a nanosecond; print milliseconds per "
                "inference"
            )
    return [float(value) for value in values]


def _is_finite(value: Any) -> bool:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return False
    try:
        return math.isfinite(value)
    except OverflowError:  # an integer beyond all floats
        return False


def _shown(value: Any) -> str:
    """Shortened: a program may print anything, at any depth and length."""
    return reprlib.repr(value)
