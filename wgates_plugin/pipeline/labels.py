"""Whether the labels of the data fit the network's outputs: told before anything is measured."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import (
    DataLoader,
    RandomSampler,
    SequentialSampler,
    TensorDataset,
    default_collate,
)

from wgates_plugin.calling import ExampleInputs, call_with, device_of
from wgates_plugin.catalogue.tensor_loader import TensorLoader
from wgates_plugin.errors import ConfigError
from wgates_plugin.training.as_found import modes_kept, random_state_kept
from wgates_plugin.training.evaluation import IGNORED, evaluate, to_device, unpack


def check_labels(
    network: nn.Module, example_inputs: ExampleInputs, **loaders: Iterable[Any]
) -> None:
    """Refuse class numbers that cross-entropy over the network's outputs (N, C, ...) cannot take.

    All labels are looked at where they lie in memory just as they are handed out; of any other loader
    the first batch. Class probabilities and whatever else is no whole number are left to the loss.

    Raises:
        ConfigError: names the loader, the label and the number of outputs.
    """
    with modes_kept(network), torch.no_grad():
        output = call_with(network.eval(), to_device(example_inputs, device_of(network)))
    if not isinstance(output, Tensor) or output.ndim < 2:
        return
    outputs, problems = output.shape[1], []
    for name, loader in loaders.items():
        for labels in _labels(loader):
            bad = labels[((labels < 0) | (labels >= outputs)) & (labels != IGNORED)]
            if bad.numel():
                worst = int(bad.max()) if int(bad.max()) >= outputs else int(bad.min())
                problems.append(
                    f"{name}: holds class {worst}, the network has {outputs} outputs (classes 0 to "
                    f"{outputs - 1}); give the network as many outputs as there are classes, number "
                    "the classes from 0, or pass a loss of your own"
                )
                break
    if problems:
        raise ConfigError("labels", problems)


def check_scored(network: nn.Module, val_loader: Iterable[Any]) -> None:
    """Refuse data and networks of which no accuracy can be told, by the first batch.

    Raises:
        TrainingError: as `evaluate` says it.
    """
    with random_state_kept(torch.device("cpu"), val_loader):
        first = list(_first(val_loader))
    evaluate(network, first)


def _labels(loader: Any) -> Iterable[Tensor]:
    """Tensors of whole numbers among the labels."""
    found: list[Any]
    if isinstance(loader, TensorLoader):
        found = [loader.targets]
    elif _hands_out_all(loader):
        found = [loader.dataset.tensors[-1]]
    elif isinstance(loader, (list, tuple)):
        found = [unpack(batch)[1] for batch in loader]
    else:
        with random_state_kept(torch.device("cpu"), loader):
            found = [unpack(batch)[1] for batch in _first(loader)]
    for item in found:
        try:
            labels = torch.as_tensor(item)
        except (TypeError, ValueError, RuntimeError):  # several targets, or none that is a number
            continue
        if labels.dtype in (torch.uint8, torch.int16, torch.int32, torch.int64):
            yield labels.long()


def _hands_out_all(loader: Any) -> bool:
    """Whether it is a `DataLoader` over tensors, with nothing in between that picks or changes."""
    return (
        isinstance(loader, DataLoader)
        and type(loader.dataset) is TensorDataset
        and loader.collate_fn is default_collate
        and type(loader.sampler) in (SequentialSampler, RandomSampler)
        and loader.batch_size is not None
    )


def _first(loader: Iterable[Any]) -> Iterable[Any]:
    for batch in loader:
        yield batch
        return
