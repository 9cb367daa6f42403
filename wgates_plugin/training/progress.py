"""A progress bar for whatever takes longer than two seconds, on a terminal or when asked for."""

from __future__ import annotations

import time
from types import TracebackType

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

DELAY_SECONDS = 2.0


class Bar:
    """A bar over `total` steps on standard error; it shows up only after two seconds.

    `wanted`: None shows it on a terminal only, True always, False never.
    """

    def __init__(self, label: str, total: int, *, wanted: bool | None = None) -> None:
        self._console = Console(stderr=True)
        self._shown = self._console.is_terminal if wanted is None else wanted
        self._label = label
        self._total = total
        self._done = 0
        self._started = time.monotonic()
        self._progress: Progress | None = None

    def advance(self, note: str = "") -> None:
        """One step further; `note` is a short text behind the bar, such as the loss."""
        self._done += 1
        if not self._shown:
            return
        if self._progress is None:
            if time.monotonic() - self._started < DELAY_SECONDS:
                return
            self._progress = Progress(
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TimeElapsedColumn(),
                TimeRemainingColumn(),
                TextColumn("{task.fields[note]}"),
                console=self._console,
                transient=True,
            )
            self._task = self._progress.add_task(self._label, total=self._total, note=note)
            self._progress.start()
        self._progress.update(self._task, completed=self._done, note=note)

    def __enter__(self) -> Bar:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._progress is not None:
            self._progress.stop()
