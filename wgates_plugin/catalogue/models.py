"""Networks by name: built in, torchvision's, timm's, or a factory of the user's."""

from __future__ import annotations

import difflib
import pickle
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from wgates_plugin.catalogue.factories import accepted, is_factory_name, load_factory
from wgates_plugin.catalogue.networks import DigitsResNet, MobileNetSmall, ResNetSmall
from wgates_plugin.catalogue.torchvision_import import import_torchvision
from wgates_plugin.errors import ConfigError, FileFormatError, MissingExtraError, first_line
from wgates_plugin.files import load_tensors
from wgates_plugin.latency.artefacts import looks_like_path

MODELS: dict[str, Callable[..., nn.Module]] = {
    "resnet_small": ResNetSmall,
    "mobilenet_small": MobileNetSmall,
    "digits_resnet": DigitsResNet,
}

_TORCHVISION = re.compile(
    r"(alexnet|convnext_|densenet\d|efficientnet_|googlenet|inception_v3|maxvit_t|mnasnet\d"
    r"|mobilenet_v[23]|regnet_|resnet\d|resnext\d|shufflenet_v2|squeezenet\d|swin_|vgg\d|vit_"
    r"|wide_resnet\d)"
)
"""Beginnings of torchvision's names, for where it is not installed and cannot be asked."""


def load_model(
    name: str,
    *,
    classes: int | None = None,
    in_channels: int = 3,
    weights: str | Path | None = None,
    options: dict[str, Any] | None = None,
) -> nn.Module:
    """The network `name`, in train mode, randomly initialised or with `weights` from a file.

    `name`: a key of `MODELS`, a torchvision classification model ("resnet18"), "timm:NAME", or
    "package.module:factory" (called with those of classes and in_channels that it takes, and all
    options). `options` are further keyword arguments of the network's constructor. For
    torchvision models with another number of input channels than 3, the first convolution is
    replaced. `weights`: a .safetensors file or a plain state dict saved by torch.save; nothing
    in it is executed.

    Raises:
        ConfigError: unknown name (close matches are listed), missing number of classes, or
            options that the network refuses.
        FileFormatError: the weights are unreadable or do not fit.
        MissingExtraError: torchvision or timm is needed and not installed.

    >>> sum(p.numel() for p in load_model("digits_resnet", classes=10, in_channels=1).parameters())
    229482
    """
    given = dict(options or {})
    if looks_like_path(name):
        raise ConfigError(
            f"model `{name}`",
            [
                "looks like a file, needs a name: built in, torchvision, timm:NAME or "
                "package.module:factory; weights go into `weights`"
            ],
        )
    if is_factory_name(name) and not name.startswith("timm:"):
        factory = load_factory(name)
        offered = {"in_channels": in_channels}
        if classes is not None:
            offered["classes"] = classes
        network = _construct(name, factory, {**accepted(factory, offered), **given})
        if not isinstance(network, nn.Module):
            raise ConfigError(
                f"model `{name}`",
                [f"the factory returned {type(network).__name__}, needed a torch.nn.Module"],
            )
    elif classes is None:
        raise ConfigError(
            f"model `{name}`",
            [
                "the number of classes is unknown; pass classes=, or let your data factory return "
                "`wgates_plugin.catalogue.Data(..., classes=N, ...)`"
            ],
        )
    elif name in MODELS:
        arguments = {"classes": classes, "in_channels": in_channels, **given}
        network = _construct(name, MODELS[name], arguments)
    elif name.startswith("timm:"):
        network = _timm(name, classes, in_channels, given)
    else:
        network = _torchvision(name, classes, in_channels, given)
    if weights is not None:
        _load_weights(network, Path(weights).expanduser())
    return network


def _construct(name: str, build: Callable[..., Any], arguments: dict[str, Any]) -> Any:
    try:
        return build(**arguments)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"model `{name}`", [f"it cannot be built: {error}"]) from error


def _unknown(name: str, known: list[str]) -> ConfigError:
    close = difflib.get_close_matches(name, known, n=5, cutoff=0.5)
    hint = f"did you mean {', '.join(close)}?" if close else f"built in: {', '.join(MODELS)}."
    return ConfigError(
        f"model `{name}`",
        [
            f"unknown name; {hint} Other forms: a torchvision classification model, timm:NAME, "
            "package.module:factory"
        ],
    )


def _torchvision(name: str, classes: int, in_channels: int, options: dict[str, Any]) -> nn.Module:
    try:
        models = import_torchvision().models
    except MissingExtraError as error:
        raise ConfigError(f"model `{name}`", [without_torchvision(name, error)]) from error
    known = models.list_models(module=models)
    if name not in known:
        raise _unknown(name, [*MODELS, *known])
    arguments = {"weights": None, "num_classes": classes, **options}
    network: nn.Module = _construct(name, lambda **kw: models.get_model(name, **kw), arguments)
    if in_channels != 3:
        _replace_stem(network, in_channels)
    return network


def without_torchvision(name: str, error: MissingExtraError) -> str:
    """What to say of a name that is not built in where torchvision is not installed."""
    if _TORCHVISION.match(name):
        return f"is a torchvision model by its name; {error}"
    close = difflib.get_close_matches(name, list(MODELS), n=3)
    hint = f"; close to it: {', '.join(close)}" if close else ""
    return f"no built-in name ({', '.join(MODELS)}){hint}. Other names need torchvision: {error}"


def _replace_stem(network: nn.Module, in_channels: int) -> None:
    for path, module in network.named_modules():
        if isinstance(module, nn.Conv2d):
            parent = network.get_submodule(path.rpartition(".")[0])
            stem = nn.Conv2d(
                in_channels,
                module.out_channels,
                module.kernel_size,  # type: ignore[arg-type]
                module.stride,  # type: ignore[arg-type]
                module.padding,  # type: ignore[arg-type]
                bias=module.bias is not None,
            )
            setattr(parent, path.rpartition(".")[2], stem)
            return


def _timm(name: str, classes: int, in_channels: int, options: dict[str, Any]) -> nn.Module:
    import_torchvision()
    try:
        import timm
    except ImportError as error:
        raise MissingExtraError("timm", "vision", f"model `{name}`") from error
    short = name.removeprefix("timm:")
    if not timm.is_model(short):
        raise _unknown(name, [f"timm:{known}" for known in timm.list_models()])
    arguments = {"pretrained": False, "num_classes": classes, "in_chans": in_channels, **options}
    network: nn.Module = _construct(name, lambda **kw: timm.create_model(short, **kw), arguments)
    return network


def _load_weights(network: nn.Module, path: Path) -> None:
    if path.suffix == ".safetensors":
        state: Any = load_tensors(path, kind="weights")
    else:
        try:
            state = torch.load(path, map_location="cpu", weights_only=True)
        except FileNotFoundError:
            raise FileFormatError(f"weights `{path}`: no such file; check the path") from None
        except OSError as error:
            raise FileFormatError(
                f"weights `{path}`: cannot be read ({error}); check the path"
            ) from error
        except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError) as error:
            raise FileFormatError(
                f"weights `{path}`: not readable as a plain state dict ({first_line(error)}); save "
                "the network's state_dict() as safetensors or with torch.save"
            ) from error
    if isinstance(state, dict) and len(state) and not _is_state(state):
        state = next(
            (state[key] for key in ("state_dict", "model", "model_state_dict") if key in state),
            state,
        )
    if not isinstance(state, dict) or not _is_state(state):
        raise FileFormatError(
            f"weights `{path}`: holds {type(state).__name__}, needed a state dict (name -> tensor)"
        )
    try:
        network.load_state_dict(state)
    except RuntimeError as error:
        lines = [line.strip() for line in str(error).splitlines()[1:4]]
        raise FileFormatError(
            f"weights `{path}`: do not fit `{type(network).__name__}`: {' '.join(lines)[:600]}; "
            "check the model's name, options and number of classes"
        ) from error


def _is_state(state: dict[Any, Any]) -> bool:
    return all(isinstance(value, Tensor) for value in state.values())
