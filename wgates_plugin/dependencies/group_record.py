"""A set of coupled channels as a `ChannelGroup`, or the reason why it cannot be one."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from wgates_plugin import modules as kinds
from wgates_plugin.channels import ChannelGroup, Slot
from wgates_plugin.dependencies.forward_pass import ForwardPass


def group_record(name: str, raw: Any, numbers: np.ndarray, seen: ForwardPass) -> ChannelGroup | str:
    """The group as a record, or the reason why it cannot be one.

    `numbers` (C,) turns the group's root indices into channels of the layer called `name`.
    """
    channels = len(numbers)
    ties = 1
    for item in raw:
        module = item.dep.target.module
        if isinstance(module, kinds.CONVS) and not kinds.is_depthwise(module):
            ties = math.lcm(ties, module.groups)
    if channels % ties or channels == ties:
        return f"{channels} channels tied over {ties} conv groups leave nothing to choose"
    units = channels // ties
    slots = []
    known: list[tuple[Any, np.ndarray]] = []
    for item in raw:
        module = item.dep.target.module
        if module not in seen.names:
            continue
        weighted = isinstance(module, kinds.READERS) and not kinds.is_depthwise(module)
        is_out = seen.graph.is_out_channel_pruning_fn(item.dep.handler)
        side = "out" if is_out or not weighted else "in"
        role = ("producer" if is_out else "consumer") if weighted else "passenger"
        size = kinds.channels_at(module, side)
        if size is None:  # a single-parameter PReLU has no channels of its own
            continue
        owner = _met_before(known, item, size)
        if owner is None:
            if size == 1 and max(item.idxs) > 0:
                return f"`{seen.names[module]}` has one channel, which is spread over all of them"
            if None in item.root_idxs or max(item.idxs) >= size:
                return f"the channel order into `{seen.names[module]}` is not known"
            owner = np.full(size, -1, dtype=np.int64)
            owner[np.asarray(item.idxs)] = numbers[np.asarray(item.root_idxs)] % units
            reached = np.bincount(owner[owner >= 0], minlength=units)
            if (reached != reached[0]).any():
                return f"its channels do not reach `{seen.names[module]}` evenly"
            known.append((item, owner))
        parts = int(getattr(module, "groups", 1)) if weighted else 1
        if (owner.reshape(parts, -1) != owner[: size // parts]).any():
            return f"the conv groups of `{seen.names[module]}` would keep different channels"
        slots.append(Slot(seen.names[module], side, role, owner))  # type: ignore[arg-type]
    slots.sort(key=lambda slot: (seen.order[slot.module], slot.side != "out"))
    return ChannelGroup(name, channels, ties, ties, channels, tuple(slots))


def _met_before(known: Sequence[tuple[Any, np.ndarray]], item: Any, size: int) -> np.ndarray | None:
    """The owners of an earlier item with the same indices: most layers of a group have them."""
    for other, owner in known:
        same = item.idxs == other.idxs and item.root_idxs == other.root_idxs
        if same and len(owner) == size:
            return owner
    return None
