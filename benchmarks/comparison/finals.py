"""The last sitting: all final networks of a runtime timed together, and who does not agree with it."""

from __future__ import annotations

import copy
import json
import random
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from torch import nn

from benchmarks.comparison.experiment import Experiment, Run, dense_recipe, runs_of, runtime_name
from benchmarks.comparison.runs import Places
from wgates_plugin.channels import ChannelSpace
from wgates_plugin.files import read_json, write_json
from wgates_plugin.latency import RuntimeSettings, get_runtime
from wgates_plugin.latency.environment import describe_environment
from wgates_plugin.latency.timing import measure
from wgates_plugin.pipeline import PruningSettings
from wgates_plugin.recipe import prepare
from wgates_plugin.surgery import rebuild, resize
from wgates_plugin.tracing import trace
from wgates_plugin.transforms import apply_steps

MOST_APART = 0.03
"""Relative. One network's ratio is found again to about 2 % on a machine with nothing else to do."""


def forget_disturbed(experiment: Experiment, places: Places, chosen: Iterable[Run]) -> list[str]:
    """Take away the results of runs that were disturbed, with a line for each.

    Those are runs that found another latency of what they delivered, smaller or larger, than the last
    sitting did, in which all are timed: other work on the machine led them to other widths.
    """
    sittings: dict[Path, dict[str, Any]] = {}
    lines = []
    for run in chosen:
        path = places.finals(run.runtime)
        if not (path.exists() and places.result(run).exists()):
            continue
        if path not in sittings:
            sittings[path] = read_json(path, kind="final latencies")
        timed = sittings[path]
        stored = read_json(places.result(run), kind="run")
        last = timed["ratio"].get(run.key)
        if last is None or stored.get("kind") == "refused":
            continue
        own = stored["final"]["latency_ms"] / stored["baseline"]["latency_ms"]
        if abs(own / last - 1.0) <= MOST_APART:
            continue
        lines.append(
            f"{run.key}: found {own:.3f} of the latency, the last sitting {last:.3f}; again"
        )
        shutil.rmtree(places.run_folder(run), ignore_errors=True)
        places.result(run).unlink()
        del timed["ratio"][run.key]
        write_json(path, timed)
    return lines


def time_finals(
    experiment: Experiment,
    places: Places,
    block: dict[str, Any],
    *,
    seconds: float = 1.0,
    passes: int = 3,
    again: bool = False,
) -> None:
    """Latencies of all final networks of one runtime, timed in one sitting, in random order.

    Each is interleaved with the untouched network; the ratio of the median pass counts. A network
    whose run folder is no longer there is built again from its stored widths: its latency does not
    depend on its weights. Nothing is written where there is nothing to time, and the same networks
    are not timed a second time but for `again`: repeated until all keep their targets, a sitting
    would tell of chance.
    """
    todo = [run for run in runs_of(experiment) if run.runtime == runtime_name(block)]
    todo = [run for run in todo if _can_be_timed(places, run)]
    path = places.finals(runtime_name(block))
    known = set(read_json(path, kind="final latencies")["ratio"]) if path.exists() else set()
    if not todo or (known == {run.key for run in todo} and not again):
        return
    runtime = get_runtime(
        runtime_name(block),
        RuntimeSettings(
            **{k: v for k, v in block.items() if k in ("threads", "device", "precision")}
        ),
        **block.get("options", {}),
    )
    seed = experiment.seeds[0]  # weights have no part in it
    network, data, _, settings = prepare(dense_recipe(experiment, seed, places.dense_folder(seed)))
    network.eval()
    reference = runtime.load(network, data.example_input)
    baseline = measure(reference, seconds=3 * seconds).latency_ms
    like = builder(network, data.example_input, settings)
    found: dict[str, list[dict[str, Any]]] = {}
    order = random.Random(0)
    for _ in range(passes):
        order.shuffle(todo)
        for run in todo:
            artefact = _artefact(places, run)
            if artefact is not None:
                folder = places.run_folder(run)
                pruned = rebuild(network, folder / "plan.json", folder / "pruned.safetensors")
                session = runtime.load_delivered(artefact, pruned, data.example_input)
            else:
                pruned = like(read_json(places.result(run), kind="run"))
                session = runtime.load(pruned, data.example_input)
            timed = measure(
                session, reference=reference, reference_ms=baseline, seconds=seconds
            ).to_json()
            session.close()
            found.setdefault(run.key, []).append(timed)
    reference.close()
    ratios = {
        key: sorted(one["latency_ms"] / baseline for one in timed) for key, timed in found.items()
    }
    write_json(
        path,
        {
            "runtime": runtime_name(block),
            "baseline_ms": baseline,
            "ratio": {key: values[len(values) // 2] for key, values in ratios.items()},
            "passes": ratios,
            "from_widths": [run.key for run in todo if _artefact(places, run) is None],
            "seconds": seconds,
            "environment": describe_environment(),
        },
    )


def _artefact(places: Places, run: Run) -> Path | None:
    if not places.result(run).exists():
        return None
    found = list(places.run_folder(run).glob("model.*"))
    return found[0] if found else None


def _can_be_timed(places: Places, run: Run) -> bool:
    """Whether the delivered file is there, or the run's result says how to build its like."""
    if _artefact(places, run) is not None:
        return True
    if not places.result(run).exists():
        return False
    stored = read_json(places.result(run), kind="run")
    return stored.get("after_cut") == []


def builder(
    network: nn.Module, example: Any, settings: PruningSettings
) -> Callable[[dict[str, Any]], nn.Module]:
    """What builds a network of a stored run's widths; which channels and weights are in it is open.

    A network is traced once for all runs that start from it.
    """
    traced: dict[str, tuple[nn.Module, ChannelSpace]] = {}

    def build(stored: dict[str, Any]) -> nn.Module:
        steps = stored["before_cut"]
        key = json.dumps(steps)
        if key not in traced:
            whole = apply_steps(copy.deepcopy(network), steps)
            traced[key] = whole, trace(whole, example, ignored_layers=settings.ignored_layers)
        whole, space = traced[key]
        kept = {row["group"]: row["kept"] for row in stored["widths"]}
        return resize(whole, space, [kept[group.name] for group in space.groups]).eval()

    return build
