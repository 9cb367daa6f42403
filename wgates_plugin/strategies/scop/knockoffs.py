"""Where knockoffs come from: a model fitted to the training images, or a generator of the user's."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from wgates_plugin.calling import ExampleInputs
from wgates_plugin.catalogue.factories import is_factory_name, load_factory
from wgates_plugin.errors import TrainingError
from wgates_plugin.strategies.scop.gaussian import KINDS, GaussianKnockoffs, fit_gaussian
from wgates_plugin.training.evaluation import unpack

KnockoffSource = Callable[[Tensor], Tensor]
"""Real images (N, ...) -> as many knockoffs of the same shape, in the range of the real ones."""

GAUSSIAN = {"gaussian": "image", "gaussian-pixel": "pixel"}
assert set(GAUSSIAN.values()) == set(KINDS)

_MARGIN = 0.25
"""How far beyond the real images' range a generator may go, as a share of that range."""


_LONGEST = 200
"""Characters of a generator's own error that are shown."""


class Checked:
    """A generator of the user's whose every answer is checked.

    Args:
        lowest, highest: range of the training images looked at; that of the batch at hand widens it.

    Raises:
        TrainingError: it fails, or its answer is no batch that the network could take for real.
    """

    def __init__(self, source: KnockoffSource, lowest: float, highest: float) -> None:
        self.source, self.lowest, self.highest = source, lowest, highest

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        try:
            made = self.source(images.clone())  # it may write on what it is given
        except Exception as error:
            raise TrainingError(
                f"knockoff generator: fails on a batch of shape {tuple(images.shape)} "
                f"({_in_short(error)}); it is called with one batch of real images"
            ) from error
        problem = self._problem(images, made)
        if problem:
            raise TrainingError(
                f"knockoff generator: {problem}; give a callable that turns a batch of real "
                "images into as many of the same shape, type and range"
            )
        return made.detach().to(images.device)

    def _problem(self, images: Tensor, made: Any) -> str | None:
        if not isinstance(made, Tensor):
            return f"returns {type(made).__name__}, not a tensor"
        if made.shape != images.shape:
            return f"returns shape {tuple(made.shape)}, needed {tuple(images.shape)}"
        if made.dtype != images.dtype:
            return f"returns {made.dtype}, the images are {images.dtype}"
        # One image may be its own knockoff by chance, as where a generator shuffles its batch.
        if len(images) > 1 and torch.equal(made.to(images.device), images):
            return "returns the real images themselves, which are no control group"
        if not torch.isfinite(made).all():
            return "returns values that are not finite"
        lowest, highest = float(made.min()), float(made.max())
        least = min(self.lowest, float(images.min()))
        most = max(self.highest, float(images.max()))
        spare = _MARGIN * (most - least)
        if lowest < least - spare or highest > most + spare:
            return (
                f"returns values from {lowest:.4g} to {highest:.4g}, the training images lie "
                f"between {least:.4g} and {most:.4g}: normalise them alike"
            )
        return None


def _in_short(error: Exception) -> str:
    """The first line of an error that may be of any length; the whole of it is its cause."""
    first = (str(error).strip().splitlines() or [""])[0]
    cut = first if len(first) <= _LONGEST else first[:_LONGEST] + "..."
    return f"{type(error).__name__}: {cut}" if cut else type(error).__name__


def main_images(inputs: ExampleInputs) -> Tensor:
    """The largest floating point tensor among a batch's inputs: what gets a knockoff.

    Raises:
        TrainingError: there is none.
    """
    values = inputs.values() if isinstance(inputs, dict) else inputs
    found = [
        value
        for value in (values if isinstance(inputs, (dict, tuple)) else (inputs,))
        if isinstance(value, Tensor) and value.is_floating_point() and value.dim() > 1
    ]
    if found:
        return max(found, key=Tensor.numel)
    raise TrainingError(
        "scop: no floating point tensor among a batch's inputs to make knockoffs of; SCOP compares "
        "real images with made ones, choose another strategy for other inputs"
    )


def collect_images(loader: Iterable[Any], count: int) -> Tensor:
    """The first `count` training images, or as many as there are (N, ...), on the CPU.

    Raises:
        TrainingError: fewer than two.
    """
    parts: list[Tensor] = []
    seen = 0
    for batch in loader:
        images = main_images(unpack(batch)[0]).detach().cpu()
        parts.append(images[: count - seen])
        seen += len(parts[-1])
        if seen >= count:
            break
    if seen < 2:
        raise TrainingError(
            f"scop: the training loader gave {seen} images; knockoffs need two or more"
        )
    return torch.cat(parts)


def make_source(
    knockoffs: str | KnockoffSource, images: Tensor, *, rank: int = 256
) -> KnockoffSource:
    """The source called `knockoffs`, fitted to or checked against training images (N, ...).

    Args:
        knockoffs: a key of `GAUSSIAN`, "package.module:callable", or a callable.
    """
    if isinstance(knockoffs, str) and knockoffs in GAUSSIAN:
        made: GaussianKnockoffs = fit_gaussian(images, kind=GAUSSIAN[knockoffs], rank=rank)
        return made
    source = load_factory(knockoffs) if isinstance(knockoffs, str) else knockoffs
    return Checked(source, float(images.min()), float(images.max()))


def is_source_name(name: str) -> bool:
    return name in GAUSSIAN or is_factory_name(name)
