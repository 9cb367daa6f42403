"""What the trials prune: a residual network on scikit-learn's digits, and how long it takes."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from wgates_plugin.catalogue.base import Data
from wgates_plugin.catalogue.data import load_data
from wgates_plugin.catalogue.models import load_model
from wgates_plugin.efficiency.lpnet import LPNet
from wgates_plugin.files import atomic_path, read_json, write_json
from wgates_plugin.latency import get_runtime
from wgates_plugin.latency.base import RuntimeSettings
from wgates_plugin.latency.measurement import Measurement
from wgates_plugin.latency.timing import measure
from wgates_plugin.latency_study import LatencyStudy
from wgates_plugin.targets import LatencyTarget
from wgates_plugin.tracing import trace
from wgates_plugin.training import evaluate

WEIGHTS, LPNET, FACTS = "dense.safetensors", "lpnet.safetensors", "dense.json"
RUNTIME = "eager"
BATCH = 64
LEARNING_RATE = 0.05


def data_of(limit: int | None = None) -> Data:
    return load_data("digits", batch_size=BATCH, limit=limit)


def epoch_steps(data: Data) -> int:
    """Batches of one pass over the training images."""
    return len(data.train_loader)  # type: ignore[arg-type]


def network_of(work: Path | None = None) -> nn.Module:
    """The network, fresh or as `prepare` trained it."""
    weights = None if work is None else work / WEIGHTS
    return load_model("digits_resnet", classes=10, in_channels=1, weights=weights)


def training_step(batch: Any, model: nn.Module) -> Tensor:
    images, labels = batch
    return nn.functional.cross_entropy(model(images), labels)


def training_func(data: Data, taken: list[None] | None = None) -> Callable[..., None]:
    """The training function NNI's `TorchEvaluator` takes, over these images.

    Args:
        taken: gets an entry for each optimizer step.
    """

    def train(
        model: nn.Module,
        optimizers: torch.optim.Optimizer,
        training_step: Callable[..., Tensor],
        lr_schedulers: Any = None,
        max_steps: int | None = None,
        max_epochs: int | None = None,
    ) -> None:
        model.train()
        done, epoch = 0, 0
        while max_epochs is None or epoch < max_epochs:
            for batch in data.train_loader:
                optimizers.zero_grad()
                training_step(batch, model).backward()
                optimizers.step()
                if lr_schedulers is not None:
                    lr_schedulers.step()
                if taken is not None:
                    taken.append(None)
                done += 1
                if max_steps is not None and done >= max_steps:
                    return
            epoch += 1

    return train


def fine_tune(
    model: nn.Module,
    data: Data,
    *,
    steps: int,
    learning_rate: float,
    after_epoch: Callable[[], None] = lambda: None,
) -> None:
    """Plain SGD with a learning rate that falls to zero along a cosine, for so many optimizer steps.

    `after_epoch` is called after each pass over the images, and at the end.
    """
    optimizer = torch.optim.SGD(
        model.parameters(), lr=learning_rate, momentum=0.9, weight_decay=1e-4
    )
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, max(1, steps))
    train, epoch = training_func(data), epoch_steps(data)
    for start in range(0, steps, epoch):
        train(model, optimizer, training_step, schedule, min(epoch, steps - start))
        after_epoch()


def prepare(
    work: Path, *, epochs: int, samples: int, seconds: float, limit: int | None, seed: int
) -> dict[str, Any]:
    """Train the network, measure it, and fit an LPNet; done once per work folder.

    Args:
        samples: sub-networks measured. seconds: timed inference of each.
        limit: training and validation images; None for all.
    """
    if (work / FACTS).exists():
        return facts_of(work)
    torch.manual_seed(seed)
    data = data_of(limit)
    network = network_of()
    steps = epochs * epoch_steps(data)
    fine_tune(network, data, steps=steps, learning_rate=LEARNING_RATE)
    network.eval()
    work.mkdir(parents=True, exist_ok=True)
    with atomic_path(work / WEIGHTS) as part:
        save_file(network.state_dict(), str(part))
    example = example_of(data)
    space = trace(network, example)
    study = LatencyStudy(network, space, example, LatencyTarget(fraction=0.5, runtime=RUNTIME))
    baseline = study.baseline(max(1.0, 4 * seconds))
    study.open_files(work / "samples.jsonl", work / "visited.jsonl")
    study.sample(count=samples, grid=1, seed=seed, seconds_per_sample=seconds)
    lpnet = study.fit(seed=seed)
    lpnet.save(work / LPNET)
    facts = {
        "accuracy": evaluate(network, data.val_loader).accuracy,
        "latency_ms": baseline.latency_ms,
        "parameters": sum(parameter.numel() for parameter in network.parameters()),
        "lpnet_error": lpnet.report.mape if lpnet.report else None,
        "limit": limit,
    }
    write_json(work / FACTS, facts)
    print(f"prepared: {json.dumps(facts)}")
    return facts


def facts_of(work: Path) -> dict[str, Any]:
    """What `prepare` found: accuracy and latency of the untouched network."""
    facts: dict[str, Any] = read_json(work / FACTS, kind="facts of the untouched network")
    return facts


def example_of(data: Data) -> Tensor:
    assert isinstance(data.example_input, Tensor)
    return data.example_input


def latency_of(
    network: nn.Module, dense: nn.Module, example: Tensor, *, dense_ms: float, seconds: float
) -> Measurement:
    """Latency of a pruned network, timed in turn with the untouched one."""
    runtime = get_runtime(RUNTIME, RuntimeSettings(threads=1))
    with runtime.load(network, example) as mine, runtime.load(dense, example) as reference:
        return measure(mine, reference=reference, reference_ms=dense_ms, seconds=seconds)


def lpnet_of(work: Path, network: nn.Module, example: Tensor) -> LPNet:
    return LPNet.load(work / LPNET, space=trace(network, example))
