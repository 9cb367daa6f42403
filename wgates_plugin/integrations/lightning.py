"""The Lightning door: a callback that runs the gate phase inside `Trainer.fit`."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from wgates_plugin.calling import ExampleInputs, device_of, map_tensors
from wgates_plugin.catalogue.torchvision_import import import_torchvision
from wgates_plugin.errors import ConfigError, MissingExtraError, TrainingError
from wgates_plugin.integrations.torch_pruning import WGatesPruner
from wgates_plugin.integrations.torch_pruning.options import wraps
from wgates_plugin.latency.base import require
from wgates_plugin.plan import PruningPlan


def _lightning() -> Any:
    if importlib.util.find_spec("lightning") and importlib.util.find_spec("torchvision"):
        import_torchvision()  # torchmetrics does, and fails where its extension cannot load
    return require("lightning.pytorch", extra="lightning", purpose="the Lightning callback")


try:
    _Callback: Any = _lightning().Callback
except MissingExtraError:
    _Callback = object  # making a callback then says what to install


class WGatesCallback(_Callback):
    """Gates learn along with the weights while `Trainer.fit` runs, and it ends with a smaller network.

    Gates go on when `fit` starts and come off when it ends; the network is pruned last, after
    the Trainer's own checkpoints are written. Fine-tune with another `fit`. An interrupted `fit`
    leaves the network whole, with its gates off; `fit(..., ckpt_path=...)` continues where the
    checkpoint was written. A checkpoint saved after the pruning restores the smaller network.

    One callback prunes one network once: another network, or another step, needs a new callback.
    Several may share a Trainer, each with a `network` of its own that holds none of the others.

    Args:
        example_inputs: one batch for tracing: a tensor, a tuple or list of arguments or a dict.
        network: attribute of the LightningModule that is pruned, dotted; "" for itself. It must be
            what `training_step` calls.
        options: those of `WGatesPruner`: `efficiency`, `target`, `pruning_ratio`, ...

    Attributes:
        pruner: the `WGatesPruner` of this `fit`, for its plan. monitor: the last step's values, which
            are logged as `gates/...`, and as `gates/<network>/...` where several callbacks learn.

    Raises:
        MissingExtraError: Lightning is not installed.
        ConfigError: iterative steps, several optimizers, no such network, or another one than the
            one that was pruned.

    Example::

        callback = WGatesCallback(images, network="net", efficiency=lpnet, target=8.0)
        Trainer(max_epochs=10, callbacks=[callback]).fit(module, loader)
    """

    def __init__(self, example_inputs: ExampleInputs, *, network: str = "", **options: Any) -> None:
        _lightning()
        super().__init__()
        problems = []
        if options.get("iterative_steps", 1) != 1:
            problems.append(
                "iterative_steps: one `fit` makes one step; call `fit` once for each, with a new "
                "callback"
            )
        if "average" in options:
            problems.append("average: the Trainer's strategy does that")
        if problems:
            raise ConfigError("WGatesCallback", problems)
        self.example_inputs, self.network, self.options = example_inputs, network, options
        self.pruner: WGatesPruner | None = None
        self.monitor: dict[str, float] = {}
        self._state: dict[str, Any] = {}
        self._loaded: dict[str, Any] | None = None
        self._removal: Iterator[Any] | None = None
        self._hooked, self._own_hook = False, None
        self._fine_tuning = False
        self._went_back = False
        self._alone = True

    @property
    def state_key(self) -> str:
        """Where a checkpoint keeps this callback's state: one place per network."""
        return f"{type(self).__qualname__}[{self.network}]"

    @property
    def plan(self) -> PruningPlan | None:
        """What stayed, once the network is pruned."""
        return None if self.pruner is None else self.pruner.plan

    def _target(self, module: nn.Module) -> nn.Module:
        try:
            return module.get_submodule(self.network)
        except AttributeError as error:
            raise ConfigError(
                "WGatesCallback", [f"network `{self.network}`: {error}; give its dotted name"]
            ) from error

    def _inputs(self, network: nn.Module) -> ExampleInputs:
        """The example inputs on the network's device, in the precision that the Trainer cast it to."""
        weight = next(network.parameters())

        def like_weights(tensor: Tensor) -> Tensor:
            return tensor.to(weight if tensor.is_floating_point() else weight.device)

        return map_tensors(like_weights, self.example_inputs)

    def _make(self, module: nn.Module, **options: Any) -> WGatesPruner:
        network = self._target(module)
        return WGatesPruner(network, self._inputs(network), **options)

    # Hooks, in the order in which the Trainer calls them

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Before a checkpoint is read: one of a pruned network needs a network as small."""
        self._unhook(pl_module)
        self._state, self._loaded, self._went_back = {}, None, False
        ours = [each for each in trainer.callbacks if isinstance(each, WGatesCallback)]
        self._alone = len(ours) == 1
        if ours[0] is not self:  # which hooks the module for all of them
            return
        # The Trainer restores callbacks after weights; this hook of the module comes before both.
        self._own_hook = vars(pl_module).get("on_load_checkpoint")
        own = pl_module.on_load_checkpoint

        def shrink_first(checkpoint: dict[str, Any]) -> None:
            self._unhook(pl_module)
            for each in ours:
                each._shrink(pl_module, checkpoint)
            own(checkpoint)

        pl_module.on_load_checkpoint = shrink_first
        self._hooked = True

    def _shrink(self, module: nn.Module, checkpoint: dict[str, Any]) -> None:
        """Make the network as small as the checkpoint's."""
        states = checkpoint.get("callbacks", {})
        unnamed = type(self).__qualname__  # a key may be without the network, where one was pruned
        if self._alone and self.state_key not in states and unnamed in states:
            states[self.state_key] = states.pop(unnamed)
        state = states.get(self.state_key, {})
        if self.plan is not None or state.get("pruner", {}).get("kept") is None:
            return
        # Its gates are not used: what these options would need is not asked for.
        self.pruner = self._make(module, **{**self.options, "importance": None, "steps": 1})
        self.pruner.load_state_dict(state["pruner"])
        if not state["fine_tuning"]:  # moments of weights that are gone
            for optimizer in checkpoint.get("optimizer_states", []):
                optimizer["state"] = {}

    def _unhook(self, module: Any) -> None:
        if self._hooked:
            del module.on_load_checkpoint
            if self._own_hook is not None:
                module.on_load_checkpoint = self._own_hook
            self._hooked, self._own_hook = False, None

    def teardown(self, trainer: Any, pl_module: Any, stage: str) -> None:
        self._unhook(pl_module)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keep a checkpoint's state until `fit` starts, when the network is in its place."""
        self._loaded = state_dict.get("pruner")

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        """Attach the gates, and bring them to where the checkpoint left them."""
        self._unhook(pl_module)
        self._fine_tuning = self.plan is not None
        if self.pruner is not None and self._fine_tuning:
            if not wraps(self._target(pl_module), self.pruner.model):
                raise ConfigError(
                    "WGatesCallback",
                    [
                        f"network `{self.network}`: is another one than this callback pruned before; "
                        "make a new callback for it. If `setup` or `configure_model` builds it, "
                        "let them keep the one that is there"
                    ],
                )
            return
        if len(trainer.optimizers) != 1:
            raise ConfigError(
                "WGatesCallback",
                [f"{len(trainer.optimizers)} optimizers: gates step with one; train with one"],
            )

        def average(gradient: Tensor) -> Tensor:
            return torch.as_tensor(trainer.strategy.reduce(gradient, reduce_op="mean"))

        options = {"steps": _steps_of(trainer), **self.options}
        self.pruner = self._make(pl_module, average=average, **options)
        if self._loaded is not None:
            self.pruner.load_state_dict(self._loaded)

    def on_after_backward(self, trainer: Any, pl_module: Any) -> None:
        """Note it: some optimizer steps come without, which the gates are to skip."""
        self._went_back = True

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        """Gradients are complete, accumulated ones included: step the gates."""
        if self.pruner is None or self.plan is not None:
            return
        # None comes for a batch whose `training_step` returned None, nor in the pass in which
        # `StochasticWeightAveraging` updates the norms.
        went_back, self._went_back = self._went_back, False
        if not went_back and not self.pruner.gates.reached:
            self.pruner.discard()
            return
        # The scaler's `unscale_` has been at the weights' gradients only.
        scaler = getattr(trainer.precision_plugin, "scaler", None)
        scale = 1.0 if scaler is None else scaler.get_scale()
        self.monitor = self.pruner.regularize(self.pruner.model, scale=scale)
        where = "gates" if self._alone or not self.network else f"gates/{self.network}"
        pl_module.log_dict({f"{where}/{name}": value for name, value in self.monitor.items()})

    def state_dict(self) -> dict[str, Any]:
        """The gates as they stand, or what stayed: tensors and plain values."""
        if self._state:
            return self._state
        if self.pruner is None:
            return {}
        return {"pruner": self.pruner.state_dict(), "fine_tuning": self._fine_tuning}

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """Decide and take the gates off; the checkpoints of this `fit` keep the whole network."""
        if self.pruner is not None and self.plan is None and self.pruner.gates.step > 0:
            self._state = self.state_dict()  # the weights are whole until `on_fit_end`
            self._removal = self.pruner.step(interactive=True)

    def on_fit_end(self, trainer: Any, pl_module: Any) -> None:
        """Remove the closed channels exactly, from the network as the Trainer hands it back.

        Raises:
            TrainingError: the gates never learned.
        """
        pruner = self.pruner
        if pruner is None or pruner.plan is not None:
            return
        pruner.detach()
        pruner.follow(self._inputs(pruner.model))  # `sync_batchnorm` puts other norms in place
        if self._removal is None:  # a checkpoint of the last epoch's end leaves nothing to train
            handed_back = device_of(pruner.model)
            pruner.model.to(pruner.gates.scores.offset.device)
            self.on_train_end(trainer, pl_module)
            pruner.model.to(handed_back)
        if self._removal is None:
            self.pruner = None
            raise TrainingError(
                "WGatesCallback: `fit` ended before the gates learned, nothing was pruned; give "
                "the Trainer at least one optimizer step"
            )
        for group in self._removal:
            group.prune()
        self._removal, self._state = None, {}

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        """Leave the network whole and without gates; checkpoints that are written now have them still."""
        self._unhook(pl_module)
        if self.pruner is not None and self.plan is None:
            self._state = self.state_dict()
            self.pruner.detach()
            self.pruner = self._removal = None


def _steps_of(trainer: Any) -> int | None:
    """Optimizer steps of a whole `fit`; None where the Trainer cannot say."""
    try:
        steps = float(trainer.estimated_stepping_batches)
    except _lightning().utilities.exceptions.MisconfigurationException:
        return None  # gradients are accumulated over another number of batches in each epoch
    return int(steps) if math.isfinite(steps) and steps >= 1 else None
