"""The case table: tiny networks of every shape, and torchvision's, shared by tests and benchmarks.

Each tiny factory returns a fresh network for `example()` inputs of shape (N, 3, 8, 8).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

CLASSES = 5


def example(batch: int = 2, size: int = 8, seed: int = 0) -> Tensor:
    """Random images (N, 3, size, size)."""
    return torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(seed))


def conv(inputs: int, outputs: int, kernel: int = 3, **options: Any) -> nn.Conv2d:
    options.setdefault("padding", kernel // 2)
    options.setdefault("bias", False)
    return nn.Conv2d(inputs, outputs, kernel, **options)


def conv_bn(inputs: int, outputs: int, kernel: int = 3, **options: Any) -> nn.Sequential:
    return nn.Sequential(
        conv(inputs, outputs, kernel, **options), nn.BatchNorm2d(outputs), nn.ReLU()
    )


class Head(nn.Module):
    """Global average pooling and a linear classifier."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.fc = nn.Linear(channels, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.fc(x.mean((2, 3)))
        return out


class Add(nn.Module):
    """`act(main(x) + shortcut(x))`."""

    def __init__(
        self, main: nn.Module, shortcut: nn.Module | None = None, act: nn.Module | None = None
    ) -> None:
        super().__init__()
        self.main = main
        self.shortcut = shortcut or nn.Identity()
        self.act = act or nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.act(self.main(x) + self.shortcut(x))
        return out


class Concat(nn.Module):
    """Every layer reads the concatenation of the input and all earlier layers (DenseNet)."""

    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = torch.cat([x, layer(x)], dim=1)
        return x


class SqueezeExcite(nn.Module):
    def __init__(self, channels: int, squeezed: int) -> None:
        super().__init__()
        self.reduce = nn.Conv2d(channels, squeezed, 1)
        self.expand = nn.Conv2d(squeezed, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        squeezed = torch.relu(self.reduce(x.mean((2, 3), keepdim=True)))
        return x * torch.sigmoid(self.expand(squeezed))


class SignedConcat(nn.Module):
    """Concatenated ReLU: the same channels reach the reader twice."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([torch.relu(x), torch.relu(-x)], dim=1)


class Twice(nn.Module):
    """One convolution used twice, so that its outputs are its own inputs."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = conv(channels, channels, bias=True)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.conv(torch.relu(self.conv(x))))


class Rows(nn.Module):
    """(N, C, H, W) -> (N, C, H * W), for one-dimensional convolutions."""

    def forward(self, x: Tensor) -> Tensor:
        return x.flatten(2)


class Columns(nn.Module):
    """(N, C, T) -> (N, C)."""

    def forward(self, x: Tensor) -> Tensor:
        return x.mean(2)


def bottleneck(inputs: int, inner: int, groups: int) -> nn.Sequential:
    return nn.Sequential(
        conv_bn(inputs, inner, 1),
        conv_bn(inner, inner, groups=groups),
        conv(inner, inputs, 1),
        nn.BatchNorm2d(inputs),
    )


def inverted(inputs: int, inner: int) -> nn.Sequential:
    return nn.Sequential(
        conv_bn(inputs, inner, 1),
        conv_bn(inner, inner, groups=inner),
        conv(inner, inputs, 1),
        nn.BatchNorm2d(inputs),
    )


def plain() -> nn.Module:
    return nn.Sequential(conv_bn(3, 8), conv_bn(8, 12, stride=2), Head(12))


def residual() -> nn.Module:
    main = nn.Sequential(conv_bn(8, 6), conv(6, 8), nn.BatchNorm2d(8))
    return nn.Sequential(conv_bn(3, 8), Add(main), Head(8))


def projection() -> nn.Module:
    main = nn.Sequential(conv_bn(8, 6, stride=2), conv(6, 12), nn.BatchNorm2d(12))
    short = nn.Sequential(conv(8, 12, 1, stride=2), nn.BatchNorm2d(12))
    return nn.Sequential(conv_bn(3, 8), Add(main, short), Head(12))


def depthwise() -> nn.Module:
    linear = Add(inverted(6, 12), act=nn.Identity())
    return nn.Sequential(conv_bn(3, 6), linear, conv_bn(6, 10, 1), Head(10))


def grouped() -> nn.Module:
    return nn.Sequential(conv_bn(3, 8), Add(bottleneck(8, 12, 3)), conv_bn(8, 8), Head(8))


def grouped_two_ways() -> nn.Module:
    """Convolutions in 4 and in 2 groups share one set of channels."""
    return nn.Sequential(
        conv_bn(3, 16), conv_bn(16, 16, groups=4), conv_bn(16, 16, groups=2), Head(16)
    )


def concat() -> nn.Module:
    dense = Concat(conv_bn(6, 4), conv_bn(10, 4), conv_bn(14, 4))
    return nn.Sequential(
        conv_bn(3, 6), dense, nn.BatchNorm2d(18), nn.ReLU(), conv_bn(18, 9), Head(9)
    )


def concat_depthwise() -> nn.Module:
    """A depthwise convolution over channels of two groups."""
    return nn.Sequential(
        conv_bn(3, 6), Concat(conv_bn(6, 4)), conv_bn(10, 10, groups=10), conv_bn(10, 7, 1), Head(7)
    )


def signed_concat() -> nn.Module:
    return nn.Sequential(conv_bn(3, 6), conv(6, 7), SignedConcat(), conv_bn(14, 6), Head(6))


def flattened() -> nn.Module:
    return nn.Sequential(
        conv_bn(3, 8, stride=2),
        nn.Flatten(),
        nn.Linear(8 * 16, 10),
        nn.ReLU(),
        nn.Dropout(0.5),
        nn.Linear(10, CLASSES),
    )


def biased() -> nn.Module:
    return nn.Sequential(
        conv(3, 8, bias=True), nn.Sigmoid(), conv(8, 6, bias=True), nn.Hardswish(), Head(6)
    )


def preactivation() -> nn.Module:
    def block(inputs: int, inner: int) -> nn.Sequential:
        return nn.Sequential(
            nn.BatchNorm2d(inputs),
            nn.ReLU(),
            conv(inputs, inner),
            nn.BatchNorm2d(inner),
            nn.ReLU(),
            conv(inner, inputs),
        )

    first, second = (Add(block(8, inner), act=nn.Identity()) for inner in (6, 5))
    return nn.Sequential(conv(3, 8), first, second, nn.BatchNorm2d(8), nn.ReLU(), Head(8))


def squeeze_excite() -> nn.Module:
    return nn.Sequential(conv_bn(3, 8), SqueezeExcite(8, 4), conv_bn(8, 6), Head(6))


def transposed() -> nn.Module:
    up = nn.ConvTranspose2d(6, 8, 3, stride=2, padding=1, output_padding=1)
    return nn.Sequential(conv_bn(3, 6, stride=2), up, nn.BatchNorm2d(8), nn.ReLU(), conv(8, 2, 1))


def prelu() -> nn.Module:
    return nn.Sequential(conv(3, 8), nn.PReLU(8), conv(8, 6), nn.PReLU(), Head(6))


def instance_norm() -> nn.Module:
    return nn.Sequential(
        conv(3, 8),
        nn.InstanceNorm2d(8, affine=True),
        nn.ReLU(),
        conv(8, 6),
        nn.InstanceNorm2d(6),
        nn.ReLU(),
        conv(6, 5),
        nn.InstanceNorm2d(5, affine=True, track_running_stats=True),
        conv(5, 4),
        Head(4),
    )


def plain_norms() -> nn.Module:
    """BatchNorms without an affine map or without running statistics."""
    return nn.Sequential(
        conv(3, 8),
        nn.BatchNorm2d(8, affine=False),
        nn.ReLU(),
        conv(8, 6),
        nn.BatchNorm2d(6, track_running_stats=False),
        nn.ReLU(),
        Head(6),
    )


def reused() -> nn.Module:
    return nn.Sequential(conv_bn(3, 8), Twice(8), Head(8))


def one_dimensional() -> nn.Module:
    return nn.Sequential(
        Rows(),
        nn.Conv1d(3, 8, 3, padding=1),
        nn.BatchNorm1d(8),
        nn.ReLU(),
        nn.Conv1d(8, 6, 3, groups=2),
        nn.ReLU(),
        Columns(),
        nn.Linear(6, 9),
        nn.BatchNorm1d(9),
        nn.ReLU(),
        nn.Linear(9, CLASSES),
    )


TINY: dict[str, Callable[[], nn.Module]] = {
    "plain": plain,
    "residual": residual,
    "projection": projection,
    "depthwise": depthwise,
    "grouped": grouped,
    "grouped-two-ways": grouped_two_ways,
    "concat": concat,
    "concat-depthwise": concat_depthwise,
    "signed-concat": signed_concat,
    "flattened": flattened,
    "biased": biased,
    "preactivation": preactivation,
    "squeeze-excite": squeeze_excite,
    "transposed": transposed,
    "prelu": prelu,
    "instance-norm": instance_norm,
    "plain-norms": plain_norms,
    "reused": reused,
    "one-dimensional": one_dimensional,
}

TORCHVISION = (
    "resnet18",
    "resnet34",
    "resnet50",
    "mobilenet_v2",
    "densenet121",
    "vgg16_bn",
    "efficientnet_b0",
    "regnet_x_400mf",
    "regnet_y_400mf",
    "resnext50_32x4d",
)
"""Names in `torchvision.models`; images of 64 x 64 are large enough for all of them."""


def tiny(name: str, seed: int = 0) -> nn.Module:
    """The tiny network called `name`, random in weights and statistics, in eval mode."""
    torch.manual_seed(seed)
    return randomised(TINY[name](), seed)


def torchvision_network(name: str, seed: int = 0, **options: Any) -> nn.Module:
    """The torchvision network called `name` with random weights and statistics, in eval mode."""
    from wgates_plugin.catalogue.torchvision_import import import_torchvision

    torch.manual_seed(seed)
    options = {"weights": None, "num_classes": 10, **options}
    network: nn.Module = getattr(import_torchvision().models, name)(**options)
    return randomised(network, seed)


Norm = nn.BatchNorm1d | nn.BatchNorm2d | nn.BatchNorm3d | nn.InstanceNorm2d


def randomised(network: nn.Module, seed: int) -> nn.Module:
    """Give norms a random affine map and statistics that keep activations near unit size.

    Fresh networks have zero shifts, which hide the very error that gates on producers would make,
    and outputs near zero, which hide any error. Statistics are therefore taken from random images,
    and then moved about. Returned in eval mode.
    """
    generator = torch.Generator().manual_seed(seed)

    def uniform(like: Tensor, low: float, high: float) -> Tensor:
        return torch.empty(like.shape).uniform_(low, high, generator=generator).to(like)

    norms = [module for module in network.modules() if isinstance(module, Norm)]
    with torch.no_grad():
        for norm in norms:
            if norm.affine:
                norm.weight.copy_(uniform(norm.weight, 0.5, 1.5))
                norm.bias.copy_(uniform(norm.bias, -0.5, 0.5))
        for module in network.modules():
            if isinstance(module, nn.PReLU):
                module.weight.copy_(uniform(module.weight, -0.5, 0.5))
        _take_statistics(network, norms, seed)
        for norm in norms:
            if norm.running_mean is not None and norm.running_var is not None:
                spread = norm.running_var.sqrt()
                norm.running_mean.add_(spread * uniform(spread, -0.3, 0.3))
                norm.running_var.mul_(uniform(spread, 0.7, 1.4))
    return network.eval()


def _take_statistics(network: nn.Module, norms: list[Norm], seed: int) -> None:
    """Set running statistics from one batch: momentum 1 for one pass with the norms training."""
    kept = [norm.momentum for norm in norms]
    size = 8 if sum(p.numel() for p in network.parameters()) < 50_000 else 64
    network.eval()
    for norm in norms:
        norm.train()
        norm.momentum = 1.0
    network(example(4, size, seed))
    for norm, momentum in zip(norms, kept, strict=True):
        norm.momentum = momentum
