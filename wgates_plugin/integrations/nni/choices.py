"""What a config list asks for, checked entry by entry, before any network is touched."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from nni.compression.base.config import (
    default_config_schema,
    select_modules_by_config,
    trans_legacy_config_list,
)
from nni.compression.base.setting import PruningSetting, canonicalize_settings
from schema import SchemaError
from torch import Tensor, nn

ConfigList = list[dict[str, Any]]
GroupId = int | str


@dataclass(frozen=True)
class LayerChoice:
    """What the config asks of one layer's weight.

    Attributes:
        ratio: share of output channels to remove; None leaves it to the target.
        least, most: bounds of that share.
        dependency: layers of one id lose the same share, or are refused.
        shared: `global_group_id`; layers of one id lose the ratio together, not each. Beside a
            `dependency_group_id` it says nothing: NNI applies that rule first.
        follows: its mask is aligned to another layer's, so that it chooses nothing itself.
    """

    ratio: float | None
    least: float
    most: float
    dependency: GroupId | None
    shared: GroupId | None
    follows: bool

    @property
    def exact(self) -> bool:
        """Whether the layer itself loses the ratio."""
        return self.ratio is not None and self.shared is None

    @property
    def clamped(self) -> float | None:
        """The ratio within its bounds, NNI's rule."""
        return None if self.ratio is None else min(self.most, max(self.least, self.ratio))


@dataclass
class ReadConfig:
    """A config list, read.

    Attributes:
        entries: the list in NNI 3.0's words.
        choices: layer whose weight it names -> what it asks, in `named_modules()` order; NNI itself
            goes through sets, in an order that changes from one process to the next.
        wrapped: layer -> parameters that NNI wraps for it.
        problems: everything that is wrong.
    """

    entries: ConfigList = field(default_factory=list)
    choices: dict[str, LayerChoice] = field(default_factory=dict)
    wrapped: dict[str, set[str]] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)


def read_config(network: nn.Module, config_list: object) -> ReadConfig:
    """Read and check a config list, without touching the network."""
    read = ReadConfig()
    problems, choices = read.problems, read.choices
    if not isinstance(config_list, list) or not config_list:
        problems.append(f"config_list is {config_list!r}, needs a list of dicts, at least one")
        return read
    if strange := [entry for entry in config_list if not isinstance(entry, dict)]:
        problems.append(f"config_list holds {strange[0]!r}, every entry must be a dict")
        return read
    read.entries = trans_legacy_config_list(copy.deepcopy(config_list))
    found = dict(network.named_modules())
    order = {name: place for place, name in enumerate(found)}
    for number, entry in enumerate(read.entries):
        where = f"entry {number}"
        wrong = _entry_problems(where, entry, found)
        if wrong:
            problems += wrong
            continue
        chosen, public, _ = select_modules_by_config(network, entry)
        if not chosen and "exclude" in config_list[number]:  # its layers left the others' choice
            continue
        if not chosen:
            problems.append(f"{where} names no layer of the network: {_selectors(entry, found)}")
            continue
        for name in sorted(chosen, key=order.__getitem__):
            choice, targets, wrong = _choice(f"{where}, `{name}`", chosen[name], public)
            problems += wrong
            read.wrapped.setdefault(name, set()).update(targets)
            if choice is None:
                continue
            earlier = choices.setdefault(name, choice)
            if earlier != choice:
                problems.append(
                    f"`{name}` is configured twice, differently, the second time in {where}; keep "
                    "one of the entries or exclude the layer from the other"
                )
    problems += _uneven(choices)
    read.choices = dict(sorted(choices.items(), key=lambda item: order[item[0]]))
    return read


def _uneven(choices: Mapping[str, LayerChoice]) -> Iterator[str]:
    """One problem for each id whose layers are given different ratios."""
    words: dict[str, Any] = {"dependency_group_id": "dependency", "global_group_id": "shared"}
    for key, attribute in words.items():
        ratios: dict[GroupId, dict[float, str]] = {}
        for name, choice in choices.items():
            group_id = getattr(choice, attribute)
            if group_id is not None and choice.ratio is not None:
                ratios.setdefault(group_id, {}).setdefault(choice.ratio, name)
        for group_id, given in ratios.items():
            if len(given) > 1:
                pairs = ", ".join(f"{ratio:g} for `{name}`" for ratio, name in given.items())
                yield f"{key} {group_id!r}: contradictory sparse_ratio ({pairs}); give one"


def _selectors(entry: Mapping[str, Any], found: Mapping[str, nn.Module]) -> str:
    used = {key: value for key, value in entry.items() if "op_" in key}
    kinds = sorted({type(module).__name__ for module in found.values() if _registered(module)})
    return (
        ", ".join(f"{key}={value}" for key, value in used.items())
        + f"; types that can be pruned here: {', '.join(kinds) or 'none'}"
    )


def _registered(module: nn.Module) -> bool:
    return type(module).__name__ in PruningSetting.registry


def _entry_problems(where: str, entry: dict[str, Any], found: Mapping[str, nn.Module]) -> list[str]:
    problems = [
        f"{where}: no layer `{name}` in the network; names are those of `named_modules()`"
        for name in _listed(entry.get("op_names"))
        if name not in found
    ]
    targets = _listed(entry.get("target_names"))
    if outside := [name for name in targets if name.startswith("_")]:
        problems.append(
            f"{where}: target_names {outside}: masks of inputs and outputs remove nothing; name "
            "weight and bias, or leave target_names out"
        )
    nested = entry.get("target_settings")
    places = {where: entry}
    if isinstance(nested, dict):
        places |= {
            f"{where}, target `{target}`": settings
            for target, settings in nested.items()
            if isinstance(settings, dict)
        }
    for place, settings in places.items():
        problems += _setting_problems(place, settings)
    if problems:
        return problems
    try:
        default_config_schema("pruning").validate(entry)
    except SchemaError as error:
        problems.append(f"{where}: {' '.join(str(error).split())}")
    return problems


def _listed(value: object) -> Sequence[str]:
    return [item for item in value if isinstance(item, str)] if isinstance(value, list) else []


def _setting_problems(where: str, settings: dict[str, Any]) -> list[str]:
    """Problems of one place that holds settings; whole numbers become floats, as NNI wants them."""
    problems = []
    ranges = {
        "sparse_ratio": ("from 0 up to, but not including, 1", lambda value: 0 <= value < 1),
        "min_sparse_ratio": ("from 0 up to, but not including, 1", lambda value: 0 <= value < 1),
        "max_sparse_ratio": ("above 0 and up to 1", lambda value: 0 < value <= 1),
    }
    for key, (words, inside) in ranges.items():
        value = settings.get(key)
        if value is None:
            settings.pop(key, None)
        elif isinstance(value, bool) or not isinstance(value, (int, float)) or not inside(value):
            problems.append(f"{where}: {key} is {value!r}, needs a number {words}")
        else:
            settings[key] = float(value)
    if not problems and settings.get("min_sparse_ratio", 0) > settings.get("max_sparse_ratio", 1):
        problems.append(f"{where}: min_sparse_ratio is larger than max_sparse_ratio")
    if settings.get("sparse_threshold") is not None:
        problems.append(
            f"{where}: sparse_threshold compares metrics of other pruners; give a sparse_ratio, or "
            "a target for the whole network"
        )
    if settings.get("apply_method", "mul") != "mul":
        problems.append(f"{where}: apply_method {settings['apply_method']!r}: only `mul` removes")
    return problems


def _choice(
    where: str, module: nn.Module, public: dict[str, Any]
) -> tuple[LayerChoice | None, set[str], list[str]]:
    """(the choice unless the weight is left alone, parameters that NNI wraps, problems)."""
    if not _registered(module):
        known = ", ".join(PruningSetting.registry)
        problem = (
            f"{where} is a {type(module).__name__}, NNI prunes {known}; narrow the entry down with "
            "op_types or exclude_op_types"
        )
        return None, set(), [problem]
    settings = canonicalize_settings(module, public, "pruning")
    weight = settings.get("weight")
    if weight is None:
        return None, set(settings), []
    problems = []
    granularity = weight.get("granularity")
    if not _whole_channels(granularity, getattr(module, "weight", None)):
        problems.append(
            f"{where}: granularity {granularity!r}: W-Gates prunes whole output channels; give "
            "'default' or 'out_channel'"
        )
    dependency = weight.get("dependency_group_id")
    choice = LayerChoice(
        ratio=weight.get("sparse_ratio"),
        least=weight.get("min_sparse_ratio") or 0.0,
        most=weight.get("max_sparse_ratio") or 1.0,
        dependency=dependency,
        shared=weight.get("global_group_id") if dependency is None else None,
        follows=weight.get("align") is not None,
    )
    return choice, set(settings), problems


def _whole_channels(granularity: object, weight: Tensor | None) -> bool:
    if granularity in (None, "default", "out_channel") or weight is None:
        return True
    shape: Any = granularity
    if isinstance(shape, list) and shape and isinstance(shape[0], list):
        shape = shape[0]
    return shape == [1] + [-1] * (weight.dim() - 1)


def missing_entries(
    needed: Mapping[str, Sequence[str]], wrapped: Mapping[str, set[str]]
) -> ConfigList:
    """Entries that make NNI wrap the parameters that need a mask and have no wrapper yet."""
    missing = {
        name: [key for key in keys if key not in wrapped.get(name, ())]
        for name, keys in needed.items()
    }
    return [{"op_names": [name], "target_names": keys} for name, keys in missing.items() if keys]
