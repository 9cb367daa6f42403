"""Data sets that fit in memory: digits, Fashion-MNIST, CIFAR."""

from __future__ import annotations

import gzip
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from wgates_plugin.catalogue.base import Data, DataRequest, chosen_indices
from wgates_plugin.catalogue.tensor_loader import TensorLoader
from wgates_plugin.catalogue.torchvision_import import import_torchvision
from wgates_plugin.errors import ConfigError, FileFormatError, MissingExtraError

DEBIAN_FASHION_MNIST = Path("/usr/share/datasets/fashion-mnist")
"""Where Debian's package `dataset-fashion-mnist` puts its files."""


def in_memory(
    request: DataRequest,
    train: tuple[Tensor, Tensor],
    val: tuple[Tensor, Tensor],
    *,
    classes: int,
    flip: bool,
    shift: int,
) -> Data:
    """Loaders over uint8 images (N, C, H, W); mean and std are the training images'."""
    # Every image of the split counts, whatever the limit: a subset must not change the scale.
    values = train[0].transpose(0, 1).flatten(1)
    levels = torch.arange(256, dtype=torch.float64) / 255
    counts = torch.stack([torch.bincount(channel, minlength=256) for channel in values]).double()
    counts /= counts.sum(1, keepdim=True)  # (C, 256)
    mean = counts @ levels
    std = (counts @ levels.square() - mean.square()).sqrt()

    def loader(part: tuple[Tensor, Tensor], seed: int, **options: Any) -> TensorLoader:
        index = chosen_indices(len(part[0]), request.limit, seed)
        return TensorLoader(
            part[0][index],
            part[1][index],
            request.batch_size,
            mean=tuple(mean.tolist()),
            std=tuple(std.tolist()),
            image_size=request.image_size,
            **options,
        )

    train_loader = loader(train, request.seed, shuffle=True, drop_last=True, flip=flip, shift=shift)
    val_loader = loader(val, 0)
    example = next(iter(val_loader))[0][:1].clone()
    return Data(train_loader, val_loader, classes, example, request.name)


def digits(request: DataRequest) -> Data:
    """1,797 real handwritten digits, 8x8 grey (scikit-learn's copy of the UCI test set)."""
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise MissingExtraError("scikit-learn", "digits", "data `digits`") from error
    bunch = load_digits()
    # 17 grey levels, 0..16; 15 * 16 = 240 keeps them whole numbers.
    images = torch.from_numpy((bunch.images * 15).astype(np.uint8)).unsqueeze(1)
    targets = torch.from_numpy(bunch.target.astype(np.int64))
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    cut = len(images) * 3 // 4
    train, val = order[:cut], order[cut:]
    return in_memory(
        request,
        (images[train], targets[train]),
        (images[val], targets[val]),
        classes=10,
        flip=False,
        shift=1,
    )


def read_idx(path: Path) -> Tensor:
    """A gzipped idx file of bytes (LeCun's format: magic 0, 0, 8, rank, then sizes) as uint8.

    Raises:
        FileFormatError: the file is cut off or of another kind.
    """
    try:
        raw = gzip.decompress(path.read_bytes())
    except (OSError, EOFError, zlib.error) as error:
        raise FileFormatError(
            f"data file `{path}`: cannot be unpacked ({error}); install it again"
        ) from error
    rank = raw[3] if len(raw) > 3 else 0
    sizes = np.frombuffer(raw[4 : 4 + 4 * rank], dtype=">u4").tolist()
    body = np.frombuffer(raw, dtype=np.uint8, offset=min(len(raw), 4 + 4 * rank))
    if raw[:3] != b"\0\0\x08" or rank == 0 or len(sizes) != rank or body.size != np.prod(sizes):
        raise FileFormatError(f"data file `{path}`: no idx file of bytes; install it again")
    return torch.from_numpy(body.reshape(sizes).copy())


def fashion_mnist(request: DataRequest) -> Data:
    """70,000 grey 28x28 images of clothes: Debian's files if installed, else a download.

    A root that is given holds the four files itself, or is torchvision's folder of them.
    """
    folder = request.root if request.root_given else DEBIAN_FASHION_MNIST
    parts = []
    for short, is_train in (("train", True), ("t10k", False)):
        images_file = folder / f"{short}-images-idx3-ubyte.gz"
        labels_file = folder / f"{short}-labels-idx1-ubyte.gz"
        if images_file.exists() and labels_file.exists():
            images, targets = read_idx(images_file), read_idx(labels_file).long()
        else:
            dataset = _download(request, "FashionMNIST", train=is_train)
            images, targets = dataset.data, dataset.targets
        parts.append((images.unsqueeze(1), targets))
    return in_memory(request, parts[0], parts[1], classes=10, flip=True, shift=2)


def cifar(request: DataRequest) -> Data:
    """CIFAR-10 or -100, 32x32 colour. torchvision checks the files' digests before it reads."""
    class_name, classes = {"cifar10": ("CIFAR10", 10), "cifar100": ("CIFAR100", 100)}[request.name]
    parts = []
    for is_train in (True, False):
        dataset = _download(request, class_name, train=is_train)
        images = torch.from_numpy(dataset.data).permute(0, 3, 1, 2).contiguous()
        parts.append((images, torch.tensor(dataset.targets)))
    return in_memory(request, parts[0], parts[1], classes=classes, flip=True, shift=4)


def _download(request: DataRequest, class_name: str, *, train: bool) -> Any:
    try:
        import_torchvision()
    except MissingExtraError as error:
        if not request.root_given:
            raise
        raise ConfigError(
            f"data `{request.name}`", [f"no usable copy under {request.root}; {error}"]
        ) from error
    from torchvision import datasets

    try:
        return getattr(datasets, class_name)(str(request.root), train=train, download=True)
    except (OSError, RuntimeError) as error:
        raise ConfigError(
            f"data `{request.name}`",
            [
                f"no usable copy under {request.root} and the download failed ({error}); check "
                "the network, or pass root= with torchvision's folder of this data set"
            ],
        ) from error
