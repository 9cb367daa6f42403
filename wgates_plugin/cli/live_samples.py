"""The latest samples while they are taken: a live table on a terminal, a line each elsewhere."""

from __future__ import annotations

import statistics
from collections import deque
from typing import TYPE_CHECKING, Any

import torch
from rich.console import Console, Group
from rich.live import Live
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table

from wgates_plugin.efficiency.bench import MUCH_DISTURBED, disturbed_share
from wgates_plugin.efficiency.common_drift import MOST_COMMON_DRIFT, common_drift
from wgates_plugin.efficiency.counts import MacsModel
from wgates_plugin.efficiency.learner import Learner
from wgates_plugin.efficiency.samples.file import SampleFile
from wgates_plugin.efficiency.samples.record import Sample

if TYPE_CHECKING:
    from wgates_plugin.channels import ChannelSpace
    from wgates_plugin.latency.base import Measurement

SHOWN = 8
LATEST = 5
HEADS = ("no.", "MACs", "measured, ms", "predicted, ms", "spread", "drift", "disturbed", "repeats")
WORDS = ("", "MACs {}", "measured {} ms", "predicted {} ms", "spread {}", "drift {}",
         "{} inferences disturbed", "doubted and measured again: {}")  # fmt: skip


class LiveSamples:
    """Called after every sample, with the number of samples and the measurement.

    It draws then and there, never from a thread of its own, which would disturb inferences that
    are being timed. A prediction is the one made before the sample was known.
    """

    def __init__(
        self,
        file: SampleFile,
        space: ChannelSpace,
        total: int,
        *,
        console: Console,
        learner: Learner | None = None,
    ) -> None:
        self.file, self.total, self.learner, self.console = file, total, learner, console
        self._macs = MacsModel(space)
        self._dense = float(self._macs(torch.tensor(space.full_widths, dtype=torch.float64)))
        self._latest: deque[tuple[str, ...]] = deque(maxlen=SHOWN)
        self._rejected, self._disturbed = len(file.rejected), 0
        self._again = 0
        self._shares: list[float] = []
        self._drifts: list[float] = []
        self._live: Live | None = None
        self._bar = Progress(
            TextColumn("measuring sub-networks"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            auto_refresh=False,
            console=console,
        )
        self._task = self._bar.add_task("", total=total, completed=file.distinct)

    def __enter__(self) -> LiveSamples:
        if self.console.is_terminal:
            self._live = Live(
                self._view(), console=self.console, auto_refresh=False, transient=True
            )
            self._live.start(refresh=True)
        return self

    def __exit__(self, *_: object) -> None:
        if self._live is not None:
            self._live.stop()

    @torch.no_grad()
    def __call__(self, done: int, found: Measurement) -> None:
        sample = self.file.samples[-1]
        again = len(self.file.rejected) - self._rejected
        self._rejected = len(self.file.rejected)
        self._again += again
        self._disturbed += sample.disturbed
        self._shares.append(disturbed_share(found))
        self._drifts.append(sample.drift)
        cells = self._cells(done, sample, again)
        self._latest.append(cells)
        self._bar.update(self._task, completed=done)
        if self._live is not None:
            self._live.update(self._view(), refresh=True)
        else:
            told = ", ".join(
                words.format(cell)
                for words, cell in zip(WORDS[1:], cells[1:], strict=True)
                if cell not in ("", "0")
            )
            self.console.print(f"{done}/{self.total}: {told}", markup=False, soft_wrap=True)

    def _cells(self, done: int, sample: Sample, again: int) -> tuple[str, ...]:
        widths = torch.tensor(sample.widths, dtype=torch.float64)
        lpnet = self.learner.lpnet if self.learner is not None else None
        return (
            str(done),
            f"{float(self._macs(widths)) / self._dense:.0%}",
            f"{self.file.latency_of(sample):.4g}",
            "" if lpnet is None else f"{float(lpnet(widths)):.4g}",
            f"{sample.ratio_spread / sample.ratio:.1%}",
            f"{sample.drift - 1.0:+.1%}",
            str(sample.disturbed),
            str(again),
        )

    def warnings(self) -> list[str]:
        """What disturbed the samples taken here, if much did."""
        if not self._shares:
            return []
        found = []
        if statistics.median(self._shares) > MUCH_DISTURBED:
            found.append(
                f"{statistics.median(self._shares):.0%} of the inferences were disturbed by other "
                "work on this machine; times are the less sure, measure when it is left alone"
            )
        drift = common_drift(self._drifts[-LATEST:])
        if len(self._drifts) >= LATEST and abs(drift - 1.0) > MOST_COMMON_DRIFT:
            found.append(
                f"the reference took {drift - 1.0:+.1%} in the last {LATEST} samples against when it "
                "was timed alone: the machine changed its speed. Ratios between networks hold, "
                "milliseconds are off by as much; run again into another --samples-file when the "
                "machine is quiet"
            )
        return found

    def _view(self) -> Any:
        table = Table(
            caption=f"disturbed inferences: {self._disturbed}; measured again: {self._again}; "
            "drift: of the reference, which the figures leave out"
        )
        for head in HEADS:
            table.add_column(head, justify="right")
        for cells in self._latest:
            table.add_row(*cells)
        return Group(table, self._bar)
