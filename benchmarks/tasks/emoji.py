"""Emoji pictograms: small RGB drawings in nine categories, from two npm packages. No photos.

`python -m benchmarks.tasks.emoji --fetch` brings them; recipes name `benchmarks.tasks.emoji:data`.
"""

from __future__ import annotations

import argparse
import hashlib
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.tasks.emoji_packages import COMMAND, SHA512, Drawing, drawings, fetch
from wgates_plugin.catalogue import Data, TensorLoader
from wgates_plugin.catalogue.base import chosen_indices
from wgates_plugin.catalogue.image_folder import IMAGENET_MEAN, IMAGENET_STD
from wgates_plugin.errors import FileFormatError, WGatesError
from wgates_plugin.latency.base import require

CATEGORIES = (
    "Activities", "Animals & Nature", "Flags", "Food & Drink", "Objects", "People & Body",
    "Smileys & Emotion", "Symbols", "Travel & Places",
)  # fmt: skip
SIDE = 64
"""Pixels of the stored images."""

VALIDATION_SHARE = 5
"""One code in so many is held out."""

DEFAULT_FOLDER = Path.home() / ".cache" / "wgates_plugin"
"""Where recipes without `data.root` look."""


def is_held_out(code: str) -> bool:
    """Whether an emoji is of the validation part, by its code alone: all its drawings are.

    Emoji that resemble each other (clock faces, professions of men and women) have codes of their
    own and may be on both sides.
    """
    digest = hashlib.sha256(code.encode()).digest()
    return int.from_bytes(digest[:8], "big") % VALIDATION_SHARE == 0


def data(
    root: Path = DEFAULT_FOLDER,
    batch_size: int = 128,
    image_size: int | None = None,
    limit: int | None = None,
    seed: int = 0,
) -> Data:
    """Both vendors' drawings on white, normalised by ImageNet's statistics as pretrained weights ask.

    Training images are mirrored, which changes no category, and shifted by a sixteenth of the side.
    The order and the augmentation follow torch's random state; `seed` chooses the images of a
    `limit`.

    Raises:
        ConfigError: the packages are not under `root`. FileFormatError: one is damaged.
        MissingExtraError: Pillow is not installed.
    """
    side = image_size or SIDE
    every = [drawing for vendor in SHA512 for drawing in drawings(root, vendor)]

    def loader(held_out: bool, chosen_by: int, **options: Any) -> TensorLoader:
        part = [drawing for drawing in every if is_held_out(drawing.code) is held_out]
        part = [part[index] for index in chosen_indices(len(part), limit, chosen_by).tolist()]
        targets = torch.tensor([_target(drawing) for drawing in part], dtype=torch.int64)
        images = _images(part, side)
        return TensorLoader(
            images, targets, batch_size, mean=IMAGENET_MEAN, std=IMAGENET_STD, **options
        )

    train = loader(False, seed, shuffle=True, drop_last=True, flip=True, shift=side // 16, fill=255)
    val = loader(True, 0)
    example = next(iter(val))[0][:1].clone()
    return Data(train, val, len(CATEGORIES), example, "emoji pictograms")


def _target(drawing: Drawing) -> int:
    if drawing.category not in CATEGORIES:
        raise FileFormatError(
            f"pictogram `{drawing.path}`: unknown category `{drawing.category}`; known: "
            f"{', '.join(CATEGORIES)}"
        )
    return CATEGORIES.index(drawing.category)


def _images(part: Sequence[Drawing], side: int) -> Tensor:
    """Images (N, 3, side, side), uint8, composited on white."""
    pillow = require("PIL.Image", extra="vision", purpose="data emoji")
    out = np.empty((len(part), side, side, 3), dtype=np.uint8)
    for index, drawing in enumerate(part):
        try:
            with pillow.open(drawing.path) as file:
                image = file.convert("RGBA")
        except (OSError, SyntaxError) as error:  # Pillow's word for a damaged PNG
            raise FileFormatError(
                f"pictogram `{drawing.path}`: cannot be read ({error}); delete the package's "
                f"folder and fetch it again: {COMMAND} FOLDER"
            ) from error
        white = pillow.new("RGBA", image.size, "white")
        flat = pillow.alpha_composite(white, image).convert("RGB")
        if flat.size != (side, side):
            flat = flat.resize((side, side), pillow.Resampling.BILINEAR)  # with antialiasing
        out[index] = np.asarray(flat)
    return torch.from_numpy(out).permute(0, 3, 1, 2).contiguous()


def counts(root: Path) -> dict[str, tuple[int, int]]:
    """Training and validation images of every category."""
    every = [drawing for vendor in SHA512 for drawing in drawings(root, vendor)]
    found = Counter((drawing.category, is_held_out(drawing.code)) for drawing in every)
    return {name: (found[name, False], found[name, True]) for name in CATEGORIES}


def main(argv: Sequence[str]) -> int:
    options = argparse.ArgumentParser(
        prog="python -m benchmarks.tasks.emoji", description=(__doc__ or "").split("\n")[0]
    )
    folder: dict[str, Any] = {"nargs": "?", "type": Path, "const": DEFAULT_FOLDER}
    wanted = options.add_mutually_exclusive_group(required=True)
    wanted.add_argument("--fetch", metavar="FOLDER", **folder, help="fetch, then count")
    wanted.add_argument("--count", metavar="FOLDER", **folder, help="images per category")
    arguments = options.parse_args(argv)
    place = arguments.fetch or arguments.count
    try:
        if arguments.fetch:
            fetch(place)
        found = counts(place)
    except WGatesError as error:
        print(error, file=sys.stderr)
        return 1
    for name, (train, val) in found.items():
        print(f"{name.ljust(18)} {train:5d} {val:5d}")
    train, val = map(sum, zip(*found.values(), strict=True))
    print(f"{'training, held out'.ljust(18)} {train:5d} {val:5d}, at {place}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
