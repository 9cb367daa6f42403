"""Values of a recipe by the place of their key: all of them, one, and one taken out."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from wgates_plugin.recipe.schema import Place


def leaves(value: Any, place: Place) -> Iterator[tuple[Place, Any]]:
    """Every plain value in `value`, which stands at `place`, with its own place."""
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from leaves(inner, (*place, key))
    elif isinstance(value, list):
        for number, inner in enumerate(value):
            yield from leaves(inner, (*place, number))
    elif place:
        yield place, value


def lookup(raw: Any, place: Place) -> Any:
    """The value at `place`, or None."""
    for part in place:
        if isinstance(raw, dict):
            raw = raw.get(part)
        elif isinstance(raw, list) and isinstance(part, int) and part < len(raw):
            raw = raw[part]
        else:
            return None
    return raw


def take_out(raw: Any, place: Place) -> bool:
    """Remove the value at `place`, or the nearest thing above it that is there."""
    for depth in range(len(place), 0, -1):
        parent, key = lookup(raw, place[: depth - 1]), place[depth - 1]
        if isinstance(parent, dict) and key in parent:
            del parent[key]
            return True
        if isinstance(parent, list) and isinstance(key, int) and key < len(parent):
            # Positions of the others must stay; a sound target stands in for the bad one.
            sound: Any = {"fraction": 1.0} if place[0] == "targets" else None
            changed = parent[key] != sound
            parent[key] = sound
            return bool(changed)
    return False
