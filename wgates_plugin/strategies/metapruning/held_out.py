"""Training images that candidates are judged on, kept out of the PruningNet's own training."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
    Subset,
)

from wgates_plugin.catalogue.tensor_loader import TensorLoader
from wgates_plugin.errors import TrainingError
from wgates_plugin.training.as_found import random_state_kept, seed_epoch
from wgates_plugin.training.evaluation import images_in, unpack

logger = logging.getLogger("wgates_plugin")

ENOUGH = 512
"""Images wanted at least, as long as they are no more than a fifth of all."""


@dataclass(frozen=True)
class Split:
    """Batches to train on, and batches to judge on."""

    train: Any
    held_out: Iterable[Any]


def split(loader: Iterable[Any], share: float, seed: int) -> Split:
    """Hold a share of a loader's training images out, the same ones for the same seed.

    At least `ENOUGH` images are held out, or a fifth where there are few (ours): a few dozen could
    not tell two candidates apart. In-memory loaders and plain torch DataLoaders are split
    by image; held-out images are neither shuffled nor, in memory, augmented. Of any other loader whole
    batches are held out by their number, which keeps images apart only if it does not shuffle; a
    line in the log says so unless it is a sequence.

    Raises:
        TrainingError: there is no second batch, or image, to hold out.
    """
    if isinstance(loader, TensorLoader):
        kept, held = _indices(len(loader.images), share, seed, loader.batch_size)
        judged = replace(_chosen(loader, held), shuffle=False, drop_last=False, flip=False, shift=0)
        return Split(_chosen(loader, kept), judged)
    if _is_plain(loader):
        count, batch_size = len(loader.dataset), loader.batch_size  # type: ignore[attr-defined]
        kept, held = _indices(count, share, seed, batch_size)
        return Split(
            _data_loader(loader, kept, drop_last=loader.drop_last),  # type: ignore[attr-defined]
            _data_loader(loader, held, drop_last=False, shuffle=False),
        )
    return _by_batches(loader, share, seed)


def _indices(count: int, share: float, seed: int, batch_size: int) -> tuple[list[int], list[int]]:
    """(kept, held out), both ascending. No last batch of one is left that was none before."""
    if count < 2:
        raise TrainingError(
            f"metapruning: {count} training images leave none to judge candidates on; give more"
        )
    held = min(max(round(share * count), min(ENOUGH, count // 5), 1), count - 1)
    if (count - held) % batch_size == 1 != count % batch_size and count - held > 1:
        held += 1
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed)).tolist()
    return sorted(order[held:]), sorted(order[:held])


def _chosen(loader: TensorLoader, indices: list[int]) -> TensorLoader:
    return replace(loader, images=loader.images[indices], targets=loader.targets[indices])


def _is_plain(loader: Any) -> bool:
    """A DataLoader whose parts are known well enough to build another one like it.

    One without a batch size was given its batches, which draw in a way of their own.
    """
    return (
        type(loader) is DataLoader
        and not isinstance(loader.dataset, IterableDataset)
        and hasattr(loader.dataset, "__len__")
        and type(loader.batch_sampler) is BatchSampler
        and loader.batch_size is not None
        and type(loader.sampler) in (RandomSampler, SequentialSampler)
        and not getattr(loader.sampler, "replacement", False)
        and getattr(loader.sampler, "_num_samples", None) is None
    )


def _data_loader(
    loader: Any, indices: list[int], *, drop_last: bool, shuffle: bool | None = None
) -> DataLoader[Any]:
    shuffled = isinstance(loader.sampler, RandomSampler) if shuffle is None else shuffle
    return DataLoader(
        Subset(loader.dataset, indices),
        batch_size=loader.batch_size,
        shuffle=shuffled,
        # A last, smaller batch is dropped only where another one is left.
        drop_last=drop_last and len(indices) >= loader.batch_size,
        num_workers=loader.num_workers,
        collate_fn=loader.collate_fn,
        pin_memory=loader.pin_memory,
        timeout=loader.timeout,
        worker_init_fn=loader.worker_init_fn,
        multiprocessing_context=loader.multiprocessing_context,
        generator=loader.generator,
        prefetch_factor=loader.prefetch_factor,
        persistent_workers=loader.persistent_workers,
    )


def _by_batches(loader: Any, share: float, seed: int) -> Split:
    try:
        count = len(loader)
    except TypeError:
        raise TrainingError(
            f"loader `{type(loader).__name__}`: its length is unknown, and candidates are judged on "
            "a part of it; give it a __len__ that counts batches"
        ) from None
    if count < 2:
        raise TrainingError(
            f"metapruning: {count} batch leaves none to judge candidates on; use smaller batches"
        )
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed)).tolist()
    chosen = frozenset(order[: max(1, round(share * count))])
    if isinstance(loader, Sequence):
        kept = [loader[i] for i in range(count) if i not in chosen]
        return Split(kept, [loader[i] for i in sorted(chosen)])
    logger.warning(
        "metapruning: loader `%s` cannot be split by image, so %d of its %d batches are held out by "
        "their number; if it shuffles, the PruningNet trains on images it is judged on. Use a torch "
        "DataLoader over a data set with a length",
        type(loader).__name__,
        len(chosen),
        count,
    )
    kept_numbers = frozenset(range(count)) - chosen
    return Split(_Part(loader, kept_numbers), gathered(_Part(loader, chosen), seed))


class _Part:
    """The batches of a loader with these numbers; what draws their order is where the loader has it."""

    def __init__(self, loader: Any, numbers: frozenset[int]) -> None:
        self.loader, self.numbers = loader, numbers
        self.sampler = getattr(loader, "sampler", None)
        self.batch_sampler = getattr(loader, "batch_sampler", None)
        self.generator = getattr(loader, "generator", None)

    def __len__(self) -> int:
        return len(self.numbers)

    def __iter__(self) -> Iterator[Any]:
        return (batch for number, batch in enumerate(self.loader) if number in self.numbers)


def gathered(loader: Any, seed: int, images: int | None = None) -> list[Any]:
    """The batches of a loader, the same at every call, up to about so many images."""
    seen, found = 0, []
    with random_state_kept(torch.device("cpu"), loader):
        seed_epoch(seed, 0, torch.device("cpu"), loader)
        for batch in loader:
            found.append(batch)
            seen += images_in(unpack(batch)[0])
            if images is not None and seen >= images:
                break
    return found
