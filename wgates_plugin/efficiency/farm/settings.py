"""How many workers measure, and what each of them takes."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from wgates_plugin.efficiency.farm.cluster import installed_ray, on_cluster
from wgates_plugin.errors import ConfigError, MissingExtraError
from wgates_plugin.latency.base import RuntimeSettings
from wgates_plugin.latency.environment import usable_cores

logger = logging.getLogger("wgates_plugin")


@dataclass(frozen=True)
class Farm:
    """How sampling is spread.

    Attributes:
        workers: processes that measure, one per machine or device. On one machine, two that share
            cores disturb each other's times: give each its own.
        restarts: times that dead workers are replaced, all of them together.
        resources: what Ray reserves for each worker, such as {"num_gpus": 1}; by default one core.
    """

    workers: int = 1
    restarts: int = 3
    resources: Mapping[str, float] | None = None

    @property
    def reserved(self) -> dict[str, float]:
        return dict(self.resources or {"num_cpus": 1})

    def at_hand(self) -> Farm:
        """This farm; where Ray is not installed, this process alone, with a warning."""
        if self.workers > 1:
            try:
                installed_ray()
            except MissingExtraError as error:
                logger.warning("%s; this process samples alone", error)
                return Farm()
        return self

    @classmethod
    def of(cls, workers: int, settings: RuntimeSettings, *, runs_here: bool = True) -> Farm:
        """As many workers with these settings, each with cores, or a GPU, of its own.

        Args:
            runs_here: whether networks run on this machine rather than on a device beside it.

        Raises:
            ConfigError: this machine has fewer; not where Ray is on a cluster.
        """
        if workers == 1:
            return cls()
        on_gpu = settings.device.startswith("cuda")
        if ":" in settings.device:
            problem = f"device `{settings.device}`: {workers} workers take a GPU each; write `cuda`"
            raise ConfigError("farm", [problem])
        if not runs_here:
            there, what = 1, "device to measure on"
        elif on_gpu:
            there, what = torch.cuda.device_count(), "GPUs"
        else:
            there = usable_cores() // settings.threads
            what = f"times {settings.threads} free cores"
        if workers > there and not on_cluster():
            raise ConfigError(
                "farm",
                [
                    f"workers: got {workers}, this machine has {there} {what}, and workers that share "
                    "one disturb each other's times; ask for at most that many, or connect Ray to "
                    "a cluster (RAY_ADDRESS)"
                ],
            )
        cores = settings.threads if runs_here else 1
        resources = {"num_cpus": float(cores), **({"num_gpus": 1.0} if on_gpu else {})}
        return cls(workers, resources=resources)
