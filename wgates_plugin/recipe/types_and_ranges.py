"""What types and ranges tell of a recipe: pydantic's errors in our words, each with its place."""

from __future__ import annotations

import copy
import difflib
import json
from collections.abc import Iterator
from typing import Any

from pydantic import ValidationError

from wgates_plugin.errors import ConfigError
from wgates_plugin.recipe.blocks import Recipe
from wgates_plugin.recipe.places import leaves, lookup, take_out
from wgates_plugin.recipe.schema import Place, all_places, keys_of, takes_bool


def validated(raw: dict[str, Any], found: dict[Place, list[str]]) -> Recipe | None:
    """Types and ranges. Bad values are taken out and the rest checked again: a block with a wrong
    type says nothing about its ranges until that value is gone."""
    rest = copy.deepcopy(raw)
    for place, value in list(leaves(raw, ())):
        if isinstance(value, bool) and not takes_bool(place):
            found.setdefault(place, []).append(
                f"is {json.dumps(value)}; needs another kind of value than yes or no"
            )
            take_out(rest, place)
    while True:
        try:
            recipe = Recipe.model_validate(rest)
        except ValidationError as error:
            progressed = False
            for one in error.errors():
                where: Place = tuple(one["loc"])
                if one["type"] == "missing":
                    if lookup(raw, where) is None and where not in found:
                        found[where] = ["is missing"]
                    continue
                for inner, line in _lines(where, one):
                    found.setdefault(inner, []).append(line)
                progressed = take_out(rest, where) or progressed
            if not progressed:
                return None
        else:
            return None if found else recipe


def _lines(place: Place, error: Any) -> Iterator[tuple[Place, str]]:
    """One pydantic error as (path, words)."""
    kind, value = error["type"], error["input"]
    if kind in ("extra_forbidden", "unexpected_keyword_argument"):
        yield place, f"unknown key{_suggestion(place)}"
        return
    cause = error.get("ctx", {}).get("error")
    if isinstance(cause, ConfigError):
        known = keys_of(place) or []
        for problem in cause.problems:
            first = problem.split()[0]
            key, _, inner = first.partition(".")
            if key in known:
                words = problem[len(first) :].strip()
                where = (*place, key, inner) if inner else (*place, key)
                yield where, words if words.startswith("is ") else f"is {words}"
            else:
                yield place, problem
        return
    message = error["msg"].removeprefix("Value error, ")
    if kind in ("model_type", "dataclass_type", "dict_type"):
        message = f"needs keys below it ({', '.join(keys_of(place) or ['name: value'])})"
    shown = repr(value) if len(repr(value)) < 60 else type(value).__name__
    yield place, f"is {shown}; {message[0].lower() + message[1:]}"


def _suggestion(place: Place) -> str:
    key, siblings = str(place[-1]), keys_of(place[:-1]) or []
    close = difflib.get_close_matches(key, siblings, n=1, cutoff=0.6)
    if close:
        return f"; did you mean `{'.'.join(map(str, (*place[:-1], close[0])))}`?"
    elsewhere = [path for path in all_places() if path[-1] == key]
    if elsewhere:
        return f"; did you mean `{'.'.join(elsewhere[0])}`?"
    return f"; known here: {', '.join(siblings)}"
