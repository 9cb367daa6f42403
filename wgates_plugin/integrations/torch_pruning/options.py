"""torch-pruning's constructor words: what they mean for gates, and which cannot be honoured."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from wgates_plugin import modules as kinds
from wgates_plugin.channels import ChannelGroup, ChannelSpace
from wgates_plugin.errors import ConfigError
from wgates_plugin.strategies.ratios import Scope, make_scopes, structure_of

SUBJECT = "WGatesPruner"

_HEADS = (
    "attention heads are not pruned: removing some would leave the module's own head count behind "
    "(see the README on networks beyond CNNs)"
)
_STRENGTH = (
    "no coefficient weighs the budget here, its pressure is found while training "
    '(`settings=WGatesSettings(constraint="linear", alpha=...)` sets one)'
)
_WRAP = "wrap the network in a module whose forward takes the example inputs and returns the tensor"
_CONV_GROUPS = "conv groups are found by tracing and kept alike in every one"

REFUSED: dict[str, tuple[tuple[Any, ...], str]] = {
    "customized_pruners": (
        (None, {}),
        "a gate cannot stand for the removal inside a layer it does not know; leave that layer out "
        "with `ignored_layers`",
    ),
    "forward_fn": ((None,), _WRAP),
    "output_transform": ((None,), _WRAP),
    "in_channel_groups": ((None, {}), _CONV_GROUPS),
    "out_channel_groups": ((None, {}), _CONV_GROUPS),
    "channel_groups": ((None, {}), _CONV_GROUPS),
    "num_heads": ((None, {}), _HEADS),
    "prune_num_heads": ((False,), _HEADS),
    "prune_head_dims": ((True,), _HEADS),
    "head_pruning_ratio": ((0.0,), _HEADS),
    "head_pruning_ratio_dict": ((None, {}), _HEADS),
    "ch_sparsity": ((None,), "renamed by torch-pruning; write `pruning_ratio`"),
    "ch_sparsity_dict": ((None, {}), "renamed by torch-pruning; write `pruning_ratio_dict`"),
    "reg": ((), _STRENGTH),
    "alpha": ((), _STRENGTH),
    "delta_reg": ((), _STRENGTH),
    "group_lasso": ((False,), "gates take the place of a norm penalty"),
}
"""Word -> (values that ask for nothing, why others cannot be honoured)."""


def refused_options(options: Mapping[str, Any]) -> list[str]:
    """One line per option that cannot be honoured, unknown ones included."""
    problems = []
    for name, value in options.items():
        if name not in REFUSED:
            problems.append(f"{name}: unknown option")
            continue
        neutral, reason = REFUSED[name]
        if not any(type(value) is type(n) and value == n for n in neutral):
            problems.append(f"{name}: {reason}")
    return problems


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


def ratio_problems(
    budget_given: bool,
    pruning_ratio: Any,
    by_module: Mapping[Any, float] | None,
    max_pruning_ratio: Any,
    iterative_steps: Any,
    isomorphic: bool,
) -> list[str]:
    """Everything wrong with the ratio words, before the network is looked at."""
    problems = []
    if budget_given:
        given = {
            "pruning_ratio": pruning_ratio is not None,
            "pruning_ratio_dict": bool(by_module),
            "isomorphic": isomorphic,
        }
        problems += [
            f"{name}: the budget decides every width; give either a target or ratios"
            for name, there in given.items()
            if there
        ]
    named = {"pruning_ratio": pruning_ratio, "max_pruning_ratio": max_pruning_ratio}
    for value in (by_module or {}).values():
        named.setdefault(f"pruning_ratio_dict value {value!r}", value)
    problems += [
        f"{name} {value!r}: needs a number from 0 to 1"
        for name, value in named.items()
        if value is not None and not _is_share(value)
    ]
    if (
        isinstance(iterative_steps, bool)
        or not isinstance(iterative_steps, int)
        or iterative_steps < 1
    ):
        problems.append(f"iterative_steps {iterative_steps!r}: needs a whole number from 1")
    return problems


def _is_share(value: Any) -> bool:
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return number and 0.0 <= value <= 1.0


def schedule(scheduler: Callable[[float, int], Sequence[float]], goal: float, steps: int) -> Any:
    """The scheduler's ratio after each step, (steps + 1,), checked.

    Raises:
        ConfigError: it gives too few numbers, or does not rise from 0 to the goal.
    """
    found = tuple(float(value) for value in scheduler(goal, steps))
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
        ConfigError: a module of `pruning_ratio_dict` has no prunable group, or one group gets two
            ratios.
    """
    named = _ratios_by_group(network, space, ratios)
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


def _ratios_by_group(
    network: nn.Module, space: ChannelSpace, ratios: Ratios
) -> dict[str, tuple[int, float]]:
    """Group name -> (number of its dictionary entry, ratio)."""
    names = {module: name for name, module in network.named_modules()}
    chosen: dict[str, tuple[int, float]] = {}
    problems = []
    for number, (key, ratio) in enumerate(ratios.by_module.items()):
        modules = key if isinstance(key, tuple) else (key,)
        for module in modules:
            if not isinstance(module, nn.Module) or module not in names:
                problems.append(
                    f"pruning_ratio_dict: {type(module).__name__} {module!r:.60} is no module of "
                    "the network"
                )
                continue
            inner = {names[m] for m in module.modules() if m in names}
            touched = [
                group.name
                for group in space.groups
                if any(slot.module in inner for slot in group.slots_as("producer"))
            ]
            if not touched:
                problems.append(
                    f"pruning_ratio_dict: `{names[module]}` produces no prunable channels"
                )
            for name in touched:
                entry = chosen.setdefault(name, (number, ratio))
                if entry[1] != ratio:
                    problems.append(
                        f"pruning_ratio_dict: group `{name}` gets {entry[1]} and {ratio} (by "
                        f"`{names[module]}`); its layers are coupled, give them one ratio"
                    )
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
