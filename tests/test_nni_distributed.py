"""Two processes, gloo: a network in `DistributedDataParallel` gets the same masks on every rank."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

pytest.importorskip("nni", reason='nni is not installed; pip install "wgates-plugin[nni]"')
pytest.importorskip("wgates_plugin.integrations.nni")  # first: it lets NNI import Lightning

from test_distributed import launch

SCRIPT = """
import sys
from pathlib import Path
sys.path.insert(0, {tests!r})
import torch
torch.set_num_threads(1)
from torch import distributed
from torch.nn.parallel import DistributedDataParallel
from wgates_plugin.integrations.nni import WGatesPruner, torch_evaluator
import nni
from networks import example, tiny
from nni_helpers import batch, training_step
from nni_pruner_helpers import HALF, SETTINGS
from wgates_plugin.files import write_json

distributed.init_process_group("gloo")
rank = distributed.get_rank()


def train(model, optimizer, step, schedulers=None, max_steps=None, max_epochs=None):
    if {where!r} == "in the training":
        model = DistributedDataParallel(model)
    model.train()
    for seed in range(max_steps):
        optimizer.zero_grad()
        step(batch(2 * seed + rank), model).backward()
        optimizer.step()


model = tiny("projection")
if {where!r} == "around the model":
    model = DistributedDataParallel(model).eval()  # as an evaluation leaves it
traced = torch_evaluator(train, nni.trace(torch.optim.SGD)(model.parameters(), lr=0.02), training_step)
pruner = WGatesPruner(model, HALF, traced, 6, settings=SETTINGS)
pruner.compress()
weights = [float(parameter.double().sum()) for parameter in model.parameters()]
write_json(Path({out!r}) / f"{{rank}}.json", [pruner.plan.kept, weights])
distributed.barrier()
distributed.destroy_process_group()
"""


@pytest.mark.parametrize("where", ["in the training", "around the model"])
def test_two_ranks_mask_alike(where: str, tmp_path: Path) -> None:
    launch(SCRIPT, tmp_path, where=where)
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1))
    assert first == second
