"""The channel space of a network: which channels live or die together.

`trace` runs torch-pruning's dependency graph once and turns its groups into plain records:
names, index maps and per-layer shapes, no modules. Everything else in this package (gates, plans,
counts, latency sampling) works on these records, so tracing happens once per network.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal

import numpy as np

from wgates_plugin.errors import FileFormatError, PlanError

Role = Literal["producer", "passenger", "consumer"]
Side = Literal["out", "in"]


def _to_runs(units: np.ndarray) -> list[list[int]]:
    """Index map (dim,) -> [[length, first unit or -1, step], ...], short for the usual ranges."""
    runs: list[list[int]] = []
    for value in units.tolist():
        if runs:
            length, first, step = runs[-1]
            expected = first if first < 0 else first + length * step
            if (value < 0) == (first < 0) and value == expected:
                runs[-1][0] += 1
                continue
            if length == 1 and first >= 0 and value in (first, first + 1):
                runs[-1] = [2, first, value - first]
                continue
        runs.append([1, value, 1])
    return runs


def _from_runs(runs: Sequence[Sequence[int]]) -> np.ndarray:
    parts = [
        np.full(length, -1) if first < 0 else first + step * np.arange(length)
        for length, first, step in runs
    ]
    return np.concatenate(parts).astype(np.int64) if parts else np.zeros(0, dtype=np.int64)


@dataclass(frozen=True, eq=False)
class Slot:
    """Where one group touches one module.

    `units` has shape (dim,): entry i is the group's unit that channel i of this module side
    belongs to, or -1 when channel i belongs to another group or to none (concatenation).
    A unit may own several entries: 49 inputs of a linear layer behind a 7x7 flatten, or one
    channel in each conv group of a grouped convolution.
    """

    module: str
    side: Side
    role: Role
    units: np.ndarray

    def to_json(self) -> dict[str, Any]:
        return {
            "module": self.module,
            "side": self.side,
            "role": self.role,
            "units": _to_runs(self.units),
        }

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Slot:
        return cls(value["module"], value["side"], value["role"], _from_runs(value["units"]))


@dataclass(frozen=True, eq=False)
class ChannelGroup:
    """Channels that are kept or removed together across layers.

    Attributes:
        name: the producer whose channel numbers the group uses.
        channels: its width when nothing is removed.
        ties: channels that share one unit because grouped convolutions must keep the same
            channels in each of their conv groups; `channels == units * ties`, and channel
            `u + k * units` belongs to unit `u`.
        floor: least width a plan may leave. cap: largest width a plan may leave.
        floor_is_own: asked for by name, where others have what all groups have.
    """

    name: str
    channels: int
    ties: int
    floor: int
    cap: int
    slots: tuple[Slot, ...]
    floor_is_own: bool = False

    @property
    def units(self) -> int:
        return self.channels // self.ties

    def slots_as(self, role: Role) -> list[Slot]:
        return [slot for slot in self.slots if slot.role == role]

    def allowed_widths(self, grid: int = 1) -> list[int]:
        """Widths on the grid between floor and cap, ascending.

        Multiples of `grid` (and of `ties`), and the full width even when it is off the grid:
        a layer nobody cut is as aligned as it was. A cap below the first grid step is the one
        width left.
        """
        step = math.lcm(max(1, grid), self.ties)
        widths = [w for w in range(step, self.channels, step) if self.floor <= w <= self.cap]
        if self.cap >= self.channels or not widths:
            widths.append(min(self.cap, self.channels))
        return widths

    def round_up(self, width: float, grid: int = 1) -> int:
        """The least allowed width that is at least `width`, or the largest one allowed."""
        allowed = self.allowed_widths(grid)
        return next((w for w in allowed if w >= width), allowed[-1])

    def to_json(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "channels": self.channels,
            "ties": self.ties,
            "floor": self.floor,
            "cap": self.cap,
            "slots": [slot.to_json() for slot in self.slots],
            **({"floor_is_own": True} if self.floor_is_own else {}),
        }

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> ChannelGroup:
        slots = tuple(Slot.from_json(slot) for slot in value["slots"])
        numbers = (value["name"], value["channels"], value["ties"], value["floor"], value["cap"])
        return cls(*numbers, slots, bool(value.get("floor_is_own", False)))


@dataclass(frozen=True)
class Layer:
    """Shape facts of one module with parameters, taken while tracing.

    Attributes:
        kind: "conv" (grouped ones too), "depthwise", "transposed", "linear", "norm" or "other".
        kernel: kernel elements per (input, output) channel pair.
        positions: output positions per image, summed over all calls of the module.
        parameters: parameter count of the untouched module.
    """

    name: str
    kind: str
    in_channels: int
    out_channels: int
    groups: int
    kernel: int
    positions: int
    bias: bool
    parameters: int


@dataclass(frozen=True, eq=False)
class ChannelSpace:
    """All channel groups of one network, in `named_modules()` order. Names and numbers only."""

    groups: tuple[ChannelGroup, ...]
    layers: tuple[Layer, ...]
    excluded: Mapping[str, str] = field(default_factory=dict)
    """Producer name -> why its channels cannot be pruned."""

    @cached_property
    def names(self) -> tuple[str, ...]:
        return tuple(group.name for group in self.groups)

    @property
    def capped(self) -> bool:
        """Whether some group may not keep all of its channels, whatever the target."""
        return any(group.cap < group.channels for group in self.groups)

    @cached_property
    def full_widths(self) -> tuple[int, ...]:
        return tuple(group.channels for group in self.groups)

    @cached_property
    def offsets(self) -> tuple[int, ...]:
        """Start of each group's units in the concatenated unit vector; last entry: its length."""
        starts = [0]
        for group in self.groups:
            starts.append(starts[-1] + group.units)
        return tuple(starts)

    @property
    def total_units(self) -> int:
        return self.offsets[-1]

    def group(self, name: str) -> ChannelGroup:
        """The group called `name`.

        Raises:
            PlanError: there is none; the message lists the known names.
        """
        for group in self.groups:
            if group.name == name:
                return group
        known = ", ".join(self.names)
        raise PlanError(f"group `{name}`: not in this network; known groups: {known}")

    def unit_slice(self, index: int) -> slice:
        return slice(self.offsets[index], self.offsets[index + 1])

    @cached_property
    def slots_of(self) -> dict[tuple[str, Side], list[tuple[int, Slot]]]:
        """(module, side) -> [(group index, slot), ...]."""
        table: dict[tuple[str, Side], list[tuple[int, Slot]]] = {}
        for index, group in enumerate(self.groups):
            for slot in group.slots:
                table.setdefault((slot.module, slot.side), []).append((index, slot))
        return table

    def unit_index(self, module: str, side: Side) -> np.ndarray | None:
        """Channel of a module side -> unit in the concatenated vector, shape (dim,).

        `total_units` marks a channel that no group owns. None when no group touches the side.
        """
        touching = self.slots_of.get((module, side))
        if not touching:
            return None
        index = np.full(touching[0][1].units.shape, self.total_units, dtype=np.int64)
        for group, slot in touching:
            owned = slot.units >= 0
            index[owned] = slot.units[owned] + self.offsets[group]
        return index

    def allowed_widths(self, grid: int = 1) -> list[list[int]]:
        return [group.allowed_widths(grid) for group in self.groups]

    def least_widths(self, grid: int = 1) -> tuple[int, ...]:
        return tuple(widths[0] for widths in self.allowed_widths(grid))

    def half_widths(self, grid: int = 1) -> tuple[int, ...]:
        """The allowed widths nearest to half of every group's channels, (G,)."""
        return tuple(
            min(allowed, key=lambda width: (abs(width - group.channels / 2), width))
            for group, allowed in zip(self.groups, self.allowed_widths(grid), strict=True)
        )

    def check_widths(self, widths: Sequence[int]) -> tuple[int, ...]:
        """Validate widths (G,) against channel counts and ties.

        Raises:
            PlanError: wrong length, or a width that its group cannot have.
        """
        if len(widths) != len(self.groups):
            raise PlanError(
                f"widths: got {len(widths)} numbers for {len(self.groups)} groups; "
                "give one width per group, in the order of `space.names`"
            )
        for group, width in zip(self.groups, widths, strict=True):
            if not 0 < width <= group.channels or width % group.ties:
                raise PlanError(
                    f"group `{group.name}`: width {width} is not possible; choose a multiple of "
                    f"{group.ties} from {group.ties} to {group.channels}"
                )
        return tuple(int(width) for width in widths)

    def to_json(self) -> dict[str, Any]:
        return {
            "kind": "channel-space",
            "version": 1,
            "groups": [group.to_json() for group in self.groups],
            "layers": [vars(layer) for layer in self.layers],
            "excluded": dict(self.excluded),
        }

    @classmethod
    def from_json(cls, value: Any) -> ChannelSpace:
        """Read what `to_json` wrote.

        Raises:
            FileFormatError: not a channel space of a version this package reads.
        """
        if not isinstance(value, dict) or value.get("kind") != "channel-space":
            raise FileFormatError("channel space: the JSON is no channel space; trace again")
        if value.get("version") != 1:
            raise FileFormatError(
                f"channel space: version {value.get('version')!r}, this package reads 1; "
                "trace again"
            )
        try:
            return cls(
                tuple(ChannelGroup.from_json(group) for group in value["groups"]),
                tuple(Layer(**layer) for layer in value["layers"]),
                dict(value["excluded"]),
            )
        except (KeyError, TypeError, ValueError) as error:
            raise FileFormatError(f"channel space: a field is missing or wrong ({error})") from None

    @cached_property
    def fingerprint(self) -> str:
        """Short hash of structure (not floors, caps or weights): equal for equal networks."""
        structure = {
            "groups": [
                [g.name, g.channels, g.ties, [slot.to_json() for slot in g.slots]]
                for g in self.groups
            ],
            "layers": [vars(layer) for layer in self.layers],
        }
        text = json.dumps(structure, sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]
