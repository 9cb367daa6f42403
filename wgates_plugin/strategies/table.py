"""Strategies by name, and their options checked."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import TypeAdapter, ValidationError

from wgates_plugin.errors import ConfigError
from wgates_plugin.strategies.base import Strategy, option_names
from wgates_plugin.strategies.criteria import REFUSED as REFUSED_CRITERIA
from wgates_plugin.strategies.criteria_strategy import criterion_strategies
from wgates_plugin.strategies.gates_strategy import WGatesStrategy

STRATEGIES: dict[str, type[Strategy]] = {
    "wgates": WGatesStrategy,
    **criterion_strategies(),
}
"""Name -> strategy."""

REFUSED: dict[str, str] = {**REFUSED_CRITERIA}
"""Name -> why it is no strategy."""


def make_strategy(name: str, options: Mapping[str, Any] | None = None) -> Strategy:
    """The strategy called `name` with its options.

    Raises:
        ConfigError: unknown name, unknown options or bad values, all at once.
    """
    problems = strategy_problems(name, options or {})
    if problems:
        raise ConfigError("strategy", problems)
    kind = STRATEGIES[name]
    return kind(TypeAdapter(kind.settings_type).validate_python(dict(options or {})))


def strategy_problems(name: object, options: Mapping[str, Any]) -> list[str]:
    """What is wrong with a strategy's name and options, one line each."""
    if not isinstance(name, str) or name not in STRATEGIES:
        reason = REFUSED.get(name) if isinstance(name, str) else None
        return [f"strategy `{name}`: {reason or 'unknown; known: ' + ', '.join(STRATEGIES)}"]
    kind = STRATEGIES[name]
    known = option_names(kind)
    problems = [
        f"options: strategy `{name}` has no `{key}`; known: {', '.join(known)}"
        for key in options
        if key not in known
    ]
    rest = {key: value for key, value in options.items() if key in known}
    while True:
        try:
            TypeAdapter(kind.settings_type).validate_python(rest)
            return problems
        except ValidationError as error:
            before = len(rest)
            for one in error.errors():
                cause = one.get("ctx", {}).get("error")
                if isinstance(cause, ConfigError):
                    problems += [f"options: {problem}" for problem in cause.problems]
                else:
                    where = ".".join(map(str, one["loc"]))
                    words = one["msg"][0].lower() + one["msg"][1:]
                    problems.append(f"options: {where} is {one['input']!r}; {words}")
                    rest.pop(str(one["loc"][0]), None)
            # A value of a wrong type says nothing about the ranges of the others until it is gone.
            if len(rest) == before:
                return problems
