"""A training loop with gates in it, and what a pruned network is held against."""

from __future__ import annotations

from typing import Any

import torch
from networks import example
from torch import nn

from wgates_plugin import trace
from wgates_plugin.efficiency import MacsModel
from wgates_plugin.integrations.torch_pruning import WGatesPruner
from wgates_plugin.strategies import WGatesSettings
from wgates_plugin.verification import removal_error

SETTINGS = WGatesSettings(learning_rate=0.05)
AT_ONCE = WGatesSettings(learning_rate=0.05, measuring=0)
"""Gates that act and learn from the first step on."""


def learn(
    pruner: WGatesPruner,
    network: nn.Module,
    steps: int = 4,
    size: int = 8,
    batch: int = 8,
    rate: float = 0.02,
) -> dict[str, float]:
    """A training loop with the gates in it."""
    optimizer = torch.optim.SGD(network.parameters(), lr=rate)
    network.train()
    monitor: dict[str, float] = {}
    for seed in range(steps):
        labels = torch.randint(5, (batch,), generator=torch.Generator().manual_seed(seed))
        logits = network(example(batch, size, seed))
        logits = logits.flatten(2).mean(2) if logits.dim() > 2 else logits
        loss = nn.functional.cross_entropy(logits, labels % logits.shape[1])
        optimizer.zero_grad()
        loss.backward()
        monitor = pruner.regularize(network, loss)
        optimizer.step()
    return monitor


def macs(network: nn.Module) -> float:
    space = trace(network, example(), verify=False)
    return float(MacsModel(space)(torch.tensor(space.full_widths)))


def law_1(pruner: WGatesPruner, fresh: nn.Module, before: Any, inputs: torch.Tensor) -> float:
    """Error between the pruned network and its twin, gated by the composed plan."""
    assert pruner.plan is not None
    fresh.load_state_dict(before)
    return removal_error(fresh, pruner.model, pruner.plan, inputs)
