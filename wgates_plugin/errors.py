"""The errors of this package: each says what went wrong, where, what was found and what to do next."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


def first_line(error: BaseException) -> str:
    """What an error of another library says, in one line; its type where it says nothing."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


class WGatesError(Exception):
    """Base of every error raised on purpose by this package."""


class TraceError(WGatesError, ValueError):
    """The network cannot be traced into channel groups, or has nothing to prune."""


class PlanError(WGatesError, ValueError):
    """A plan is malformed, breaks a floor, or belongs to another network."""


class SurgeryError(WGatesError, RuntimeError):
    """Removing channels failed, or the smaller network would not compute the same function."""


class TargetError(WGatesError, ValueError):
    """A target is no positive finite number."""


class InfeasibleTargetError(TargetError):
    """No allowed widths reach the target; the message names the least reachable cost."""


class TrainingError(WGatesError, RuntimeError):
    """Training broke down, for example because the loss is no longer finite."""


class RuntimeUnavailableError(WGatesError, ImportError):
    """A runtime is unknown or its library is not installed."""


class MeasurementError(WGatesError, RuntimeError):
    """A latency could not be taken, or is not believable."""


class ExportError(WGatesError, RuntimeError):
    """An export failed or does not compute what the network computes."""


class FileFormatError(WGatesError, ValueError):
    """A file is corrupt, truncated, or of another kind or version."""


class FileInUseError(WGatesError, RuntimeError):
    """Another process is writing a file, or it was written by others since it was read."""


class RunFolderError(WGatesError, ValueError):
    """A run folder belongs to another run or cannot be resumed."""


class ConfigError(WGatesError, ValueError):
    """A recipe or option is wrong; all problems are listed at once."""

    def __init__(self, subject: str, problems: Sequence[str]) -> None:
        self.subject = subject
        self.problems = list(problems)
        lines = "\n".join(f"  - {problem}" for problem in self.problems)
        count = len(self.problems)
        super().__init__(f"{subject}: {count} problem{'s' if count != 1 else ''}\n{lines}")

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.subject, self.problems)


class MissingExtraError(WGatesError, ImportError):
    """An optional library is needed and not installed."""

    def __init__(self, library: str, extra: str, purpose: str) -> None:
        self._arguments = library, extra, purpose
        super().__init__(
            f"{purpose} needs `{library}`, which is not installed; "
            f'install it with: pip install "wgates-plugin[{extra}]"'
        )

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), self._arguments


class LibraryVersionError(WGatesError, ImportError):
    """An optional library is installed in a version that this package does not work with."""
