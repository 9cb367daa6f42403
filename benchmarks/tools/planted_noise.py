"""A network with useless filters that magnitude cannot find, planted while it learns.

A third of the filters of each convolution are planted: Gaussian noise of the size of another filter of
their layer, with the BatchNorm scale and shift of that filter. While the network learns, their feature
maps come from another image of the batch, so that they say nothing about the image at hand and all
readers learn to cope without them. In the finished network they are ordinary filters again, whose maps
belong to the image. Neither the size of a planted filter nor its BatchNorm scale tells it from the
others, for both are copied; that it is useless is checked by closing all planted filters.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from wgates_plugin.catalogue import Data
from wgates_plugin.training import Trainer, TrainingSettings, recalibrate_batchnorm

WIDTHS = (24, 36, 48, 60)
SHARE = 1 / 3


class Convolutions(nn.Module):
    """Four convolutions with BatchNorm, pooled in between, and a linear classifier."""

    def __init__(self, classes: int, in_channels: int = 1) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for index, width in enumerate(WIDTHS):
            layers += [nn.Conv2d(in_channels, width, 3, padding=1, bias=False)]
            layers += [nn.BatchNorm2d(width), nn.ReLU()]
            layers += [nn.MaxPool2d(2)] if index < 2 else []
            in_channels = width
        self.features = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.classifier = nn.Linear(in_channels, classes)

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.classifier(self.features(images))
        return logits


@dataclass(frozen=True)
class Planted:
    """The planted filters of one convolution.

    Attributes:
        mask: (C_out,) booleans, true where planted. like: (P,) filter that each one takes after.
        noise: (P, C_in, k, k), of unit L1 norm each.
    """

    convolution: nn.Conv2d
    norm: nn.BatchNorm2d
    mask: Tensor
    like: Tensor
    noise: Tensor

    @classmethod
    def choose(
        cls, convolution: nn.Conv2d, norm: nn.BatchNorm2d, draws: torch.Generator
    ) -> Planted:
        channels = convolution.out_channels
        count = round(SHARE * channels)
        order = torch.randperm(channels, generator=draws)
        mask = torch.zeros(channels, dtype=torch.bool)
        mask[order[:count]] = True
        like = order[count:][torch.randint(channels - count, (count,), generator=draws)]
        noise = torch.randn((count, *convolution.weight.shape[1:]), generator=draws)
        noise /= noise.flatten(1).abs().sum(1).view(-1, 1, 1, 1)
        return cls(convolution, norm, mask, like, noise)

    @torch.no_grad()
    def follow(self) -> None:
        """Take size, scale and shift from the filters they take after, as these are now."""
        weight = self.convolution.weight
        size = weight[self.like].flatten(1).abs().sum(1)
        weight[self.mask] = self.noise * size.view(-1, 1, 1, 1)
        for values in (self.norm.weight, self.norm.bias):
            values[self.mask] = values[self.like]

    def disconnect(self, _: nn.Module, __: object, output: Tensor) -> Tensor:
        """Maps of planted filters (B, C, H, W) go to another image; batch statistics stay."""
        shift = int(torch.randint(1, len(output), ()))
        return torch.where(self.mask.view(-1, 1, 1), output.detach().roll(shift, 0), output)


def train_planted(
    data: Data, training: TrainingSettings, seed: int
) -> tuple[Convolutions, dict[str, Tensor]]:
    """The trained network, and convolution name -> (C_out,) booleans, true where planted."""
    assert data.classes is not None
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = Convolutions(data.classes)
    draws = torch.Generator().manual_seed(seed)
    modules = dict(network.named_modules())
    planted = {}
    for name, module in modules.items():
        if isinstance(module, nn.Conv2d):
            parent, _, place = name.rpartition(".")
            norm = modules[f"{parent}.{int(place) + 1}"]
            assert isinstance(norm, nn.BatchNorm2d)
            planted[name] = Planted.choose(module, norm, draws)

    def follow(*_: object) -> None:
        for one in planted.values():
            one.follow()

    handles = [one.convolution.register_forward_hook(one.disconnect) for one in planted.values()]
    trainer = Trainer(network, data.train_loader, training, seed=seed, label="planted")
    trainer.run(before_forward=follow, progress=False)
    follow()
    for handle in handles:
        handle.remove()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        recalibrate_batchnorm(network, data.train_loader, images=2048)
    return network.eval(), {name: one.mask for name, one in planted.items()}
