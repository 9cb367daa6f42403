"""NNI's `ModelSpeedup` on today's torch, and its result compared with the masked network."""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Iterator
from typing import Any

import torch
from nni.compression.speedup import ModelSpeedup as TheirModelSpeedup
from torch import nn

from wgates_plugin.calling import ExampleInputs, left_as_found
from wgates_plugin.errors import ConfigError, SurgeryError
from wgates_plugin.integrations.nni.given_masks import GivenMasks, check_masks, read_masks
from wgates_plugin.integrations.nni.removal import compare, masked_output


class ModelSpeedup(TheirModelSpeedup):
    """NNI's own, with what keeps it from today's torch put right; arguments and result are theirs.

    Its tracer fails from torch 2.2 on, so the graph comes from `torch.fx.symbolic_trace` unless one
    is given. Its dry runs happen in eval mode: in train mode they move BatchNorm statistics. A file of
    masks is read as plain tensors, so that nothing in it can execute code.

    What it removes is its own affair: it also takes channels that only *look* constant, so that
    plain masks of convolutions lead to another function than the masked network's. `speedup` checks.
    """

    def __init__(
        self,
        model: nn.Module,
        dummy_input: Any,
        masks_or_file: Any,
        map_location: Any = None,
        batch_dim: int = 0,
        batch_size: int = 8,
        customized_mask_updaters: Any = None,
        customized_replacers: Any = None,
        graph_module: torch.fx.GraphModule | None = None,
        **options: Any,
    ) -> None:
        masks = read_masks(masks_or_file, map_location=map_location)
        with _evaluating(model):
            super().__init__(
                model,
                dummy_input,
                masks,
                map_location,
                batch_dim,
                batch_size,
                customized_mask_updaters,
                customized_replacers,
                graph_module=graph_module or torch.fx.symbolic_trace(model),
                **options,
            )

    def speedup_model(self) -> nn.Module:
        with _evaluating(self.bound_model):
            model: nn.Module = super().speedup_model()
        return model


@contextlib.contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Eval mode, with gradients, which ModelSpeedup spreads masks by, for the length of the block.

    Layers that replace others take over their modes.
    """
    modes = {name: module.training for name, module in model.named_modules()}
    model.eval()
    try:
        with torch.enable_grad():
            yield
    finally:
        for name, module in model.named_modules():
            module.training = modes.get(name, modes[""])


def speedup(model: nn.Module, masks: GivenMasks, example_inputs: ExampleInputs) -> nn.Module:
    """`ModelSpeedup` with these masks, in place, silently, compared with the masked network.

    It takes many times as long as `remove`. Masks may be the path of a file, as there.

    Raises:
        FileFormatError: the file cannot be read as plain tensors.
        ConfigError: the masks do not fit the network, or empty a layer.
        SurgeryError: torch.fx cannot trace the network, ModelSpeedup fails, or what it leaves
            computes something else; the model is then not to be used any more.
    """
    masks = check_masks(model, read_masks(masks))
    if isinstance(example_inputs, dict):
        raise ConfigError("speedup", ["example_inputs by name: ModelSpeedup takes positions only"])
    empty = [
        f"masks close all {len(mask)} channels of `{name}`, which ModelSpeedup cannot do without; "
        "keep at least one"
        for name, targets in masks.items()
        if (mask := targets.get("weight")) is not None and not mask.any()
    ]
    if empty:
        raise ConfigError("masks", empty)
    expected = masked_output(model, masks, example_inputs)
    copies = {
        name: {key: mask.clone() for key, mask in targets.items() if mask is not None}
        for name, targets in masks.items()
    }
    try:
        with left_as_found(model), _silent():
            ModelSpeedup(model, example_inputs, copies).speedup_model()
    except Exception as error:
        raise SurgeryError(
            f"ModelSpeedup fails on {type(model).__name__} ({type(error).__name__}: {error}); use "
            "`remove`, which goes through torch-pruning"
        ) from error
    compare(model, expected, example_inputs, "ModelSpeedup")
    return model


@contextlib.contextmanager
def _silent() -> Iterator[None]:
    """Keep out NNI's report on every node of the graph."""
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
