"""One file for a unified network's weights: small, checked, and exact to the bit.

Layout: magic (8 bytes), version (uint16), CRC-32 and length of the header (uint32 each), CRC-32 of the
streams (uint32), all little-endian; then the header and the streams, each a Zstandard frame. The header
is JSON: every tensor's name, dtype and shape, the block grid of those that have one, and the size of
every frame. Streams hold one kind of number of all tensors together, floats split into planes of
first bytes, second bytes, ..., because exponents compress and mantissas do not.
"""

from __future__ import annotations

import json
import math
import re
import struct
import zlib
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from wgates_plugin.errors import FileFormatError
from wgates_plugin.files import atomic_path, raw_bytes
from wgates_plugin.latency.base import require
from wgates_plugin.transforms.unification import coding
from wgates_plugin.transforms.unification.blocks import BlockGrid

MAGIC = b"WGUNIFY\n"
VERSION = 1
_PREFIX = struct.Struct("<8sHIII")
_LEVEL = 19
_LONGEST_HEADER = 1 << 26
"""Bytes; names and shapes of a thousand times more tensors than any network has."""
_FRAME = re.compile("(kinds|signs|magnitudes|plain)-([1-8])-([0-7])", re.ASCII)

DTYPES: dict[str, torch.dtype] = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in (
        torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.bool,
        torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64,
    )
}  # fmt: skip


def zstandard() -> Any:
    """The library that codes the streams.

    Raises:
        MissingExtraError: it is not installed.
    """
    return require("zstandard", extra="unification", purpose="a file of unified weights")


def save_unified(
    path: str | Path, state: Mapping[str, Tensor], grids: Mapping[str, BlockGrid]
) -> int:
    """Write a state dict; tensors named in `grids` by blocks, the others plainly. Returns bytes.

    Any state dict is stored exactly; it is small when its weights have the structure.

    Raises:
        FileFormatError: a tensor of a kind that the file does not know.
    """
    data = encoded(state, grids)
    with atomic_path(path) as part:
        part.write_bytes(data)
    return len(data)


def encoded(state: Mapping[str, Tensor], grids: Mapping[str, BlockGrid]) -> bytes:
    """The content of a file of unified weights."""
    compressor = zstandard().ZstdCompressor(level=_LEVEL, write_content_size=True)
    tensors, streams = [], _Streams()
    for name, tensor in state.items():
        dtype = str(tensor.dtype).removeprefix("torch.")
        if dtype not in DTYPES or tensor.layout != torch.strided:
            raise FileFormatError(
                f"unified weights: tensor `{name}` is {tensor.layout} of {tensor.dtype}, which the "
                f"file does not hold; it knows {', '.join(DTYPES)}"
            )
        entry: dict[str, Any] = {"name": name, "dtype": dtype, "shape": list(tensor.shape)}
        size = tensor.element_size()
        grid = grids.get(name)
        if grid is None or not coding.can_encode(tensor) or not tensor.numel():
            streams.add("plain", size, raw_bytes(tensor))
        else:
            entry["grid"] = _grid_json(grid)
            parts = coding.encode(tensor, grid)
            streams.add("kinds", 1, parts.kinds)
            streams.add("signs", 1, parts.signs)
            streams.add("magnitudes", size, parts.magnitudes)
            streams.add("plain", size, parts.plain)
        tensors.append(entry)
    frames, body = [], b""
    for name, plane in streams.planes():
        frame = compressor.compress(plane)
        frames.append([name, len(frame), len(plane)])
        body += frame
    text = json.dumps({"tensors": tensors, "frames": frames}, separators=(",", ":"))
    header = compressor.compress(text.encode())
    prefix = _PREFIX.pack(MAGIC, VERSION, zlib.crc32(header), len(header), zlib.crc32(body))
    return prefix + header + body


def load_unified(path: str | Path) -> dict[str, Tensor]:
    """The state dict that `save_unified` wrote, bit for bit; nothing in the file is executed.

    Raises:
        FileFormatError: no such file, another kind or version, cut off or corrupt.
        MissingExtraError: `zstandard` is not installed.
    """
    path = Path(path)
    try:
        data = path.read_bytes()
    except OSError as error:
        raise FileFormatError(
            f"unified weights `{path}`: cannot be read ({error.strerror}); check the path"
        ) from None
    try:
        return decoded(data)
    except FileFormatError as error:
        raise FileFormatError(
            f"unified weights `{path}`: {error}; copy the file again, or write it anew with "
            "`save_unified`"
        ) from None


def decoded(data: bytes) -> dict[str, Tensor]:
    """The state dict in the content of a file.

    Raises:
        FileFormatError: see `load_unified`.
    """
    header, body = _checked(data)
    try:
        frames = [(_text(n), _whole(packed), _whole(raw)) for n, packed, raw in header["frames"]]
    except (KeyError, TypeError, ValueError) as error:
        raise FileFormatError(f"its header is malformed ({error!r})") from None
    streams = _Streams.of(frames, body)
    try:
        entries = [
            (_text(e["name"]), DTYPES[e["dtype"]], _shape(e["shape"]), e.get("grid"))
            for e in header["tensors"]
        ]
        names = [name for name, *_ in entries]
        twice = sorted(name for name, times in Counter(names).items() if times > 1)
        if twice:
            raise ValueError(f"named twice: {', '.join(twice)}")
        blocks = 4 * streams.length("kinds", 1)  # two bits for each
        grids = [_grid_from_json(grid, shape, dtype, blocks) for _, dtype, shape, grid in entries]
    except (KeyError, TypeError, ValueError, IndexError, OverflowError, MemoryError) as error:
        raise FileFormatError(f"its header is malformed ({error!r})") from None
    state: dict[str, Tensor] = {}
    for (name, dtype, shape, _), grid in zip(entries, grids, strict=True):
        size = dtype.itemsize
        if grid is None:
            raw = bytearray(streams.take("plain", size, size * math.prod(shape)))
            flat = torch.frombuffer(raw, dtype=dtype) if raw else torch.empty(0, dtype=dtype)
            state[name] = flat.reshape(shape)
            continue
        kinds = streams.take("kinds", 1, coding.kinds_length(grid))
        signs, magnitudes, plain = coding.lengths(kinds, grid, size)
        parts = coding.Streams(
            kinds,
            streams.take("signs", 1, signs),
            streams.take("magnitudes", size, magnitudes),
            streams.take("plain", size, plain),
        )
        state[name] = coding.decode(parts, grid, shape, dtype)
    streams.check_used_up()
    return state


def _checked(data: bytes) -> tuple[dict[str, Any], bytes]:
    """Header and body of a file whose sums are right."""
    if len(data) < _PREFIX.size or not data.startswith(MAGIC):
        raise FileFormatError("is no file of unified weights")
    _, version, header_sum, length, body_sum = _PREFIX.unpack_from(data)
    if version != VERSION:
        raise FileFormatError(f"version {version}, this package reads {VERSION}")
    packed, body = data[_PREFIX.size :][:length], data[_PREFIX.size + length :]
    if len(packed) != length or zlib.crc32(packed) != header_sum or zlib.crc32(body) != body_sum:
        raise FileFormatError("is corrupt or was cut off (checksum)")
    library = zstandard()
    try:
        if library.frame_content_size(packed) > _LONGEST_HEADER:
            raise ValueError(f"longer than {_LONGEST_HEADER} bytes")
        plain = library.ZstdDecompressor().decompress(packed, max_output_size=_LONGEST_HEADER)
        header = json.loads(plain)
    except (library.ZstdError, ValueError, RecursionError) as error:
        raise FileFormatError(f"its header cannot be read ({error})") from None
    if not isinstance(header, dict):
        raise FileFormatError("its header is malformed (no mapping)")
    return header, body


def _grid_json(grid: BlockGrid) -> dict[str, Any]:
    """The block, and the positions where a channel removal left gaps."""
    found: dict[str, Any] = {"block": list(grid.block)}
    for name, positions in (("rows", grid.rows), ("columns", grid.columns)):
        if not np.array_equal(positions, np.arange(len(positions))):
            found[name] = np.diff(positions, prepend=-1).tolist()
    return found


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{value!r} is no name")
    return value


def _whole(value: Any, least: int = 0) -> int:
    """A whole number that 64 bits hold; no truth value, no float, no word."""
    if type(value) is not int or not least <= value < 2**63:
        raise ValueError(f"{value!r} is no whole number from {least}")
    return value


def _shape(value: Any) -> tuple[int, ...]:
    if not isinstance(value, list):
        raise TypeError(f"{value!r} is no shape")
    shape = tuple(_whole(size) for size in value)
    if math.prod(max(size, 1) for size in shape) >= 2**60:
        raise ValueError(f"a shape beyond all measure: {list(shape)}")
    return shape


def _grid_from_json(
    value: Any, shape: tuple[int, ...], dtype: torch.dtype, blocks: int
) -> BlockGrid | None:
    """The grid of a tensor, None of one without; `blocks`: as many as the file has kinds for."""
    if value is None:
        return None
    if not coding.can_encode(torch.empty(0, dtype=dtype)):
        raise ValueError(f"blocks of {dtype}")
    down, across = value["block"]
    block = (_whole(down, 1), _whole(across, 1))
    # Before memory is taken for positions: every entry is in a block, every block has its kind.
    if math.prod(shape) > blocks * math.prod(block):
        raise ValueError(f"kinds of {blocks} blocks do not fill the shape {list(shape)}")
    grid = BlockGrid.over(shape, block)
    found = []
    for name, plain in (("rows", grid.rows), ("columns", grid.columns)):
        steps = [_whole(step, 1) for step in value.get(name, [1] * len(plain))]
        if len(steps) != len(plain) or not steps or sum(steps) >= 2**60:
            raise ValueError(f"{name} do not fit the shape")
        found.append(np.cumsum(np.asarray(steps, dtype=np.int64)) - 1)
    grid = BlockGrid(found[0], found[1], block)
    # A grid is cut from that of a real weight; a far larger one would only eat memory.
    area = math.prod(grid.shape) * math.prod(grid.block)
    if area > 4096 * max(math.prod(shape), 4096):
        raise ValueError("a grid beyond all measure")
    return grid


class _Streams:
    """Bytes by kind of number; taken in the order in which they were added."""

    def __init__(self) -> None:
        self._parts: dict[tuple[str, int], list[bytes]] = {}
        self._places: dict[tuple[str, int], int] = {}

    def add(self, kind: str, size: int, data: bytes) -> None:
        self._parts.setdefault((kind, size), []).append(data)

    def planes(self) -> Iterator[tuple[str, bytes]]:
        """(name, bytes): byte `p` of every number of a stream is plane `p`."""
        for (kind, size), parts in self._parts.items():
            numbers = np.frombuffer(b"".join(parts), np.uint8).reshape(-1, size)
            for plane in range(size):
                yield f"{kind}-{size}-{plane}", numbers[:, plane].tobytes()

    @classmethod
    def of(cls, frames: list[tuple[str, int, int]], body: bytes) -> _Streams:
        """The streams of a file's frames (name, bytes packed, bytes unpacked)."""
        planes: dict[tuple[str, int], list[bytes]] = {}
        place = 0
        for name, packed, raw in frames:
            known = _FRAME.fullmatch(name)
            if known is None:
                raise FileFormatError(f"its frame `{name}` is of no kind that there is")
            mine = planes.setdefault((known[1], int(known[2])), [])
            if int(known[3]) != len(mine):
                raise FileFormatError(f"its frame `{name}` is out of place")
            mine.append(_unpacked(body[place : place + packed], raw, name))
            place += packed
        if place != len(body):
            raise FileFormatError(f"holds {len(body) - place} bytes that belong to nothing")
        streams = cls()
        for (kind, width), found in planes.items():
            if len(found) != width or len({len(data) for data in found}) != 1:
                raise FileFormatError(f"its stream `{kind}-{width}` is not whole")
            numbers = np.stack([np.frombuffer(data, np.uint8) for data in found], axis=1)
            streams.add(kind, width, numbers.tobytes())
        return streams

    def length(self, kind: str, size: int) -> int:
        """Bytes of a stream."""
        return sum(map(len, self._parts.get((kind, size), ())))

    def take(self, kind: str, size: int, length: int) -> bytes:
        data = self._parts.get((kind, size), [b""])[0]
        start = self._places.get((kind, size), 0)
        if start + length > len(data):
            raise FileFormatError(f"its stream `{kind}-{size}` is too short")
        self._places[kind, size] = start + length
        return data[start : start + length]

    def check_used_up(self) -> None:
        for (kind, size), (data,) in self._parts.items():
            if self._places.get((kind, size), 0) != len(data):
                raise FileFormatError(f"its stream `{kind}-{size}` is longer than its tensors")


def _unpacked(frame: bytes, length: int, name: str) -> bytes:
    library = zstandard()
    try:
        # The announced size is checked before memory is taken for it.
        if library.frame_content_size(frame) != length:
            raise FileFormatError(f"its frame `{name}` is not of the size that the header says")
        data: bytes = library.ZstdDecompressor().decompress(frame)
    except (library.ZstdError, MemoryError) as error:
        raise FileFormatError(f"its frame `{name}` cannot be unpacked ({error})") from None
    return data
