"""One rank's file of a checkpoint: a safetensors file whose metadata says where each tensor belongs.

The layout is the safetensors format's own (8 bytes header length, JSON header, raw little-endian data), so
any safetensors reader opens it; `__metadata__["gloria.shards"]` adds `{name: [first row, global shape]}`.
Written in one pass with the hash taken on the way; read with every number of the header checked against the
file.
"""

from __future__ import annotations

import json
import math
import os
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import xxhash
from torch import Tensor

from gloria.dist.state import Shard
from gloria.errors import UserError
from gloria.files import CHUNK_BYTES, MAX_JSON_BYTES, brief, open_plain, parse_json_object, write_all

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True)
class Piece:
    """Rows `first : first + rows` of a tensor, as contiguous bytes in a file."""

    file: Path
    position: int  # of the first byte, from the start of the file
    bytes: int
    dtype: torch.dtype
    first: int
    rows: int  # 1 for a scalar
    shape: tuple[int, ...]  # global


@dataclass(frozen=True)
class TensorFile:
    """A checked header."""

    step: int
    rank: int
    world: int
    pieces: dict[str, Piece]


def byte_view(tensor: Tensor) -> memoryview:
    """The memory of a contiguous host tensor, of any dtype (numpy knows no bfloat16), as writable bytes."""
    # as_strided: a single row may be contiguous and yet have a stride that view(dtype) refuses.
    return tensor.as_strided((tensor.numel(),), (1,)).view(torch.uint8).numpy().data


def write_tensor_file(
    path: Path, shards: dict[str, Shard], *, step: int, rank: int, world: int, cancelled: threading.Event
) -> tuple[int, str]:
    """Write the shards, make them durable, and give (bytes, xxh3-128 in hex).

    Raises OSError when the disk refuses and once `cancelled` is set.
    """
    # Large items first, so that every tensor starts at a multiple of its item size; else as they come, which is the
    # order they will be read in, so that the kernel reads ahead of it.
    order = sorted(shards, key=lambda name: -shards[name].tensor.element_size())
    header = _header(shards, order, {"gloria.step": str(step), "gloria.rank": str(rank), "gloria.world": str(world)})
    hasher = xxhash.xxh3_128()
    size = 0
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
    try:
        for chunk in _chunks(header, shards, order):
            if cancelled.is_set():
                raise OSError(f"{path}: abandoned")
            hasher.update(chunk)
            write_all(descriptor, chunk)
            size += len(chunk)
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    return size, hasher.hexdigest()


def _header(shards: dict[str, Shard], order: list[str], metadata: dict[str, str]) -> bytes:
    places = {name: [shards[name].offset, list(shards[name].shape)] for name in order}
    entries: dict[str, Any] = {"__metadata__": {"format": "pt", **metadata, "gloria.shards": json.dumps(places)}}
    start = 0
    for name in order:
        tensor = shards[name].tensor
        end = start + tensor.numel() * tensor.element_size()
        entries[name] = {
            "dtype": _NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [start, end],
        }
        start = end
    text = json.dumps(entries).encode()
    text += b" " * (-len(text) % 8)
    assert len(text) <= MAX_JSON_BYTES, f"a header of {len(text)} bytes could not be read back"
    return len(text).to_bytes(8, "little") + text


def _chunks(header: bytes, shards: dict[str, Shard], order: list[str]) -> Iterator[memoryview]:
    yield memoryview(header)
    for name in order:
        view = byte_view(shards[name].tensor.detach().cpu().contiguous())
        for start in range(0, len(view), CHUNK_BYTES):
            yield view[start : start + CHUNK_BYTES]


def read_tensor_file(path: Path) -> TensorFile:
    """Read and check a header: sizes, dtypes, ranges, and that the data fills the file without gap or overlap.

    UserError `PATH: what is wrong` for anything that is not so.
    """
    descriptor = open_plain(path)
    try:
        file_size = os.fstat(descriptor).st_size
        length = int.from_bytes(os.pread(descriptor, 8, 0), "little")
        if not 2 <= length <= min(file_size - 8, MAX_JSON_BYTES):
            raise UserError(f"{path}: says its header has {length} bytes, in a file of {file_size}")
        text = os.pread(descriptor, length, 8)
    finally:
        os.close(descriptor)
    header = parse_json_object(text, path)
    try:
        return _check_header(path, header, data_start=8 + length, file_size=file_size)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UserError(f"{path}: its header does not describe a rank's shards ({brief(error)})") from None


def _check_header(path: Path, header: dict[str, Any], *, data_start: int, file_size: int) -> TensorFile:
    metadata = header.pop("__metadata__")
    places = parse_json_object(metadata["gloria.shards"].encode(), path)
    if places.keys() != header.keys():
        raise ValueError("tensors and places differ")
    pieces = {}
    filled = 0
    for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
        dtype = DTYPES[entry["dtype"]]
        local = _shape(entry["shape"])
        first, shape = places[name]
        shape = _shape(shape)
        start, end = entry["data_offsets"]
        if not all(type(number) is int for number in (first, start, end)):
            raise ValueError(f"{name}: {first!r}, {start!r} and {end!r} are not all whole numbers")
        rows = local[0] if local else 1
        if local[1:] != shape[1:] or len(local) != len(shape) or not 0 <= first <= first + rows <= (*shape, 1)[0]:
            raise ValueError(f"{name}: rows {first} to {first + rows} of {shape} cannot have the shape {local}")
        if start != filled or end - start != math.prod(local) * dtype.itemsize:
            raise ValueError(f"{name}: bytes {start} to {end} do not fit {local} of {dtype}")
        filled = end
        pieces[name] = Piece(path, data_start + start, end - start, dtype, first, rows, shape)
    if data_start + filled != file_size:
        raise ValueError(f"{data_start + filled} bytes described, {file_size} there")
    step, rank, world = (int(metadata[f"gloria.{key}"]) for key in ("step", "rank", "world"))
    return TensorFile(step, rank, world, pieces=pieces)


def _shape(value: Any) -> tuple[int, ...]:
    if not isinstance(value, list) or not all(type(size) is int and size >= 0 for size in value):
        raise ValueError(f"shape {value!r}")
    return tuple(value)
