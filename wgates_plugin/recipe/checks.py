"""Checking a recipe: every problem found at once, each with the path of its key."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from typing import Any

from wgates_plugin.errors import ConfigError
from wgates_plugin.recipe.blocks import Recipe
from wgates_plugin.recipe.meaning import meaning_problems
from wgates_plugin.recipe.overrides import override
from wgates_plugin.recipe.schema import Place
from wgates_plugin.recipe.types_and_ranges import validated


def checked(
    raw: dict[str, Any], *, overrides: Sequence[str] = (), subject: str = "recipe"
) -> Recipe:
    """The recipe of plain values `raw` with `overrides` put in.

    Raises:
        ConfigError: all problems at once.
    """
    raw = copy.deepcopy(raw)
    found: dict[Place, list[str]] = {}
    for item in overrides:
        problem = override(raw, item)
        if problem:
            found.setdefault(("--set", item), []).append(problem)
    recipe = validated(raw, found)
    for place, problem in meaning_problems(raw):
        if place not in found:
            found[place] = [problem]
    if found or recipe is None:
        raise ConfigError(
            subject, [line for place, lines in found.items() for line in _worded(place, lines)]
        )
    return recipe


def _worded(place: Place, lines: list[str]) -> Iterator[str]:
    path = ".".join(map(str, place)) if place[0] != "--set" else " ".join(map(str, place))
    for line in lines:
        yield f"`{path}`: {line}"
