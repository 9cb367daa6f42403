"""Runtimes and their options as asked for on the command line, checked before anything is timed."""

from __future__ import annotations

import difflib
import json
from collections.abc import Sequence
from typing import Any

from wgates_plugin.errors import ConfigError

NAMES = (
    "eager", "compile", "onnxruntime", "openvino", "executorch", "cuda-graphs", "tensorrt",
    "command",
)  # fmt: skip
"""Those of `wgates_plugin.latency.RUNTIMES`, which takes seconds to import."""

DEFAULT = "onnxruntime"


def asked_runtimes(names: Sequence[str], items: list[str] | None) -> dict[str, dict[str, Any]]:
    """Runtime -> its options, each runtime once.

    Raises:
        ConfigError: a runtime or option that is not known, or an option for a runtime that is not
            asked for; all of them are named.
    """
    options = parsed_options(items)
    wanted = list(dict.fromkeys(names))
    problems = [
        f"runtime `{name}`: unknown; {close_to(name)}" for name in wanted if name not in NAMES
    ]
    for key in options:
        head, dot, rest = key.partition(".")
        if not dot or head in wanted:
            continue
        if head in NAMES:
            problems.append(
                f"--runtime-option {key}: is for runtime `{head}`, which is not asked for "
                f"(--runtime {', '.join(wanted)})"
            )
        else:
            problems.append(
                f"--runtime-option {key}: `{head}` is no runtime; {close_to(head)} "
                f"(`RUNTIME.{rest}=...`)"
            )
    if problems:
        raise ConfigError("runtimes", problems)
    own = {name: options_for(name, options) for name in wanted}
    _check_options(own)
    return own


def close_to(name: str) -> str:
    close = difflib.get_close_matches(name, NAMES, n=2, cutoff=0.5)
    hint = f"did you mean {' or '.join(f'`{one}`' for one in close)}? " if close else ""
    return f"{hint}choose one of: {', '.join(NAMES)}"


def options_for(runtime: str, options: dict[str, Any]) -> dict[str, Any]:
    """Those meant for `runtime`: "compile.freezing" is for that one alone, "freezing" for all."""
    own = {}
    for key, value in options.items():
        head, dot, rest = key.partition(".")
        if not dot:
            own[key] = value
        elif head == runtime:
            own[rest] = value
    return own


def parsed_options(items: list[str] | None) -> dict[str, Any]:
    """ "key=value" as a mapping; a value that is no JSON is text.

    Raises:
        ConfigError: an item has another form; all of them are named.
    """
    found: dict[str, Any] = {}
    problems = []
    for item in items or []:
        key, equals, text = item.partition("=")
        if not equals or not key.strip():
            problems.append(f"got {item!r}, needs the form key=value: channels_last=true")
            continue
        try:
            found[key.strip()] = json.loads(text)
        except ValueError:
            found[key.strip()] = text
    if problems:
        raise ConfigError("--runtime-option", problems)
    return found


def _check_options(own: dict[str, dict[str, Any]]) -> None:
    from wgates_plugin.latency import RUNTIMES
    from wgates_plugin.latency.options import option_problems

    problems = [
        f"runtime `{name}`: {key}: {words}"
        for name, options in own.items()
        for key, words in option_problems(RUNTIMES[name], options).items()
    ]
    if problems:
        raise ConfigError("--runtime-option", problems)
