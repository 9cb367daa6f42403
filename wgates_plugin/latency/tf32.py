"""TF32 switched off: what is called float32 multiplies in float32 on a CUDA device too.

GPUs since Ampere multiply float32 numbers with 10 bits of mantissa (TF32) where they are allowed to.
By torch's default convolutions are, matrix products are not. That is another number format, so a
latency "at float32" taken with it would be compared with ones taken without.

Torch has two ways to say it (`allow_tf32`, and from 2.9 on `fp32_precision`), and refuses to read the
one where the other was used. Whichever is in use here is set and put back.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch

_EXACT = "ieee"


def tf32_allowed() -> bool:
    """Whether torch may use TF32 for matrix products, convolutions or recurrent layers."""
    return bool(_changes())


@contextmanager
def exact_float32() -> Iterator[None]:
    """No TF32 inside; afterwards what was allowed before."""
    with ExitStack() as restoring:
        for change, restore in _changes():
            restoring.callback(restore)
            change()
        yield


_Change = tuple[Callable[[], None], Callable[[], None]]


def _changes() -> list[_Change]:
    """(what turns TF32 off, what puts it back) for everything that it is on for."""
    return _of_products() + _of_cudnn()


def _of_products() -> list[_Change]:
    products = torch.backends.cuda.matmul
    allowed = _read(lambda: products.allow_tf32)
    if allowed is None:
        return _of_new_settings(products)
    if not allowed:
        return []
    level = _read(torch.get_float32_matmul_precision)
    if level in ("high", "medium"):  # the flag alone would not bring "medium" back
        return [
            (
                lambda: torch.set_float32_matmul_precision("highest"),
                lambda: torch.set_float32_matmul_precision(level),
            )
        ]
    return [_switch(products, "allow_tf32", off=False, on=True)]


def _of_cudnn() -> list[_Change]:
    cudnn = torch.backends.cudnn
    allowed = _read(lambda: cudnn.allow_tf32)
    if allowed is None:
        kinds = [getattr(cudnn, name, None) for name in ("conv", "rnn")]
        return [change for kind in kinds if kind for change in _of_new_settings(kind)]
    return [_switch(cudnn, "allow_tf32", off=False, on=True)] if allowed else []


def _of_new_settings(backend: Any) -> list[_Change]:
    before = backend.fp32_precision
    return [] if before == _EXACT else [_switch(backend, "fp32_precision", off=_EXACT, on=before)]


def _switch(backend: Any, name: str, *, off: Any, on: Any) -> _Change:
    return lambda: setattr(backend, name, off), lambda: setattr(backend, name, on)


def _read(setting: Callable[[], Any]) -> Any:
    """A setting of torch's older kind; None where torch says that the newer kind is in use."""
    try:
        return setting()
    except RuntimeError:
        return None
