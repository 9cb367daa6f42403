"""Floors and caps: the widths that each channel group may have."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from numbers import Integral

from wgates_plugin.channels import ChannelGroup
from wgates_plugin.errors import TraceError


def limit_problems(
    groups: Sequence[ChannelGroup], floors: Mapping[str, int], caps: Mapping[str, int]
) -> list[str]:
    """Names that are no group, and widths that are no number of channels."""
    known = [group.name for group in groups]
    wrong = [f"`{name}` is no prunable group" for name in (*floors, *caps) if name not in known]
    wrong += [
        f"`{name}` has {width!r}, needs a whole number of channels"
        for name, width in (*floors.items(), *caps.items())
        if not isinstance(width, Integral)
    ]
    return [f"floors and caps: {'; '.join(wrong)}; groups: {', '.join(known)}"] if wrong else []


def with_limits(
    groups: Sequence[ChannelGroup],
    min_channels: int,
    min_fraction: float,
    floors: Mapping[str, int],
    caps: Mapping[str, int],
) -> list[ChannelGroup]:
    """The groups with their floors and caps, in whole ties.

    Raises:
        TraceError: a floor and a cap leave no width; all of them at once.
    """
    problems, limited = [], []
    for group in groups:
        # 100 * 0.07 is a little more than 7 in floating point.
        wanted = max(min_channels, math.ceil(min_fraction * group.channels - 1e-9))
        wanted = floors.get(group.name, min(wanted, group.channels))
        cap = caps.get(group.name, group.channels)
        floor = math.ceil(max(1, wanted) / group.ties) * group.ties
        cap = int(cap) // group.ties * group.ties
        if not floor <= cap <= group.channels:
            problems.append(
                f"`{group.name}`: floor {floor} and cap {cap} of {group.channels} channels leave "
                "no width"
            )
        limited.append(
            dataclasses.replace(group, floor=floor, cap=cap, floor_is_own=group.name in floors)
        )
    if problems:
        raise TraceError(f"floors and caps: {'; '.join(problems)}")
    return limited
