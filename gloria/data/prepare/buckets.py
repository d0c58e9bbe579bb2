"""Passes 2 and 3 of `gloria.prepare`: buckets of hashed documents into token shards.

`survey` learns from the hashes alone which documents are duplicates and which may be for validation, `draw`
takes the sample that a new tokenizer is trained on, `tokenise` turns a bucket into tokens in the order of
the hashes, and `gather` lays the buckets of one split of one source one after the other and cuts shards at
document ends. Each is a function of one task that some worker runs; its result depends on the documents
only.
"""

from __future__ import annotations

import functools
import itertools
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np
import zstandard

from gloria.data.corpus import TOKENIZER, SourceEntry
from gloria.data.prepare.adopt import adopt_megatron
from gloria.data.prepare.recipe import SourceConfig
from gloria.data.prepare.scatter import Frame, cut_texts, deduplicate, read_kept, read_records
from gloria.data.prepare.split import candidates
from gloria.data.shards import ShardEntry, dtype_for_vocab, write_split
from gloria.data.tokenizer import load_tokenizer

ENCODE_BYTES = 1 << 20  # text tokenised at a time: its encodings take many times its size

_tokenizer = functools.lru_cache(maxsize=1)(load_tokenizer)


@dataclass(frozen=True)
class BucketTask:
    """One bucket and what the passes over it need to know of the whole corpus."""

    frames: Sequence[Frame]
    sources: int
    bounds: np.ndarray = field(default_factory=lambda: np.empty(0, np.uint64))  # (sources,), see `is_valid`
    chances: np.ndarray = field(default_factory=lambda: np.empty(0))  # (sources,) of a document to be drawn
    tokenizer: str = ""
    out: str = ""  # what the result is written to


@dataclass(frozen=True)
class Survey:
    """A bucket's documents by source, each int64 (sources,), and its candidates for validation."""

    kept: np.ndarray
    size: np.ndarray  # bytes of what is kept
    duplicate: np.ndarray  # of a document of the same source
    duplicate_elsewhere: np.ndarray  # of one of a source that comes earlier in the recipe
    candidates: np.ndarray  # RECORD (candidates,)


def survey(task: BucketTask) -> Survey:
    """What is kept of a bucket and what may be for validation."""
    records = read_records(task.frames)
    keep, keeper = deduplicate(records)
    kept = records[keep]
    same = records["source"] == keeper

    def count(sources: np.ndarray) -> np.ndarray:
        return np.bincount(sources, minlength=task.sources)

    size = np.zeros(task.sources, np.int64)
    np.add.at(size, kept["source"], kept["size"])
    own = count(kept["source"])
    return Survey(
        kept=own,
        size=size,
        duplicate=count(records["source"][same]) - own,
        duplicate_elsewhere=count(records["source"][~same]),
        candidates=kept[candidates(kept["source"], kept["low"], kept["size"])],
    )


def is_valid(records: np.ndarray, bounds: np.ndarray) -> np.ndarray:
    """Which documents are for validation, bool (documents,): split-hash below the source's bound, (sources,)."""
    return records["low"] < bounds[records["source"]]


def draw(task: BucketTask) -> np.ndarray:
    """Write the bucket's part of the tokenizer's sample to `task.out`, for `read_sample`; bytes by source, (sources,).

    A document for training is drawn with its source's chance. What decides is the sum of the hash's halves,
    which is independent of the half that splits, and of the half that orders.
    """
    records, texts = read_kept(task.frames)
    chance = (records["high"] + records["low"]).astype(np.float64) / 2.0**64
    chosen = (chance < task.chances[records["source"]]) & ~is_valid(records, task.bounds)
    sizes = records["size"][chosen]
    with open(task.out, "wb") as file:
        file.write(np.int64(len(sizes)).tobytes())
        file.write(sizes.tobytes())
        text = b"".join([texts[i] for i in np.flatnonzero(chosen)])
        file.write(zstandard.ZstdCompressor(level=1).compress(text))
    drawn = np.zeros(task.sources, np.int64)
    np.add.at(drawn, records["source"][chosen], sizes)
    return drawn


def read_sample(paths: Sequence[str]) -> Iterator[str]:
    """The texts that `draw` wrote, file by file: in bucket order, the order of the hashes."""
    for path in paths:
        data = Path(path).read_bytes()
        count = int(np.frombuffer(data, "<i8", 1)[0])
        sizes = np.frombuffer(data, "<i8", count, offset=8)
        text = zstandard.ZstdDecompressor().decompress(data[8 * (count + 1) :])
        yield from (part.decode() for part in cut_texts(text, sizes))


class Segment(NamedTuple):
    """One split of one source in a bucket's token file: what it holds and where it begins."""

    prefix: str  # of the bucket's files .tokens and .lengths
    source: int
    valid: bool
    documents: int
    tokens: int
    size: int  # bytes of text
    words: int  # as white space parts them
    first_document: int
    first_token: int


def tokenise(task: BucketTask) -> tuple[list[Segment], float]:
    """Write the tokens of a bucket's documents, each with its EOS, and their lengths to `task.out`, grouped
    by source and split. Gives the groups and the seconds spent in the tokenizer.
    """
    tokenizer = _tokenizer(task.tokenizer)
    dtype = dtype_for_vocab(tokenizer.vocab_size)
    end = np.array([tokenizer.eos_id], dtype)
    records, texts = read_kept(task.frames)
    group = records["source"] * 2 + is_valid(records, task.bounds)
    order = np.argsort(group, kind="stable")  # within a group they stay in the order of the hashes
    lengths = np.empty(len(order), np.int32)
    words = np.empty(len(order), np.int64)
    seconds = 0.0
    with open(f"{task.out}.tokens", "wb") as file:
        for first, last in _batches(records["size"][order]):
            batch = [texts[i].decode() for i in order[first:last]]
            start = time.perf_counter()
            encoded = tokenizer.encode_batch(batch)
            seconds += time.perf_counter() - start
            ids = [part for document in encoded for part in (document, end)]
            file.write(np.concatenate(ids).astype(dtype, copy=False).tobytes())
            lengths[first:last] = [len(document) + 1 for document in encoded]
            words[first:last] = [len(text.split()) for text in batch]
    lengths.tofile(f"{task.out}.lengths")
    return _segments(task.out, group[order], lengths, records["size"][order], words), seconds


def _batches(sizes: np.ndarray) -> Iterator[tuple[int, int]]:
    """Ranges of neighbouring documents, each of about ENCODE_BYTES of text."""
    number = (np.cumsum(sizes) - sizes) // ENCODE_BYTES
    edges = [0, *(np.flatnonzero(np.diff(number)) + 1).tolist(), len(sizes)]
    return itertools.pairwise(edges)


def _segments(
    prefix: str, group: np.ndarray, lengths: np.ndarray, sizes: np.ndarray, words: np.ndarray
) -> list[Segment]:
    present, starts = np.unique(group, return_index=True)
    segments, first_token = [], 0
    for key, start, end in zip(present.tolist(), starts.tolist(), [*starts[1:].tolist(), len(group)]):
        part = slice(start, end)
        tokens = int(lengths[part].sum(dtype=np.int64))
        size, count = int(sizes[part].sum()), int(words[part].sum())
        segments.append(Segment(prefix, key // 2, bool(key % 2), end - start, tokens, size, count, start, first_token))
        first_token += tokens
    return segments


@dataclass(frozen=True)
class GatherTask:
    """One split of one source: its segments in bucket order, and the shards' prefix below the corpus folder."""

    segments: Sequence[Segment]
    folder: str
    path: str
    vocab_size: int
    shard_tokens: int


def gather(task: GatherTask) -> list[ShardEntry]:
    """Write the shards of one split of one source."""
    dtype = dtype_for_vocab(task.vocab_size)
    return write_split(task.folder, task.path, dtype, _chunks(task.segments, dtype), task.shard_tokens)


def _chunks(segments: Sequence[Segment], dtype: np.dtype) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    for segment in segments:
        lengths = np.fromfile(
            f"{segment.prefix}.lengths", np.int32, segment.documents, offset=4 * segment.first_document
        )
        offset = dtype.itemsize * segment.first_token
        yield np.fromfile(f"{segment.prefix}.tokens", dtype, segment.tokens, offset=offset), lengths


@dataclass(frozen=True)
class AdoptTask:
    """One source of token shards made elsewhere: its configuration and the shards' prefixes."""

    folder: str
    source: SourceConfig
    prefixes: Sequence[str]
    seed: int
    shard_tokens: int


def adopt(task: AdoptTask) -> SourceEntry:
    """Take over a source of token shards, which must be those of the corpus's tokenizer."""
    return adopt_megatron(
        task.folder,
        task.source.name,
        task.prefixes,
        _tokenizer(f"{task.folder}/{TOKENIZER}"),
        weight=task.source.weight,
        seed=task.seed,
        shard_tokens=task.shard_tokens,
    )
