"""Checking a recipe: every problem found at once, each with the path of its key."""

from __future__ import annotations

import copy
import difflib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml
from pydantic import ValidationError

from wgates_plugin.errors import ConfigError, FileFormatError, MissingExtraError
from wgates_plugin.recipe.blocks import Recipe
from wgates_plugin.recipe.schema import FREE_KEYS, Place, all_places, keys_of, takes_bool
from wgates_plugin.targets import LatencyTarget

if TYPE_CHECKING:
    from wgates_plugin.latency.base import BaseRuntime

_NO_TEACHER = "the untouched network has no teacher yet; give it under `pruning.training`"

NO_EFFECT: dict[Place, str] = {
    ("pruning", "seed"): "give `seed` at the top level instead; it seeds everything",
    ("pruning", "training", "epochs"): (
        "give `pruning.gate_epochs` and `pruning.fine_tune_epochs` instead"
    ),
    ("dense_training", "distillation_weight"): _NO_TEACHER,
    ("dense_training", "distillation_temperature"): _NO_TEACHER,
}


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
        problem = _override(raw, item)
        if problem:
            found.setdefault(("--set", item), []).append(problem)
    recipe = _validate(raw, found)
    for place, problem in _meaning(raw):
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


def _override(raw: dict[str, Any], item: str) -> str | None:
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
            if not part.isdigit() or int(part) >= len(here):
                return f"`{part}` is no position in a list of {len(here)}"
            here = here[int(part)]
        else:
            if here.get(part) is None:
                here[part] = {}
            here = here[part]
        if not isinstance(here, (dict, list)):
            return f"`{part}` holds {here!r} and has no keys below it"
    if isinstance(here, list):
        if not parts[-1].isdigit() or int(parts[-1]) >= len(here):
            return f"`{parts[-1]}` is no position in a list of {len(here)}"
        here[int(parts[-1])] = value
    else:
        here[parts[-1]] = value
    return None


def _validate(raw: dict[str, Any], found: dict[Place, list[str]]) -> Recipe | None:
    """Types and ranges. Bad values are taken out and the rest checked again: a block with a wrong
    type says nothing about its ranges until that value is gone."""
    rest = copy.deepcopy(raw)
    for place, value in list(_leaves(raw, ())):
        if isinstance(value, bool) and not takes_bool(place):
            found.setdefault(place, []).append(
                f"is {json.dumps(value)}; needs another kind of value than yes or no"
            )
            _take_out(rest, place)
    while True:
        try:
            recipe = Recipe.model_validate(rest)
        except ValidationError as error:
            progressed = False
            for one in error.errors():
                where: Place = tuple(one["loc"])
                if one["type"] == "missing":
                    if _lookup(raw, where) is None and where not in found:
                        found[where] = ["is missing"]
                    continue
                for inner, line in _lines(where, one):
                    found.setdefault(inner, []).append(line)
                progressed = _take_out(rest, where) or progressed
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


def _leaves(value: Any, place: Place) -> Iterator[tuple[Place, Any]]:
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from _leaves(inner, (*place, key))
    elif isinstance(value, list):
        for number, inner in enumerate(value):
            yield from _leaves(inner, (*place, number))
    elif place:
        yield place, value


def _lookup(raw: Any, place: Place) -> Any:
    for part in place:
        if isinstance(raw, dict):
            raw = raw.get(part)
        elif isinstance(raw, list) and isinstance(part, int) and part < len(raw):
            raw = raw[part]
        else:
            return None
    return raw


def _take_out(raw: Any, place: Place) -> bool:
    """Remove the value at `place`, or the nearest thing above it that is there."""
    for depth in range(len(place), 0, -1):
        parent, key = _lookup(raw, place[: depth - 1]), place[depth - 1]
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


# What types cannot tell


def _meaning(raw: dict[str, Any]) -> Iterator[tuple[Place, str]]:
    yield from _model_problems(raw)
    yield from _data_problems(raw)
    yield from _target_problems(raw)
    for place, advice in NO_EFFECT.items():
        if _lookup(raw, place) is not None:
            yield place, f"has no effect in a recipe; {advice}"


def _model_problems(raw: dict[str, Any]) -> Iterator[tuple[Place, str]]:
    from wgates_plugin.catalogue import MODELS, import_torchvision
    from wgates_plugin.catalogue.factories import is_factory_name
    from wgates_plugin.catalogue.models import without_torchvision

    name, weights = _lookup(raw, ("model", "name")), _lookup(raw, ("model", "weights"))
    if isinstance(weights, str) and not Path(weights).expanduser().is_file():
        yield ("model", "weights"), f"no such file `{weights}`; check the path"
    if not isinstance(name, str):
        return
    of_timm = name.startswith("timm:")
    if is_factory_name(name) and not of_timm:
        return
    if name not in MODELS and not of_timm:
        known = list(MODELS)
        try:
            models = import_torchvision().models
            known += models.list_models(module=models)
        except MissingExtraError as error:
            yield ("model", "name"), without_torchvision(name, error)
            known.append(name)
        if name not in known:
            close = difflib.get_close_matches(name, known, n=3, cutoff=0.5) or list(MODELS)
            yield (
                ("model", "name"),
                f"unknown model `{name}`; close to it: {', '.join(close)}; other forms: a "
                "torchvision classification model, timm:NAME, package.module:factory",
            )
    options = _lookup(raw, ("model", "options"))
    pretrained = isinstance(options, dict) and (options.get("weights") or options.get("pretrained"))
    if weights is None and raw.get("dense_training") is None and not pretrained:
        yield (
            ("model", "weights"),
            "no weights and no `dense_training`: the network would be pruned untrained; give one "
            "of the two",
        )


def _data_problems(raw: dict[str, Any]) -> Iterator[tuple[Place, str]]:
    from wgates_plugin.catalogue import DATA
    from wgates_plugin.catalogue.factories import is_factory_name

    name = _lookup(raw, ("data", "name"))
    if not isinstance(name, str) or name in DATA:
        return
    if name.startswith("folder:"):
        if not Path(name.removeprefix("folder:")).expanduser().is_dir():
            yield ("data", "name"), f"no such folder `{name.removeprefix('folder:')}`"
    elif not is_factory_name(name):
        yield (
            ("data", "name"),
            f"unknown data set `{name}`; choose from {', '.join(DATA)}, folder:PATH, "
            "package.module:factory",
        )


def _target_problems(raw: dict[str, Any]) -> Iterator[tuple[Place, str]]:
    from wgates_plugin.latency import RUNTIMES

    several = raw.get("targets")
    listed = several if isinstance(several, list) else []
    places: list[Place] = [("target",)] if isinstance(raw.get("target"), dict) else []
    places += [("targets", number) for number in range(len(listed))]
    if raw.get("target") is None and not several:
        yield ("target",), "is missing; for example target: {milliseconds: 8.0} or {fraction: 0.5}"
    kinds: list[str] = []
    for place in places:
        block = _lookup(raw, place)
        if not isinstance(block, dict):
            continue
        runtime = block.get("runtime") or LatencyTarget.runtime
        if isinstance(runtime, str) and runtime in RUNTIMES:
            yield from _runtime_problems(place, block, RUNTIMES[runtime])
        elif isinstance(runtime, str):
            close = difflib.get_close_matches(runtime, list(RUNTIMES), n=1)
            hint = f"did you mean `{close[0]}`? " if close else ""
            yield (
                (*place, "runtime"),
                f"unknown runtime `{runtime}`; {hint}choose from {', '.join(RUNTIMES)}",
            )
            if close:  # most likely a slip of the pen: what else is wrong is said with it
                yield from _runtime_problems(place, block, RUNTIMES[close[0]])
        kind = block.get("kind") or next(
            (k for k in ("macs", "parameters") if block.get(k) is not None), "latency"
        )
        if kind in kinds:
            yield place, f"a second {kind} target; give each kind once"
        kinds.append(kind)


def _runtime_problems(
    place: Place, block: dict[str, Any], runtime: type[BaseRuntime]
) -> Iterator[tuple[Place, str]]:
    """What the runtime of a latency target will refuse; wrong types are found elsewhere."""
    from wgates_plugin.latency.base import too_many_threads
    from wgates_plugin.latency.options import option_problems

    precision, device = block.get("precision"), block.get("device") or LatencyTarget.device
    if isinstance(precision, str) and precision not in runtime.precisions:
        yield (
            (*place, "precision"),
            f"runtime `{runtime.name}` has no {precision}; choose from "
            f"{', '.join(runtime.precisions)}",
        )
    if isinstance(device, str) and not runtime.takes_device(device):
        yield (
            (*place, "device"),
            f"runtime `{runtime.name}` has no {device}; choose from "
            f"{', '.join(runtime.device_kinds)}",
        )
    threads = block.get("threads")
    if type(threads) is int and runtime.runs_here and device == "cpu":
        for problem in too_many_threads(threads):
            yield (*place, "threads"), problem.removeprefix("threads: ")
    options = block.get("options")
    if isinstance(options, dict) or (options is None and "runtime" in block):
        for name, words in option_problems(runtime, options or {}).items():
            yield (*place, "options", name), words
