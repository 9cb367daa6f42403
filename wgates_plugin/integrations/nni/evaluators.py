"""NNI's evaluators, checked before they are used: what they need, and the inputs they would train on."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from nni.common import is_traceable
from nni.compression import LightningEvaluator, TorchEvaluator
from nni.compression.utils import Evaluator
from torch import Tensor, nn

from wgates_plugin.calling import ExampleInputs, device_of, left_as_found, map_tensors
from wgates_plugin.errors import ConfigError
from wgates_plugin.training.as_found import random_state_kept

EXAMPLE_IMAGES = 2
"""As many images of a training batch are enough to trace a network."""


def torch_evaluator(
    training_func: Callable[..., None],
    optimizers: Any,
    training_step: Callable[..., Any],
    *,
    lr_schedulers: Any = None,
    dummy_input: Any = None,
    evaluating_func: Callable[[nn.Module], Any] | None = None,
) -> TorchEvaluator:
    """NNI's `TorchEvaluator`, with readable errors where NNI's own asserts say nothing.

    Raises:
        ConfigError: an optimizer or scheduler that NNI cannot make anew, or something not callable.
    """
    problems = [
        f"{name} is {value!r}, needs a function"
        for name, value in (("training_func", training_func), ("training_step", training_step))
        if not callable(value)
    ]
    for kind, given in (("optimizer", optimizers), ("lr_scheduler", lr_schedulers)):
        items = given if isinstance(given, (list, tuple)) else [given] if given is not None else []
        if kind == "optimizer" and not items:
            problems.append("optimizers is empty, needs at least one traced optimizer")
        problems += [
            f"{kind} {type(item).__name__} is not traced, so NNI cannot make it anew for the wrapped "
            f"network; make it with nni.trace({type(item).__name__})(...)"
            for item in items
            if not is_traceable(item)
        ]
    if problems:
        raise ConfigError("evaluator", problems)
    return TorchEvaluator(
        training_func, optimizers, training_step, lr_schedulers, dummy_input, evaluating_func
    )


def evaluator_problems(evaluator: object, model: nn.Module) -> list[str]:
    """What keeps the evaluator from training this model; it is made ready on the way."""
    if not isinstance(evaluator, Evaluator):
        return [
            f"evaluator is a {type(evaluator).__name__}, needs one of NNI's, such as "
            "TorchEvaluator(training_func, nni.trace(SGD)(model.parameters(), ...), training_step)"
        ]
    if isinstance(evaluator, LightningEvaluator) and not hasattr(model, "configure_optimizers"):
        return [f"a LightningEvaluator trains LightningModules, not {type(model).__name__}"]
    if not evaluator._initialization_complete:
        try:
            evaluator._init_optimizer_helpers(model)
        except (AssertionError, TypeError, AttributeError) as error:
            return [
                f"evaluator: its optimizers cannot be made anew ({error}); trace them with "
                "nni.trace, as in nni.trace(torch.optim.SGD)(model.parameters(), lr=0.1)"
            ]
    helpers = getattr(evaluator, "_optimizer_helpers", [])
    groups = [group for helper in helpers for group in _param_groups(helper)]
    if groups and not any(group["params"] for group in groups):
        return [
            "evaluator: its optimizer holds no parameter of this model; make it from this model"
        ]
    return []


def _param_groups(helper: Any) -> Sequence[dict[str, Any]]:
    groups: Sequence[dict[str, Any]]
    groups = helper.kwargs["params"] if "params" in helper.kwargs else helper.args[0]
    return groups


class _FirstCall(BaseException):
    """Leaves a training function at its first use of the model; no `except Exception` keeps it."""


def example_from(evaluator: Evaluator | None, model: nn.Module) -> ExampleInputs:
    """Example inputs from the evaluator: its dummy input, or what its training first calls with.

    The training function runs up to the model's first call and is left there, before anything is
    learned. Random states of Python, NumPy and torch (the CPU's, and that of the model's device) are
    given back; a generator of the loader's own is not.

    Raises:
        ConfigError: there is no evaluator, or its training never calls the model.
    """
    if evaluator is None:
        raise ConfigError(
            "WGatesPruner",
            ["the network is traced on example inputs: give `example_inputs=`, or an evaluator"],
        )
    if isinstance(evaluator, LightningEvaluator):
        batch = evaluator.get_dummy_input()
        return _few(batch[0] if isinstance(batch, (list, tuple)) else batch)
    dummy = evaluator.get_dummy_input()
    if dummy is not None:
        return tuple(dummy) if isinstance(dummy, list) else dummy
    caught: list[ExampleInputs] = []

    def catch(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        caught.append(_few(kwargs if not args else args if len(args) > 1 else args[0]))
        raise _FirstCall

    with left_as_found(model), random_state_kept(device_of(model), None):
        evaluator.bind_model(model, {name: name for name, _ in model.named_parameters()})
        # NNI trains a DistributedDataParallel of its own in place of the user's.
        handle = evaluator.model.register_forward_pre_hook(catch, with_kwargs=True)
        try:
            evaluator.train(1, None)
        except _FirstCall:
            pass
        finally:
            handle.remove()
            evaluator.unbind_model()
    if not caught:
        raise ConfigError(
            "evaluator",
            ["its training function never calls the model; give `example_inputs=`"],
        )
    return caught[0]


def example_of(data: Iterable[Any], model: nn.Module) -> ExampleInputs:
    """The first images of the first batch (inputs, targets), on the model's device.

    Random states are given back, those of the loader's own generators too. Data without a batch
    raise ConfigError.
    """
    device = device_of(model)
    with random_state_kept(device, data):
        batch = next(iter(data), None)
    if batch is None:
        raise ConfigError(
            "StrategyPruner",
            [
                "data: got no batches; give batches (inputs, targets), or `example_inputs` to trace on"
            ],
        )
    example: ExampleInputs = map_tensors(lambda tensor: tensor.to(device), _few(batch[0]))
    return example


SIDES = (224, 32, 28, 64, 96, 128, 299, 16, 8)


@torch.no_grad()
def guessed_inputs(model: nn.Module) -> Tensor | None:
    """Random inputs that the network accepts, by its first layer; None when none of the usual do.

    Which channels belong together depends on the size of the images only where they are flattened,
    and there one size alone fits.
    """
    kinds = (nn.Conv2d, nn.Linear)
    first = next((module for module in model.modules() if isinstance(module, kinds)), None)
    shapes: list[tuple[int, ...]] = []
    if isinstance(first, nn.Conv2d):
        shapes = [(EXAMPLE_IMAGES, first.in_channels, side, side) for side in SIDES]
    elif isinstance(first, nn.Linear):
        shapes = [(EXAMPLE_IMAGES, first.in_features)]
    generator = torch.Generator().manual_seed(0)
    for shape in shapes:
        assert first is not None
        images = torch.randn(shape, generator=generator).to(first.weight)
        try:
            with left_as_found(model):
                model.eval()(images)
        except (RuntimeError, ValueError, TypeError, IndexError):
            continue
        return images
    return None


def _few(inputs: Any) -> Any:
    """The first images of a batch, detached."""
    if isinstance(inputs, Tensor):
        return inputs[:EXAMPLE_IMAGES].detach().clone() if inputs.dim() else inputs.detach()
    if isinstance(inputs, dict):
        return {key: _few(value) for key, value in inputs.items()}
    if isinstance(inputs, (tuple, list)):
        return tuple(_few(value) for value in inputs)
    return inputs
