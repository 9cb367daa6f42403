"""What a training function does to the weights' gradients is done to the gates' as well."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

pytest.importorskip("nni", reason='nni is not installed; pip install "wgates-plugin[nni]"')
pytest.importorskip("wgates_plugin.integrations.nni")  # first: it lets NNI import Lightning

import torch
from networks import TINY, tiny
from nni_helpers import batch, evaluator
from nni_pruner_helpers import FREE, SETTINGS, all_layers
from torch import nn

from wgates_plugin.errors import TrainingError
from wgates_plugin.integrations.nni import WGatesPruner
from wgates_plugin.integrations.nni import pruner as pruner_module
from wgates_plugin.strategies import WGatesSettings
from wgates_plugin.targets import MacsTarget

pytestmark = pytest.mark.filterwarnings("ignore:WGatesPruner. layers that stay whole")

STEPS = 8
Parameters = list[nn.Parameter]


def compressed(
    network: nn.Module,
    config: Any,
    *,
    scaler: torch.amp.GradScaler | None = None,
    penalty: float = 0.0,
    weight: float = 1.0,
    change: Callable[[Parameters], None] = lambda _: None,
    **options: Any,
) -> Any:
    """The masks after a training function that scales its loss, or changes the weights' gradients."""
    scaler = scaler or torch.amp.GradScaler("cpu", enabled=False)

    def train(
        model: Any, optimizers: Any, step: Any, _: Any = None, steps: Any = None, *__: Any
    ) -> None:
        weights = [each for group in optimizers.param_groups for each in group["params"]]
        model.train()
        for seed in range(steps or 1):
            optimizers.zero_grad()
            for part in range(2):  # accumulated
                loss = weight * step(batch(2 * seed + part), model)
                loss = loss + penalty * sum(each.square().sum() for each in weights)
                scaler.scale(loss).backward()
            scaler.unscale_(optimizers)
            change(weights)
            scaler.step(optimizers)
            scaler.update()

    traced = evaluator(network)
    traced.training_func = train
    options.setdefault("settings", WGatesSettings(learning_rate=0.05, measuring=2))
    pruner = WGatesPruner(network, config, traced, STEPS, **options)
    _, masks = pruner.compress()
    pruner.unwrap_model()
    assert pruner.gates.skipped == 0
    return masks


@pytest.mark.parametrize("growth", [1, 1000])
@pytest.mark.parametrize("told", [True, False])
def test_weights_and_masks_are_those_without_a_scaler(told: bool, growth: int) -> None:
    config = [{"op_types": ["Conv2d"], "sparse_ratio": 0.5}]
    plain, scaled = tiny("residual"), tiny("residual")
    expected = compressed(plain, config)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**12, growth_interval=growth)
    options = {"loss_scale": scaler.get_scale} if told else {}
    masks = compressed(scaled, config, scaler=scaler, **options)
    assert scaler.get_scale() == (2.0 ** (12 + STEPS) if growth == 1 else 2.0**12)
    for name, targets in expected.items():
        assert torch.equal(targets["weight"], masks[name]["weight"])
    for name, value in plain.state_dict().items():
        assert torch.allclose(scaled.state_dict()[name], value, rtol=1e-3, atol=1e-5), name


def shrink(weights: Parameters) -> None:
    for weight in weights:
        assert weight.grad is not None
        weight.grad /= 8


@pytest.mark.parametrize("name", TINY)
@pytest.mark.parametrize(
    ("change", "factor"), [(shrink, pytest.approx(8.0, rel=1e-3)), (lambda _: None, 1.0)]
)
def test_the_factor_is_found_on_every_network(
    name: str, change: Any, factor: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    found: list[float] = []
    plain = pruner_module.found_scale

    def watch(*given: Any) -> float:
        found.append(plain(*given))
        return found[-1]

    monkeypatch.setattr(pruner_module, "found_scale", watch)
    network = tiny(name)
    compressed(network, all_layers(network, sparse_ratio=0.5), change=change, settings=SETTINGS)
    assert found == [factor] * STEPS


def one_by_one(weights: Parameters) -> None:
    nn.utils.clip_grad_value_(weights, 1e-5)


def test_gradients_of_another_direction_and_scale_are_refused_unless_told() -> None:
    config, target = FREE, MacsTarget(fraction=0.5)
    with pytest.raises(TrainingError, match=r"by no one factor for all channels; .* `loss_scale`"):
        compressed(tiny("residual"), config, change=one_by_one, target=target)
    assert compressed(
        tiny("residual"), config, change=one_by_one, target=target, loss_scale=lambda: 1.0
    )


@pytest.mark.parametrize("weight", [1.0, 1e-4])
def test_a_penalty_on_weights_changes_no_scale(weight: float) -> None:
    """However little of the task is left beside it."""
    networks = tiny("residual"), tiny("residual")
    words: Any = {"penalty": 0.1, "weight": weight, "target": MacsTarget(fraction=0.5)}
    compressed(networks[0], FREE, **words)
    compressed(networks[1], FREE, **words, loss_scale=lambda: 1.0)
    states = [network.state_dict() for network in networks]
    assert all(torch.equal(value, states[1][name]) for name, value in states[0].items())


def test_a_frozen_reader_is_left_out_of_the_comparison() -> None:
    half = [{"op_types": ["Conv2d"], "sparse_ratio": 0.5}]
    plain, scaled = tiny("residual"), tiny("residual")
    for network in (plain, scaled):
        network[2].fc.weight.requires_grad_(False)
    expected = compressed(plain, half, loss_scale=lambda: 1.0)
    masks = compressed(scaled, half, scaler=torch.amp.GradScaler("cpu", init_scale=2.0**12))
    for name, targets in expected.items():
        assert torch.equal(targets["weight"], masks[name]["weight"])
    for name, value in plain.state_dict().items():
        assert torch.allclose(scaled.state_dict()[name], value, rtol=1e-3, atol=1e-5), name
