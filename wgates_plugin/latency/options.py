"""Options of runtimes, checked against the annotations of their constructors."""

from __future__ import annotations

import functools
import inspect
import typing
from collections.abc import Mapping
from typing import Any

from pydantic import ConfigDict, TypeAdapter, ValidationError

from wgates_plugin.latency.base import BaseRuntime
from wgates_plugin.option_checks import did_you_mean


@functools.cache
def options_of(kind: type[BaseRuntime]) -> dict[str, inspect.Parameter]:
    """Keyword arguments of a runtime beside its settings, in the order of its constructor."""
    parameters = inspect.signature(kind).parameters
    return {
        name: parameter
        for name, parameter in parameters.items()
        if parameter.kind is inspect.Parameter.KEYWORD_ONLY
    }


def option_problems(kind: type[BaseRuntime], options: Mapping[str, Any]) -> dict[str, str]:
    """What is wrong with the options of a runtime: name -> words; empty when all is well."""
    known = options_of(kind)
    hints = typing.get_type_hints(kind.__init__, include_extras=True)
    problems: dict[str, str] = {}
    for name, value in options.items():
        if name not in known:
            hint = did_you_mean(name, known)
            listed = f"it knows {', '.join(known)}" if known else "it has none"
            problems[str(name)] = f"no option of runtime `{kind.name}`; {hint}{listed}"
            continue
        wrong = _type_problem(hints[name], value)
        if wrong:
            problems[name] = wrong + _example(kind, name)
    for name, parameter in known.items():
        if parameter.default is inspect.Parameter.empty and name not in options:
            problems[name] = f"is missing; runtime `{kind.name}` needs it{_example(kind, name)}"
    return problems


def _example(kind: type[BaseRuntime], name: str) -> str:
    example = kind.examples.get(name)
    return "" if example is None else f"; such as {example}"


def _type_problem(hint: Any, value: Any) -> str | None:
    try:
        TypeAdapter(hint, config=ConfigDict(strict=True)).validate_python(value)
    except ValidationError as error:
        reasons = [
            "".join(f"item {part}: " for part in one["loc"] if isinstance(part, int))
            + one["msg"].removeprefix("Value error, ")
            for one in error.errors()
        ]
        return f"is {value!r}; " + "; ".join(reasons)
    return None
