"""Small convolutional networks for the built-in data sets; plain torch modules, easy to prune."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn
from torch.nn import functional


def _conv_bn(into: int, out: int, *, size: int = 3, stride: int = 1, groups: int = 1) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(into, out, size, stride, padding=size // 2, groups=groups, bias=False),
        nn.BatchNorm2d(out),
    )


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut (He et al. 2016, "Deep Residual Learning", fig. 5)."""

    def __init__(self, in_channels: int, out_channels: int, *, stride: int = 1) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(out_channels)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or in_channels != out_channels:
            self.shortcut = _conv_bn(in_channels, out_channels, size=1, stride=stride)

    def forward(self, inputs: Tensor) -> Tensor:
        out = functional.relu(self.bn1(self.conv1(inputs)))
        return functional.relu(self.bn2(self.conv2(out)) + self.shortcut(inputs))


class ResNetSmall(nn.Module):
    """CIFAR-style residual network: a 3x3 stem, stages of basic blocks, average pool, linear.

    Images (N, in_channels, H, W) of any size from 8x8 on -> logits (N, classes). Every stage but
    the first halves the resolution, unless `stage_strides` says otherwise.
    """

    def __init__(
        self,
        classes: int,
        in_channels: int = 3,
        widths: Sequence[int] = (32, 64, 128),
        blocks: Sequence[int] = (1, 1, 1),
        stem_stride: int = 2,
        stage_strides: Sequence[int] | None = None,
    ) -> None:
        super().__init__()
        strides = [1] + [2] * (len(widths) - 1) if stage_strides is None else list(stage_strides)
        self.stem = nn.Conv2d(in_channels, widths[0], 3, stem_stride, padding=1, bias=False)
        self.stem_bn = nn.BatchNorm2d(widths[0])
        stages = []
        channels = widths[0]
        for width, count, stride in zip(widths, blocks, strides, strict=True):
            stage = [BasicBlock(channels, width, stride=stride)]
            stage += [BasicBlock(width, width) for _ in range(count - 1)]
            stages.append(nn.Sequential(*stage))
            channels = width
        self.stages = nn.Sequential(*stages)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.classifier = nn.Linear(channels, classes)
        _initialise(self)

    def forward(self, images: Tensor) -> Tensor:
        out = self.stages(functional.relu(self.stem_bn(self.stem(images))))
        logits: Tensor = self.classifier(self.pool(out).flatten(1))
        return logits


class DigitsResNet(ResNetSmall):
    """A `ResNetSmall` for 8x8 images: full resolution in two stages, 4x4 in the last.

    About 11 M MACs per image, so that its latency stands clear of a runtime's fixed costs.
    """

    def __init__(self, classes: int, in_channels: int = 1) -> None:
        super().__init__(
            classes,
            in_channels,
            widths=(32, 64, 64),
            blocks=(1, 2, 1),
            stem_stride=1,
            stage_strides=(1, 1, 2),
        )


class InvertedResidual(nn.Module):
    """Expand 1x1, depthwise 3x3, project 1x1 (Sandler et al. 2018, "MobileNetV2", section 3.3)."""

    def __init__(self, in_channels: int, out_channels: int, *, stride: int, expand: int) -> None:
        super().__init__()
        hidden = in_channels * expand
        layers: list[nn.Module] = []
        if expand != 1:
            layers += [_conv_bn(in_channels, hidden, size=1), nn.ReLU6()]
        layers += [_conv_bn(hidden, hidden, stride=stride, groups=hidden), nn.ReLU6()]
        self.layers = nn.Sequential(*layers, _conv_bn(hidden, out_channels, size=1))
        self.residual = stride == 1 and in_channels == out_channels

    def forward(self, inputs: Tensor) -> Tensor:
        out: Tensor = self.layers(inputs)
        return inputs + out if self.residual else out


MOBILENET_STAGES = ((1, 16, 1, 1), (4, 24, 2, 1), (4, 40, 2, 2), (4, 80, 2, 1))
"""Per stage: expansion, channels, blocks, stride of the first block."""


class MobileNetSmall(nn.Module):
    """MobileNetV2-style network for small images, such as 28x28 grey ones: about 8 M MACs.

    Images (N, in_channels, H, W) -> logits (N, classes); the stem and the third stage halve the
    resolution.
    """

    def __init__(
        self,
        classes: int,
        in_channels: int = 3,
        stages: Sequence[tuple[int, int, int, int]] = MOBILENET_STAGES,
        stem_width: int = 16,
        head_width: int = 128,
        stem_stride: int = 2,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.stem = nn.Sequential(_conv_bn(in_channels, stem_width, stride=stem_stride), nn.ReLU6())
        blocks: list[nn.Module] = []
        channels = stem_width
        for expand, width, count, stride in stages:
            for index in range(count):
                blocks.append(
                    InvertedResidual(
                        channels, width, stride=stride if index == 0 else 1, expand=expand
                    )
                )
                channels = width
        self.blocks = nn.Sequential(*blocks)
        self.head = nn.Sequential(_conv_bn(channels, head_width, size=1), nn.ReLU6())
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.dropout = nn.Dropout(dropout)
        self.classifier = nn.Linear(head_width, classes)
        _initialise(self)

    def forward(self, images: Tensor) -> Tensor:
        out = self.head(self.blocks(self.stem(images)))
        logits: Tensor = self.classifier(self.dropout(self.pool(out).flatten(1)))
        return logits


def _initialise(network: nn.Module) -> None:
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
