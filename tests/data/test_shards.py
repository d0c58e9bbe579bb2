"""Bug prevented: shards that other readers of the format can't read or read otherwise, documents cut in two by a
shard's end or by the writer's chunks, ids wrapped to 16 bits, and a damaged index believed."""

from __future__ import annotations

import os
import struct
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import xxhash
from hypothesis import given, settings
from hypothesis import strategies as st

from gloria.data.shards import (
    HEADER,
    MAGIC,
    ShardWriter,
    dtype_for_vocab,
    map_tokens,
    read_index,
    write_split,
)
from gloria.errors import UserError

Documents = list[list[int]]


def chunk(documents: Documents, dtype: str = "<u2") -> tuple[np.ndarray, np.ndarray]:
    tokens = [token for document in documents for token in document]
    return np.array(tokens, dtype), np.array([len(document) for document in documents], np.int32)


def write(folder: Path, documents: Documents, dtype: str = "<u2") -> Path:
    write_split(folder, "shard", np.dtype(dtype), [chunk(documents, dtype)])
    return folder / "shard-00000"


def read(prefix: Path) -> Documents:
    """Document by document, all the sequences of each, as the module promises."""
    tokens, offsets = map_tokens(prefix), read_index(prefix).document_offsets()
    return [tokens[a:b].tolist() for a, b in pairwise(offsets)]


def index_bytes(lengths: list[int], pointers: list[int], indices: list[int], code: int = 8) -> bytes:
    """An `.idx` built field by field from the format's description, independently of the writer."""
    return b"".join(
        [
            b"MMIDIDX\0\0",
            struct.pack("<Q", 1),
            struct.pack("<B", code),
            struct.pack("<Q", len(lengths)),
            struct.pack("<Q", len(indices)),
            *(struct.pack("<i", length) for length in lengths),
            *(struct.pack("<q", pointer) for pointer in pointers),
            *(struct.pack("<q", index) for index in indices),
        ]
    )


def error_of(function, *args) -> str:
    with pytest.raises(UserError) as caught:
        function(*args)
    return str(caught.value)


@pytest.mark.parametrize(("vocab", "name"), [(2, "uint16"), (65_499, "uint16"), (65_500, "int32")])
def test_dtype_follows_megatrons_rule(vocab: int, name: str) -> None:
    assert dtype_for_vocab(vocab) == np.dtype(name)


def test_golden_bytes(tmp_path: Path) -> None:
    documents = [[1, 2, 0], [7, 0], [65_535, 0]]
    prefix = write(tmp_path, documents)
    assert Path(f"{prefix}.bin").read_bytes() == struct.pack("<7H", 1, 2, 0, 7, 0, 65_535, 0)
    assert Path(f"{prefix}.idx").read_bytes() == index_bytes([3, 2, 2], [0, 6, 10], [0, 1, 2, 3])
    assert HEADER.size == 34
    assert read(prefix) == documents


def test_entry_has_what_lies_on_disk(tmp_path: Path) -> None:
    writer = ShardWriter(tmp_path, "source/train-00000", np.dtype("<i4"))
    writer.add(*chunk([[100_000, 0], [5, 0]], "<i4"))
    writer.add(*chunk([[9, 9, 0]], "<i4"))
    entry = writer.close()
    data, index = ((tmp_path / f"source/train-00000{suffix}").read_bytes() for suffix in (".bin", ".idx"))
    assert (entry.path, entry.documents, entry.tokens, entry.dtype) == ("source/train-00000", 3, 7, "int32")
    assert (entry.bin_size, entry.bin_hash) == (28, xxhash.xxh3_128_hexdigest(data))
    assert (entry.idx_size, entry.idx_hash) == (len(index), xxhash.xxh3_128_hexdigest(index))
    assert index == index_bytes([2, 2, 3], [0, 8, 16], [0, 1, 2, 3], code=4)


def test_writer_holds_no_shard_and_leaves_no_index_when_it_dies(tmp_path: Path) -> None:
    writer = ShardWriter(tmp_path, "a", np.dtype("<u2"))
    tokens = np.ones(100_000, "<u2")
    writer.add(tokens, np.array([len(tokens)]))
    assert (tmp_path / "a.bin").stat().st_size > 0  # on its way to the disk, not kept for later
    del writer
    assert not (tmp_path / "a.idx").exists()


def test_writer_refuses_what_would_be_written_wrong(tmp_path: Path) -> None:
    writer = ShardWriter(tmp_path, "a", np.dtype("<u2"))
    with pytest.raises(AssertionError, match="wrap"):
        writer.add(np.array([70_000], "<i4"), np.array([1]))
    with pytest.raises(AssertionError):
        writer.add(np.array([1, 2], "<u2"), np.array([1]))
    with pytest.raises(AssertionError):
        writer.add(np.array([1], "<u2"), np.array([1, 0]))
    with pytest.raises(AssertionError, match=r"empty \.bin"):
        writer.close()
    with pytest.raises(FileExistsError):
        ShardWriter(tmp_path, "a", np.dtype("<u2"))


def test_a_closed_shard_is_on_the_disk(tmp_path: Path, monkeypatch) -> None:
    synced = []
    monkeypatch.setattr(os, "fsync", lambda descriptor: synced.append(os.fstat(descriptor).st_ino))
    write(tmp_path, [[1, 0]])
    names = ("shard-00000.bin", "shard-00000.idx", ".")
    assert synced == [(tmp_path / name).stat().st_ino for name in names]


def test_no_documents_no_shard(tmp_path: Path) -> None:
    nothing = (np.empty(0, "<u2"), np.empty(0, np.int32))
    assert write_split(tmp_path, "a/train", np.dtype("<u2"), [nothing, nothing]) == []
    assert list(tmp_path.iterdir()) == []


def greedy(documents: Documents, shard_tokens: int) -> list[Documents]:
    """Pure Python: a document opens a new shard when the last one would grow beyond `shard_tokens`."""
    shards: list[Documents] = []
    for document in documents:
        if shards and sum(map(len, shards[-1])) + len(document) <= shard_tokens:
            shards[-1].append(document)
        else:
            shards.append([document])
    return shards


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_shards_are_cut_at_document_ends_whatever_the_chunks(tmp_path_factory, data) -> None:
    document = st.lists(st.integers(0, 65_499), min_size=1, max_size=12)
    documents = data.draw(st.lists(document, max_size=12))
    cuts = sorted(data.draw(st.lists(st.integers(0, len(documents)), max_size=4)))
    shard_tokens = data.draw(st.integers(1, 30))
    folder = tmp_path_factory.mktemp("split")
    edges = [0, *cuts, len(documents)]
    chunks = [chunk(documents[a:b]) for a, b in pairwise(edges)]
    entries = write_split(folder, "s/train", np.dtype("<u2"), chunks, shard_tokens)
    assert [entry.path for entry in entries] == [f"s/train-{i:05d}" for i in range(len(entries))]
    found = [read(folder / entry.path) for entry in entries]
    assert found == greedy(documents, shard_tokens)
    assert [entry.tokens for entry in entries] == [sum(map(len, shard)) for shard in found]
    assert sorted(os.listdir(folder / "s") if entries else []) == sorted(
        f"{Path(entry.path).name}{suffix}" for entry in entries for suffix in (".bin", ".idx")
    )


def test_sequences_of_a_document_are_grouped(tmp_path: Path) -> None:
    prefix = tmp_path / "m"
    Path(f"{prefix}.bin").write_bytes(np.arange(9, dtype="<u2").tobytes())
    Path(f"{prefix}.idx").write_bytes(index_bytes([4, 2, 0, 3], [0, 8, 12, 12], [0, 2, 2, 4]))
    assert read_index(prefix).documents == 3
    assert read(prefix) == [[0, 1, 2, 3, 4, 5], [], [6, 7, 8]]


@pytest.mark.parametrize(("code", "dtype"), [(1, "|u1"), (3, "<i2"), (4, "<i4"), (5, "<i8"), (8, "<u2")])
def test_header_is_believed(tmp_path: Path, code: int, dtype: str) -> None:
    prefix = tmp_path / "m"
    Path(f"{prefix}.bin").write_bytes(np.array([1, 2, 3], dtype).tobytes())
    size = np.dtype(dtype).itemsize
    Path(f"{prefix}.idx").write_bytes(index_bytes([1, 2], [0, size], [0, 1, 2], code))
    assert map_tokens(prefix).dtype == np.dtype(dtype)
    assert read(prefix) == [[1], [2, 3]]


def test_mapped_tokens_are_a_plain_read_only_array(tmp_path: Path) -> None:
    prefix = write(tmp_path, [[1, 2, 0]])
    for tokens in (map_tokens(prefix), map_tokens(prefix, in_order=True)):
        assert type(tokens) is np.ndarray
        assert not tokens.flags.writeable
        assert tokens.tolist() == [1, 2, 0]


GOOD = index_bytes([3, 2], [0, 6], [0, 1, 2])  # 34 + 24 + 24 bytes
AGAIN = "; copy or make the file again"


@pytest.mark.parametrize(
    ("index", "what"),
    [
        (b"", "is not a Megatron index (it doesn't begin with MMIDIDX)"),
        (MAGIC + b"\1", "is not a Megatron index (it doesn't begin with MMIDIDX)"),
        (b"x" * 82, "is not a Megatron index (it doesn't begin with MMIDIDX)"),
        (GOOD[:9] + struct.pack("<Q", 2) + GOOD[17:], "is of version 2, not 1"),
        (GOOD[:17] + b"\7" + GOOD[18:], "has dtype code 7, which is not an integer type"),
        (GOOD[:17] + b"\0" + GOOD[18:], "has dtype code 0, which is not an integer type"),
        (
            GOOD[:-8],
            "is 74 bytes, but its header counts 2 sequences and 3 document indices, 82 bytes",
        ),
        (
            GOOD + b"\0\0",
            "is 84 bytes, but its header counts 2 sequences and 3 document indices, 82 bytes",
        ),
        (
            GOOD[:18] + struct.pack("<Q", 2**60) + GOOD[26:],
            f"is 82 bytes, but its header counts {2**60} sequences and 3 document indices, "
            f"{34 + 12 * 2**60 + 24} bytes",
        ),
        (index_bytes([3, 2], [0, 6], []), "counts no document index, and there is always a first one"),
        (index_bytes([6, -1], [0, 12], [0, 1, 2]), "has a sequence of negative length"),
        (index_bytes([3, 2], [0, 6], [0, 1, 1]), "its document indices don't run from 0 up to its 2 sequences"),
        (index_bytes([3, 2], [0, 6], [1, 1, 2]), "its document indices don't run from 0 up to its 2 sequences"),
        (
            index_bytes([3, 2], [0, 6], [0, 2, 1, 2]),
            "its document indices don't run from 0 up to its 2 sequences",
        ),
        (index_bytes([3, 2], [0, 4], [0, 1, 2]), "its sequences don't lie one after the other in the .bin"),
    ],
)
def test_a_broken_index_is_named(tmp_path: Path, index: bytes, what: str) -> None:
    prefix = write(tmp_path, [[1, 2, 0], [7, 0]])
    Path(f"{prefix}.idx").write_bytes(index)
    assert error_of(read_index, prefix) == f"{prefix}.idx: {what}{AGAIN}"


def test_a_bin_that_disagrees_is_named(tmp_path: Path) -> None:
    prefix = write(tmp_path, [[1, 2, 0], [7, 0]])
    data = Path(f"{prefix}.bin")
    data.write_bytes(data.read_bytes()[:-2])
    assert error_of(read_index, prefix) == f"{data}: is 8 bytes, but its .idx lists 5 tokens, 10 bytes{AGAIN}"
    data.write_bytes(b"123")
    assert error_of(map_tokens, prefix) == f"{data}: is 3 bytes, not a whole number of uint16 tokens{AGAIN}"
    data.write_bytes(b"")
    assert error_of(map_tokens, prefix) == f"{data}: is 0 bytes, not a whole number of uint16 tokens{AGAIN}"


@pytest.mark.parametrize("suffix", [".bin", ".idx"])
def test_a_missing_half_is_named(tmp_path: Path, suffix: str) -> None:
    prefix = write(tmp_path, [[1, 0]])
    os.remove(f"{prefix}{suffix}")
    expected = f"{prefix}{suffix}: no such file; a shard is a .bin and an .idx side by side"
    assert error_of(read_index, prefix) == expected
    assert error_of(map_tokens, prefix) == expected
