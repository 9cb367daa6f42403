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
REFRESH_SECONDS = 0.1


class Bar:
    """A bar over `total` steps on standard error; it shows up only after two seconds.

    It is drawn in `advance` and `reach` alone, never from a thread of its own, which would disturb
    inferences that are being timed.

    `wanted`: None shows it on a terminal only, True always, False never.
    """

    def __init__(
        self,
        label: str,
        total: int,
        *,
        wanted: bool | None = None,
        console: Console | None = None,
    ) -> None:
        self.done = 0
        self._console = console or Console(stderr=True)
        self._shown = self._console.is_terminal if wanted is None else wanted
        self._label = label
        self._total = total
        self._started = time.monotonic()
        self._drawn = 0.0
        self._progress: Progress | None = None

    def advance(self, note: str = "") -> None:
        """One step further; `note` is a short text behind the bar, such as the loss."""
        self.reach(self.done + 1, note)

    def reach(self, done: int, note: str = "") -> None:
        """`done` steps of all are behind us, for work that counts for itself or is resumed."""
        self.done = done
        now = time.monotonic()
        if not self._shown or now - self._started < DELAY_SECONDS:
            return
        if self._progress is None:
            self._progress = Progress(
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TimeElapsedColumn(),
                TimeRemainingColumn(),
                TextColumn("{task.fields[note]}"),
                console=self._console,
                transient=True,
                auto_refresh=False,
            )
            self._task = self._progress.add_task(self._label, total=self._total, note=note)
            self._progress.start()
        self._progress.update(self._task, completed=done, note=note)
        if now - self._drawn >= REFRESH_SECONDS or done >= self._total:
            self._drawn = now
            self._progress.refresh()

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
