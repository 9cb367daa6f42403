"""What types cannot tell of a recipe: unknown names, keys without effect, targets that clash."""

from __future__ import annotations

import difflib
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from wgates_plugin.errors import MissingExtraError
from wgates_plugin.recipe.places import lookup
from wgates_plugin.recipe.schema import Place
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


def meaning_problems(raw: dict[str, Any]) -> Iterator[tuple[Place, str]]:
    """(place, what is wrong there) for values of whatever type: wrong types are found elsewhere."""
    yield from _model_problems(raw)
    yield from _data_problems(raw)
    yield from _target_problems(raw)
    for place, advice in NO_EFFECT.items():
        if lookup(raw, place) is not None:
            yield place, f"has no effect in a recipe; {advice}"


def _model_problems(raw: dict[str, Any]) -> Iterator[tuple[Place, str]]:
    from wgates_plugin.catalogue import MODELS, import_torchvision
    from wgates_plugin.catalogue.factories import is_factory_name
    from wgates_plugin.catalogue.models import without_torchvision

    name, weights = lookup(raw, ("model", "name")), lookup(raw, ("model", "weights"))
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
    options = lookup(raw, ("model", "options"))
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

    name = lookup(raw, ("data", "name"))
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
        block = lookup(raw, place)
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
