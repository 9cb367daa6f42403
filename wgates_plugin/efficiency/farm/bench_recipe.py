"""What a worker sets up its own bench from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from torch import nn

from wgates_plugin.channels import ChannelSpace
from wgates_plugin.efficiency.bench import Bench
from wgates_plugin.efficiency.light_reference import light_bench
from wgates_plugin.latency.base import RuntimeSettings

if TYPE_CHECKING:
    from wgates_plugin.calling import ExampleInputs


@dataclass(frozen=True)
class BenchRecipe:
    """Everything a worker needs to set up its own bench; it travels in memory, never as a file.

    Attributes:
        options: the runtime's own keyword arguments.
        dense_ms: latency of the untouched network where the job began. It is the clock of all
            workers: identical machines differ by the minute, their ratios do not.
        seconds: timed inference of the calibration of the light reference.
    """

    network: nn.Module
    space: ChannelSpace
    example_inputs: ExampleInputs
    runtime: str
    settings: RuntimeSettings
    dense_ms: float
    grid: int
    options: Mapping[str, Any] = field(default_factory=dict)
    seconds: float = 2.0

    def __call__(self) -> Bench:
        from wgates_plugin.latency import get_runtime

        runtime = get_runtime(self.runtime, self.settings, **self.options)
        family = runtime.family(self.network, self.space, self.example_inputs)
        dense = runtime.load(self.network, self.example_inputs)
        try:
            bench = light_bench(
                family, self.space, dense, self.dense_ms, grid=self.grid, seconds=self.seconds
            )
        finally:
            dense.close()
        name = runtime.identity(self.example_inputs)["device_name"]
        bench.environment = {**bench.environment, "device_name": name}
        return bench
