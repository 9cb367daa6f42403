"""The last sitting: all final networks of a runtime timed together."""

from __future__ import annotations

import copy
import json
import random
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from benchmarks.comparison.experiment import Experiment, Run, dense_recipe, runs_of, runtime_name
from benchmarks.comparison.runs import Places, is_of, refuse_other_machines, runtime_of
from benchmarks.comparison.summary import network_of
from wgates_plugin.channels import ChannelSpace
from wgates_plugin.files import read_json, write_json
from wgates_plugin.latency.environment import describe_environment
from wgates_plugin.latency.timing import measure
from wgates_plugin.pipeline import PruningSettings
from wgates_plugin.recipe import prepare
from wgates_plugin.surgery import rebuild, resize
from wgates_plugin.tracing import trace
from wgates_plugin.transforms import apply_steps

MOST_SLOWED = 1.05
"""Times its quiet latency: what the untouched network may take beside a timing that is not doubted."""

LEAST_HELP = 0.9
"""Share of the networks timed beside other work that a further pass may leave, if they are not `FEW`:
where it leaves more, the machine's own speed wanders, and the next would help as little."""

FEW = 10

MOST_PASSES = 3
"""Times the passes asked for: how many there may be for a network that is timed beside other work."""


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

    Each is interleaved with the untouched network, once in each pass. Two networks do not slow down
    alike beside other work, so those that were timed while the untouched one was slow are timed in
    further passes, as long as these help; of one network's ratios the median of those `passes` counts
    beside which the untouched one was quickest. The choice never looks at the network that is judged.
    Where the same networks were timed in an earlier sitting on this machine, its quietest timings are
    among those that are chosen from: a busy hour does not undo a quiet one.

    A network whose run folder is no longer there is built again from its stored widths: its latency
    does not depend on its weights. What cannot be built again, and was timed before, stays as it is.
    Nothing is written where there is nothing to time, and the same networks are not timed a second
    time but for `again`: repeated until all keep their targets, a sitting would tell of chance.

    Raises:
        ConfigError: the runs are of another machine than this one.
    """
    all_runs = [run for run in runs_of(experiment) if run.runtime == runtime_name(block)]
    todo = [run for run in all_runs if _can_be_timed(places, run)]
    stored = {run.key: read_json(places.result(run), kind="run") for run in todo}
    networks = {key: network_of(one) for key, one in stored.items()}
    artefacts = {run.key: _artefact(places, run, stored[run.key]) for run in todo}
    path = places.finals(runtime_name(block))
    known = read_json(path, kind="final latencies") if path.exists() else {}
    kept = _still_stored(known, [run for run in all_runs if run not in todo], places)
    all_networks = {**_of(known, "networks", kept), **networks}
    if not todo or (known.get("networks") == all_networks and not again):
        return
    refuse_other_machines(experiment, places, {runtime_name(block)})
    environment = describe_environment()
    earlier = _still_true(known, networks, environment, passes)
    before = [
        one["baseline"]["latency_ms"]
        for one in stored.values()
        if one.get("environment") == environment
    ]
    print(f"{experiment.name}: timing {len(todo)} networks on {runtime_name(block)}", flush=True)
    sitting = _Sitting(experiment, places, block, artefacts, seconds)
    found, quiet_ms, slow = _timings(sitting, todo, stored, passes, before, earlier)
    sitting.close()
    write_json(
        path,
        {
            "runtime": runtime_name(block),
            "baseline_ms": quiet_ms,
            "ratio": {**_of(known, "ratio", kept), **_ratios(found, passes)},
            "networks": all_networks,
            "passes": {**_of(known, "passes", kept), **found},
            "disturbed": sorted({*slow, *kept & {*known.get("disturbed", ())}}),
            "of_an_earlier_sitting": sorted(kept),
            "from_widths": [key for key, artefact in artefacts.items() if artefact is None],
            "seconds": seconds,
            "environment": environment,
        },
    )
    if slow:
        print(
            f"{len(slow)} of {len(todo)} networks were timed beside other work in every pass "
            "(listed as `disturbed`); time them again with --finals on a quieter machine",
            file=sys.stderr,
        )


Timings = list[dict[str, Any]]
"""Of one network, in each pass: its `ratio` to the untouched one, what that took (`reference_ms`), and
the samples behind them."""

RAW = (
    "ratio", "ratio_spread", "reference_ms", "samples_ms", "reference_samples_ms", "disturbed", "seconds",
)  # fmt: skip
"""What is kept of a measurement; where it was taken is the same for all."""


class _Sitting:
    """One runtime with the untouched network in it, beside which all others are timed."""

    def __init__(
        self,
        experiment: Experiment,
        places: Places,
        block: dict[str, Any],
        artefacts: dict[str, Path | None],
        seconds: float,
    ) -> None:
        self.runtime = runtime_of(block)
        seed = experiment.seeds[0]  # weights have no part in it
        recipe = dense_recipe(experiment, seed, places.dense_folder(seed))
        self.network, data, _, pruning = prepare(recipe)
        self.network.eval()
        self.places, self.artefacts, self.seconds = places, artefacts, seconds
        self.example = data.example_input
        self.reference = self.runtime.load(self.network, self.example)
        self.like = builder(self.network, self.example, pruning)

    def time(self, run: Run, stored: dict[str, Any]) -> dict[str, Any]:
        artefact = self.artefacts[run.key]
        if artefact is not None:
            folder = self.places.run_folder(run)
            pruned = rebuild(self.network, folder / "plan.json", folder / "pruned.safetensors")
            session = self.runtime.load_delivered(artefact, pruned, self.example)
        else:
            pruned = self.like(stored)
            session = self.runtime.load(pruned, self.example)
        found = measure(session, reference=self.reference, seconds=self.seconds)
        session.close()
        return {name: getattr(found, name) for name in RAW}

    def close(self) -> None:
        self.reference.close()


def _timings(
    sitting: _Sitting,
    todo: list[Run],
    stored: dict[str, dict[str, Any]],
    passes: int,
    before: list[float],
    earlier: dict[str, Timings],
) -> tuple[dict[str, Timings], float, set[str]]:
    """Timings by run, the quiet latency of the untouched network (ms), and the runs that had no quiet.

    Args:
        stored: results by run. before: what the untouched network took (ms) while these were made.
        earlier: timings of a sitting before, by run.
    """
    found: dict[str, Timings] = {run.key: list(earlier.get(run.key, ())) for run in todo}
    order, left = random.Random(0), list(todo)
    quiet_ms, slow = 0.0, set[str]()
    for number in range(1, MOST_PASSES * passes + 1):
        order.shuffle(left)
        for run in left:
            found[run.key].append(sitting.time(run, stored[run.key]))
        slower = len(slow)
        quiet_ms, slow = _doubted(found, before, passes)
        left = [run for run in todo if number < passes or run.key in slow]
        helped = number <= passes or len(slow) <= max(FEW, LEAST_HELP * slower)
        if not left or not helped:
            break
    return found, quiet_ms, slow


def _still_true(
    known: dict[str, Any], networks: dict[str, str], environment: dict[str, Any], passes: int
) -> dict[str, Timings]:
    """The quietest timings of an earlier sitting, of networks that are the same, on this machine."""
    if known.get("environment") != environment:
        return {}
    return {
        key: _quietest(timings, passes)
        for key, timings in known.get("passes", {}).items()
        if key in networks and known["networks"].get(key) == networks[key]
    }


def _still_stored(known: dict[str, Any], runs: list[Run], places: Places) -> set[str]:
    """Keys of runs that cannot be timed here, and whose networks an earlier sitting has timed."""
    return {
        run.key
        for run in runs
        if run.key in known.get("networks", {})
        and places.result(run).exists()
        and network_of(read_json(places.result(run), kind="run")) == known["networks"][run.key]
    }


def _of(known: dict[str, Any], table: str, keys: set[str]) -> dict[str, Any]:
    return {key: value for key, value in known.get(table, {}).items() if key in keys}


def _doubted(found: dict[str, Timings], before: list[float], passes: int) -> tuple[float, set[str]]:
    """The quiet latency of the untouched network (ms), and the runs that were not timed beside it."""
    seen = [one["reference_ms"] for timings in found.values() for one in timings]
    quiet_ms = float(np.quantile([*before, *seen], 0.1))
    slow = {key for key, mine in found.items() if _slowest(mine, passes) > MOST_SLOWED * quiet_ms}
    return quiet_ms, slow


def _ratios(found: dict[str, Timings], passes: int) -> dict[str, float]:
    return {
        key: statistics.median(one["ratio"] for one in _quietest(timings, passes))
        for key, timings in found.items()
    }


def _quietest(timings: Timings, count: int) -> Timings:
    return sorted(timings, key=lambda one: one["reference_ms"])[:count]


def _slowest(timings: Timings, count: int) -> float:
    return _quietest(timings, count)[-1]["reference_ms"]


def _artefact(places: Places, run: Run, stored: dict[str, Any]) -> Path | None:
    """The delivered file, if the run folder is that of the stored result."""
    folder = places.run_folder(run)
    found = list(folder.glob("model.*"))
    return found[0] if found and is_of(folder, stored) else None


def _can_be_timed(places: Places, run: Run) -> bool:
    """Whether the delivered file is there, or the run's result says how to build its like."""
    if not places.result(run).exists():
        return False
    stored = read_json(places.result(run), kind="run")
    return stored.get("after_cut") == [] or _artefact(places, run, stored) is not None


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
