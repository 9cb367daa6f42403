"""Two processes, gloo: gates, plan and weights are identical on every rank."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import test_pipeline
import torch

from wgates_plugin.files import load_tensors

SCRIPT = """
import dataclasses
import sys
from pathlib import Path
sys.path.insert(0, {tests!r})
import torch
torch.set_num_threads(1)
import test_pipeline as t
from wgates_plugin.catalogue.tensor_loader import TensorLoader
from wgates_plugin.pipeline import learning
from wgates_plugin.files import save_tensors, write_json
from wgates_plugin.pipeline import prune_to_target
from wgates_plugin.targets import MacsTarget
import os
rank = os.environ["RANK"]
images, targets = (torch.cat(part) for part in zip(*t.make_data()))
loader = TensorLoader(images, targets, batch_size=16, shuffle=True)
decide = learning.decide


def decide_and_keep(job):
    decision = decide(job)
    learned = {{"scores": decision.scores, **dict(decision.network.named_parameters())}}
    save_tensors(Path({out!r}) / f"learned-{{rank}}.safetensors", learned)
    phase = {{"foreseen": job.task().steps, "monitor": decision.monitor, "facts": decision.facts}}
    write_json(Path({out!r}) / f"phase-{{rank}}.json", phase)
    return decision


learning.decide = decide_and_keep
settings = dataclasses.replace(t.SETTINGS, strategy={strategy!r})
result = prune_to_target(t.make_network(), t.EXAMPLE, loader, loader, target=MacsTarget(fraction=0.5),
                         settings=settings, run_folder=Path({out!r}) / "run", progress=False)
write_json(Path({out!r}) / f"plan-{{rank}}.json", result.plan.to_json())

# gloo's threads can abort the interpreter's exit, which is not what is tested here.
import os, sys
import torch
torch.distributed.barrier()
sys.stdout.flush()
os._exit(0)
"""


DOOR = """
import os
import sys
from pathlib import Path
sys.path.insert(0, {tests!r})
import torch
torch.set_num_threads(1)
import test_pipeline as t
from torch.utils.data import DataLoader, TensorDataset
from wgates_plugin.files import save_tensors
from wgates_plugin.integrations.torch_pruning import StrategyPruner
from wgates_plugin.training import TrainingSettings
images, targets = (torch.cat(part) for part in zip(*t.make_data()))
network = t.make_network()
pruner = StrategyPruner(network, t.EXAMPLE, {strategy!r}, DataLoader(TensorDataset(images, targets), 16),
                        epochs=2, training=TrainingSettings(accelerator="cpu"), target=3e5)
pruner.step()
rank = os.environ["RANK"]
save_tensors(Path({out!r}) / f"door-{{rank}}.safetensors",
             {{"scores": pruner.decision.scores, **network.state_dict()}})
torch.distributed.barrier()
sys.stdout.flush()
os._exit(0)
"""


def launch(script: str, folder: Path, **words: str) -> None:
    path = folder / "job.py"
    path.write_text(script.format(tests=str(Path(__file__).parent), out=str(folder), **words))
    ranks = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2")
    done = subprocess.run(
        [sys.executable, *ranks, str(path)],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.parametrize("strategy", ["wgates", "gdp"])
def test_two_ranks_decide_alike_through_a_door(strategy: str, tmp_path: Path) -> None:
    launch(DOOR, tmp_path, strategy=strategy)
    first, second = (
        load_tensors(tmp_path / f"door-{rank}.safetensors", kind="weights") for rank in (0, 1)
    )
    assert {name: value.shape for name, value in first.items()} == {
        name: value.shape for name, value in second.items()
    }
    # Running statistics are each rank's own.
    weights = [name for name in first if "running" not in name and "tracked" not in name]
    assert all(torch.equal(first[name], second[name]) for name in weights)


@pytest.mark.parametrize("strategy", ["wgates", "gdp"])
def test_two_ranks_end_alike(strategy: str, tmp_path: Path) -> None:
    launch(SCRIPT, tmp_path, strategy=strategy)
    plans = [json.loads((tmp_path / f"plan-{rank}.json").read_text()) for rank in (0, 1)]
    assert plans[0] == plans[1]
    first, second = (
        load_tensors(tmp_path / f"learned-{rank}.safetensors", kind="weights") for rank in (0, 1)
    )
    start = dict(test_pipeline.make_network().named_parameters())
    assert not torch.equal(first["conv1.weight"], start["conv1.weight"])
    assert all(torch.equal(value, second[name]) for name, value in first.items())
    # The shards are half as long as the loader: a phase planned on the loader would end half-way.
    for rank in (0, 1):
        phase = json.loads((tmp_path / f"phase-{rank}.json").read_text())
        assert len(phase["monitor"]) == phase["foreseen"] == 2 * 3
        if strategy == "gdp":
            assert phase["monitor"][-1]["violation"] <= 0  # settled within the phase
            assert phase["facts"]["absorption_error"] <= 1e-5
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    assert report["contract"] == "held"
