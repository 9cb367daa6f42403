"""Claim: trace and removal cost no more than torch-pruning's own, and 1/20 of NNI's at most.

Measured: ResNet-50 at 224x224, half the channels of every group, random masks; time from the untouched
network to the smaller one. Ours is a `DependencyTrace`, its channel space, the masks' `PruningPlan` and
`remove`. The way called "ours" checks in numbers that gated and smaller network agree only where an
operation in the network might move channels, and ResNet-50 has none; "ours_always_checked" always checks.
Rivals in the same rounds, on fresh copies, for the same masks: torch-pruning's `BasePruner`, made and
stepped, with an importance that hands the masks over (so that it spends nothing on deciding), and NNI's
`ModelSpeedup` where nni 3.0 is installed, for a few rounds. Before anything is timed, ours and
torch-pruning's results must be the same tensors, and all outputs agree. The pruners of the doors do more
than this: they check options and attach gates.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import importlib.metadata
import io
import logging
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch_pruning as tp
from torch import Tensor, nn

from benchmarks.tools.interleave import Contender, Job, compare, interleave
from benchmarks.tools.records import parser, write_record
from benchmarks.tools.subjects import SIDE, images, torchvision_network
from wgates_plugin.channels import ChannelSpace
from wgates_plugin.dependencies import DependencyTrace
from wgates_plugin.plan import PruningPlan
from wgates_plugin.surgery import remove
from wgates_plugin.tracing import trace
from wgates_plugin.verification import check_traced

CLAIM = (
    "trace and removal take no longer than torch-pruning's own, and a twentieth of ModelSpeedup's"
)
Removal = Callable[[nn.Module], nn.Module]
NNI_HINT = 'nni is not installed; pip install "wgates-plugin[nni]" in an environment of its own'


def half_plan(space: ChannelSpace, seed: int) -> PruningPlan:
    """Random half of every group's channels."""
    scores = torch.rand(space.total_units, generator=torch.Generator().manual_seed(seed))
    return PruningPlan.top(
        space, scores, [group.round_up(group.channels / 2) for group in space.groups]
    )


def ours(plan: PruningPlan, example: Tensor, *, check: bool) -> Removal:
    """Trace, plan and remove; with `check` the trace is always checked in numbers.

    Without it only where an operation might move channels
    (`wgates_plugin.dependencies.channel_order`).
    """
    mask = plan.mask

    def run(network: nn.Module) -> nn.Module:
        traced = DependencyTrace(network, example)
        space = traced.space()
        if check or not traced.keeps_channel_order:
            check_traced(network, space, example)
        return remove(network, PruningPlan.from_masks(space, mask), traced=traced)

    return run


def kept_masks(plan: PruningPlan, role: str) -> dict[str, Tensor]:
    """Module -> boolean mask of its output channels, for the slots of this role."""
    flags = torch.cat([plan.mask, torch.ones(1, dtype=torch.bool)])
    masks = {}
    for group in plan.space.groups:
        for slot in group.slots_as(role):  # type: ignore[arg-type]
            index = plan.space.unit_index(slot.module, "out")
            assert index is not None
            masks[slot.module] = flags[torch.from_numpy(index)]
    return masks


def torch_pruning(plan: PruningPlan, example: Tensor, ignored: Sequence[str]) -> Removal:
    masks = kept_masks(plan, "producer")

    def run(network: nn.Module) -> nn.Module:
        known = {module: masks.get(name) for name, module in network.named_modules()}

        def importance(group: Any) -> Tensor:
            mask = known[group[0].dep.target.module]
            assert mask is not None
            return mask.float()

        pruner = tp.pruner.BasePruner(
            network,
            (example,),
            importance=importance,
            pruning_ratio=0.5,
            ignored_layers=[network.get_submodule(name) for name in ignored],
            in_channel_groups={},
            out_channel_groups={},
            num_heads={},
            channel_groups={},
        )
        pruner.step()
        return network

    return run


def nni_speedup(plan: PruningPlan, example: Tensor) -> Removal | None:
    """NNI's removal, None where nni is not installed.

    Masks cover BatchNorm as well, without which ModelSpeedup removes other channels than were
    masked; the graph comes from torch.fx, because NNI's own tracer fails on torch from 2.2 on.
    """
    try:
        from nni.compression.speedup import ModelSpeedup
    except ImportError:
        return None
    logging.disable(
        logging.WARNING
    )  # nni reports every node of the graph through loggers of its own
    channels = {**kept_masks(plan, "producer"), **kept_masks(plan, "passenger")}

    def run(network: nn.Module) -> nn.Module:
        masks: dict[str, dict[str, Tensor]] = {}
        for name, kept in channels.items():
            masks[name] = {
                key: kept.float().view(-1, *[1] * (value.dim() - 1)).expand_as(value).clone()
                for key, value in network.get_submodule(name).named_parameters(recurse=False)
            }
        graph = torch.fx.symbolic_trace(network)
        with contextlib.redirect_stdout(io.StringIO()):
            ModelSpeedup(network, example, masks, graph_module=graph).speedup_model()
        return network

    return run


def nni_version() -> str | None:
    try:
        return importlib.metadata.version("nni")
    except importlib.metadata.PackageNotFoundError:
        return None


def difference(found: nn.Module, expected: nn.Module, example: Tensor) -> dict[str, Any]:
    """Whether two smaller networks hold the same tensors, and how far their outputs are apart."""
    mine, theirs = found.eval().state_dict(), expected.eval().state_dict()
    same = set(mine) == set(theirs) and all(torch.equal(mine[k], theirs[k]) for k in theirs)
    with torch.no_grad():
        first, second = found(example), expected(example)
    error = float((first - second).abs().max() / second.abs().max())
    return {"same_tensors": same, "relative_output_difference": error}


def contender(removal: Removal, network: nn.Module) -> Contender:
    def prepare() -> Job:
        fresh = copy.deepcopy(network)
        return lambda: removal(fresh)

    return prepare


def measure(arguments: argparse.Namespace) -> tuple[dict[str, Any], dict[str, Any]]:
    network = torchvision_network(arguments.network, seed=arguments.seed)
    example = images(1, side=arguments.side, seed=arguments.seed)
    space = trace(network, example)
    plan = half_plan(space, arguments.seed)
    removals = {
        "ours": ours(plan, example, check=False),
        "ours_always_checked": ours(plan, example, check=True),
        "torch_pruning": torch_pruning(plan, example, list(space.excluded)),
    }
    speedup = nni_speedup(plan, example)
    if speedup is not None:
        removals["nni"] = speedup
    expected = remove(copy.deepcopy(network), plan, example)
    alike = {
        name: difference(removal(copy.deepcopy(network)), expected, example)
        for name, removal in removals.items()
    }
    for name, facts in alike.items():
        assert facts["relative_output_difference"] < 1e-4, (name, facts)
        assert name == "nni" or facts["same_tensors"], (name, facts)
    contenders = {name: contender(removal, network) for name, removal in removals.items()}
    # ModelSpeedup takes many times as long as the others; a few rounds show it well enough.
    slow = contenders.pop("nni", None)
    seconds = interleave(contenders, rounds=arguments.rounds)
    numbers: dict[str, Any] = {
        name: compare(seconds[name], seconds["torch_pruning"]) for name in seconds
    }
    samples: dict[str, Any] = {"removal": seconds}
    if slow is None:
        numbers["nni"] = {"installed": False, "note": NNI_HINT}
    else:
        pair = {"nni": slow, "ours": contenders["ours"]}
        samples["nni"] = interleave(pair, rounds=arguments.nni_rounds, warmup=0)
        against_ours = compare(samples["nni"]["nni"], samples["nni"]["ours"])
        numbers["nni"] = {"installed": True, "against": "ours", **against_ours}
    numbers["results"] = alike
    return numbers, samples


def main(argv: Sequence[str] = ()) -> None:
    options = parser("removal", __doc__)
    options.add_argument("--network", default="resnet50")
    options.add_argument("--side", type=int, default=SIDE)
    options.add_argument("--threads", type=int, default=1)
    options.add_argument("--rounds", type=int, default=20)
    options.add_argument("--nni-rounds", type=int, default=3)
    arguments = options.parse_args(list(argv))
    torch.set_num_threads(arguments.threads)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        numbers, samples = measure(arguments)
    for name in ("ours", "ours_always_checked"):
        print(f"{arguments.network}: {name} {numbers[name]['ratio']:.2f} of torch-pruning")
    write_record(
        arguments.results,
        "removal",
        claim=CLAIM,
        settings={
            "network": arguments.network,
            "side": arguments.side,
            "threads": arguments.threads,
            "rounds": arguments.rounds,
            "nni_rounds": arguments.nni_rounds,
            "nni": nni_version(),
            "channels_kept": 0.5,
        },
        seed=arguments.seed,
        numbers=numbers,
        samples=samples,
    )
