"""Batch-norm recalibration: running statistics that fit the network as it is now."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm, _NormBase

from wgates_plugin.calling import call_with, device_of
from wgates_plugin.errors import TrainingError
from wgates_plugin.modules import BATCH_NORMS, INSTANCE_NORMS, first_input
from wgates_plugin.training.as_found import modes_kept, random_state_kept
from wgates_plugin.training.evaluation import images_in, of_one_value, to_device, unpack


@torch.no_grad()
def recalibrate_batchnorm(network: nn.Module, loader: Iterable[Any], *, images: int = 512) -> int:
    """Estimate the running statistics of all norms that keep any anew; returns the images used.

    The statistics are reset and become the average over the batches (Yu and Huang 2019,
    "Universally Slimmable Networks", section 3.3), each weighed by its images, until at least `images`
    images were seen or the loader ends. A norm that runs several times in a forward pass takes the
    average over all its calls; one that never runs keeps its statistics. Only the norms run in train
    mode, so dropout stays off. Modes, momenta and random states, the loader's own too, are left as
    found; if anything fails, so are the statistics.

    Norms are batch norms, and instance norms that track statistics. Each process sees its own images
    alone, `SyncBatchNorm` too: one of several may recalibrate. A network without such norms is left alone
    (0 images).

    Raises:
        TrainingError: `images` is not positive, or the loader gave nothing usable.
    """
    if images < 1:
        raise TrainingError(f"recalibration: images is {images}, needs 1 or more")
    norms = [
        module
        for module in network.modules()
        if isinstance(module, (*BATCH_NORMS, *INSTANCE_NORMS)) and module.track_running_stats
    ]
    if not norms:
        return 0
    device = device_of(network)
    before = [{name: value.clone() for name, value in norm.named_buffers()} for norm in norms]
    seen = 0
    try:
        with modes_kept(network), random_state_kept(device, loader), _averaging(norms):
            network.eval()
            for norm in norms:
                norm.train()
            for batch in loader:
                inputs, _ = unpack(to_device(batch, device))
                size = images_in(inputs)
                if size == 1 and seen:
                    continue
                seen += size
                call_with(network, inputs)
                if seen >= images:
                    break
        if not seen:
            raise TrainingError(
                "recalibration: the loader gave no batches; check the data set and limit"
            )
    except BaseException as error:
        for norm, saved in zip(norms, before, strict=True):
            for name, value in norm.named_buffers():
                value.copy_(saved[name])
        if of_one_value(error):
            raise TrainingError(
                "recalibration: a batch of one image has no variance to estimate; use a loader "
                "with larger batches"
            ) from error
        raise
    return seen


@contextmanager
def _averaging(norms: Sequence[_NormBase]) -> Iterator[None]:
    """Within the block each norm averages over its own calls in train mode, and syncs with nobody."""
    seen: dict[nn.Module, int] = {}

    def weigh(norm: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        assert isinstance(norm, _NormBase)
        if not norm.training:
            return
        if norm not in seen:
            norm.reset_running_stats()
        values = first_input(args, kwargs)
        seen[norm] = seen.get(norm, 0) + len(values)
        norm.momentum = len(values) / seen[norm]  # which leaves the average over all so far

    momenta = [norm.momentum for norm in norms]
    synced = [norm for norm in norms if isinstance(norm, nn.SyncBatchNorm)]
    handles = [norm.register_forward_pre_hook(weigh, with_kwargs=True) for norm in norms]
    try:
        for sync in synced:
            sync.forward = partial(_BatchNorm.forward, sync)  # type: ignore[method-assign]
        yield
    finally:
        for sync in synced:
            del sync.forward
        for handle in handles:
            handle.remove()
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum
