"""Values that the command line puts into a recipe, as "key=value" with dotted keys."""

from __future__ import annotations

import json
from typing import Any

import yaml

from wgates_plugin.recipe.schema import FREE_KEYS


def override(raw: dict[str, Any], item: str) -> str | None:
    """Put "key=value" into `raw`; returns what is wrong with it."""
    key, equals, text = item.partition("=")
    if not equals or not key.strip():
        return "needs the form key=value, for example target.fraction=0.3"
    try:
        value = json.loads(text)
    except json.JSONDecodeError:
        try:
            value = yaml.safe_load(text)
        except yaml.YAMLError:
            return f"the value {text!r} is no YAML"
    parts = key.strip().split(".")
    for number, part in enumerate(parts[:-1]):
        if part in FREE_KEYS:
            parts = [*parts[: number + 1], ".".join(parts[number + 1 :])]
            break
    here: Any = raw
    for part in parts[:-1]:
        if isinstance(here, list):
            if not part.isdecimal() or int(part) >= len(here):
                return f"`{part}` is no position in a list of {len(here)}"
            here = here[int(part)]
        else:
            if here.get(part) is None:
                here[part] = {}
            here = here[part]
        if not isinstance(here, (dict, list)):
            return f"`{part}` holds {here!r} and has no keys below it"
    if isinstance(here, list):
        if not parts[-1].isdecimal() or int(parts[-1]) >= len(here):
            return f"`{parts[-1]}` is no position in a list of {len(here)}"
        here[int(parts[-1])] = value
    else:
        here[parts[-1]] = value
    return None
