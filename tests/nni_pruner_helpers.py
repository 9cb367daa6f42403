"""Our NNI pruner on small networks, and the check that its masks are removed exactly."""

from __future__ import annotations

import copy
from typing import Any

import pytest

pytest.importorskip("nni", reason='nni is not installed; pip install "wgates-plugin[nni]"')
pytest.importorskip("wgates_plugin.integrations.nni")  # first: it lets NNI import Lightning

import torch
from networks import example
from nni_helpers import evaluator
from torch import Tensor, nn

from wgates_plugin.errors import SurgeryError
from wgates_plugin.integrations.nni import WGatesPruner, remove, speedup
from wgates_plugin.strategies import WGatesSettings
from wgates_plugin.verification import TOLERANCE, masked_output, relative_error

SETTINGS = WGatesSettings(learning_rate=0.05)
HALF = [{"op_types": ["Conv2d"], "sparse_ratio": 0.5}]
FREE = [{"op_types": ["Conv2d"]}]
PRUNABLE = {"Conv1d", "Conv2d", "ConvTranspose2d", "Linear"}


def all_layers(network: nn.Module, **settings: Any) -> list[dict[str, Any]]:
    kinds = {type(module).__name__ for module in network.modules()} & PRUNABLE
    return [{"op_types": sorted(kinds), **settings}]


def pruner_of(
    network: nn.Module,
    config: Any = HALF,
    *,
    steps: int | None = 3,
    size: int = 8,
    **options: Any,
) -> WGatesPruner:
    options.setdefault("settings", SETTINGS)
    return WGatesPruner(network, config, evaluator(network, size=size), steps, **options)


@torch.no_grad()
def output(network: nn.Module, size: int = 8) -> Tensor:
    return network.eval()(example(4, size, seed=99))


def width(network: nn.Module, name: str) -> int:
    return network.get_submodule(name).out_channels


def check_exact(
    pruner: WGatesPruner, masks: Any, network: nn.Module, size: int = 8, *, theirs: bool = True
) -> nn.Module:
    """Masked equals removed, by torch-pruning and by ModelSpeedup; returns the smaller network."""
    masked = output(network, size)
    pruner.unwrap_model()
    assert pruner.plan is not None
    gated = masked_output(network, pruner.plan, example(4, size, seed=99))
    assert relative_error(masked, gated) <= TOLERANCE
    twin = copy.deepcopy(network)
    smaller = remove(network, masks, example(2, size))
    assert smaller is network
    assert relative_error(output(smaller, size), masked) <= TOLERANCE
    for name, kept in zip(pruner.space.names, pruner.plan.widths, strict=True):
        root = smaller.get_submodule(name)
        assert kept == getattr(root, "out_channels", getattr(root, "out_features", None))
    if not theirs:
        with pytest.raises(SurgeryError, match="ModelSpeedup fails"):
            speedup(twin, masks, example(2, size))
    else:
        sped = speedup(twin, masks, example(2, size))
        assert relative_error(output(sped, size), masked) <= TOLERANCE
        counts = [sum(p.numel() for p in net.parameters()) for net in (smaller, sped)]
        assert counts[0] == counts[1]
    return smaller
