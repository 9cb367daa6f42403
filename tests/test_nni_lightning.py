# ruff: noqa: E402
"""The NNI door in Lightning's hands: their `LightningEvaluator` trains, our gates learn."""

from __future__ import annotations

from typing import Any

import pytest

from wgates_plugin.catalogue.torchvision_import import import_torchvision

pytest.importorskip("nni", reason='nni is not installed; pip install "wgates-plugin[nni]"')
import_torchvision()  # torchmetrics imports it, which a CPU build of torch alone cannot
pl = pytest.importorskip("pytorch_lightning", reason="pytorch_lightning is not installed")

import nni
import torch
from networks import example, tiny
from nni.compression import LightningEvaluator
from nni_helpers import batch
from torch import Tensor, nn

from wgates_plugin.errors import ConfigError
from wgates_plugin.integrations.nni import WGatesPruner, remove
from wgates_plugin.strategies import WGatesSettings
from wgates_plugin.verification import TOLERANCE, relative_error

SETTINGS = WGatesSettings(learning_rate=0.05)


class Module(pl.LightningModule):
    """A network inside a LightningModule, called directly by the training step."""

    def __init__(self, *, traced: bool = True) -> None:
        super().__init__()
        self.net = tiny("residual").train()
        self.make = nni.trace(torch.optim.SGD) if traced else torch.optim.SGD

    def forward(self, images: Tensor) -> Tensor:
        return self.net(images)

    def training_step(self, given: Any, _: int) -> Tensor:
        images, labels = given
        return nn.functional.cross_entropy(self.net(images), labels)

    def configure_optimizers(self) -> Any:
        return self.make(self.parameters(), lr=0.02)


@nni.trace
class Batches(pl.LightningDataModule):
    def train_dataloader(self) -> Any:
        return torch.utils.data.DataLoader([batch(seed) for seed in range(4)], batch_size=None)


def evaluator(**options: Any) -> LightningEvaluator:
    trainer = nni.trace(pl.Trainer)(
        max_epochs=1,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **options,
    )
    return LightningEvaluator(trainer, Batches())


@pytest.mark.parametrize("duration", [{"max_epochs": 1}, {"max_steps": 3}])
def test_gates_learn_inside_the_trainer(duration: dict[str, int]) -> None:
    module = Module()
    pruner = WGatesPruner(
        module, [{"op_types": ["Conv2d"], "sparse_ratio": 0.5}], evaluator(), settings=SETTINGS
    )
    _, masks = pruner.compress(**duration)
    assert pruner.gates.step == duration.get("max_steps", 4)
    assert "on_before_optimizer_step" not in vars(module)
    with torch.no_grad():
        masked = module.eval()(example(4))
        pruner.unwrap_model()
        remove(module, masks, example())
        assert relative_error(module.eval()(example(4)), masked) <= TOLERANCE
    assert module.net[0][0].out_channels == 4


class Counts(Module):
    steps = 0

    def training_step(self, given: Any, _: int) -> Tensor:
        self.steps += 1
        assert self.steps < 20
        return super().training_step(given, _)


@pytest.mark.parametrize(
    ("duration", "steps"),
    [({"max_steps": 3}, 3), ({"max_epochs": 1}, 4), ({"max_steps": 0, "max_epochs": 2}, 8)],
)
def test_training_ends_where_no_gate_learns(duration: dict[str, int], steps: int) -> None:
    module = Counts()
    half = [{"op_types": ["Conv2d"], "sparse_ratio": 0.5}]
    pruner = WGatesPruner(module, half, evaluator(), training_steps=0, settings=SETTINGS)
    pruner.compress(**duration)
    assert module.steps == steps


@pytest.mark.parametrize("growth", [1, 1000])
def test_the_scale_of_the_trainers_scaler_is_taken_out_of_the_gates(growth: int) -> None:
    """The CPU's mixed precision has no scaler; with one, of whatever course, gates learn as without."""
    states, kept = [], []
    for scaled in (False, True):
        plugin = pl.plugins.MixedPrecision("bf16-mixed", "cpu")
        if scaled:
            plugin.scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=growth)
        module = Module()
        pruner = WGatesPruner(
            module,
            [{"op_types": ["Conv2d"], "sparse_ratio": 0.5}],
            evaluator(plugins=[plugin]),
            4,
            settings=SETTINGS,
        )
        pruner.compress()
        pruner.unwrap_model()
        assert pruner.plan is not None
        kept.append(pruner.plan.kept)
        states.append(module.state_dict())
        if scaled:
            assert plugin.scaler.get_scale() == (2.0**14 if growth == 1 else 1024.0)
    assert kept[0] == kept[1]
    for name, value in states[0].items():
        assert torch.allclose(states[1][name], value, rtol=1e-2, atol=1e-3), name


class Broken(Exception):
    pass


class BreaksOff(Module):
    """Its third training step fails, once."""

    steps = 0

    def training_step(self, given: Any, _: int) -> Tensor:
        self.steps += 1
        if self.steps == 3:
            raise Broken
        return super().training_step(given, _)


@pytest.mark.parametrize("duration", [{"max_epochs": 1}, {"max_steps": 4}])
def test_a_call_that_broke_off_shortens_no_later_one(duration: dict[str, int]) -> None:
    module = BreaksOff()
    half = [{"op_types": ["Conv2d"], "sparse_ratio": 0.5}]
    pruner = WGatesPruner(module, half, evaluator(), settings=SETTINGS)
    with pytest.raises(Broken):
        pruner.compress(max_steps=3)
    pruner.compress(**duration)
    assert pruner.gates.step == 4


def test_an_untraced_optimizer_is_explained() -> None:
    with pytest.raises(ConfigError, match=r"nni.trace\(torch.optim.SGD\)"):
        WGatesPruner(
            Module(traced=False), [{"op_types": ["Conv2d"], "sparse_ratio": 0.5}], evaluator(), 3
        )
