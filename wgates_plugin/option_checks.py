"""Words for settings that are given by name: unknown names, values of the wrong form."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

from pydantic import ValidationError

from wgates_plugin.errors import ConfigError


def did_you_mean(name: object, known: Iterable[str]) -> str:
    """A question with a space behind it, empty where no known name is near.

    >>> did_you_mean("sampels", ["samples", "grid"]), did_you_mean("x", ["samples"])
    ('did you mean `samples`? ', '')
    """
    near = difflib.get_close_matches(str(name), list(known), n=1)
    return f"did you mean `{near[0]}`? " if near else ""


def is_whole(value: object, *, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def value_problems(error: ValidationError) -> list[str]:
    """What is wrong with the values of a settings dataclass, one line each, the key first."""
    problems: list[str] = []
    for one in error.errors():
        cause = one.get("ctx", {}).get("error")
        if isinstance(cause, ConfigError):
            problems += cause.problems
        else:
            where, message = ".".join(map(str, one["loc"])), one["msg"]
            problems.append(f"{where} is {one['input']!r}; {message[0].lower()}{message[1:]}")
    return problems
