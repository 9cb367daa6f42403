"""Images in folders, one per class: PATH/train/CLASS/* and PATH/val/CLASS/*."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset, Subset

from wgates_plugin.catalogue.base import Data, DataRequest, chosen_indices
from wgates_plugin.catalogue.torchvision_import import import_torchvision
from wgates_plugin.errors import ConfigError, FileFormatError, first_line

# Usual per-channel statistics of ImageNet's training images, as torchvision's weights expect.
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def image_folder(request: DataRequest) -> Data:
    """torchvision's ImageFolder under train/ and val/, with ImageNet's usual transforms.

    Files whose name begins with a dot, such as those that macOS leaves beside others, are no images.

    Raises:
        ConfigError: folders that do not fit. FileFormatError, now or from the loaders: an image cannot be
            read.
    """
    import_torchvision()
    from torchvision import transforms
    from torchvision.datasets import ImageFolder

    path = Path(request.name.removeprefix("folder:")).expanduser()
    missing = [str(path / part) for part in ("train", "val") if not (path / part).is_dir()]
    if missing:
        raise ConfigError(
            f"data `{request.name}`",
            [
                f"no folder `{item}`; needed PATH/train/CLASS/* and PATH/val/CLASS/*"
                for item in missing
            ],
        )
    side = request.image_size or 224
    finish = [transforms.ToTensor(), transforms.Normalize(IMAGENET_MEAN, IMAGENET_STD)]
    crops: dict[str, list[Any]] = {
        "train": [transforms.RandomResizedCrop(side), transforms.RandomHorizontalFlip()],
        "val": [transforms.Resize(round(side * 256 / 224)), transforms.CenterCrop(side)],
    }
    try:
        sets = {
            part: ImageFolder(
                str(path / part),
                transforms.Compose([*crops[part], *finish]),
                loader=_read,
                is_valid_file=_is_image,
            )
            for part in ("train", "val")
        }
    except FileNotFoundError as error:
        raise ConfigError(f"data `{request.name}`", [str(error)]) from error
    if sets["train"].classes != sets["val"].classes:
        odd = sorted(set(sets["train"].classes) ^ set(sets["val"].classes))
        raise ConfigError(
            f"data `{request.name}`",
            [f"train and val differ in classes ({', '.join(odd[:5])}); rename or add folders"],
        )

    def loader(part: str, seed: int) -> DataLoader[Any]:
        dataset: Dataset[Any] = sets[part]
        chosen = chosen_indices(len(sets[part]), request.limit, seed).tolist()
        # Starting worker processes takes longer than reading a small folder.
        workers = min(4, os.cpu_count() or 1) if len(chosen) >= 1000 else 0
        is_train = part == "train"
        return DataLoader(
            Subset(dataset, chosen),
            batch_size=request.batch_size,
            shuffle=is_train,
            drop_last=is_train and len(chosen) >= request.batch_size,
            num_workers=workers,
            pin_memory=torch.cuda.is_available(),
        )

    example = sets["val"][0][0].unsqueeze(0)
    classes = len(sets["train"].classes)
    return Data(loader("train", request.seed), loader("val", 0), classes, example, request.name)


def _is_image(path: str) -> bool:
    from torchvision.datasets.folder import is_image_file

    return is_image_file(path) and not Path(path).name.startswith(".")


def _read(path: str) -> Any:
    from torchvision.datasets.folder import default_loader

    try:
        return default_loader(path)
    except (OSError, SyntaxError) as error:  # the latter of a broken PNG
        access = isinstance(error, OSError) and error.errno is not None
        mend = "see that it can be reached" if access else "delete or replace it"
        raise FileFormatError(
            f"image `{path}`: cannot be read ({first_line(error)}); {mend}"
        ) from error
