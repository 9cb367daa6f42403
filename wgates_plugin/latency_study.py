"""All that one job measures on one runtime: the baseline, LPNet's samples, and single candidates."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import nn

from wgates_plugin.calling import ExampleInputs
from wgates_plugin.channels import ChannelSpace
from wgates_plugin.efficiency.lpnet import LPNet
from wgates_plugin.efficiency.sampling import SampleFile, SamplingCost, collect, measure_widths
from wgates_plugin.latency import get_runtime
from wgates_plugin.latency.base import Family, Measurement, RuntimeSettings, Session
from wgates_plugin.latency.grid import probe_grid
from wgates_plugin.latency.timing import measure
from wgates_plugin.targets import LatencyTarget


class LatencyStudy:
    """Latency of one network's sub-networks, in milliseconds of the baseline's clock.

    The untouched network is measured once; from then on everything is timed interleaved with it, and
    the ratio counts. A machine that speeds up or slows down in between changes both alike.
    """

    def __init__(
        self,
        network: nn.Module,
        space: ChannelSpace,
        example_inputs: ExampleInputs,
        target: LatencyTarget,
    ) -> None:
        self.runtime = get_runtime(
            target.runtime, RuntimeSettings(threads=target.threads, device=target.device)
        )
        self.network, self.space, self.example_inputs = network, space, example_inputs
        self.identity = self.runtime.identity(example_inputs)
        self.reference_ms: float | None = None
        self.samples: SampleFile | None = None
        self.visited: SampleFile | None = None
        self._reference: Session | None = None
        self._family: Family | None = None

    @property
    def reference(self) -> Session:
        """The untouched network, loaded on first use and kept."""
        if self._reference is None:
            self._reference = self.runtime.load(self.network, self.example_inputs)
        return self._reference

    @property
    def family(self) -> Family:
        if self._family is None:
            self._family = self.runtime.family(self.network, self.space, self.example_inputs)
        return self._family

    def baseline(self, seconds: float) -> Measurement:
        """Calibrate: latency of the untouched network on its own."""
        found = measure(self.reference, seconds=seconds)
        self.reference_ms = found.latency_ms
        return found

    def probe(self) -> dict[str, Any]:
        """The runtime's channel grid, as JSON."""
        return asdict(probe_grid(self.runtime))

    def open_files(self, samples: Path, visited: Path) -> None:
        """Start or continue the file of random samples and that of widths the job came by."""
        assert self.reference_ms is not None
        self.samples = SampleFile.open(samples, self.space, self.identity, self.reference_ms)
        self.visited = SampleFile.open(visited, self.space, self.identity, self.reference_ms)

    def at(self, widths: Sequence[int], seconds: float) -> Measurement:
        """Latency of the network resized to `widths` (G,); remembered as visited."""
        assert self.reference_ms is not None
        assert self.visited is not None
        found = measure_widths(self.family, widths, self.reference, self.reference_ms, seconds)
        self.visited.add(widths, found)
        return found

    def of_file(self, path: Path, seconds: float) -> Measurement:
        """Latency of an exported artefact, run from the file."""
        session = self.runtime.load_file(path, self.example_inputs)
        try:
            return measure(
                session,
                reference=self.reference,
                reference_ms=self.reference_ms,
                seconds=seconds,
            )
        finally:
            session.close()

    def sample(
        self,
        *,
        count: int,
        grid: int,
        seed: int,
        seconds_per_sample: float,
        on_sample: Callable[[int, Measurement], None] | None = None,
    ) -> SamplingCost:
        """Bring the samples up to `count` measured sub-networks."""
        assert self.samples is not None
        return collect(
            self.samples,
            self.space,
            self.family,
            self.reference,
            count=count,
            grid=grid,
            seed=seed,
            seconds_per_sample=seconds_per_sample,
            on_sample=on_sample,
        )

    def fit(self, *, seed: int) -> LPNet:
        """LPNet from the samples and from everything visited since."""
        return LPNet.fit(self.space, *self._seen(), seed=seed)

    def refit(self, lpnet: LPNet) -> LPNet:
        """`lpnet` trained further on everything seen by now."""
        return lpnet.refit(*self._seen())

    def _seen(self) -> tuple[list[tuple[int, ...]], list[float]]:
        assert self.samples is not None
        assert self.visited is not None
        widths = [*self.samples.widths, *self.visited.widths]
        return widths, [*self.samples.latencies_ms, *self.visited.latencies_ms]

    def visited_error(self, lpnet: LPNet) -> float | None:
        """Mean relative error of `lpnet` on the visited widths, None when there are none."""
        if not self.visited:
            return None
        widths = torch.tensor(self.visited.widths, dtype=torch.float64)
        measured = torch.tensor(self.visited.latencies_ms, dtype=torch.float64)
        return float(lpnet.relative_errors(widths, measured).abs().mean())

    def predictions(self, lpnet: LPNet) -> list[dict[str, Any]]:
        """Measured against predicted latency of every sampled and visited sub-network."""
        rows: list[dict[str, Any]] = []
        for name, file in (("sampled", self.samples), ("visited", self.visited)):
            if file:
                predicted = lpnet(torch.tensor(file.widths, dtype=torch.float64)).tolist()
                rows += [
                    {"measured_ms": float(m), "predicted_ms": float(p), "set": name}
                    for m, p in zip(file.latencies_ms, predicted, strict=True)
                ]
        return rows
