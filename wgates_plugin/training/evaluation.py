"""What a network scores on a loader."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from wgates_plugin.calling import ExampleInputs, call_with, device_of, map_tensors
from wgates_plugin.errors import TrainingError
from wgates_plugin.training.as_found import modes_kept, random_state_kept


@dataclass(frozen=True)
class Evaluation:
    """Accuracy as a fraction 0..1, mean cross-entropy in nats, and how many images were seen."""

    accuracy: float
    loss: float
    images: int


def unpack(batch: Any) -> tuple[ExampleInputs, Any]:
    """A batch (inputs, targets), its inputs as `calling.call_with` takes them.

    Inputs: one tensor, a tuple or list of arguments, or a mapping of keyword arguments.

    Raises:
        TrainingError: the batch is no pair.
    """
    if not isinstance(batch, Sequence) or isinstance(batch, str) or len(batch) != 2:
        size = f" of length {len(batch)}" if isinstance(batch, Sequence) else ""
        raise TrainingError(
            f"loader: a batch is {type(batch).__name__}{size}, needed the pair (inputs, targets); "
            "wrap the loader so that it yields pairs (inputs may be a tensor, a "
            "tuple of tensors or a dict of keyword -> tensor)"
        )
    inputs, targets = batch
    if isinstance(inputs, Mapping):
        return dict(inputs), targets
    return tuple(inputs) if isinstance(inputs, list) else inputs, targets


def images_of(value: Any, part: slice, count: int) -> Any:
    """A part of a batch of `count` images; what is not by image (a mixing weight) is for all."""
    return map_tensors(lambda t: t[part] if t.ndim and len(t) == count else t, value)


def images_in(inputs: ExampleInputs) -> int:
    """Length of the first tensor among the inputs.

    Raises:
        TrainingError: there is none.
    """
    values: Iterable[Any] = (inputs,)
    if isinstance(inputs, (tuple, dict)):
        values = inputs.values() if isinstance(inputs, dict) else inputs
    for value in values:
        if isinstance(value, Tensor) and value.ndim:
            return int(value.shape[0])
    raise TrainingError(
        "loader: no tensor with a batch dimension among a batch's inputs, a "
        f"{type(inputs).__name__}; give a tensor, a tuple of tensors or a dict of keyword -> tensor"
    )


def logits_of(output: Any, network: nn.Module) -> Tensor:
    """The network's output if it is a tensor.

    Raises:
        TrainingError: it is something else, as with auxiliary heads.
    """
    if not isinstance(output, Tensor):
        raise TrainingError(
            f"network `{type(network).__name__}`: its output is {type(output).__name__}, needed "
            "one tensor of logits; switch auxiliary heads off (for example aux_logits=False) or "
            "wrap the network in a module that returns the logits"
        )
    return output


def answer(network: nn.Module, batch: Any, device: torch.device) -> tuple[Tensor, Any]:
    """(logits, targets) of a batch, on `device`; the mode is the caller's, the batch is left as it is."""
    inputs, targets = unpack(to_device(batch, device))
    return logits_of(call_with(network, inputs), network), targets


IGNORED = -100
"""The label that cross-entropy leaves out."""


def count_correct(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor] | None:
    """(number of right answers, number of answers), or None if accuracy has no meaning here.

    logits (N, C, ...) of two classes or more; targets (N, ...) class numbers, or (N, C, ...) class
    probabilities: 0 or more, of sum 1 over the classes.
    """
    if not isinstance(targets, Tensor) or logits.ndim < 2 or logits.shape[1] < 2:
        return None
    if targets.shape == logits.shape and _are_probabilities(targets):
        targets = targets.argmax(dim=1)
    if targets.is_floating_point() or targets.shape != logits.shape[:1] + logits.shape[2:]:
        return None
    return (logits.detach().argmax(dim=1) == targets).sum(), (~_ignored(targets)).sum()


def _are_probabilities(targets: Tensor) -> bool:
    if not targets.is_floating_point():
        return False
    tolerance = max(1e-3, torch.finfo(targets.dtype).eps)
    off = (targets.float().sum(dim=1) - 1).abs()
    return bool((targets >= 0).all() & (off <= tolerance).all())


def all_ignored(targets: Any) -> bool:
    """Whether cross-entropy leaves out every label there is."""
    if not isinstance(targets, Tensor) or targets.is_floating_point() or not targets.numel():
        return False
    return bool(_ignored(targets).all())


def _ignored(targets: Tensor) -> Tensor:
    return targets.long() == IGNORED  # a uint8 takes -100 for 156


def cross_entropy(logits: Tensor, targets: Any, *, label_smoothing: float = 0.0) -> Tensor:
    """`functional.cross_entropy` of logits (N, C, ...); 0 where all labels are ones to ignore.

    Raises:
        TrainingError: a label that the network has no output for (on the CPU, where it is noticed).
    """
    if isinstance(targets, Tensor) and targets.dtype in (torch.int32, torch.int16, torch.int8):
        targets = targets.long()
    try:
        loss = functional.cross_entropy(logits, targets, label_smoothing=label_smoothing)
    except IndexError as error:
        raise TrainingError(
            f"labels: a batch's classes go from {int(targets.min())} to {int(targets.max())}, the "
            f"network has {logits.shape[1]} outputs (classes 0 to {logits.shape[1] - 1}); give it "
            "as many outputs as there are classes, or number the classes from 0"
        ) from error
    # The mean over no labels is not a number.
    return logits.sum() * 0.0 if loss.isnan() and all_ignored(targets) else loss


def one_number(loss: Any, subject: str) -> Tensor:
    """What a user's loss gave, of shape ().

    Raises:
        TrainingError: it is no tensor of one number; names `subject`.
    """
    if isinstance(loss, Tensor) and loss.numel() == 1:
        return loss.reshape(())
    got = tuple(loss.shape) if isinstance(loss, Tensor) else type(loss).__name__
    raise TrainingError(
        f"{subject}: the loss gave {got}, needed a tensor of one number, the mean over the batch"
    )


def of_one_value(error: BaseException) -> bool:
    """Whether it is torch's complaint that a BatchNorm has one value per channel, as in a batch of one
    image, and so no variance."""
    return isinstance(error, ValueError) and "more than 1 value per channel" in str(error)


def to_device(value: Any, device: torch.device) -> Any:
    """`value` with copies of its tensors, in nested tuples, lists and mappings, on `device`.

    Copies in any case, for a network may work on its inputs in place, and these are the loader's.
    """
    return map_tensors(lambda tensor: tensor.to(device, non_blocking=True, copy=True), value)


@torch.no_grad()  # in inference mode, what a network caches could not be trained with
def evaluate(
    network: nn.Module, loader: Iterable[Any], device: torch.device | str | None = None
) -> Evaluation:
    """Accuracy and cross-entropy of `network` over the whole of `loader`, in eval mode.

    Batches go to `device` (by default where the network is; the network itself is not moved).
    Modes and random states, the loader's own too, are left as found.

    Raises:
        TrainingError: no batches, batches that are no pairs, an output that is no tensor, or
            targets that are no classes.
    """
    where = device_of(network) if device is None else torch.device(device)
    correct = torch.zeros((), dtype=torch.long, device=where)
    loss = torch.zeros((), dtype=torch.float64 if where.type != "mps" else None, device=where)
    answers = torch.zeros_like(correct)
    images = 0
    with modes_kept(network), random_state_kept(where, loader):
        network.eval()
        for batch in loader:
            logits, targets = answer(network, batch, where)
            counted = count_correct(logits, targets)
            if counted is None:
                raise TrainingError(
                    f"evaluation: logits of shape {tuple(logits.shape)} and targets of shape "
                    f"{tuple(getattr(targets, 'shape', ()))} are no classification; needed logits "
                    "(N, C) of two classes or more, and class numbers (N,) or class probabilities "
                    "(N, C) whose sum is 1"
                )
            correct += counted[0]
            answers += counted[1]
            images += logits.shape[0]
            loss += cross_entropy(logits.float(), targets) * counted[1]
    count = int(answers)
    if not images:
        raise TrainingError("evaluation: the loader gave no batches; check the data set and limit")
    if not count:
        raise TrainingError(
            f"evaluation: the labels of all {images} images are ones to ignore (-100); check the "
            "data set"
        )
    return Evaluation(int(correct) / count, float(loss) / count, images)
