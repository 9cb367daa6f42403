"""The pruning plan: which channels stay. The only currency between deciding and removing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from wgates_plugin.channels import ChannelSpace
from wgates_plugin.errors import FileFormatError, PlanError
from wgates_plugin.files import read_json, write_json


@dataclass(frozen=True, eq=False)
class PruningPlan:
    """Kept units per group, validated against the channel space it is for.

    `kept[g]` lists unit numbers, ascending. Without grouped convolutions a unit is a channel; with
    ties, unit `u` stands for channels `u, u + units, u + 2 * units, ...`.
    """

    space: ChannelSpace
    kept: tuple[tuple[int, ...], ...]
    note: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        groups = self.space.groups
        if len(self.kept) != len(groups):
            raise PlanError(f"plan: {len(self.kept)} entries for {len(groups)} groups")
        problems = []
        for group, kept in zip(groups, self.kept, strict=True):
            width = len(kept) * group.ties
            if list(kept) != sorted(set(kept)):
                problems.append(f"group `{group.name}`: kept units repeat or are out of order")
            elif kept and not (kept[0] >= 0 and kept[-1] < group.units):
                wrong = kept[0] if kept[0] < 0 else kept[-1]
                problems.append(
                    f"group `{group.name}`: unit {wrong} of {group.units} does not exist"
                )
            elif width < group.floor:
                problems.append(
                    f"group `{group.name}`: keeps {width} of {group.channels} channels, its floor "
                    f"is {group.floor}"
                )
            elif width > group.cap:
                problems.append(
                    f"group `{group.name}`: keeps {width} of {group.channels} channels, its cap is "
                    f"{group.cap}"
                )
        if problems:
            raise PlanError("plan: " + "; ".join(problems))

    @classmethod
    def from_masks(
        cls, space: ChannelSpace, masks: Tensor | np.ndarray, **note: Any
    ) -> PruningPlan:
        """From one boolean vector (total_units,) over all groups, True = kept."""
        flags = np.asarray(masks.cpu() if isinstance(masks, Tensor) else masks, dtype=bool)
        if flags.shape != (space.total_units,):
            raise PlanError(f"plan: mask of shape {flags.shape}, needed ({space.total_units},)")
        kept = tuple(
            tuple(np.flatnonzero(flags[space.unit_slice(index)]).tolist())
            for index in range(len(space.groups))
        )
        return cls(space, kept, note)

    @classmethod
    def top(
        cls, space: ChannelSpace, scores: Tensor, widths: Sequence[int], **note: Any
    ) -> PruningPlan:
        """Keep the highest scores (total_units,) of each group, as many as `widths` (G,) allow.

        Equal scores are decided by the lower unit number, so the same scores give the same plan.

        Raises:
            PlanError: widths that the space cannot have, or scores of another shape or with a NaN.
        """
        widths = space.check_widths(widths)
        if problem := score_problem(space, scores, infinite=True):
            raise PlanError(f"plan: {problem}")
        kept = []
        for index, (group, width) in enumerate(zip(space.groups, widths, strict=True)):
            mine = scores.detach()[space.unit_slice(index)]
            order = torch.argsort(mine, descending=True, stable=True)
            kept.append(tuple(sorted(order[: width // group.ties].tolist())))
        return cls(space, tuple(kept), note)

    @classmethod
    def leading(cls, space: ChannelSpace, widths: Sequence[int]) -> PruningPlan:
        """Keep the first channels of each group: for shapes alone, where values do not matter."""
        widths = space.check_widths(widths)
        kept = tuple(
            tuple(range(width // group.ties))
            for group, width in zip(space.groups, widths, strict=True)
        )
        # Shapes may be outside the limits of what is delivered, so these are not checked here.
        plan = object.__new__(cls)
        object.__setattr__(plan, "space", space)
        object.__setattr__(plan, "kept", kept)
        object.__setattr__(plan, "note", {})
        return plan

    @property
    def widths(self) -> tuple[int, ...]:
        """Kept channels per group (G,)."""
        return tuple(
            len(kept) * group.ties for group, kept in zip(self.space.groups, self.kept, strict=True)
        )

    @property
    def mask(self) -> Tensor:
        """Boolean (total_units,), True = kept."""
        mask = torch.zeros(self.space.total_units, dtype=torch.bool)
        for index, kept in enumerate(self.kept):
            mask[self.space.offsets[index] + torch.tensor(kept, dtype=torch.long)] = True
        return mask

    def removed_channels(self, index: int) -> list[int]:
        """Channel numbers of group `index` that go, in the numbering of its named producer."""
        group = self.space.groups[index]
        units = group.units
        gone = sorted(set(range(units)) - set(self.kept[index]))
        return [unit + tie * units for tie in range(group.ties) for unit in gone]

    def compose(self, inner: PruningPlan) -> PruningPlan:
        """The one plan that equals this plan followed by `inner`, made for the smaller network.

        A group that is down to one unit has nothing left to choose, so that `inner` need not know it.
        Floors are the lower ones of both: a fraction of the smaller network is less than one of this.
        Steps after the cut are those of both, in their order.

        Raises:
            PlanError: `inner` is for another network, or has steps before its cut: they come after the
                first cut, where no plan can have them.
        """
        if inner.note.get("before"):
            raise PlanError(
                "plan: the second plan changes layers before its cut, which one plan cannot tell after "
                "the first cut; keep both plans, and rebuild by one after the other"
            )
        if unknown := set(inner.space.names) - set(self.space.names):
            raise PlanError(
                f"plan: the second plan has a group `{min(unknown)}` that the first does not know; "
                "it is for another network"
            )
        seconds = dict(zip(inner.space.names, inner.kept, strict=True))
        units = {group.name: group.units for group in inner.space.groups}
        kept = []
        for name, first in zip(self.space.names, self.kept, strict=True):
            second = seconds.get(name, ())
            if name not in seconds or (len(first) == 1 and len(second) == units[name]):
                kept.append(first)
                continue
            if units[name] != len(first):
                raise PlanError(
                    f"group `{name}`: the second plan chooses among {units[name]} units, the first "
                    f"left {len(first)}; it keeps what is gone already or is for another network"
                )
            kept.append(tuple(first[unit] for unit in second))
        steps = {
            "before": self.note.get("before"),
            "after": [*self.note.get("after", ()), *inner.note.get("after", ())],
        }
        told = {when: mine for when, mine in steps.items() if mine}
        space = _with_lower_floors(self.space, inner.space)
        return PruningPlan(space, tuple(kept), {**self.note, **inner.note, **told})

    def to_json(self) -> dict[str, Any]:
        return {
            "kind": "pruning-plan",
            "version": 1,
            "fingerprint": self.space.fingerprint,
            "kept": {
                name: list(kept) for name, kept in zip(self.space.names, self.kept, strict=True)
            },
            "note": dict(self.note),
            "space": self.space.to_json(),
        }

    @classmethod
    def from_json(cls, value: Any, *, space: ChannelSpace | None = None) -> PruningPlan:
        """Read what `to_json` wrote; with `space`, insist that the plan is for that network.

        Raises:
            FileFormatError: no plan. PlanError: a plan for another network, or an invalid one.
        """
        if not isinstance(value, dict) or value.get("kind") != "pruning-plan":
            raise FileFormatError("plan: the JSON is no pruning plan")
        if value.get("version") != 1:
            raise FileFormatError(f"plan: version {value.get('version')!r}, this package reads 1")
        try:
            own = ChannelSpace.from_json(value["space"])
            fingerprint, table, note = value["fingerprint"], value["kept"], value["note"]
            kept = tuple(tuple(int(unit) for unit in table[name]) for name in own.names)
            if not isinstance(note, dict):
                raise TypeError("`note` is no object")
        except (KeyError, TypeError, ValueError) as error:
            raise FileFormatError(f"plan: a field is missing or wrong ({error!r})") from None
        if own.fingerprint != fingerprint:
            raise FileFormatError("plan: its channel space does not match its fingerprint")
        if space is not None and space.fingerprint != fingerprint:
            raise PlanError(
                f"plan: made for another network (fingerprint {fingerprint}, this one has "
                f"{space.fingerprint}); use the network and input shape that the plan was made from"
            )
        return cls(own, kept, note)

    def save(self, path: str | Path) -> None:
        write_json(path, self.to_json())

    @classmethod
    def load(cls, path: str | Path, *, space: ChannelSpace | None = None) -> PruningPlan:
        return cls.from_json(read_json(path, kind="plan"), space=space)


def score_problem(space: ChannelSpace, scores: Tensor, *, infinite: bool = False) -> str | None:
    """What is wrong with scores that should be one number per unit (total_units,); None: nothing.

    Args:
        infinite: take infinities, which can be put in order like any number.
    """
    if scores.shape != (space.total_units,):
        return f"scores have shape {tuple(scores.shape)}, needed ({space.total_units},)"
    usable = (~scores.isnan() if infinite else scores.isfinite()).cpu()
    wrong = [name for i, name in enumerate(space.names) if not usable[space.unit_slice(i)].all()]
    if not wrong:
        return None
    shown = ", ".join(f"`{name}`" for name in wrong[:6]) + " ..." * (len(wrong) > 6)
    return f"scores of {shown} are not finite; give every unit a number"


def _with_lower_floors(space: ChannelSpace, other: ChannelSpace) -> ChannelSpace:
    """`space` with the floors of the other's groups where these are lower."""
    floors = {group.name: group.floor for group in other.groups}
    groups = tuple(
        replace(group, floor=min(group.floor, floors.get(group.name, group.floor)))
        for group in space.groups
    )
    return replace(space, groups=groups)
