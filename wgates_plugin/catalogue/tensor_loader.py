"""A loader over images that fit in memory: batches are slices, augmentation works on whole batches.

One process, no workers: for images of this size, worker processes cost more than they save.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional


@dataclass(frozen=True, eq=False)
class TensorLoader:
    """Batches (images (B, C, H, W) float32, targets (B,) int64) of in-memory images.

    `images` (N, C, H, W) are kept as uint8 and normalised per batch: (value / 255 - mean) / std,
    per channel. With `image_size` batches are then resized bilinearly to squares of that side.
    `shift` pads with `fill` (black) and crops at random, by up to so many pixels each way; `flip`
    mirrors each image with probability 1/2. Both act before normalisation.

    A shuffled loader draws one number from torch's global random state per pass, and everything
    else from that number. With `drop_last` a last, smaller batch is left out, unless it is the
    only one.
    """

    images: Tensor
    targets: Tensor
    batch_size: int
    mean: tuple[float, ...] = (0.0,)
    std: tuple[float, ...] = (1.0,)
    shuffle: bool = False
    drop_last: bool = False
    flip: bool = False
    shift: int = 0
    fill: int = 0
    image_size: int | None = None
    rank: int = 0
    world_size: int = 1

    @property
    def size(self) -> int:
        """Number of images of this process. None is left for a batch of its own, which a BatchNorm cannot
        train on, unless the whole has such a batch too."""
        whole = len(self.images)
        size = whole // self.world_size
        alone = size > 1 and size % self.batch_size == 1 != whole % self.batch_size
        return size - alone

    def __len__(self) -> int:
        if self.drop_last and self.size >= self.batch_size:
            return self.size // self.batch_size
        return math.ceil(self.size / self.batch_size)

    def shard(self, rank: int, world: int) -> TensorLoader:
        """The part of process `rank` of `world`: every world-th sample of the same permutation.

        Parts are of equal length, so up to 2 * world - 1 samples are left out of each pass.
        """
        return replace(self, rank=rank, world_size=world)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        draws = torch.Generator()
        order = torch.arange(len(self.images))
        if self.shuffle:
            seed = int(torch.randint(2**62, ()))
            order = torch.randperm(len(self.images), generator=draws.manual_seed(seed))
            draws.manual_seed(seed + 1 + self.rank)
        order = order[self.rank :: self.world_size][: self.size]
        shape = (1, -1, 1, 1)
        scale = (1 / (255 * torch.tensor(self.std))).view(shape)
        offset = (-torch.tensor(self.mean) / torch.tensor(self.std)).view(shape)
        for index in range(len(self)):
            chosen = order[index * self.batch_size : (index + 1) * self.batch_size]
            images = augment(
                self.images[chosen], draws, flip=self.flip, shift=self.shift, fill=self.fill
            )
            batch = images.float().mul_(scale).add_(offset)
            side = self.image_size
            if side is not None and batch.shape[-2:] != (side, side):
                batch = functional.interpolate(
                    batch, size=(side, side), mode="bilinear", align_corners=False, antialias=True
                )
            yield batch, self.targets[chosen]


def augment(
    images: Tensor, generator: torch.Generator, *, flip: bool, shift: int, fill: int = 0
) -> Tensor:
    """Random mirror and shifted crop of each image (B, C, H, W); `fill` comes in at the edges."""
    count, _, height, width = images.shape
    if flip:
        mirrored = torch.rand(count, generator=generator) < 0.5
        images = torch.where(mirrored.view(-1, 1, 1, 1), images.flip(3), images)
    if shift:
        padded = functional.pad(images, (shift, shift, shift, shift), value=fill)
        top, left = torch.randint(2 * shift + 1, (2, count, 1), generator=generator)
        rows = (top + torch.arange(height)).view(count, 1, height, 1)
        columns = (left + torch.arange(width)).view(count, 1, 1, width)
        batch = torch.arange(count).view(count, 1, 1, 1)
        channels = torch.arange(images.shape[1]).view(1, -1, 1, 1)
        images = padded[batch, channels, rows, columns]  # (B, C, H + 2s, W + 2s) -> (B, C, H, W)
    return images
