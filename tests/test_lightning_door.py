"""The Lightning door: gates inside `fit`, a smaller network at its end, resume from checkpoints."""

from __future__ import annotations

import copy
import importlib
import itertools
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import same_tensors, snapshot
from networks import example, tiny
from test_distributed import launch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from wgates_plugin import rebuild, trace
from wgates_plugin.efficiency import MacsModel
from wgates_plugin.errors import (
    ConfigError,
    InfeasibleTargetError,
    MissingExtraError,
    TrainingError,
)
from wgates_plugin.files import load_tensors
from wgates_plugin.integrations.lightning import WGatesCallback
from wgates_plugin.integrations.torch_pruning import WGatesPruner
from wgates_plugin.strategies import WGatesSettings
from wgates_plugin.strategies.criteria.repaired import TaylorImportance
from wgates_plugin.verification import TOLERANCE, removal_error

lightning = pytest.importorskip("lightning.pytorch")

SETTINGS = WGatesSettings(learning_rate=0.05)


class Module(lightning.LightningModule):
    def __init__(self, name: str = "residual", optimizers: int = 1) -> None:
        super().__init__()
        self.net = tiny(name).train()  # the Trainer leaves modes as it finds them
        self.optimizers_wanted = optimizers
        self.fail_at: int | None = None
        self.losses: list[float] = []

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.net(x)
        return out

    def training_step(self, batch: Any, index: int) -> Tensor:
        if self.fail_at is not None and self.global_step >= self.fail_at:
            raise RuntimeError("the power went out")
        loss = nn.functional.cross_entropy(self(batch[0]), batch[1])
        self.losses.append(float(loss.detach()))
        return loss

    def validation_step(self, batch: Any, index: int) -> None:
        self.log("val_loss", nn.functional.cross_entropy(self(batch[0]), batch[1]))

    def test_step(self, batch: Any, index: int) -> None:
        self.log("test_loss", nn.functional.cross_entropy(self(batch[0]), batch[1]))

    def configure_optimizers(self) -> Any:
        made = [
            torch.optim.SGD(self.parameters(), lr=0.02, momentum=0.9)
            for _ in range(self.optimizers_wanted)
        ]
        return made[0] if len(made) == 1 else made


def loader(batch: int = 8) -> DataLoader[Any]:
    labels = torch.randint(5, (24,), generator=torch.Generator().manual_seed(1))
    return DataLoader(TensorDataset(example(24), labels), batch_size=batch)


def trainer(folder: Path, epochs: int, *callbacks: Any, **options: Any) -> Any:
    return lightning.Trainer(
        max_epochs=epochs,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
        callbacks=list(callbacks),
        **{"accelerator": "cpu", "enable_checkpointing": False, **options},
    )


def callback(**options: Any) -> WGatesCallback:
    options = {"network": "net", "pruning_ratio": 0.5, "settings": SETTINGS, **options}
    return WGatesCallback(example(), **options)


@pytest.mark.parametrize("name", ["residual", "grouped", "concat", "depthwise", "flattened"])
@pytest.mark.parametrize("root", ["net", ""])
def test_fit_ends_with_an_exactly_smaller_network(tmp_path: Path, name: str, root: str) -> None:
    module = Module(name)
    seen: list[Any] = []

    class Watch(lightning.Callback):
        def on_train_end(self, trainer: Any, pl_module: Any) -> None:
            seen.append(copy.deepcopy(pl_module.net.state_dict()))

    gates = callback(network=root)
    trainer(tmp_path, 2, gates, Watch()).fit(module, loader(), loader())
    assert gates.monitor["step"] == 6.0
    assert gates.plan is not None
    assert gates.plan.widths != gates.plan.space.full_widths
    dense = Module(name)
    dense.net.load_state_dict(seen[0])
    pair = (dense, module) if root == "" else (dense.net, module.net)
    assert removal_error(*pair, gates.plan, example()) <= TOLERANCE
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in module.modules())
    # Another fit is the fine-tuning.
    shapes = [p.shape for p in module.parameters()]
    trainer(tmp_path, 1, gates).fit(module, loader())
    assert [p.shape for p in module.parameters()] == shapes
    assert gates.monitor["step"] == 6.0


def test_it_learns_what_a_loop_by_hand_learns(tmp_path: Path) -> None:
    module = Module()
    gates = callback(efficiency=MacsModel, target=4e4, pruning_ratio=None)
    trainer(tmp_path, 2, gates).fit(module, loader())
    by_hand = tiny("residual").train()
    pruner = WGatesPruner(
        by_hand, example(), efficiency=MacsModel, target=4e4, settings=SETTINGS, steps=6
    )
    optimizer = torch.optim.SGD(by_hand.parameters(), lr=0.02, momentum=0.9)
    for _ in range(2):
        for inputs, labels in loader():
            optimizer.zero_grad()
            nn.functional.cross_entropy(by_hand(inputs), labels).backward()
            pruner.regularize(by_hand)
            optimizer.step()
    pruner.step()
    assert gates.plan is not None
    assert pruner.plan is not None
    assert gates.plan.kept == pruner.plan.kept
    assert gates.plan.widths != gates.plan.space.full_widths
    assert same_tensors(by_hand.state_dict(), module.net.state_dict())


def watch(gates: WGatesCallback, seen: list[Tensor]) -> Any:
    """A callback that notes the scores after every step."""

    class Watch(lightning.Callback):
        def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
            assert gates.pruner is not None
            seen.append(gates.pruner.gates.unit_scores())

    return Watch()


class SyncedNorms(lightning.strategies.SingleDeviceStrategy):
    """What DDP makes of a network's norms under `sync_batchnorm=True`, which needs GPUs there."""

    sync = lightning.plugins.TorchSyncBatchNorm()

    def setup(self, trainer: Any) -> None:
        self.model = self.sync.apply(self.model)
        super().setup(trainer)

    def teardown(self) -> None:
        self.model = self.sync.revert(self.model)
        super().teardown()


@pytest.mark.parametrize("resumed", [False, True], ids=["trained", "nothing-left-to-train"])
def test_norms_that_were_synchronised_are_pruned_along(tmp_path: Path, resumed: bool) -> None:
    plain, first = Module(), callback()
    checkpoints = lightning.callbacks.ModelCheckpoint(dirpath=tmp_path, save_last=True)
    trainer(tmp_path, 2, first, checkpoints, enable_checkpointing=True).fit(plain, loader())
    module, gates = Module(), callback()
    trainer(tmp_path, 2, gates, strategy=SyncedNorms()).fit(
        module, loader(), ckpt_path=tmp_path / "last.ckpt" if resumed else None
    )
    assert gates.plan is not None
    assert first.plan is not None
    assert gates.plan.kept == first.plan.kept
    assert same_tensors(module.net.state_dict(), plain.net.state_dict())
    assert torch.equal(module.net.eval()(example()), plain.net.eval()(example()))
    # The norms that were put in their place are followed by the next step's trace.
    assert trace(module.net, example()).names == first.plan.space.names


def test_two_ranks_learn_the_same_gates(tmp_path: Path) -> None:
    launch(RANKS, tmp_path)
    first, second = (
        load_tensors(tmp_path / f"rank-{rank}.safetensors", kind="weights") for rank in (0, 1)
    )
    # Running statistics are each rank's own.
    names = [name for name in first if "running" not in name]
    assert all(torch.equal(first[name], second[name]) for name in names)
    assert first["0.0.weight"].shape == (4, 3, 3, 3)


RANKS = """
import os
import sys
from pathlib import Path
sys.path.insert(0, {tests!r})
import torch
torch.set_num_threads(1)
import test_lightning_door as t
from wgates_plugin.files import save_tensors
module, gates, seen = t.Module(), t.callback(), []
ranks = t.trainer(Path({out!r}), 2, gates, t.watch(gates, seen), devices=2, strategy="ddp")
ranks.fit(module, t.loader(batch=4))
assert gates.monitor["step"] == len(seen) == 6.0  # 24 images on two ranks, twice
save_tensors(Path({out!r}) / f"rank-{{os.environ['RANK']}}.safetensors",
             {{"scores": seen[-1], **module.net.state_dict()}})
torch.distributed.barrier()
sys.stdout.flush()
os._exit(0)
"""


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true"])
def test_gates_learn_under_reduced_precision(tmp_path: Path, precision: Any) -> None:
    gates, seen, module = callback(), [], Module()
    trainer(tmp_path, 2, gates, watch(gates, seen), precision=precision).fit(
        module, loader(), loader()
    )
    assert gates.monitor["step"] == 6.0
    assert gates.monitor["skipped"] == 0.0
    assert {scores.dtype for scores in seen} == {torch.float32}
    assert all(not torch.equal(*pair) for pair in itertools.pairwise(seen))
    assert module.net[0][0].out_channels == 4


def test_the_scale_of_a_loss_scaler_is_taken_out_of_the_gates(tmp_path: Path) -> None:
    """The CPU's mixed precision has no scaler; with one, of whatever course, gates learn as without."""
    found: list[list[Tensor]] = []
    for growth in (None, 1, 2000):  # none, one that doubles after every step, a constant one
        plugin = lightning.plugins.MixedPrecision("bf16-mixed", "cpu")
        if growth is not None:
            plugin.scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=growth)
        gates, seen = callback(pruning_ratio=None, target=4e4), []
        trainer(tmp_path, 2, gates, watch(gates, seen), plugins=[plugin]).fit(Module(), loader())
        assert len(seen) == gates.monitor["step"] == 6.0
        if growth is not None:
            assert plugin.scaler.get_scale() == (2.0**16 if growth == 1 else 1024.0)
        found.append(seen)
    for scaled in found[1:]:
        assert all(torch.equal(*pair) for pair in zip(found[0], scaled, strict=True))


def test_accumulated_gradients_make_one_gate_step(tmp_path: Path) -> None:
    gates = callback()
    trainer(tmp_path, 2, gates, accumulate_grad_batches=3).fit(Module(), loader())
    assert gates.monitor["step"] == 2.0


def test_an_interrupted_fit_resumes_and_ends_in_the_same_place(tmp_path: Path) -> None:
    whole, gates = Module(), callback()
    trainer(tmp_path / "a", 3, gates).fit(whole, loader())

    checkpoints = lightning.callbacks.ModelCheckpoint(
        dirpath=tmp_path / "b", every_n_epochs=1, save_top_k=-1, filename="{epoch}"
    )
    broken = Module()
    broken.fail_at = 4  # in the second epoch of three
    first = callback()
    with pytest.raises(RuntimeError, match="power"):
        trainer(tmp_path, 3, first, checkpoints, enable_checkpointing=True).fit(broken, loader())
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in broken.modules())
    path = tmp_path / "b" / "epoch=0.ckpt"
    resumed, second = Module(), callback()
    trainer(tmp_path, 3, second).fit(resumed, loader(), ckpt_path=path)
    assert second.monitor["step"] == 9.0
    assert second.plan is not None
    assert gates.plan is not None
    assert second.plan.kept == gates.plan.kept
    assert same_tensors(resumed.net.state_dict(), whole.net.state_dict())
    assert "on_load_checkpoint" not in vars(resumed)


def test_a_checkpoint_written_on_an_exception_has_the_gates(tmp_path: Path) -> None:
    saves = lightning.callbacks.OnExceptionCheckpoint(tmp_path, "broken")
    broken, first = Module(), callback()
    broken.fail_at = 4  # in the second epoch of three
    runner = trainer(tmp_path, 3, first, saves, enable_checkpointing=True)
    with pytest.raises(RuntimeError, match="power"):
        runner.fit(broken, loader())
    resumed, second = Module(), callback()
    trainer(tmp_path, 3, second).fit(resumed, loader(), ckpt_path=tmp_path / "broken.ckpt")
    assert second.monitor["step"] == 9.0
    # The next `fit` of the callback that broke is a fresh one.
    fresh = Module()
    trainer(tmp_path, 1, first).fit(fresh, loader())
    assert first.monitor["step"] == 3.0


@pytest.mark.parametrize("accelerator", ["cpu", pytest.param("gpu", marks=pytest.mark.gpu)])
def test_a_checkpoint_of_the_finished_gate_phase_is_pruned(
    tmp_path: Path, accelerator: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As after a kill between the last epoch and the removal: there is nothing left to train."""
    options = {"accelerator": accelerator, "devices": 1}
    checkpoints = lightning.callbacks.ModelCheckpoint(dirpath=tmp_path, save_last=True)
    module, gates = Module(), callback()
    trainer(tmp_path, 2, gates, checkpoints, enable_checkpointing=True, **options).fit(
        module, loader()
    )
    killed, again = Module(), callback()
    # The Trainer has moved the network to the CPU by then; the gates are where they learned.
    done: list[str] = []
    to, step = nn.Module.to, WGatesPruner.step

    def told_to(self: nn.Module, *args: Any, **others: Any) -> Any:
        if self is killed.net:
            done.append(str(args[0]))
        return to(self, *args, **others)

    def told_step(self: WGatesPruner, **others: Any) -> Any:
        done.append("step")
        return step(self, **others)

    monkeypatch.setattr(nn.Module, "to", told_to)
    monkeypatch.setattr(WGatesPruner, "step", told_step)
    trainer(tmp_path, 2, again, **options).fit(killed, loader(), ckpt_path=tmp_path / "last.ckpt")
    assert done == ["cpu" if accelerator == "cpu" else "cuda:0", "step", "cpu"]
    assert killed.losses == []
    assert again.plan is not None
    assert gates.plan is not None
    assert again.plan.kept == gates.plan.kept
    assert same_tensors(killed.net.state_dict(), module.net.state_dict())


@pytest.mark.filterwarnings("ignore:.*returned `None`")
def test_a_batch_that_is_skipped_steps_no_gates(tmp_path: Path) -> None:
    class Picky(Module):
        def training_step(self, batch: Any, index: int) -> Tensor | None:  # type: ignore[override]
            loss = super().training_step(batch, index)
            return None if index == 1 else loss

    gates = callback()
    trainer(tmp_path, 2, gates).fit(Picky(), loader())
    assert gates.monitor["step"] == 4.0
    assert gates.plan is not None


@pytest.mark.filterwarnings("ignore:.*SWA")
def test_a_pass_without_a_backward_steps_no_gates(tmp_path: Path) -> None:
    """Weight averaging ends `fit` with one, in which the norms are updated."""
    averaging = lightning.callbacks.StochasticWeightAveraging(1e-2, swa_epoch_start=1)
    module, gates = Module(), callback()
    trainer(tmp_path, 2, gates, averaging).fit(module, loader())
    assert gates.monitor["step"] == 6.0
    assert module.net[0][0].out_channels == 4


class Pair(Module):
    """Two networks, whose logits add up."""

    def __init__(self) -> None:
        super().__init__("residual")
        self.other = tiny("concat").train()

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.net(x) + self.other(x)
        return out


def test_two_networks_of_one_module_are_pruned_in_one_fit(tmp_path: Path) -> None:
    def both() -> list[WGatesCallback]:
        return [callback(network="net"), callback(network="other", pruning_ratio=0.25)]

    def shapes(module: Pair) -> list[Any]:
        return [parameter.shape for parameter in module.parameters()]

    module, gates = Pair(), both()
    runner = trainer(tmp_path, 3, *gates, enable_checkpointing=True)
    runner.fit(module, loader())
    for each, share in zip(gates, (0.5, 0.25), strict=True):
        assert each.plan is not None
        kept = sum(each.plan.widths) / sum(each.plan.space.full_widths)
        assert kept == pytest.approx(1 - share, abs=0.1)
    assert {f"gates/{name}/step" for name in ("net", "other")} <= runner.logged_metrics.keys()
    assert "on_load_checkpoint" not in vars(module)
    # Resumed in the gate phase.
    broken = Pair()
    broken.fail_at = 4
    saves = lightning.callbacks.OnExceptionCheckpoint(tmp_path, "broken")
    with pytest.raises(RuntimeError, match="power"):
        trainer(tmp_path, 3, *both(), saves, enable_checkpointing=True).fit(broken, loader())
    resumed, again = Pair(), both()
    trainer(tmp_path, 3, *again).fit(resumed, loader(), ckpt_path=tmp_path / "broken.ckpt")
    assert [each.monitor["step"] for each in again] == [9.0, 9.0]
    assert shapes(resumed) == shapes(module)
    assert "on_load_checkpoint" not in vars(resumed)
    # And restored when both are pruned.
    runner.save_checkpoint(tmp_path / "pruned.ckpt")
    fresh, tuned = Pair(), both()
    trainer(tmp_path, 4, *tuned).fit(fresh, loader(), ckpt_path=tmp_path / "pruned.ckpt")
    assert len(fresh.losses) == 3
    assert shapes(fresh) == shapes(module)
    for restored, each in zip(tuned, gates, strict=True):
        assert restored.plan is not None
        assert each.plan is not None
        assert restored.plan.kept == each.plan.kept


@pytest.mark.parametrize("pruned", [False, True])
def test_a_state_without_the_networks_name_is_read(tmp_path: Path, pruned: bool) -> None:
    module, gates = Module(), callback()
    if not pruned:
        module.fail_at = 4
    saves = lightning.callbacks.OnExceptionCheckpoint(tmp_path, "saved")
    runner = trainer(tmp_path, 3, gates, saves, enable_checkpointing=True)
    if pruned:
        runner.fit(module, loader())
        runner.save_checkpoint(tmp_path / "saved.ckpt")
    else:
        with pytest.raises(RuntimeError, match="power"):
            runner.fit(module, loader())
    saved = torch.load(tmp_path / "saved.ckpt", weights_only=True)
    saved["callbacks"]["WGatesCallback"] = saved["callbacks"].pop(gates.state_key)
    torch.save(saved, tmp_path / "unnamed.ckpt")
    resumed, again = Module(), callback()
    trainer(tmp_path, 3 + pruned, again).fit(resumed, loader(), ckpt_path=tmp_path / "unnamed.ckpt")
    assert again.plan is not None
    assert again.monitor.get("step") == (None if pruned else 9.0)
    assert resumed.net[0][0].out_channels == 4


def test_a_network_that_is_not_called_is_no_skipped_batch(tmp_path: Path) -> None:
    module = Module()
    module.other = tiny("residual")
    with pytest.raises(TrainingError, match="no gradient reached them"):
        trainer(tmp_path, 1, callback(network="other")).fit(module, loader())


def test_checkpoints_of_the_gate_phase_hold_the_whole_network(tmp_path: Path) -> None:
    checkpoints = lightning.callbacks.ModelCheckpoint(dirpath=tmp_path, save_last=True)
    module, gates = Module(), callback()
    trainer(tmp_path, 2, gates, checkpoints, enable_checkpointing=True).fit(module, loader())
    saved = torch.load(tmp_path / "last.ckpt", weights_only=True)
    assert saved["state_dict"]["net.0.0.weight"].shape == (8, 3, 3, 3)
    assert module.net[0][0].out_channels == 4
    # Going on from it continues the gate phase.
    longer, more = Module(), callback()
    trainer(tmp_path, 3, more).fit(longer, loader(), ckpt_path=tmp_path / "last.ckpt")
    assert more.monitor["step"] == 9.0
    assert longer.net[0][0].out_channels == 4


def test_a_checkpoint_of_the_pruned_network_restores_it(tmp_path: Path) -> None:
    module, gates = Module(), callback()
    runner = trainer(tmp_path, 2, gates)
    runner.fit(module, loader())
    runner.save_checkpoint(tmp_path / "pruned.ckpt")
    for stage in ("fit", "test"):
        fresh, again = Module(), callback()
        other = trainer(tmp_path, 3, again)
        if stage == "fit":
            other.fit(fresh, loader(), ckpt_path=tmp_path / "pruned.ckpt")
            assert len(fresh.losses) == 3
        else:
            other.test(fresh, loader(), ckpt_path=tmp_path / "pruned.ckpt", verbose=False)
            assert same_tensors(fresh.net.state_dict(), module.net.state_dict())
        assert [p.shape for p in fresh.parameters()] == [p.shape for p in module.parameters()]
        assert again.plan is not None
        assert gates.plan is not None
        assert again.plan.kept == gates.plan.kept
    saved = torch.load(tmp_path / "pruned.ckpt", weights_only=True)["state_dict"]
    state = {name.removeprefix("net."): value for name, value in saved.items()}
    assert gates.plan is not None
    rebuilt = rebuild(tiny("residual"), gates.plan, state)
    assert torch.equal(rebuilt(example()), module.net.eval()(example()))


@pytest.mark.parametrize("stage", ["setup", "configure_model"])
def test_a_network_may_be_built_by_a_hook(tmp_path: Path, stage: str) -> None:
    def build(module: Any, **_: Any) -> None:
        if not hasattr(module, "net"):
            module.net = tiny("residual").train()

    late = type("Late", (Module,), {stage: build})

    def made() -> Any:
        module = late()
        del module.net
        return module

    module, again = made(), callback()
    runner = trainer(tmp_path, 1, callback())
    runner.fit(module, loader())
    runner.save_checkpoint(tmp_path / "pruned.ckpt")
    restored = made()
    other = trainer(tmp_path, 1, again)
    other.test(restored, loader(), ckpt_path=tmp_path / "pruned.ckpt", verbose=False)
    assert restored.net[0][0].out_channels == 4
    assert same_tensors(restored.net.state_dict(), module.net.state_dict())


@pytest.mark.parametrize("way", ["open", "taylor"])
def test_what_only_learning_needs_is_not_asked_for_to_restore(tmp_path: Path, way: str) -> None:
    words = {
        "open": {"settings": WGatesSettings(learning_rate=0.05, start="open")},
        "taylor": {"importance": TaylorImportance()},
    }
    module = Module()
    module.net(example()).sum().backward()
    runner = trainer(tmp_path, 2, callback(**words[way]))
    runner.fit(module, loader())
    runner.save_checkpoint(tmp_path / "pruned.ckpt")
    fresh, again = Module(), callback(**words[way])
    trainer(tmp_path, 3, again).fit(fresh, loader(), ckpt_path=tmp_path / "pruned.ckpt")
    assert [p.shape for p in fresh.parameters()] == [p.shape for p in module.parameters()]
    assert len(fresh.losses) == 3


def test_a_callback_does_not_take_another_network_for_the_one_it_pruned(tmp_path: Path) -> None:
    gates, other = callback(), Module()
    trainer(tmp_path, 1, gates).fit(Module(), loader())
    with pytest.raises(ConfigError, match="make a new callback"):
        trainer(tmp_path, 1, gates).fit(other, loader())
    assert other.losses == []


def test_checkpoints_while_fine_tuning_keep_the_optimizer(tmp_path: Path) -> None:
    module, gates = Module(), callback()
    trainer(tmp_path, 1, gates).fit(module, loader())
    tuner = trainer(tmp_path, 1, gates)
    tuner.fit(module, loader())
    tuner.save_checkpoint(tmp_path / "tuned.ckpt")
    moments = list(tuner.optimizers[0].state_dict()["state"].values())
    fresh, again = Module(), callback()
    found: list[Any] = []

    class Watch(lightning.Callback):
        def on_train_start(self, trainer: Any, pl_module: Any) -> None:
            found.extend(copy.deepcopy(trainer.optimizers[0].state_dict()["state"]).values())

    trainer(tmp_path, 2, again, Watch()).fit(fresh, loader(), ckpt_path=tmp_path / "tuned.ckpt")
    assert len(found) == len(moments)
    for mine, theirs in zip(found, moments, strict=True):
        assert torch.equal(mine["momentum_buffer"], theirs["momentum_buffer"])


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"iterative_steps": 2}, ConfigError, "one `fit` makes one step"),
        ({"average": lambda g: g}, ConfigError, "the Trainer's strategy"),
        ({"network": "backbone"}, ConfigError, "`backbone`"),
        ({"pruning_ratio": 3}, ConfigError, "0 to 1"),
        ({"pruning_ratio": None, "target": 1.0}, InfeasibleTargetError, "out of reach"),
    ],
)
def test_wrong_options_leave_the_network_as_found(
    tmp_path: Path, options: dict[str, Any], error: type[Exception], words: str
) -> None:
    module = Module()
    before = snapshot(module.net)
    with pytest.raises(error, match=words):
        trainer(tmp_path, 1, callback(**options)).fit(module, loader())
    assert snapshot(module.net) == before


def test_several_optimizers_are_refused(tmp_path: Path) -> None:
    module = Module(optimizers=2)
    module.automatic_optimization = False
    with pytest.raises(ConfigError, match="2 optimizers"):
        trainer(tmp_path, 1, callback()).fit(module, loader())


def test_a_fit_without_a_step_does_not_prune(tmp_path: Path) -> None:
    module = Module()
    with pytest.raises(TrainingError, match="before the gates learned"):
        trainer(tmp_path, 1, callback(), limit_train_batches=0).fit(module, loader())
    assert module.net[0][0].out_channels == 8
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in module.modules())


def test_without_lightning_the_message_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    name = "wgates_plugin.integrations.lightning"
    monkeypatch.setitem(sys.modules, "lightning.pytorch", None)
    monkeypatch.delitem(sys.modules, name)
    module = importlib.import_module(name)
    monkeypatch.delitem(sys.modules, name)
    with pytest.raises(MissingExtraError, match=r"wgates-plugin\[lightning\]"):
        module.WGatesCallback(example())
