"""A weight as streams of a few bits, and back, bit for bit.

Works on the bits of floats, never on their values, so that not-a-number, infinities and negative
zeros survive. What a block is, is read off its bits: all `+0.0` is a pruned block, equal but for the
sign bit is a unified one, anything else is kept as it is. No weight can therefore be encoded wrongly.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from wgates_plugin.errors import FileFormatError
from wgates_plugin.transforms.unification.blocks import BlockGrid
from wgates_plugin.transforms.unification.projection import KEPT, PRUNED, UNIFIED

_SIGNED: dict[int, torch.dtype] = {2: torch.int16, 4: torch.int32, 8: torch.int64}


@dataclass(frozen=True)
class Streams:
    """One weight in bytes.

    Attributes:
        kinds: two bits per block. signs: one bit per entry of unified blocks.
        magnitudes: one float without sign per unified block. plain: the floats of kept blocks.
    """

    kinds: bytes
    signs: bytes
    magnitudes: bytes
    plain: bytes


def can_encode(tensor: Tensor) -> bool:
    return tensor.is_floating_point() and tensor.element_size() in _SIGNED


def bits_of(tensor: Tensor) -> np.ndarray:
    """The tensor's bits as unsigned integers of its own size, in its own shape."""
    size = tensor.element_size()
    signed: np.ndarray = tensor.detach().cpu().contiguous().view(_SIGNED[size]).numpy()
    return signed.view(f"u{size}")


def from_bits(bits: np.ndarray, dtype: torch.dtype) -> Tensor:
    return torch.from_numpy(bits.view(f"i{bits.itemsize}").copy()).view(dtype)


def encode(weight: Tensor, grid: BlockGrid) -> Streams:
    """The streams of a weight (dim 0 first, as it lies in the state dict)."""
    bits = bits_of(weight)
    unsigned = torch.from_numpy(bits.astype(np.uint64).view(np.int64))
    blocks = grid.split(unsigned).numpy().view(np.uint64)  # (blocks, r * c)
    real = grid.real.numpy()
    sign_bit = np.uint64(1) << np.uint64(8 * bits.itemsize - 1)
    magnitudes = blocks & ~sign_bit
    first = np.take_along_axis(magnitudes, real.argmax(1)[:, None], axis=1)
    kinds = np.full(len(blocks), KEPT, dtype=np.uint8)
    kinds[((magnitudes == first) | ~real).all(1)] = UNIFIED
    kinds[(blocks == 0).all(1)] = PRUNED  # padding is zero, so empty blocks are pruned ones
    unified, kept = kinds == UNIFIED, kinds == KEPT
    signs = ((blocks & sign_bit) != 0)[unified][real[unified]]
    dtype = bits.dtype
    return Streams(
        _pack_kinds(kinds).tobytes(),
        np.packbits(signs).tobytes(),
        first[unified, 0].astype(dtype).tobytes(),
        blocks[kept][real[kept]].astype(dtype).tobytes(),
    )


def decode(streams: Streams, grid: BlockGrid, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """What `encode` took apart. The streams have the `lengths` that their block map asks for."""
    kinds = _unpack_kinds(streams.kinds, grid)
    real = grid.real.numpy()
    unified, kept = kinds == UNIFIED, kinds == KEPT
    size = dtype.itemsize
    blocks = np.zeros(real.shape, dtype=np.uint64)
    count = int(real[unified].sum())
    flags = np.unpackbits(np.frombuffer(streams.signs, np.uint8), count=count).astype(np.uint64)
    sign_bits = np.zeros((int(unified.sum()), real.shape[1]), dtype=np.uint64)
    sign_bits[real[unified]] = flags << np.uint64(8 * size - 1)
    magnitudes = np.frombuffer(streams.magnitudes, f"u{size}").astype(np.uint64)
    blocks[unified] = magnitudes[:, None] | sign_bits
    inside = np.zeros((int(kept.sum()), real.shape[1]), dtype=np.uint64)
    inside[real[kept]] = np.frombuffer(streams.plain, f"u{size}")
    blocks[kept] = inside
    bits = grid.join(torch.from_numpy(blocks.view(np.int64)), shape)
    return from_bits(bits.numpy().view(np.uint64).astype(f"u{size}"), dtype)


def lengths(kinds: bytes, grid: BlockGrid, size: int) -> tuple[int, int, int]:
    """Bytes of signs, magnitudes and plain floats of a weight with this block map.

    Raises:
        FileFormatError: the map is not one of this grid.
    """
    found = _unpack_kinds(kinds, grid)
    counts = grid.real.numpy().sum(1)
    unified = found == UNIFIED
    signs = (int(counts[unified].sum()) + 7) // 8
    return signs, int(unified.sum()) * size, int(counts[found == KEPT].sum()) * size


def kinds_length(grid: BlockGrid) -> int:
    """Bytes of a block map."""
    return (grid.shape[0] * grid.shape[1] + 3) // 4


def _pack_kinds(kinds: np.ndarray) -> np.ndarray:
    padded = np.zeros(-(-len(kinds) // 4) * 4, dtype=np.uint8)
    padded[: len(kinds)] = kinds
    four = padded.reshape(-1, 4)
    packed: np.ndarray = four[:, 0] | four[:, 1] << 2 | four[:, 2] << 4 | four[:, 3] << 6
    return packed


def _unpack_kinds(packed: bytes, grid: BlockGrid) -> np.ndarray:
    if len(packed) != kinds_length(grid):
        raise FileFormatError(
            f"the block map holds {len(packed)} bytes, its grid asks for {kinds_length(grid)}"
        )
    bytes_ = np.frombuffer(packed, np.uint8)
    kinds = np.stack([bytes_ >> shift & 3 for shift in (0, 2, 4, 6)], axis=1).reshape(-1)
    count = grid.shape[0] * grid.shape[1]
    if (kinds > PRUNED).any() or kinds[count:].any():
        raise FileFormatError("the block map holds a kind of block that does not exist")
    return kinds[:count]
