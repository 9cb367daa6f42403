"""Two processes, gloo: a unified network is the same on every rank, its statistics included."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import test_pipeline
import torch

from wgates_plugin.files import load_tensors

SCRIPT = """
import os
import sys
from pathlib import Path
sys.path.insert(0, {tests!r})
import torch
torch.set_num_threads(1)
import test_pipeline as t
from wgates_plugin.catalogue.tensor_loader import TensorLoader
from wgates_plugin.files import save_tensors
from wgates_plugin.training import TrainingSettings
from wgates_plugin.training.launch import default_fabric
from wgates_plugin.transforms.unification import UnificationSettings, unify
images, targets = (torch.cat(part) for part in zip(*t.make_data()))
loader = TensorLoader(images, targets, batch_size=16, shuffle=True)
training = TrainingSettings(accelerator="cpu")
settings = UnificationSettings(rho=(1e-3,), retrain_epochs=1)
unified = unify(t.make_network(), loader, settings=settings, training=training,
                fabric=default_fabric(training), skip_small=True, progress=False)
path = Path({out!r}) / ("unified-" + os.environ["RANK"] + ".safetensors")
save_tensors(path, unified.network.state_dict())

# gloo's threads can abort the interpreter's exit, which is not what is tested here.
torch.distributed.barrier()
sys.stdout.flush()
os._exit(0)
"""
LAUNCH = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2")


def test_two_ranks_unify_alike(tmp_path: Path) -> None:
    path = tmp_path / "job.py"
    path.write_text(SCRIPT.format(tests=str(Path(__file__).parent), out=str(tmp_path)))
    command = [sys.executable, *LAUNCH, str(path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    first, second = (
        load_tensors(tmp_path / f"unified-{rank}.safetensors", kind="weights") for rank in (0, 1)
    )
    start = test_pipeline.make_network().state_dict()
    statistics = [name for name in first if name.endswith("running_mean")]
    assert statistics
    assert not any(torch.equal(first[name], start[name]) for name in statistics)
    assert [name for name, value in first.items() if not torch.equal(value, second[name])] == []
