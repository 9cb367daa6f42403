"""What a recipe may hold, read off its classes: keys, types and where they stand."""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Iterator
from typing import Any

from pydantic import BaseModel

from wgates_plugin.recipe.blocks import Recipe

Place = tuple[str | int, ...]

FREE_KEYS = ("floors", "caps", "options")
"""Mappings whose keys are names of the user's; such names may hold dots."""


def inner_type(annotation: Any) -> Any:
    """`X` of `X | None` and `list[X]`."""
    if typing.get_origin(annotation) in (typing.Union, types.UnionType, list):
        for part in typing.get_args(annotation):
            if part is not type(None):
                return inner_type(part)
    return annotation


def fields_of(kind: Any) -> dict[str, Any]:
    """Key -> annotation of a settings class; empty for anything else."""
    if isinstance(kind, type) and issubclass(kind, BaseModel):
        return {name: info.annotation for name, info in kind.model_fields.items()}
    if isinstance(kind, type) and dataclasses.is_dataclass(kind):
        return typing.get_type_hints(kind)
    return {}


def type_at(place: Place) -> Any:
    kind: Any = Recipe
    for part in place:
        if isinstance(part, int):
            continue
        kind = inner_type(fields_of(inner_type(kind)).get(part))
    return kind


def keys_of(place: Place) -> list[str]:
    return list(fields_of(type_at(place)))


def all_places(kind: Any = Recipe, where: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    for name, annotation in fields_of(kind).items():
        yield (*where, name)
        yield from all_places(inner_type(annotation), (*where, name))


def takes_bool(place: Place) -> bool:
    if any(part in FREE_KEYS for part in place[:-1]):
        return "options" in place
    parent = type_at(place[:-1])
    return place[-1] not in fields_of(parent) or type_at(place) is bool
