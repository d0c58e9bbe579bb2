"""Token shards on disk, in the format of Megatron-LM's indexed dataset.

A shard is two files with one prefix. `PREFIX.bin` holds raw little-endian tokens, document after document.
`PREFIX.idx` holds the magic, version 1, a dtype code, two counts, then int32 sequence lengths, int64 byte
pointers and int64 document indices: a document is the sequences between two neighbouring indices, and there
is one index more than there are documents. Megatron-LM, NeMo and datatrove write and read the same files
(`megatron/core/datasets/indexed_dataset.py`). Shards written here have one sequence a document and never an
empty `.bin`, which megatron-core can't map.
"""

from __future__ import annotations

import mmap
import os
import struct
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, NoReturn

import numpy as np
import xxhash

from gloria.config.cli import option
from gloria.errors import UserError
from gloria.files import sync_folder

MAGIC = b"MMIDIDX\x00\x00"
VERSION = 1
HEADER = struct.Struct("<9sQBQQ")  # magic, version, dtype code, sequences, document indices
DTYPES = {1: "|u1", 2: "|i1", 3: "<i2", 4: "<i4", 5: "<i8", 8: "<u2"}  # 6 and 7 are floats: no tokens
CODES = {"uint16": 8, "int32": 4}  # what is written
SAMPLE_BLOCKS, BLOCK_BYTES = 16, 1 << 16
SHARD_TOKENS = 2**28  # 512 MB of uint16: quick to copy and to hash, and few files even for a terabyte


@dataclass(frozen=True)
class ShardEntry:
    """A shard as the corpus manifest lists it; sizes in bytes, hashes xxh3-128 in hexadecimal."""

    path: str = option(help="prefix of .bin and .idx, relative to the corpus folder")
    documents: int = option(minimum=1)
    tokens: int = option(minimum=1)
    dtype: str = option(choices=tuple(CODES))
    bin_size: int = option(minimum=1)
    bin_hash: str = option()
    idx_size: int = option(minimum=1)
    idx_hash: str = option()
    bin_sample: str = option("", help="hash_sample of the .bin")


@dataclass(frozen=True)
class Index:
    """What an `.idx` file says, checked against itself and against the size of its `.bin`."""

    dtype: np.dtype
    lengths: np.ndarray  # (sequences,) int32, tokens
    document_indices: np.ndarray  # (documents + 1,) int64, sequences

    @property
    def documents(self) -> int:
        return len(self.document_indices) - 1

    def document_offsets(self) -> np.ndarray:
        """(documents + 1,) int64: document d is tokens `offsets[d]` up to `offsets[d + 1]`."""
        return _offsets(self.lengths)[self.document_indices]


def dtype_for_vocab(vocab_size: int) -> np.dtype:
    """The dtype tokens are written in: Megatron-LM's rule, uint16 below 65,500 and else int32."""
    return np.dtype("<u2" if vocab_size < 65_500 else "<i4")


class ShardWriter:
    """Writes one shard as documents come, hashing on the way; memory holds only the documents' lengths.

    `path` is the shard's prefix relative to `folder`; neither file may exist yet. The `.idx` is written by
    `close`, so a shard cut short by a crash has none.
    """

    def __init__(self, folder: str | os.PathLike[str], path: str, dtype: np.dtype) -> None:
        self.path = path
        self.dtype = np.dtype(dtype)
        self.tokens = 0
        self._prefix = Path(folder) / path
        self._prefix.parent.mkdir(parents=True, exist_ok=True)
        self._file = open(f"{self._prefix}.bin", "xb")  # noqa: SIM115 (closed by `close`, when the shard is whole)
        self._hash = xxhash.xxh3_128()
        self._lengths: list[np.ndarray] = []

    def add(self, tokens: np.ndarray, lengths: np.ndarray) -> None:
        """Append documents: `tokens` (their tokens, one after the other) and `lengths` (documents,)."""
        assert tokens.dtype == self.dtype, "a cast would wrap ids that don't fit"
        assert len(lengths) > 0
        assert 0 < lengths.min() <= lengths.max() < 2**31
        assert lengths.sum(dtype=np.int64) == len(tokens)
        tokens = np.ascontiguousarray(tokens)
        self._file.write(tokens.data)
        self._hash.update(tokens.data)
        self._lengths.append(lengths.astype("<i4"))
        self.tokens += len(tokens)

    def close(self) -> ShardEntry:
        """Write the `.idx`, make both files durable and return their entry."""
        assert self.tokens, "an empty .bin can't be mapped"
        lengths = np.concatenate(self._lengths)
        pointers = (_offsets(lengths)[:-1] * self.dtype.itemsize).astype("<i8")
        documents = len(lengths)
        header = HEADER.pack(MAGIC, VERSION, CODES[self.dtype.name], documents, documents + 1)
        indices = np.arange(documents + 1, dtype="<i8")
        index = b"".join([header, lengths.tobytes(), pointers.tobytes(), indices.tobytes()])
        with self._file as file:
            _make_durable(file)
        with open(f"{self._prefix}.idx", "xb") as file:
            file.write(index)
            _make_durable(file)
        sync_folder(self._prefix.parent)
        return ShardEntry(
            path=self.path,
            documents=documents,
            tokens=self.tokens,
            dtype=self.dtype.name,
            bin_size=self.tokens * self.dtype.itemsize,
            bin_hash=self._hash.hexdigest(),
            idx_size=len(index),
            idx_hash=xxhash.xxh3_128_hexdigest(index),
            bin_sample=hash_sample(f"{self._prefix}.bin"),
        )


def hash_sample(path: str | os.PathLike[str]) -> str:
    """xxh3-128 of 16 blocks of 64 KB, evenly spread from a file's first byte to its last: of all of it up to 1 MB."""
    hasher = xxhash.xxh3_128()
    with open(path, "rb", buffering=0) as file:
        last = max(0, os.fstat(file.fileno()).st_size - BLOCK_BYTES)
        for number in range(SAMPLE_BLOCKS):
            hasher.update(os.pread(file.fileno(), BLOCK_BYTES, last * number // (SAMPLE_BLOCKS - 1)))
    return hasher.hexdigest()


def write_split(
    folder: str | os.PathLike[str],
    path: str,
    dtype: np.dtype,
    chunks: Iterable[tuple[np.ndarray, np.ndarray]],
    shard_tokens: int = SHARD_TOKENS,
) -> list[ShardEntry]:
    """Write documents as shards `path-00000`, `path-00001`, ... below `folder`, cut at document ends.

    `chunks` yields (tokens of whole documents one after the other, lengths of these documents). A shard takes
    documents as long as it stays within `shard_tokens`; a document longer than that is a shard of its own.
    The files depend on the documents alone, not on how they are cut into chunks. No document, no shard.
    """
    shards: list[ShardEntry] = []
    writer: ShardWriter | None = None
    for tokens, lengths in chunks:
        offsets = _offsets(lengths)  # (documents + 1,)
        first = 0
        while first < len(lengths):
            if writer is None:
                writer = ShardWriter(folder, f"{path}-{len(shards):05d}", dtype)
            room = shard_tokens - writer.tokens
            end = int(np.searchsorted(offsets, offsets[first] + room, side="right")) - 1
            end = max(end, first if writer.tokens else first + 1)
            if end > first:
                writer.add(tokens[offsets[first] : offsets[end]], lengths[first:end])
            if end < len(lengths):
                shards.append(writer.close())
                writer = None
            first = end
    if writer is not None:
        shards.append(writer.close())
    return shards


def read_index(prefix: str | os.PathLike[str]) -> Index:
    """The index of anyone's shard; `UserError` names the file whose header, counts or sizes disagree."""
    path = f"{prefix}.idx"
    dtype, sequences, indices = _read_header(prefix)
    with open(path, "rb") as file:
        file.seek(HEADER.size)
        lengths = np.fromfile(file, "<i4", sequences)
        pointers = np.fromfile(file, "<i8", sequences)
        document_indices = np.fromfile(file, "<i8", indices)
    if (lengths < 0).any():
        _refuse(path, "has a sequence of negative length")
    steps = np.diff(document_indices)
    if document_indices[0] != 0 or document_indices[-1] != sequences or (steps < 0).any():
        _refuse(path, f"its document indices don't run from 0 up to its {sequences} sequences")
    offsets = _offsets(lengths)
    if not np.array_equal(pointers, offsets[:-1] * dtype.itemsize):
        _refuse(path, "its sequences don't lie one after the other in the .bin")
    size = _size(f"{prefix}.bin")
    needed = int(offsets[-1]) * dtype.itemsize
    if size != needed:
        _refuse(f"{prefix}.bin", f"is {size} bytes, but its .idx lists {offsets[-1]} tokens, {needed} bytes")
    return Index(dtype, lengths, document_indices)


def map_tokens(prefix: str | os.PathLike[str], *, in_order: bool = False) -> np.ndarray:
    """All tokens of a shard, (tokens,) in the header's dtype, mapped read-only.

    A plain array: slicing an `np.memmap` costs 18 times as much. Of the `.idx` only the header is read.
    `in_order` is for reading from end to end: the system then reads ahead.
    """
    path = f"{prefix}.bin"
    dtype, _, _ = _read_header(prefix)
    size = _size(path)
    if size == 0 or size % dtype.itemsize:
        _refuse(path, f"is {size} bytes, not a whole number of {dtype.name} tokens")
    with open(path, "rb") as file:
        mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    if not in_order and hasattr(mmap, "MADV_RANDOM"):
        # windows come in random order: reading ahead would fetch pages that are not used
        mapped.madvise(mmap.MADV_RANDOM)
    return np.frombuffer(mapped, dtype)


def _read_header(prefix: str | os.PathLike[str]) -> tuple[np.dtype, int, int]:
    """(dtype, sequences, document indices) of an `.idx` whose size fits these counts."""
    path = f"{prefix}.idx"
    size = _size(path)
    with open(path, "rb") as file:
        header = file.read(HEADER.size)
    if len(header) < HEADER.size or not header.startswith(MAGIC):
        _refuse(path, "is not a Megatron index (it doesn't begin with MMIDIDX)")
    _, version, code, sequences, indices = HEADER.unpack(header)
    if version != VERSION:
        _refuse(path, f"is of version {version}, not {VERSION}")
    if code not in DTYPES:
        _refuse(path, f"has dtype code {code}, which is not an integer type")
    needed = HEADER.size + sequences * 12 + indices * 8
    if indices == 0:
        _refuse(path, "counts no document index, and there is always a first one")
    if size != needed:
        counts = f"{sequences} sequences and {indices} document indices"
        _refuse(path, f"is {size} bytes, but its header counts {counts}, {needed} bytes")
    return np.dtype(DTYPES[code]), sequences, indices


def _offsets(lengths: np.ndarray) -> np.ndarray:
    """(n + 1,) int64: where each of n pieces begins, and where the last one ends."""
    offsets = np.zeros(len(lengths) + 1, np.int64)
    np.cumsum(lengths, dtype=np.int64, out=offsets[1:])
    return offsets


def _size(path: str) -> int:
    try:
        return os.stat(path).st_size
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; a shard is a .bin and an .idx side by side") from None


def _make_durable(file: BinaryIO) -> None:
    file.flush()
    os.fsync(file.fileno())


def _refuse(path: str, what: str) -> NoReturn:
    raise UserError(f"{path}: {what}; copy or make the file again")
