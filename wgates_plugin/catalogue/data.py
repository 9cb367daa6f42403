"""Data sets by name: the table, and what a user names themselves."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from torch import Tensor

from wgates_plugin.catalogue.base import Data, DataRequest
from wgates_plugin.catalogue.factories import accepted, is_factory_name, load_factory
from wgates_plugin.catalogue.image_folder import image_folder
from wgates_plugin.catalogue.in_memory import cifar, digits, fashion_mnist
from wgates_plugin.errors import ConfigError

DATA: dict[str, Callable[[DataRequest], Data]] = {
    "digits": digits,
    "fashion-mnist": fashion_mnist,
    "cifar10": cifar,
    "cifar100": cifar,
}
WITHOUT_FILES = ("digits",)
"""Those that come with a library."""

BATCH_SIZE = 128


def load_data(
    name_or_path: str,
    *,
    batch_size: int = BATCH_SIZE,
    image_size: int | None = None,
    limit: int | None = None,
    seed: int = 0,
    root: str | Path | None = None,
) -> Data:
    """The data set `name_or_path`.

    A key of `DATA`, "folder:PATH" (PATH/train/CLASS/*.jpg and PATH/val/CLASS/*.jpg), or
    "package.module:factory": a callable that returns `Data` or the tuple (train_loader,
    val_loader, example_inputs), called with those of batch_size, image_size, limit, seed and root
    that it takes.

    `image_size` resizes images to squares (default: as they are; 224 for folders). `limit` takes
    at most so many training and so many validation images; `seed` chooses those training images.
    Splits never depend on the seed, nor does shuffling, which follows torch's random state.
    `root` is where the files are, or are downloaded to: `~/.cache/wgates_plugin` by default, where
    fashion-mnist is taken from Debian's package if that is installed. No other folder is read when a
    root is given.

    Raises:
        ConfigError: unknown name, an option out of range or without effect, or data that cannot be had.
        FileFormatError: a data file is corrupt. MissingExtraError: a library is not installed.
    """
    numbers = {"batch_size": batch_size, "image_size": image_size, "limit": limit}
    problems = [
        f"{key} is {value!r}, needs a whole number of 1 or more"
        for key, value in numbers.items()
        if value is not None and (not isinstance(value, int) or value < 1)
    ]
    if problems:
        raise ConfigError(f"data `{name_or_path}`", problems)
    place = (
        Path(root).expanduser() if root is not None else Path.home() / ".cache" / "wgates_plugin"
    )
    given = root is not None
    request = DataRequest(name_or_path, batch_size, image_size, limit, seed, place, given)
    asked = {
        **numbers,
        "batch_size": None if batch_size == BATCH_SIZE else batch_size,
        "root": root,
    }
    _refuse_unused(name_or_path, {key for key, value in asked.items() if value is not None})
    if name_or_path in DATA:
        return DATA[name_or_path](request)
    if name_or_path.startswith("folder:"):
        return image_folder(request)
    if is_factory_name(name_or_path):
        return _factory(request)
    raise ConfigError(
        f"data `{name_or_path}`",
        [f"unknown name; choose from {', '.join(DATA)}, folder:PATH, package.module:factory"],
    )


def _refuse_unused(name: str, given: set[str]) -> None:
    """Raises ConfigError for options that would change nothing."""
    unused: set[str] = set()
    if name in WITHOUT_FILES or name.startswith("folder:"):
        unused = given & {"root"}
        hint = "its files are not taken from there; leave it out"
    elif name not in DATA and is_factory_name(name):
        unused = given - set(accepted(load_factory(name), dict.fromkeys(given)))
        hint = "the factory has no such parameter; leave it out, or let the factory take it"
    if unused:
        raise ConfigError(f"data `{name}`", [f"{key}: {hint}" for key in sorted(unused)])


def _factory(request: DataRequest) -> Data:
    factory = load_factory(request.name)
    offered = {
        "batch_size": request.batch_size,
        "image_size": request.image_size,
        "limit": request.limit,
        "seed": request.seed,
        "root": request.root,
    }
    made = factory(**accepted(factory, offered))
    if isinstance(made, Data):
        return made
    if isinstance(made, (tuple, list)) and len(made) == 3:
        train_loader, val_loader, example = made
        inputs = tuple(example) if isinstance(example, (tuple, list)) else (example,)
        if inputs and all(isinstance(item, Tensor) for item in inputs):
            example_input = inputs if len(inputs) > 1 else inputs[0]
            return Data(train_loader, val_loader, None, example_input, request.name)
    raise ConfigError(
        f"data `{request.name}`",
        [
            f"the factory returned {type(made).__name__}, needed Data or the tuple (train_loader, "
            "val_loader, example_inputs) with tensors as example inputs"
        ],
    )
