"""A recipe's file as plain values."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import yaml

from wgates_plugin.errors import FileFormatError


class _Loader(yaml.SafeLoader):
    """Plain values only, and no key twice: the last one would win in silence."""

    def compose_mapping_node(self, anchor: Any) -> Any:
        node = super().compose_mapping_node(anchor)
        seen = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode) or key.tag == "tag:yaml.org,2002:merge":
                continue
            if key.value in seen:
                raise yaml.MarkedYAMLError(
                    problem=f"`{key.value}` is given twice", problem_mark=key.start_mark
                )
            seen.add(key.value)
        return node


def _once_each(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    names = [name for name, _ in pairs]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise ValueError(f"`{twice}` is given twice")
    return dict(pairs)


def read(path: Path) -> dict[str, Any]:
    """The file's content as plain values; nothing in it is executed.

    Raises:
        FileFormatError: missing, unreadable, or no mapping.
    """
    try:
        text = path.read_text(encoding="utf-8")
        is_json = path.suffix == ".json"
        raw = (
            json.loads(text, object_pairs_hook=_once_each) if is_json else yaml.load(text, _Loader)
        )
    except FileNotFoundError:
        raise FileFormatError(f"recipe `{path}`: no such file; check the path") from None
    except (OSError, ValueError, yaml.YAMLError) as error:
        what = " ".join(str(error).split())
        raise FileFormatError(f"recipe `{path}`: cannot be read ({what}); correct it") from error
    if not isinstance(raw, dict):
        raise FileFormatError(
            f"recipe `{path}`: holds {type(raw).__name__}, needed a mapping of keys to values "
            "such as model, data and target"
        )
    return raw
