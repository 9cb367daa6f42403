"""Masks as users hand them over: NNI's nested dict or a file of it, read and held to the network."""

from __future__ import annotations

import os
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from wgates_plugin.errors import ConfigError, FileFormatError
from wgates_plugin.integrations.nni.masks import AnyMasks

GivenMasks = AnyMasks | str | os.PathLike[str]
"""{layer: {"weight": tensor, ...}}, or the path of a file that `torch.save` wrote of it."""

_FORM = '{layer: {"weight": tensor, "bias": tensor}}, as `pruner.compress()` returns it'


def read_masks(given: object, *, map_location: Any = "cpu") -> Any:
    """What was given, or what the file of this path holds; nothing in it can execute code.

    Raises:
        FileFormatError: no such file, or not one of plain tensors.
    """
    if not isinstance(given, (str, os.PathLike)):
        return given
    path = Path(given)
    if not path.is_file():
        raise FileFormatError(f"masks `{path}`: no such file; check the path")
    try:
        with _default_dicts_as_plain():
            return torch.load(path, map_location=map_location, weights_only=True)
    except Exception as error:  # a foreign file fails in many ways
        raise FileFormatError(
            f"masks `{path}`: not readable as plain tensors ({type(error).__name__}); write them "
            f"with torch.save(masks, path), masks being {_FORM}, in plain dicts"
        ) from error


def _default_dicts_as_plain() -> AbstractContextManager[Any]:
    """Let torch read the defaultdict(dict) that NNI's `compress()` returns, where it can (from 2.6)."""
    safe_globals = getattr(torch.serialization, "safe_globals", None)
    if safe_globals is None:
        return nullcontext()
    context: AbstractContextManager[Any] = safe_globals([(_plain, "collections.defaultdict"), dict])
    return context


def _plain(*_: Any) -> dict[str, Any]:
    """An empty dict in the place of a defaultdict, whose factory is not wanted."""
    return {}


def check_masks(model: nn.Module, masks: object) -> AnyMasks:
    """The masks, if they fit the network; all that does not is refused at once.

    Raises:
        ConfigError: the network is wrapped, the form is another, or a mask has no parameter, another
            shape or values.
    """
    found = dict(model.named_modules())
    problems: list[str] = []
    if any("_nni_wrapper" in module._modules for module in found.values()):
        problems.append("the network is still wrapped by NNI; call `pruner.unwrap_model()` first")
    elif not isinstance(masks, Mapping):
        problems.append(f"found {_told(masks)}, needs {_FORM}")
    else:
        for name, targets in masks.items():
            problems += _layer_problems(name, targets, found)
    if problems:
        raise ConfigError("masks", problems)
    checked: Any = masks
    return checked


def _layer_problems(name: object, targets: object, found: Mapping[str, nn.Module]) -> list[str]:
    module = found.get(name) if isinstance(name, str) else None
    if module is None:
        return [f"`{name}` is not in the network; the masks are for another one"]
    if not isinstance(targets, Mapping):
        weight = module._parameters.get("weight")
        shape = "" if weight is None else f" of shape {tuple(weight.shape)}"
        return [f'`{name}`: found {_told(targets)}, expected {{"weight": tensor{shape}}}']
    problems = []
    for key, mask in targets.items():
        if mask is None:
            continue
        if str(key).startswith("_"):
            problems.append(f"`{name}`: a mask of `{key}` removes no channel; mask weights")
            continue
        parameter = module._parameters.get(key)
        if parameter is None:
            problems.append(f"`{name}` has no parameter `{key}`")
        elif not isinstance(mask, Tensor) or mask.shape != parameter.shape:
            where = f"`{name}.{key}`: found {_told(mask)}, expected shape {tuple(parameter.shape)}"
            if not isinstance(mask, Tensor):
                problems.append(f"{where}, as a tensor")
            elif mask.dim() == 1 and mask.shape == parameter.shape[:1]:
                problems.append(f"{where}; spread it over each channel's weights")
            else:
                problems.append(f"{where}; the network changed since the masks were made")
        elif not ((mask == 0) | (mask == 1)).all():
            problems.append(f"`{name}.{key}`: the mask holds other values than 0 and 1")
    return problems


def _told(value: object) -> str:
    shape = getattr(value, "shape", None)
    if shape is not None:
        return f"a {type(value).__name__} of shape {tuple(shape)}"
    size = f" of {len(value)} entries" if isinstance(value, (list, tuple, dict)) else ""
    return f"a {type(value).__name__}{size}"
