"""Strategies by name, and their options checked."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import Any

from pydantic import TypeAdapter, ValidationError

from wgates_plugin.catalogue.factories import is_factory_name, load_factory
from wgates_plugin.errors import ConfigError
from wgates_plugin.option_checks import did_you_mean, value_problems
from wgates_plugin.strategies.base import Strategy, option_names
from wgates_plugin.strategies.criteria.refused import REFUSED as REFUSED_CRITERIA
from wgates_plugin.strategies.criteria.strategy import criterion_strategies
from wgates_plugin.strategies.functionality import FunctionalityStrategy
from wgates_plugin.strategies.gdp import GDPStrategy
from wgates_plugin.strategies.knapsack import KnapsackStrategy
from wgates_plugin.strategies.metapruning import MetaPruningStrategy
from wgates_plugin.strategies.scop import ScopStrategy
from wgates_plugin.strategies.slim import SlimStrategy
from wgates_plugin.strategies.wgates.strategy import WGatesStrategy

STRATEGIES: dict[str, type[Strategy]] = {
    "wgates": WGatesStrategy,
    "gdp": GDPStrategy,
    "functionality": FunctionalityStrategy,
    "metapruning": MetaPruningStrategy,
    "scop": ScopStrategy,
    "slim": SlimStrategy,
    "knapsack": KnapsackStrategy,
    **criterion_strategies(),
}
"""Name -> strategy."""

REFUSED: dict[str, str] = {
    **REFUSED_CRITERIA,
    "unification": (
        "weight unification saves bytes and leaves all shapes as they are, so it cannot reach a "
        "target in milliseconds, MACs or parameters; choose a strategy and put `unification` "
        "(UnificationSettings) beside it in the pruning settings"
    ),
}
"""Name -> why it is no strategy."""


def strategy_type(name: str) -> type[Strategy]:
    """The class of a strategy, by its name or, one of your own, as "package.module:Class".

    Importing the latter runs that module's code.

    Raises:
        ConfigError: no such name, module or class.
    """
    if name in STRATEGIES:
        return STRATEGIES[name]
    if is_factory_name(name):
        found = load_factory(name)
        if isinstance(found, type) and issubclass(found, Strategy):
            return found
        raise ConfigError(
            f"strategy `{name}`",
            ["no subclass of wgates_plugin.strategies.Strategy; name a class that is one"],
        )
    hint = did_you_mean(name, STRATEGIES)
    raise ConfigError(
        f"strategy `{name}`",
        [f"{hint}known: {', '.join(STRATEGIES)}, or your own as package.module:Class"],
    )


def make_strategy(name: str, options: Mapping[str, Any] | None = None) -> Strategy:
    """The strategy called `name` with its options.

    Raises:
        ConfigError: unknown name, unknown options or bad values, all at once.
    """
    problems = strategy_problems(name, options or {})
    if problems:
        raise ConfigError("strategy", problems)
    kind = strategy_type(name)
    return kind(TypeAdapter(kind.settings_type).validate_python(dict(options or {})))


def strategy_problems(name: object, options: Mapping[str, Any]) -> list[str]:
    """What is wrong with a strategy's name and options, one line each, the key first."""
    reason = REFUSED.get(name) if isinstance(name, str) else None
    if reason is not None:
        return [f"strategy is {name!r}; {reason}"]
    try:
        kind = strategy_type(str(name))
    except ConfigError as error:
        # Options are most likely meant for the name that was nearly written.
        near = difflib.get_close_matches(str(name), list(STRATEGIES), n=1)
        return [
            *(f"strategy is {name!r}; {problem}" for problem in error.problems),
            *(strategy_problems(near[0], options) if near else ()),
        ]
    known = option_names(kind)
    problems = []
    rest = dict(options)
    for key in [key for key in options if key not in known]:
        problems.append(
            f"options.{key} is unknown to `{name}`; {did_you_mean(key, known)}known: "
            f"{', '.join(known) or 'none'}"
        )
        del rest[key]
    while True:
        try:
            settings: Any = TypeAdapter(kind.settings_type).validate_python(rest)
        except ValidationError as error:
            before = len(rest)
            problems += [f"options.{problem}" for problem in value_problems(error)]
            for one in error.errors():
                if one["loc"]:  # empty where the settings themselves refuse a value
                    rest.pop(str(one["loc"][0]), None)
            # A value of a wrong type says nothing about the ranges of the others until it is gone.
            if len(rest) == before:
                return problems
        else:
            try:
                kind(settings)
            except ConfigError as error:  # what only the strategy knows, such as what it imports
                problems += [f"options.{problem}" for problem in error.problems]
            return problems
