"""Claim: a gated network and what removal leaves of it compute the same to 1e-5, through every door.

Measured: largest output difference over the largest output, float32, eval mode, for random plans on
every network of the tests' case table (tiny ones of all structures, and torchvision's); and then for
what each door of `tools/doors.py` decides and removes on seven networks of torchvision. The rival is the
gated network itself: two independent ways to the same output, one by hooks, one by torch-pruning.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.tools.doors import DOORS, NETWORKS, rows
from benchmarks.tools.records import parser, write_record
from tests import networks
from wgates_plugin.channels import ChannelSpace
from wgates_plugin.plan import PruningPlan
from wgates_plugin.surgery import remove
from wgates_plugin.tracing import trace
from wgates_plugin.verification import TOLERANCE, removal_error

CLAIM = "gated and physically smaller network agree to 1e-5 relative"


def random_plan(space: ChannelSpace, generator: torch.Generator) -> PruningPlan:
    """Random channels at random widths, each group's share drawn on its own."""
    shares = torch.rand(len(space.groups), generator=generator).tolist()
    widths = [
        group.round_up(share * group.channels)
        for group, share in zip(space.groups, shares, strict=True)
    ]
    scores = torch.rand(space.total_units, generator=generator)
    return PruningPlan.top(space, scores, widths)


def errors(network: nn.Module, example: Tensor, *, plans: int, seed: int) -> list[float]:
    """Relative error of each plan."""
    space = trace(network, example)
    generator = torch.Generator().manual_seed(seed)
    found = []
    for _ in range(plans):
        plan = random_plan(space, generator)
        smaller = remove(copy.deepcopy(network), plan, example)
        found.append(removal_error(network, smaller, plan, example))
    return found


def main(argv: Sequence[str] = ()) -> None:
    options = parser("masked_equals_removed", __doc__)
    options.add_argument("--plans", type=int, default=10, help="plans per tiny network")
    options.add_argument("--large-plans", type=int, default=4, help="plans per torchvision network")
    options.add_argument("--networks", nargs="*", help="only these of the case table")
    options.add_argument("--doors", nargs="*", default=list(DOORS), help="only these doors")
    options.add_argument("--door-networks", nargs="+", default=NETWORKS, help="of torchvision")
    arguments = options.parse_args(list(argv))
    torch.set_num_threads(1)
    table = [*networks.TINY, *networks.TORCHVISION]
    samples: dict[str, list[float]] = {}
    for name in table if arguments.networks is None else arguments.networks:
        tiny = name in networks.TINY
        network = networks.tiny(name) if tiny else networks.torchvision_network(name)
        samples[name] = errors(
            network,
            networks.example(size=8 if tiny else 64),
            plans=arguments.plans if tiny else arguments.large_plans,
            seed=arguments.seed,
        )
        print(f"{name}: worst of {len(samples[name])} plans {max(samples[name]):.1e}", flush=True)
    by_network = {name: max(found) for name, found in samples.items()}
    through_doors: list[dict[str, Any]] = []
    for door in arguments.doors:
        for network in arguments.door_networks:
            through_doors += rows(door, network)
            last = [row["relative_error"] for row in through_doors if row["network"] == network]
            print(f"{door}, {network}: {last[-1]:.1e}", flush=True)
    worst_by_door = {
        door: max(row["relative_error"] for row in through_doors if row["door"] == door)
        for door in arguments.doors
    }
    write_record(
        arguments.results,
        "masked_equals_removed",
        claim=CLAIM,
        settings={
            "plans": arguments.plans,
            "large_plans": arguments.large_plans,
            "tolerance": TOLERANCE,
        },
        seed=arguments.seed,
        numbers={
            "worst": max(by_network.values(), default=None),
            "networks": len(samples),
            "plans": sum(map(len, samples.values())),
            "worst_by_network": by_network,
            "worst_by_door": worst_by_door,
            "rows": through_doors,
        },
        samples=samples,
    )
