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


def _samplers(loader: Any) -> list[Any]:
    """What decides on a loader's order: its sampler, its batch sampler and that one's sampler."""
    batches = getattr(loader, "batch_sampler", None)
    found = (getattr(loader, "sampler", None), batches, getattr(batches, "sampler", None))
    return list({id(sampler): sampler for sampler in found if sampler is not None}.values())


def own_generators(loader: Any) -> list[torch.Generator]:
    """Random generators that a loader draws from beside the global one."""
    found = (getattr(owner, "generator", None) for owner in (loader, *_samplers(loader)))
    return [item for item in found if isinstance(item, torch.Generator)]


@contextmanager
def random_state_kept(device: torch.device, loader: Any) -> Iterator[None]:
    """Give back every random state that `seed_epoch` sets."""
    python, numpy = random.getstate(), np.random.get_state()
    own = [(generator, generator.get_state()) for generator in own_generators(loader)]
    try:
        with rng_kept(device):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)
        for generator, state in own:
            generator.set_state(state)


def seed_epoch(seed: int, epoch: int, device: torch.device, loader: Any) -> None:
    """Make all that is drawn from now on, by the loader too, depend on (seed, epoch) alone."""
    digest = hashlib.blake2b(f"{seed}:{epoch}".encode(), digest_size=8).digest()
    value = int.from_bytes(digest, "big") >> 1
    # Not torch.manual_seed: it would reseed devices whose state is not given back afterwards.
    torch.default_generator.manual_seed(value)
    if device.type != "cpu":
        getattr(torch, device.type).manual_seed(value)
    random.seed(value)
    np.random.seed(value % 2**32)
    for generator in own_generators(loader):
        generator.manual_seed(value)
    # Fabric's wrapper sets the sampler's epoch from its own count of iterations, which knows
    # nothing of the epochs that an earlier process has done.
    if hasattr(loader, "_num_iter_calls"):
        loader._num_iter_calls = epoch
    for sampler in _samplers(loader):
        set_epoch = getattr(sampler, "set_epoch", None)
        if set_epoch is not None:
            set_epoch(epoch)


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
