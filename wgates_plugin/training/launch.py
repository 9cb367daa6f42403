"""Which processes and devices train, and which part of the data is each one's."""

from __future__ import annotations

import atexit
import os
from collections.abc import Iterable
from typing import Any

from lightning_fabric import Fabric
from lightning_fabric.plugins.environments import TorchElasticEnvironment
from torch import distributed
from torch.utils.data import DataLoader, DistributedSampler

from wgates_plugin.errors import ConfigError, TrainingError
from wgates_plugin.training.as_found import samplers
from wgates_plugin.training.settings import TrainingSettings


def default_fabric(settings: TrainingSettings) -> Fabric:
    """A launched Fabric: all processes of torchrun if it started us, else a single device.

    Raises:
        ConfigError: an accelerator that Fabric does not know, or that is not here.
    """
    options: dict[str, Any] = {"accelerator": settings.accelerator, "precision": settings.precision}
    if TorchElasticEnvironment.detect():
        local = int(os.environ["LOCAL_WORLD_SIZE"])
        nodes = int(os.environ["WORLD_SIZE"]) // local
        options |= {"strategy": "ddp", "devices": local, "num_nodes": nodes}
    else:
        options["devices"] = 1
    try:
        fabric = Fabric(**options)
    except (ValueError, RuntimeError) as error:
        what = " ".join(str(error).split())
        raise ConfigError(
            "training settings",
            [
                f"accelerator {settings.accelerator!r} with precision {settings.precision!r} cannot "
                f"be had here ({what}); give what this machine has, such as accelerator 'cpu' or "
                "'auto'"
            ],
        ) from error
    fabric.launch()
    if fabric.world_size > 1:
        # Fabric does this for nccl only; a gloo group that is still up when the interpreter ends
        # now and then aborts the process ("terminate called without an active exception").
        atexit.unregister(_leave_process_group)
        atexit.register(_leave_process_group)
    return fabric


def _leave_process_group() -> None:
    if distributed.is_available() and distributed.is_initialized():
        distributed.destroy_process_group()


def batches_of(loader: Any) -> int:
    """How many batches a loader has.

    Raises:
        TrainingError: it does not say.
    """
    try:
        return len(loader)
    except TypeError:
        raise TrainingError(
            f"loader `{type(loader).__name__}`: its length is unknown, and the learning-rate schedule "
            "needs it; give it a __len__ that counts batches"
        ) from None


def share_loader(loader: Iterable[Any], fabric: Fabric) -> Any:
    """This process's part of `loader`: the loader itself if there is one process.

    Raises:
        TrainingError: the loader has no length or no batches, or processes cannot share it.
    """
    name = type(loader).__name__
    world, rank = fabric.world_size, fabric.global_rank
    shared: Any = loader
    if world > 1:
        if hasattr(loader, "shard"):
            shared = loader.shard(rank, world)
        elif isinstance(loader, DataLoader):
            shared = fabric.setup_dataloaders(loader, move_to_device=False)
            if not any(isinstance(item, DistributedSampler) for item in samplers(shared)):
                raise TrainingError(
                    f"loader `{name}`: {world} processes cannot share it, for its data set, a "
                    f"{type(loader.dataset).__name__}, has no indices to share out, and each would "
                    "train on all of it; use a data set with indices, or give the loader a method "
                    "shard(rank, world), which for a data set that shares itself out returns the loader"
                )
        else:
            raise TrainingError(
                f"loader `{name}`: {world} processes cannot share it; use a torch DataLoader, or "
                "give it a method shard(rank, world)"
            )
    if batches_of(shared) == 0:
        raise TrainingError(
            f"loader `{name}`: it has no batches; use a smaller batch size or keep the last, "
            "smaller batch"
        )
    return shared
