"""Two processes, gloo: gates of the torch-pruning door learn alike in `DistributedDataParallel`."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from test_distributed import launch

from wgates_plugin.files import load_tensors

SCRIPT = """
import sys
from pathlib import Path
sys.path.insert(0, {tests!r})
import torch
torch.set_num_threads(1)
from torch import distributed, nn
from torch.nn.parallel import DistributedDataParallel
from networks import example, tiny
from test_gdp import make
from torch_pruning_helpers import SETTINGS
from wgates_plugin.files import save_tensors
from wgates_plugin.integrations.torch_pruning import WGatesPruner
import dataclasses

distributed.init_process_group("gloo")
rank = distributed.get_rank()
network = tiny("projection").train()
if {gates!r} == "wgates":
    settings = dataclasses.replace(SETTINGS, measuring=3)
    gates = WGatesPruner(network, example(), pruning_ratio=0.5, settings=settings)
    regularize = lambda: gates.regularize(parallel)
else:
    gates = make(network, steps=8).attach()
    regularize = gates.regularize
parallel = DistributedDataParallel(network)
optimizer = torch.optim.SGD(parallel.parameters(), lr=0.02)
for seed in range(8):
    labels = torch.randint(5, (8,), generator=torch.Generator().manual_seed(2 * seed + rank))
    optimizer.zero_grad()
    nn.functional.cross_entropy(parallel(example(8, seed=2 * seed + rank)), labels).backward()
    regularize()
    optimizer.step()
if {gates!r} == "wgates":
    scores = gates.gates.unit_scores()
    gates.step()
else:
    scores = gates.unit_scores()
    gates.absorb()
save_tensors(Path({out!r}) / f"{{rank}}.safetensors",
             {{"scores": scores, **dict(network.named_parameters())}})
distributed.barrier()
distributed.destroy_process_group()
"""


@pytest.mark.parametrize("gates", ["wgates", "gdp"])
def test_two_ranks_learn_the_same_gates_on_other_batches(gates: str, tmp_path: Path) -> None:
    launch(SCRIPT, tmp_path, gates=gates)
    first, second = (
        load_tensors(tmp_path / f"{rank}.safetensors", kind="weights") for rank in (0, 1)
    )
    assert first.keys() == second.keys()
    assert all(torch.equal(value, second[name]) for name, value in first.items())
