"""Ray: found or started, with room for a farm."""

from __future__ import annotations

import logging
import math
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import TYPE_CHECKING

from wgates_plugin.errors import ConfigError, first_line
from wgates_plugin.latency.base import require

if TYPE_CHECKING:
    from wgates_plugin.efficiency.farm.settings import Farm

logger = logging.getLogger("wgates_plugin")

_STORE_BYTES = 256 * 2**20
"""Shared memory of a Ray started here: it carries one network, not a data set."""

_NODE_NAMES = {"num_cpus": "CPU", "num_gpus": "GPU"}
"""What an actor asks for -> what a node calls it, where that is another name."""


def on_cluster() -> bool:
    """Whether Ray is told, or connected, to what is more than this machine."""
    ray = sys.modules.get("ray")
    return "RAY_ADDRESS" in os.environ or bool(ray is not None and ray.is_initialized())


def installed_ray() -> ModuleType:
    return require("ray", extra="ray", purpose="sampling on several workers")


@contextmanager
def connected(farm: Farm) -> Iterator[ModuleType]:
    """Ray with room for the farm; one that was connected before stays so afterwards."""
    ray = installed_ray()
    ours = not ray.is_initialized()
    if ours:
        _connect(ray, farm)
    try:
        _check_room(ray, farm)
        yield ray
    finally:
        if ours:
            ray.shutdown()


def _connect(ray: ModuleType, farm: Farm) -> None:
    """Start Ray here, or find the cluster that RAY_ADDRESS names.

    Raises:
        ConfigError: the cluster cannot be reached.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # nobody asked for a report
    quiet = {"include_dashboard": False, "log_to_driver": False}
    address = os.environ.get("RAY_ADDRESS")
    if address is None:  # a cluster has cores and memory as it has them
        cores = farm.reserved.get("num_cpus", 1)
        ray.init(
            num_cpus=math.ceil(farm.workers * cores), object_store_memory=_STORE_BYTES, **quiet
        )
        return
    try:
        ray.init(**quiet)
    except Exception as error:  # of many types: nobody there, no address, a client that is missing
        raise ConfigError(
            "farm",
            [
                f"RAY_ADDRESS: no cluster can be reached at `{address}` ({first_line(error)}); "
                "start it, or unset RAY_ADDRESS to measure on this machine"
            ],
        ) from error


def _check_room(ray: ModuleType, farm: Farm) -> None:
    """Warn where some workers have no place on the nodes that are there.

    Raises:
        ConfigError: none has: all would wait, for ever where no node is to come.
    """
    wanted = {_NODE_NAMES.get(n, n): amount for n, amount in farm.reserved.items() if amount}
    room = sum(
        min(
            (int(node["Resources"].get(n, 0.0) / amount + 1e-6) for n, amount in wanted.items()),
            default=farm.workers,
        )
        for node in ray.nodes()
        if node["Alive"]
    )
    if room < farm.workers:
        each = ", ".join(f"{name} {amount:g}" for name, amount in wanted.items())
        found = f"got {farm.workers} of {each} each, Ray has room for {room}"
        if not room:
            raise ConfigError("farm", [f"workers: {found}; connect it to a machine that has them"])
        logger.warning("farm: workers: %s; the others wait for a place", found)
