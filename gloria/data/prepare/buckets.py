"""Passes 2 and 3 of `gloria.prepare`: buckets of hashed documents into token shards.

`survey` finds from the hashes alone which documents are duplicates, `choose` which may be for validation;
`draw` takes the sample that a new tokenizer is trained on, `tokenise` turns a bucket into tokens in the order of
the hashes, and `gather` puts the buckets of one split of one source one after the other and cuts shards at document
ends. Each is a function of one task that some worker runs; its result depends on the documents only.
"""

from __future__ import annotations

import itertools
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import zstandard

from gloria.data.prepare.adopt import range_edges
from gloria.data.prepare.recipe import Recipe
from gloria.data.prepare.reuse import Known, read_list
from gloria.data.prepare.scatter import (
    RECORD,
    Frame,
    Reading,
    cut_texts,
    deduplicate,
    read_kept,
    read_records,
    shared_tokenizer,
)
from gloria.data.prepare.split import Split, candidates
from gloria.data.shards import ShardEntry, dtype_for_vocab, write_split
from gloria.data.tokenizer import PIECE_CHARS, TextTokenizer, cut_at_spaces
from gloria.errors import warn

ENCODE_BYTES = 1 << 20  # text tokenised at a time: its encodings take many times its size
WHOLE_PIECES = 4  # times the usual piece: longer texts that can't be cut are reported


@dataclass(frozen=True)
class BucketTask:
    """One bucket and what the passes over it need to know of the whole corpus."""

    number: int
    buckets: int
    sources: int
    frames: Sequence[Frame]
    listed: Sequence[tuple[int, str]] = ()  # sources that need not be read again, and the lists of their documents
    split: Split | None = None
    chances: np.ndarray = field(default_factory=lambda: np.empty(0))  # (sources,) of a document to be drawn
    tokenizer: str = ""
    out: str = ""  # what the result is written to

    def others(self) -> np.ndarray:
        """The records of the bucket's documents that are in no frame, RECORD (documents,)."""
        lists = [read_list(path, source, self.number, self.buckets) for source, path in self.listed]
        return np.concatenate([np.empty(0, RECORD), *lists])

    def records(self) -> np.ndarray:
        """The records of all of the bucket's documents, RECORD (documents,)."""
        return np.concatenate([read_records(self.frames), self.others()])


@dataclass
class Draft:
    """A corpus in the making: what each source holds, by number."""

    recipe: Recipe
    work: Path
    buckets: int
    readings: dict[int, Reading] = field(default_factory=dict)  # of the sources that are read
    known: dict[int, Known] = field(default_factory=dict)  # of those that are taken over, and not read

    @property
    def folder(self) -> Path:
        return self.work / "corpus"

    def tasks(self, **more: Any) -> list[BucketTask]:
        """A task for each bucket that holds documents, with `more` for its fields."""
        listed = [(number, known.documents) for number, known in self.known.items()]
        tasks = []
        for bucket in range(self.buckets):
            frames = [frame for number in self.readings for frame in self.readings[number].frames.get(bucket, ())]
            if frames or listed:
                tasks.append(BucketTask(bucket, self.buckets, len(self.recipe.source), frames, listed, **more))
        return tasks

    def counts(self) -> list[Counter[str]]:
        """A copy of each source's counts of documents as they were read."""
        return [
            Counter(self.readings[i].counts if i in self.readings else self.known[i].record.counts)
            for i in range(len(self.recipe.source))
        ]


@dataclass(frozen=True)
class Survey:
    """A bucket's documents by source, each (sources,)."""

    kept: np.ndarray
    size: np.ndarray  # bytes of what is kept
    duplicate: np.ndarray  # of a document of the same source
    duplicate_elsewhere: np.ndarray  # of one of a source that comes earlier in the recipe
    identity: np.ndarray  # uint64 (sources, 2), sums of the kept documents' hashes: they say which are kept


def survey(task: BucketTask) -> Survey:
    """What is kept of a bucket."""
    records = task.records()
    keep, keeper = deduplicate(records)
    kept = records[keep]
    same = records["source"] == keeper

    def count(sources: np.ndarray) -> np.ndarray:
        return np.bincount(sources, minlength=task.sources)

    size = np.zeros(task.sources, np.int64)
    np.add.at(size, kept["source"], kept["size"])
    identity = np.zeros((task.sources, 2), np.uint64)
    np.add.at(identity, kept["source"], np.stack([kept["high"], kept["low"]], axis=1))  # modulo 2^64
    own = count(kept["source"])
    return Survey(
        kept=own,
        size=size,
        duplicate=count(records["source"][same]) - own,
        duplicate_elsewhere=count(records["source"][~same]),
        identity=identity,
    )


def choose(task: BucketTask) -> np.ndarray:
    """The bucket's candidates for validation, RECORD (candidates,)."""
    assert task.split is not None
    records = task.records()
    kept = records[deduplicate(records)[0]]
    return kept[candidates(kept["source"], kept["low"], kept["size"], task.split.most)]


def _text(record: np.void, data: bytes) -> str:
    return data[: record["size"]].decode()


def draw(task: BucketTask) -> np.ndarray:
    """Write the bucket's part of the tokenizer's sample to `task.out`, for `read_sample`; bytes by source, (sources,).

    A document for training is drawn with its source's chance. What decides is the sum of the hash's halves,
    which is independent of the half that splits, and of the half that orders.
    """
    records, texts = read_kept(task.frames, task.others())
    chance = (records["high"] + records["low"]).astype(np.float64) / 2.0**64
    assert task.split is not None
    chosen = (chance < task.chances[records["source"]]) & ~task.split.is_valid(records)
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


def tokenise(task: BucketTask) -> dict[str, Any]:
    """Write the tokens of the documents in a bucket's frames, each with its EOS, and their lengths to `task.out`,
    grouped by source and split.

    Gives the "segments", without their prefix, and the "seconds" spent in the tokenizer.
    """
    assert task.split is not None
    tokenizer = shared_tokenizer(task.tokenizer)
    records, texts = read_kept(task.frames, task.others())
    group = records["source"] * 2 + task.split.is_valid(records)
    order = np.argsort(group, kind="stable")  # within a group they stay in the order of the hashes
    lengths = np.empty(len(order), np.int32)
    words = np.zeros(len(order), np.int64)
    seconds = 0.0
    with open(f"{task.out}.tokens", "wb") as file:
        offsets = np.concatenate([[0], np.cumsum(records["size"][order])])
        for first, last in itertools.pairwise(range_edges(offsets, ENCODE_BYTES)):
            start = time.perf_counter()
            batch = [_text(records[i], texts[i]) for i in order[first:last]]
            encoded = _encode(tokenizer, batch, [texts[i][records["size"][i] :] for i in order[first:last]])
            seconds += time.perf_counter() - start
            file.write(b"".join(document.data for document in encoded))
            lengths[first:last] = [len(document) for document in encoded]
            words[first:last] = [sum(len(piece.split()) for piece in cut_at_spaces(text)) for text in batch]
    lengths.tofile(f"{task.out}.lengths")
    segments = _segments(task.out, group[order], lengths, records["size"][order], words)
    return {"segments": [segment[1:] for segment in segments], "seconds": seconds}


def _encode(tokenizer: TextTokenizer, texts: Sequence[str], tokens: Sequence[bytes]) -> list[np.ndarray]:
    """The ids of documents with their EOS: those they came with (`tokens`), else those of their texts."""
    dtype = dtype_for_vocab(tokenizer.vocab_size)
    limit = WHOLE_PIECES * PIECE_CHARS
    for text in [text for text, given in zip(texts, tokens) if not given and len(text) > limit]:
        longest = len(text) if tokenizer.why_whole else max(map(len, cut_at_spaces(text)))
        if longest > limit:
            why = tokenizer.why_whole or "it has no single space between words"
            warn(
                f'the document of {len(text):,} characters that begins "{text[:60]}" can\'t be cut up to be tokenised '
                f"({why}): this takes about {longest / 1e7:.1f} GB of memory"
            )
    encoded = iter(tokenizer.encode_batch([text for text, given in zip(texts, tokens) if not given]))
    end = np.array([tokenizer.eos_id], dtype)
    return [np.frombuffer(given, dtype) if given else np.concatenate([next(encoded), end]) for given in tokens]


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
