"""torch-pruning's constructor words: what they mean for gates."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import nn

from wgates_plugin import modules as kinds
from wgates_plugin.channels import ChannelGroup, ChannelSpace
from wgates_plugin.errors import ConfigError
from wgates_plugin.strategies.ratios import Scope, make_scopes, structure_of

SUBJECT = "torch-pruning options"
"""Subject of errors raised here, until `told_as` puts the class that the user called."""


@contextmanager
def told_as(subject: str) -> Iterator[None]:
    """Errors about options name what the user called."""
    try:
        yield
    except ConfigError as error:
        if error.subject != SUBJECT:
            raise
        raise ConfigError(subject, error.problems) from error.__cause__


def problems_of(*checks: Callable[[], object]) -> list[str]:
    """The problems of all checks that raise a `ConfigError`."""
    problems = []
    for check in checks:
        try:
            check()
        except ConfigError as error:
            problems += error.problems
    return problems


@dataclass(frozen=True)
class Ratios:
    """The ratio words of torch-pruning's pruners, unchecked."""

    ratio: float
    by_module: Mapping[Any, float]
    together: bool
    isomorphic: bool


def plain(model: nn.Module) -> nn.Module:
    """The network within `torch.compile`'s wrapper, which shares its layers."""
    inner = getattr(model, "_orig_mod", None)
    return inner if isinstance(inner, nn.Module) else model


def wraps(model: object, network: nn.Module) -> bool:
    """Is it `network` itself, or a compiled or parallel wrapper of it?"""
    seen: list[object] = []
    while isinstance(model, nn.Module) and model not in seen:
        if model is network:
            return True
        seen.append(model)
        inner = getattr(model, "_orig_mod", None)
        model = getattr(model, "module", None) if inner is None else inner
    return False


def schedule(scheduler: Callable[[float, int], Sequence[float]], goal: float, steps: int) -> Any:
    """The scheduler's ratio after each step, (steps + 1,), checked.

    Raises:
        ConfigError: it gives too few numbers, or does not rise from 0 to the goal.
    """
    try:
        found = tuple(float(value) for value in scheduler(goal, steps))
    except TypeError as error:
        raise ConfigError(
            SUBJECT,
            [
                f"iterative_pruning_ratio_scheduler: fails for ratio {goal} in {steps} steps "
                f"({error}); needs a function (ratio, steps) -> ratios after each step"
            ],
        ) from error
    rising = all(a <= b + 1e-12 for a, b in itertools.pairwise(found))
    if len(found) != steps + 1 or not rising or not math.isclose(found[-1], goal, abs_tol=1e-9):
        raise ConfigError(
            SUBJECT,
            [
                f"iterative_pruning_ratio_scheduler: gave {list(found)} for ratio {goal} in {steps} "
                f"steps; needs {steps + 1} numbers that rise to the ratio"
            ],
        )
    return found


def scopes_of(
    network: nn.Module,
    space: ChannelSpace,
    ratios: Ratios,
    steps: int,
    scheduler: Callable[[float, int], Sequence[float]],
) -> list[Scope]:
    """Which groups are ranked together, and how much of each scope goes.

    Raises:
        ConfigError: coupled layers get two ratios.
    """
    named = _ratios_by_group(network, space, ratios.by_module)
    default = schedule(scheduler, ratios.ratio, steps)

    def of(group: ChannelGroup) -> tuple[object, tuple[float, ...]]:
        if group.name in named:
            entry, ratio = named[group.name]
            key = ("entry", entry, None if ratios.together else group.name)
            return key, schedule(scheduler, ratio, steps)
        if ratios.isomorphic:
            return ("like", structure_of(group, network)), default
        return ("all", None if ratios.together else group.name), default

    return make_scopes(space, of)


def check_ratio_modules(network: nn.Module, by_module: Mapping[Any, float] | None) -> None:
    """Refuse keys of `pruning_ratio_dict` that are no modules of the network.

    Raises:
        ConfigError: names them.
    """
    own = set(network.modules())
    problems = [
        f"pruning_ratio_dict: {type(module).__name__} {module!r:.60} is no module of the network"
        for key in by_module or {}
        for module in (key if isinstance(key, tuple) else (key,))
        if not isinstance(module, nn.Module) or module not in own
    ]
    if problems:
        raise ConfigError(SUBJECT, problems)


def ratios_without_effect(
    network: nn.Module, space: ChannelSpace, by_module: Mapping[Any, float]
) -> list[str]:
    """Entries of `pruning_ratio_dict` that ask for channels to go where all of them stay."""
    pruned = {
        slot.module for group in space.groups for slot in group.slots if slot.role != "consumer"
    }
    return [
        f"pruning_ratio_dict: {ratio} for `{layers[0]}` has no effect, nothing of it is pruned"
        + (f" ({space.excluded[layers[0]]})" if layers[0] in space.excluded else "")
        for _, ratio, layers in _entries(network, by_module)
        if ratio > 0 and pruned.isdisjoint(layers)
    ]


def _entries(
    network: nn.Module, by_module: Mapping[Any, float]
) -> Iterator[tuple[int, float, list[str]]]:
    """(number of the entry, ratio, names of one of its modules and of all within it)."""
    names = {module: name for name, module in network.named_modules()}
    for number, (key, ratio) in enumerate(by_module.items()):
        for module in key if isinstance(key, tuple) else (key,):
            yield number, ratio, [names[inner] for inner in module.modules()]


def _ratios_by_group(
    network: nn.Module, space: ChannelSpace, by_module: Mapping[Any, float]
) -> dict[str, tuple[int, float]]:
    """Group name -> (number of its dictionary entry, ratio).

    As in torch-pruning, a layer's last entry counts, and what produces a group's channels speaks for
    it before what they pass through. A module speaks for the channels that it produces, one without
    any (a norm) for those that pass.
    """
    producers = {slot.module for group in space.groups for slot in group.slots_as("producer")}
    entry_of: dict[str, tuple[int, float]] = {}
    for number, ratio, layers in _entries(network, by_module):
        produced = [layer for layer in layers if layer in producers]
        entry_of.update(dict.fromkeys(produced or layers, (number, ratio)))
    chosen: dict[str, tuple[int, float]] = {}
    problems = []
    for group in space.groups:
        found = [
            [slot.module for slot in group.slots_as(role) if slot.module in entry_of]
            for role in ("producer", "passenger")
        ]
        layers = found[0] or found[1]
        if not layers:
            continue
        first, chosen[group.name] = layers[0], entry_of[layers[0]]
        problems += [
            f"pruning_ratio_dict: group `{group.name}` gets {entry_of[first][1]} and "
            f"{entry_of[other][1]} (by `{first}` and `{other}`); its layers are coupled, give them "
            "one ratio"
            for other in layers
            if entry_of[other][1] != entry_of[first][1]
        ]
    if problems:
        raise ConfigError(SUBJECT, problems)
    return chosen


def root_types_left_out(
    network: nn.Module, space: ChannelSpace, types: Sequence[type] | None
) -> list[str]:
    """Names of groups without a producer of these types, to be ignored.

    Raises:
        ConfigError: none of the types is one whose channels are pruned here.
    """
    if types is None:
        return []
    wanted = check_root_types(types)
    found = dict(network.named_modules())
    return [
        group.name
        for group in space.groups
        if not any(isinstance(found[slot.module], wanted) for slot in group.slots_as("producer"))
    ]


def check_root_types(types: Sequence[type] | None) -> tuple[type, ...]:
    """The types among `types`; an empty tuple for None.

    Raises:
        ConfigError: none of them is one whose channels are pruned here.
    """
    if types is None:
        return ()
    # torch-pruning's own words are base classes, such as `_ConvNd`.
    wanted = tuple(t for t in types if isinstance(t, type))
    if not any(
        issubclass(t, kinds.WEIGHTED) or issubclass(kind, t)
        for t in wanted
        for kind in kinds.WEIGHTED
    ):
        known = ", ".join(kind.__name__ for kind in kinds.WEIGHTED)
        raise ConfigError(
            SUBJECT, [f"root_module_types {list(types)!r}: none is prunable here; known: {known}"]
        )
    return wanted


def listed_layers(network: nn.Module, ignored_layers: Sequence[Any] | None) -> list[Any]:
    """`ignored_layers` with each type replaced by the network's modules of that type.

    Raises:
        ConfigError: a bare parameter, or a type of which the network has none.
    """
    layers: list[Any] = []
    problems = []
    for layer in ignored_layers or []:
        if isinstance(layer, type):
            found = [module for module in network.modules() if isinstance(module, layer)]
            if not found:
                problems.append(f"ignored_layers: the network has no {layer.__name__}")
            layers += found
        elif isinstance(layer, nn.Parameter):
            problems.append(
                "ignored_layers: holds a parameter; name the layer whose channels must stay "
                "(channels that a bare parameter shares stay anyway)"
            )
        else:
            layers.append(layer)
    if problems:
        raise ConfigError(SUBJECT, problems)
    return layers


def parameter_dims(network: nn.Module, given: Any) -> list[tuple[nn.Parameter, int]]:
    """`unwrapped_parameters`, a mapping or pairs, as the pairs that torch-pruning takes.

    Raises:
        ConfigError: an entry is no parameter of the network with one of its dimensions.
    """
    pairs = list(given.items()) if isinstance(given, Mapping) else list(given or [])
    own = {id(parameter) for parameter in network.parameters()}
    problems = [
        f"unwrapped_parameters: entry {number} is no (parameter of the network, dimension)"
        for number, pair in enumerate(pairs)
        if len(pair) != 2
        or not isinstance(pair[0], nn.Parameter)
        or id(pair[0]) not in own
        or not isinstance(pair[1], int)
        or not -pair[0].dim() <= pair[1] < pair[0].dim()
    ]
    if problems:
        raise ConfigError(SUBJECT, problems)
    return [(parameter, dim) for parameter, dim in pairs]
