"""Leaving things as found: modes, random state and memory order, for the length of a block."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils.data import BatchSampler, DistributedSampler

from wgates_plugin.calling import rng_kept


@contextmanager
def modes_kept(network: nn.Module) -> Iterator[None]:
    """Give every module its train/eval mode back, however the block ends."""
    modes = [(module, module.training) for module in network.modules()]
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


def samplers(loader: Any) -> list[Any]:
    """What decides on a loader's order: its sampler, its batch sampler and that one's sampler."""
    batches = getattr(loader, "batch_sampler", None)
    found = (getattr(loader, "sampler", None), batches, getattr(batches, "sampler", None))
    return list({id(sampler): sampler for sampler in found if sampler is not None}.values())


def own_generators(loader: Any) -> list[torch.Generator]:
    """Random generators that a loader draws from beside the global one."""
    found = (getattr(owner, "generator", None) for owner in (loader, *samplers(loader)))
    return [item for item in found if isinstance(item, torch.Generator)]


@contextmanager
def random_state_kept(device: torch.device, loader: Any) -> Iterator[None]:
    """Give back every random state that `seed_epoch` sets."""
    python, numpy = random.getstate(), np.random.get_state()
    own = [(generator, generator.get_state()) for generator in own_generators(loader)]
    found = (item for item in samplers(loader) if isinstance(item, DistributedSampler))
    orders = [(sampler, sampler.seed, sampler.epoch) for sampler in found]
    try:
        with rng_kept(device):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)
        for generator, state in own:
            generator.set_state(state)
        for sampler, seed, epoch in orders:
            sampler.seed, sampler.epoch = seed, epoch


def epoch_batches(
    loader: Any, seed: int, epoch: int, device: torch.device, rank: int = 0
) -> Iterator[Any]:
    """The batches of an epoch, `seed_epoch` done before.

    Processes that share the data have its order in common, and draw all else each for themselves: from
    the start where the order has a seed of its own, otherwise from the first batch on, by which the order
    is drawn.
    """
    apart = rank > 0 and _order_has_seed(loader)
    seed_epoch(seed, epoch, device, loader, rank=rank if apart else 0)
    for number, batch in enumerate(loader):
        if number == 0 and rank > 0 and not apart:
            _seed_draws(_seed_of(seed, epoch, rank), device)
        yield batch


def seed_epoch(seed: int, epoch: int, device: torch.device, loader: Any, rank: int = 0) -> None:
    """Make all that is drawn from now on, by the loader too, depend on (seed, epoch, rank) alone, and the
    order of a torch `DistributedSampler`, which ranks have in common, on (seed, epoch)."""
    value = _seed_of(seed, epoch, rank)
    _seed_draws(value, device)
    for generator in own_generators(loader):
        generator.manual_seed(value)
    # Fabric's wrapper sets the sampler's epoch from its own count of iterations, which knows
    # nothing of the epochs that an earlier process has done.
    if hasattr(loader, "_num_iter_calls"):
        loader._num_iter_calls = epoch
    for sampler in samplers(loader):
        if isinstance(sampler, DistributedSampler):
            sampler.seed = _seed_of(seed, epoch, 0)
        set_epoch = getattr(sampler, "set_epoch", None)
        if set_epoch is not None:
            set_epoch(epoch)


def _seed_of(seed: int, epoch: int, rank: int) -> int:
    words = f"{seed}:{epoch}:{rank}" if rank else f"{seed}:{epoch}"
    return int.from_bytes(hashlib.blake2b(words.encode(), digest_size=8).digest(), "big") >> 1


def _seed_draws(value: int, device: torch.device) -> None:
    # Not torch.manual_seed: it would reseed devices whose state is not given back afterwards.
    torch.default_generator.manual_seed(value)
    if device.type != "cpu":
        getattr(torch, device.type).manual_seed(value)
    random.seed(value)
    np.random.seed(value % 2**32)


def _order_has_seed(loader: Any) -> bool:
    """Whether the order is a plain `DistributedSampler`'s alone; a subclass may wrap another sampler."""
    kinds = {type(sampler) for sampler in samplers(loader)}
    return DistributedSampler in kinds and kinds <= {DistributedSampler, BatchSampler}


@contextmanager
def channels_last_within(network: nn.Module, *, wanted: bool) -> Iterator[None]:
    """Weights in channels-last order within the block, in their former order after it."""
    if not wanted:
        yield
        return
    plain = [p for p in network.parameters() if p.ndim == 4 and p.is_contiguous()]
    # Not network.to(memory_format=...): it raises on parameters of five dimensions.
    for parameter in plain:
        parameter.data = parameter.data.contiguous(memory_format=torch.channels_last)
    try:
        yield
    finally:
        for parameter in plain:
            parameter.data = parameter.data.contiguous()
