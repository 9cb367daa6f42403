"""`WGatesPruner`: W-Gates where NNI's users have `TaylorPruner` or `SlimPruner`."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from nni.compression import LightningEvaluator
from nni.compression.base.compressor import Compressor
from nni.compression.base.wrapper import ModuleWrapper
from nni.compression.utils import Evaluator
from torch import Tensor, nn

from wgates_plugin.calling import ExampleInputs
from wgates_plugin.errors import ConfigError, TrainingError
from wgates_plugin.integrations.nni.asked import (
    Efficiency,
    duration_problems,
    training_problems,
)
from wgates_plugin.integrations.nni.base import TracedPruner
from wgates_plugin.integrations.nni.choices import ConfigList
from wgates_plugin.integrations.nni.gates import wrapped_gates
from wgates_plugin.integrations.nni.loss_scale import found_scale, trainers_scale
from wgates_plugin.integrations.nni.masks import Masks, still_open
from wgates_plugin.strategies.averaging import mean_over_ranks
from wgates_plugin.strategies.budgeting import plan_for_budget
from wgates_plugin.strategies.unit_scores import widths_of
from wgates_plugin.strategies.wgates import WGatesSettings
from wgates_plugin.targets import Target


class WGatesPruner(TracedPruner):
    """W-Gates as an NNI pruner: gates learn in the evaluator's training, masks come out.

    The config list says which layers may shrink. How far, either it says too (`sparse_ratio`, per
    layer or over a `global_group_id`), or `target` does for the whole network, in milliseconds,
    MACs or parameters. Coupled layers are found by tracing; `dependency_group_id`s are checked, not
    needed. Masks close channels wherever they would come to life again (BatchNorms, depthwise
    convolutions), so that the masked network computes what `remove` leaves. Under
    DistributedDataParallel gates' gradients are averaged over all processes: each must `compress`.

    Args:
        model: the network; wrapped by NNI until `unwrap_model()`.
        config_list: NNI's, with `op_types`, `op_names`, `op_names_re`, `exclude_*`, `sparse_ratio`
            or `max_sparse_ratio`, `min_sparse_ratio`, `global_group_id`, `granularity`.
        evaluator: whose training the gates learn in; without one, filter norms decide.
        training_steps: optimizer steps with gates; None takes `compress`'s own duration, 0 decides
            by filter norms, without training, and at equal shares under a `global_group_id`.
        existed_wrappers: used by `from_compressor`.
        example_inputs: what to trace the network on; by default the evaluator's dummy input, or
            the first batch that its training calls the model with; with neither evaluator nor
            target, random images of a size that the network accepts.
        efficiency: what `target` limits: `LPNet`, `MacsModel`, `ParametersModel`, a function of the
            channel space that returns one, or a `Budget` of several limits. By default MACs.
        target: the limit in the model's unit, or a `MacsTarget`, `ParametersTarget` or
            `LatencyTarget` (which needs an `LPNet`).
        settings: how gates learn, and the channel multiple; where they name none, under a latency,
            it is that of the widths which LPNet has measured.
        min_channels: least width of every layer.
        loss_scale: what the training multiplies its loss by, where it takes that off the weights'
            gradients again before a step (`scaler.get_scale`). By default found by comparing the
            gates' gradient with the weights', and taken from Lightning's trainer.

    Attributes:
        plan: the decided plan, None before `compress`.
        left_out: layer that the config names -> why all its channels stay.

    Raises:
        ConfigError, TraceError, InfeasibleTargetError: before the network is wrapped.
    """

    def __init__(
        self,
        model: nn.Module,
        config_list: ConfigList,
        evaluator: Evaluator | None = None,
        training_steps: int | None = None,
        existed_wrappers: dict[str, ModuleWrapper] | None = None,
        *,
        example_inputs: ExampleInputs | None = None,
        efficiency: Efficiency | None = None,
        target: float | Target | None = None,
        settings: WGatesSettings | None = None,
        min_channels: int = 1,
        loss_scale: Callable[[], float] | None = None,
    ) -> None:
        settings = settings or WGatesSettings()
        untrained = evaluator is None and training_steps is None
        if untrained:
            training_steps = 0
        problems = duration_problems(training_steps, evaluator, settings)
        if existed_wrappers is not None and not isinstance(existed_wrappers, Mapping):
            problems.append(
                f"existed_wrappers is {existed_wrappers!r}, needs a dict, as `from_compressor` hands it "
                "over; SlimPruner's `regular_scale`, which has this place there, is to be left out"
            )
        if loss_scale is not None and not callable(loss_scale):
            problems.append(
                f"loss_scale is {loss_scale!r}, needs a function that returns it, as `scaler.get_scale`"
            )
        super().__init__(
            model,
            config_list,
            evaluator,
            existed_wrappers,
            example_inputs=example_inputs,
            efficiency=efficiency,
            target=target,
            grid=settings.grid,
            min_channels=min_channels,
            problems=problems,
        )
        self.training_steps = training_steps
        self._settings = replace(settings, grid=self._grid)
        self._longest: int | None = None
        self._loss_scale = loss_scale
        self._renew_gates()
        self._undo: Callable[[], None] | None = None
        self._last_step: int | None = None
        self._steps_done = 0
        if untrained:
            warnings.warn(
                f"{self._subject}: no evaluator, so filter norms decide which channels go, and layers of "
                "one global_group_id lose equal shares; gates learn in the training of an evaluator",
                stacklevel=2,
            )

    @classmethod
    def from_compressor(
        cls,
        compressor: Compressor,
        new_config_list: ConfigList,
        training_steps: int | None = None,
        *,
        evaluator: Evaluator | None = None,
        **options: Any,
    ) -> WGatesPruner:
        """Go on from another compressor: its wrappers stay, its evaluator is used if it has one.

        What it has masked stays masked, and counts towards ratio and target. See the class for
        `options`.
        """
        was_wrapped = compressor._is_wrapped
        try:
            pruner: WGatesPruner = super().from_compressor(
                compressor,
                new_config_list,
                training_steps=training_steps,
                evaluator=evaluator,
                **options,
            )
        except BaseException:
            if was_wrapped and not compressor._is_wrapped:
                compressor.wrap_model()
            raise
        return pruner

    def _renew_gates(self) -> None:
        """Gates that start from the weights as they are now, under the masks there are."""
        space = still_open(self.space, self._closed())
        steps = self.training_steps or self._longest
        self.gates = wrapped_gates(
            self.bound_model,
            space,
            self.budget,
            self._settings,
            steps=steps,
            average=self._as_the_weights,
        )

    def compress(
        self, max_steps: int | None = None, max_epochs: int | None = None
    ) -> tuple[nn.Module, Masks]:
        """Learn the gates in the evaluator's training, decide, and return the model and its masks.

        Args:
            max_steps, max_epochs: length of the training; by default `training_steps`. What is
                left of it after `training_steps` trains the masked network on.

        Raises:
            ConfigError: no duration, one shorter than `training_steps`, or one that nothing trains for.
            PlanError: compressed already, or the network changed since it was traced.
            TrainingError: the training broke down.
        """
        self._check_ready()
        if problems := training_problems(
            max_steps, max_epochs, self.training_steps, self.evaluator
        ):
            raise ConfigError(f"{self._subject}.compress", problems)
        if max_steps is None and max_epochs is None:
            max_steps = self.training_steps
        self._longest = max_steps
        self._steps_done, self._last_step = 0, None  # a call that broke off leaves its own
        if self.training_steps == 0 and not max_epochs and not max_steps:
            self._renew_gates()
            self._decide()
            return self.bound_model, self.get_masks()
        if isinstance(self.evaluator, LightningEvaluator) and max_steps:
            # NNI sets a number of steps in a way that Lightning 2 no longer has.
            self._last_step, max_steps = max_steps, None
            max_epochs = -1 if max_epochs is None else max_epochs
        with self._detached_on_error():
            model, masks = super().compress(max_steps, max_epochs)
        return model, masks

    def _single_compress(self, max_steps: int | None, max_epochs: int | None) -> None:
        self._fusion_compress(max_steps, max_epochs)

    @contextmanager
    def _detached_on_error(self) -> Any:
        try:
            yield
        except BaseException:
            self._release()
            if self.evaluator is not None and self.evaluator.model is not None:
                self.evaluator.unbind_model()
            raise

    def _fuse_preprocess(self, evaluator: Evaluator) -> None:
        if self.plan is not None:  # an earlier link of a chain: its masks work by themselves
            return
        self._check_unchanged()
        self._renew_gates()
        self.gates.attach()
        lightning = isinstance(evaluator, LightningEvaluator)
        if self.training_steps == 0:
            self._decide()
            if lightning:
                evaluator.patch_optimizer_step([], [self._stop_when_due])
        elif lightning:
            # Lightning computes gradients inside `optimizer.step(closure)`, which is too late.
            self._undo = _before_optimizer_step(evaluator.model, self._learn)
            evaluator.patch_optimizer_step([], [self._decide_when_due, self._stop_when_due])
        else:
            evaluator.patch_optimizer_step([self._learn], [self._decide_when_due])

    def _fuse_postprocess(self, evaluator: Evaluator) -> None:
        if self.plan is None:
            if 0 < self.gates.step < (self.training_steps or 0):
                warnings.warn(
                    f"{self._subject}: the evaluator's training ended after {self.gates.step} of "
                    f"{self.training_steps} steps; the masks are decided as far as gates learned",
                    stacklevel=2,
                )
            self._decide()
        self._release()

    def _learn(self) -> None:
        if self.plan is None:
            self.gates.regularize()

    def _as_the_weights(self, gradient: Tensor) -> Tensor:
        """The gates' gradient (total_units,), averaged and on the scale of the weights' gradients."""
        gradient = mean_over_ranks(gradient)
        if self._loss_scale is not None:
            scale = self._loss_scale()
        elif isinstance(self.evaluator, LightningEvaluator):
            scale = trainers_scale(self.evaluator.model.trainer)
        else:
            scale = found_scale(gradient, self.bound_model, self.space)
        return gradient / scale

    def _decide_when_due(self) -> None:
        if self.plan is None and self.gates.step == self.training_steps:
            self._decide()

    def _stop_when_due(self) -> None:
        self._steps_done += 1
        if self._last_step is not None and self._steps_done >= self._last_step:
            assert self.evaluator is not None
            self.evaluator.model.trainer.should_stop = True

    def _decide(self) -> None:
        """Turn scores into a plan and the plan into masks; the gates come off."""
        if self.training_steps != 0 and self.gates.step == 0:
            raise TrainingError(
                f"{self._subject}: the gates never learned; the evaluator's training made no optimizer "
                "step on the wrapped model"
            )
        if words := self.gates.warning(self._subject, "training_steps"):
            warnings.warn(words, stacklevel=2)
        masks = self.generate_masks()
        self._release()
        self.update_masks(masks)

    def _release(self) -> None:
        if self._undo is not None:
            self._undo()
            self._undo = None
        self.gates.detach()

    def _calculate_metrics(
        self, data: dict[str, dict[str, Tensor]]
    ) -> dict[str, dict[str, Tensor]]:
        """The score of each output channel, (C, 1, ...) as NNI's pruners have it."""
        return self._by_layer(self.gates.unit_scores(), data)

    def _generate_sparsity(self, metrics: dict[str, dict[str, Tensor]]) -> Masks:
        """The plan that the scores stand for under the budget, as masks."""
        scores = self.gates.unit_scores().cpu()
        for name, held in metrics.items():
            index = torch.from_numpy(self.space.unit_index(name, "out"))
            owned = index < self.space.total_units
            scores[index[owned]] = held["weight"].flatten()[owned]
        earlier, grid = self._closed(), self._grid
        # What is closed already counts towards ratio and target, before anything else goes.
        scores[earlier] = scores.min() - 1e-6
        space = still_open(self.space, earlier)
        widths = widths_of(space, scores, grid)
        plan = plan_for_budget(space, scores, widths, self.budget, grid, strategy="wgates")
        return self._masks_of(plan)


def _before_optimizer_step(module: Any, task: Callable[[], None]) -> Callable[[], None]:
    """Run `task` when Lightning has the gradients of a step; returns what takes it away again."""
    original = module.on_before_optimizer_step

    def patched(*args: Any, **kwargs: Any) -> Any:
        task()
        return original(*args, **kwargs)

    module.__dict__["on_before_optimizer_step"] = patched
    return lambda: module.__dict__.pop("on_before_optimizer_step", None)
