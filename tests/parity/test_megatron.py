"""Bug prevented: shards that only we can read, or foreign shards that we read otherwise than Megatron-LM does."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch

from gloria.data.shards import dtype_for_vocab, map_tokens, read_index, write_split

megatron = pytest.importorskip("megatron.core.datasets.indexed_dataset", reason="megatron-core is not installed")


def random_documents(vocab: int, count: int = 300) -> list[np.ndarray]:
    draws = np.random.RandomState(0)
    return [draws.randint(0, vocab, draws.randint(1, 60)) for _ in range(count)]


def write_ours(folder: Path, documents: list[np.ndarray], dtype: np.dtype) -> Path:
    tokens, lengths = np.concatenate(documents).astype(dtype), np.array([len(d) for d in documents])
    write_split(folder, "ours", dtype, [(tokens, lengths)])
    return folder / "ours-00000"


def write_theirs(prefix: Path, documents: list[list[np.ndarray]], dtype: type) -> None:
    builder = megatron.IndexedDatasetBuilder(f"{prefix}.bin", dtype=dtype)
    for sequences in documents:
        tokens = torch.from_numpy(np.concatenate(sequences).astype(np.int64))
        builder.add_document(tokens, [len(sequence) for sequence in sequences])
    builder.finalize(f"{prefix}.idx")


def read_ours(prefix: Path) -> list[list[int]]:
    tokens, offsets = map_tokens(prefix), read_index(prefix).document_offsets()
    return [tokens[a:b].tolist() for a, b in pairwise(offsets)]


@pytest.mark.parametrize("vocab", [50_257, 65_499, 65_500, 200_000])
def test_dtype_rule(vocab: int) -> None:
    assert dtype_for_vocab(vocab) == megatron.DType.optimal_dtype(vocab)


@pytest.mark.parametrize(("vocab", "dtype"), [(50_257, np.uint16), (200_000, np.int32)])
@pytest.mark.parametrize("mapped", [True, False])
def test_megatron_reads_ours_and_writes_the_same_bytes(tmp_path: Path, vocab: int, dtype: type, mapped) -> None:
    documents = random_documents(vocab)
    prefix = write_ours(tmp_path, documents, dtype_for_vocab(vocab))
    dataset = megatron.IndexedDataset(str(prefix), mmap=mapped)
    assert len(dataset) == len(documents)
    assert len(dataset.document_indices) == len(documents) + 1
    assert all(np.array_equal(dataset[i], document) for i, document in enumerate(documents))
    assert dataset[0].dtype == dtype
    write_theirs(tmp_path / "theirs", [[document] for document in documents], dtype)
    for suffix in (".bin", ".idx"):
        assert Path(f"{prefix}{suffix}").read_bytes() == (tmp_path / f"theirs{suffix}").read_bytes()


@pytest.mark.parametrize(("vocab", "dtype"), [(50_257, np.uint16), (200_000, np.int32)])
def test_we_read_megatrons_documents_of_several_sequences(tmp_path: Path, vocab: int, dtype: type) -> None:
    pieces = random_documents(vocab)
    documents = [pieces[i : i + 1 + i % 4] for i in range(0, 280, 5)]
    write_theirs(tmp_path / "theirs", documents, dtype)
    assert read_ours(tmp_path / "theirs") == [np.concatenate(document).tolist() for document in documents]
    assert map_tokens(tmp_path / "theirs").dtype == dtype
    dataset = megatron.IndexedDataset(str(tmp_path / "theirs"))
    index = read_index(tmp_path / "theirs")
    assert np.array_equal(index.lengths, dataset.sequence_lengths)
    assert np.array_equal(index.document_indices, dataset.document_indices)
    begins = np.cumsum(index.lengths, dtype=np.int64) - index.lengths
    assert np.array_equal(begins * index.dtype.itemsize, dataset.index.sequence_pointers)


def test_megatrons_merged_files(tmp_path: Path) -> None:
    """Its tool for merging shards moves document indices and pointers of the second file."""
    pieces = random_documents(1000, 8)
    for name, documents in (("a", [pieces[:2], pieces[2:3]]), ("b", [pieces[3:4], pieces[4:8]])):
        write_theirs(tmp_path / name, documents, np.uint16)
    builder = megatron.IndexedDatasetBuilder(str(tmp_path / "merged.bin"), dtype=np.uint16)
    for name in ("a", "b"):
        builder.add_index(str(tmp_path / name))
    builder.finalize(str(tmp_path / "merged.idx"))
    expected = [pieces[:2], pieces[2:3], pieces[3:4], pieces[4:8]]
    assert read_ours(tmp_path / "merged") == [np.concatenate(document).tolist() for document in expected]
