"""Pass 1 of `gloria.prepare`: raw files into spill files of hashed documents, bucket by bucket.

A bucket is a range of the documents' keyed xxh3-128 hashes, so the buckets in order are all documents in
the order of their hashes: equal texts meet in one bucket (exact deduplication without a global table) and
the order is a shuffle that depends on nothing but the texts. A worker writes one spill file, however many
buckets there are: in it are frames, each a bucket's records (hash, size, source) and then their texts,
compressed together.
"""

from __future__ import annotations

import functools
import heapq
import io
import itertools
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import xxhash
import zstandard

from gloria.data.corpus import TOKENIZER
from gloria.data.prepare.adopt import cut_documents, read_shard
from gloria.data.prepare.filters import ask_filter
from gloria.data.prepare.inputs import text_bytes
from gloria.data.prepare.recipe import MEGATRON, Recipe, SourceConfig, SourceFile
from gloria.data.prepare.report import FILTERED
from gloria.data.prepare.text import Document, clean, lines_before, read_documents
from gloria.data.prepare.units import Unit, hash_values, run_units
from gloria.data.prepare.workers import Workers
from gloria.data.tokenizer import load_tokenizer
from gloria.errors import UserError, warn

PIECE_BYTES = 64 << 20  # of an uncompressed file that a worker reads at a stretch
BATCH_BYTES = 1 << 30  # text of a spill file, about
LEAST_BATCHES = 16  # of a source, if it has so many files or pieces: work for several workers
BUCKET_BYTES = 64 << 20  # text of a bucket, which a worker holds in memory
LEAST_BUCKETS, MOST_BUCKETS = 64, 4096
SPILL_BYTES = 64 << 20  # text a worker holds before it writes it out
WARNED_FILES = 10  # files with malformed documents that get a line of their own
SHOWN = 3  # malformed documents of a file that are named; the others are counted

LONG_BYTES = 4 << 20  # documents from this size on are noted, so that they can be named if memory runs out

# The hash's upper half orders the documents, its lower half splits them into training and validation. Sizes are
# bytes: of the text, and of the tokens behind it where the document came with them.
RECORD = np.dtype([("high", "<u8"), ("low", "<u8"), ("size", "<i8"), ("tokens", "<i8"), ("source", "<i4")])

shared_tokenizer = functools.lru_cache(maxsize=1)(load_tokenizer)


class Piece(NamedTuple):
    """A file or a range of it, and its source's number in the recipe. A range is the lines that begin in it
    (bytes), or the documents of token shards with these numbers.
    """

    source: int
    file: SourceFile
    start: int = 0
    end: int | None = None


class Frame(NamedTuple):
    """Some of one bucket's documents, all of one source, in a spill file."""

    spill: str
    source: int
    offset: int
    documents: int
    packed: int  # bytes of the compressed texts


@dataclass(frozen=True)
class ScatterTask:
    """Pieces of one source to read into one spill file."""

    pieces: Sequence[Piece]
    source: SourceConfig
    seed: int
    buckets: int
    out: str  # of the spill file, without its ending
    tokenizer: str  # folder; needed for token shards only


@dataclass
class PieceCounts:
    """A piece's documents by what became of them, and the first malformed ones as (line, problem)."""

    piece: Piece
    counts: Counter[str] = field(default_factory=Counter)
    malformed: list[tuple[int, str]] = field(default_factory=list)


@dataclass
class Reading:
    """What pass 1 has made of a source."""

    counts: Counter[str] = field(default_factory=Counter)
    frames: dict[int, list[Frame]] = field(default_factory=lambda: defaultdict(list))  # by bucket
    keys: list[str] = field(default_factory=list)  # of the units that read it


def read_sources(
    recipe: Recipe,
    files: Mapping[int, Sequence[SourceFile]],
    keys: Mapping[int, Callable[[Sequence[Piece]], str]],
    work: Path,
    buckets: int,
    pool: Workers,
) -> dict[int, Reading]:
    """Pass 1, of the sources (by number) whose `files` are given.

    `keys` gives what the documents of some of a source's pieces depend on.
    """
    (work / "spill").mkdir(exist_ok=True)
    units = []
    for number, found in files.items():
        source = recipe.source[number]
        pieces = [piece for file in found for piece in cut_pieces(number, file)]
        least = sum(map(text_bytes, found)) // BATCH_BYTES
        for index, batch in enumerate(_batches(pieces, max(LEAST_BATCHES, least))):
            out = str(work / "spill" / f"{source.name}-{index:05d}")
            task = ScatterTask(batch, source, recipe.seed, buckets, out, str(work / "corpus" / TOKENIZER))
            units.append(Unit(task, out, hash_values([buckets, keys[number](batch)])))
    results: list[PieceCounts] = []
    readings = {number: Reading() for number in files}
    for unit, (value, _) in run_units(scatter, units, pool, "reading"):
        number = unit.task.pieces[0].source
        reading = readings[number]
        reading.keys.append(unit.key)
        for piece, (counts, malformed) in zip(unit.task.pieces, value["pieces"]):
            reading.counts += Counter(counts)
            results.append(PieceCounts(piece, Counter(counts), [(line, problem) for line, problem in malformed]))
        for bucket, offset, documents, packed in value["frames"]:
            reading.frames[bucket].append(Frame(f"{unit.out}.spill", number, offset, documents, packed))
    report_malformed(
        recipe, [readings[i].counts if i in readings else Counter() for i in range(len(recipe.source))], results
    )
    return readings


def count_buckets(files: Sequence[Sequence[SourceFile]]) -> int:
    """Into how many buckets the documents go: a power of two, so that it seldom changes when a source does."""
    total = sum(text_bytes(file) for source in files for file in source)
    return min(max(1 << (total // BUCKET_BYTES).bit_length(), LEAST_BUCKETS), MOST_BUCKETS)


def cut_pieces(source: int, file: SourceFile) -> list[Piece]:
    if file.format == MEGATRON:
        return [Piece(source, file, first, last) for first, last in itertools.pairwise(cut_documents(file.path))]
    if file.format != "jsonl":  # the others can only be read from their beginning
        return [Piece(source, file)]
    size = Path(file.path).stat().st_size
    edges = [*range(0, size, PIECE_BYTES), size]
    return [Piece(source, file, start, end) for start, end in itertools.pairwise(edges)]


def _batches(pieces: Sequence[Piece], count: int) -> list[list[Piece]]:
    """At most `count` batches of about the same size: the largest piece first, each joins the lightest."""
    heap: list[tuple[int, int, list[Piece]]] = [(0, number, []) for number in range(min(count, len(pieces)))]
    for size, piece in sorted(((piece_bytes(piece), piece) for piece in pieces), reverse=True):
        load, number, batch = heapq.heappop(heap)
        batch.append(piece)
        heapq.heappush(heap, (load + size, number, batch))
    return [batch for _, _, batch in heap]


def piece_bytes(piece: Piece) -> int:
    if piece.file.format == MEGATRON or piece.end is None:
        return text_bytes(piece.file)
    return piece.end - piece.start


def report_malformed(recipe: Recipe, counts: Sequence[Counter[str]], results: Sequence[PieceCounts]) -> None:
    """Warn of malformed documents by file and line; `UserError` for sources that have too many of them."""
    found: list[dict[str, tuple[int, list[str]]]] = [{} for _ in recipe.source]  # path -> number, the first
    for result in sorted(results, key=lambda result: result.piece):
        source, file, start, _ = result.piece
        if result.malformed:
            before = lines_before(file.path, start)
            number, first = found[source].get(file.path, (0, []))
            first += [f"{file.path}:{before + line} ({problem})" for line, problem in result.malformed]
            found[source][file.path] = (number + result.counts["malformed"], first[:SHOWN])
    problems = []
    for config, count, places in zip(recipe.source, counts, found):
        bad, read = count["malformed"], count["read"]
        if bad > recipe.max_malformed * read:
            shown = [place for _, first in places.values() for place in first]
            problems.append(
                f'source "{config.name}": {bad:,} of {read:,} documents are malformed, over max_malformed = '
                f"{recipe.max_malformed:g}: {_some(shown, bad)}; correct them or raise it"
            )
    if problems:
        raise UserError(*problems)
    files = [item for places in found for item in places.items()]
    for path, (number, first) in files[:WARNED_FILES]:
        warn(f"{path}: {number:,} malformed documents are left out: {_some(first, number)}")
    if len(files) > WARNED_FILES:
        warn(f"{len(files) - WARNED_FILES:,} more files have malformed documents, which are left out")


def _some(places: Sequence[str], number: int) -> str:
    return ", ".join(places[:SHOWN]) + (", ..." if number > SHOWN else "")


def scatter(task: ScatterTask) -> dict[str, Any]:
    """Read, clean and hash the pieces' documents into the task's spill file.

    Gives "pieces", for each its counts and its first malformed documents, and "frames" as (bucket, offset, documents,
    packed).
    """
    with open(f"{task.out}.spill", "wb") as file:
        spill = _Spill(file, task.buckets)
        counts = [_scatter_piece(piece, task, spill) for piece in task.pieces]
        spill.flush()
    return {"pieces": [(result.counts, result.malformed) for result in counts], "frames": spill.frames}


def read_piece(piece: Piece, config: SourceConfig, tokenizer: str) -> Iterator[Document]:
    if piece.file.format == MEGATRON:
        assert piece.end is not None
        return read_shard(piece.file.path, shared_tokenizer(tokenizer), piece.start, piece.end)
    return read_documents(
        piece.file.path,
        piece.file.format,
        text_field=config.text_field,
        documents=config.documents,
        columns=bool(config.filter or config.url_field),
        start=piece.start,
        end=piece.end,
    )


def _scatter_piece(piece: Piece, task: ScatterTask, spill: _Spill) -> PieceCounts:
    config = task.source
    result = PieceCounts(piece)
    counts = result.counts
    for line, text, problem, metadata, tokens in read_piece(piece, config, task.tokenizer):
        counts["read"] += 1
        data = b""
        if len(text) >= LONG_BYTES:
            with open(f"{task.out}.long", "a") as file:
                file.write(f"{len(text)}\t{place_of(piece, line)}\n")
        if not problem:
            text = clean(text)
            try:
                data = text.encode()
            except UnicodeEncodeError:  # JSON may spell one as \ud83d; no UTF-8 file can hold it
                problem = "half a surrogate pair"
        if problem:
            counts["malformed"] += 1
            if len(result.malformed) < SHOWN:
                result.malformed.append((line, problem))
        elif reason := config.why_dropped(text):
            counts[reason] += 1
        elif config.filter and (reason := ask_filter(config.filter, text, metadata, place_of(piece, line))):
            counts[f"{FILTERED}{reason}"] += 1
        else:
            spill.add(xxhash.xxh3_128_digest(data, task.seed), data, tokens)
    return result


def place_of(piece: Piece, line: int) -> str:
    path = piece.file.path
    return f"{path}:{(0 if piece.file.format == MEGATRON else lines_before(path, piece.start)) + line}"


def long_documents(work: Path) -> list[tuple[int, str]]:
    """Size (characters) and place of the documents of LONG_BYTES and more that were read, the longest first."""
    lines = [line for path in sorted(work.glob("spill/*.long")) for line in path.read_text().splitlines()]
    sizes = [(int(size), where) for size, _, where in (line.partition("\t") for line in lines)]
    return sorted(sizes, reverse=True)


class _Spill:
    """Writes documents to one spill file; `frames` locates them in it: bucket, offset, documents, packed."""

    def __init__(self, file: io.BufferedWriter, buckets: int) -> None:
        self.frames: list[tuple[int, int, int, int]] = []
        self._file, self._buckets = file, buckets
        self._compressor = zstandard.ZstdCompressor(level=1)
        self._clear()

    def _clear(self) -> None:
        self._digests: list[bytes] = []
        self._texts: list[bytes] = []  # each with its tokens behind it
        self._sizes: list[tuple[int, int]] = []
        self._held = 0

    def add(self, digest: bytes, data: bytes, tokens: bytes) -> None:
        self._digests.append(digest)
        self._texts.append(data + tokens if tokens else data)
        self._sizes.append((len(data), len(tokens)))
        self._held += len(self._texts[-1])
        if self._held >= SPILL_BYTES:
            self.flush()

    def flush(self) -> None:
        if not self._texts:
            return
        halves = np.frombuffer(b"".join(self._digests), ">u8").reshape(-1, 2)  # (documents, high and low)
        records = np.zeros(len(halves), RECORD)
        records["high"], records["low"] = halves[:, 0], halves[:, 1]
        records["size"], records["tokens"] = np.array(self._sizes).T
        bucket = ((records["high"] >> 48) * self._buckets) >> 16  # equal ranges of the hash, ascending
        order = np.argsort(bucket, kind="stable")
        present, starts = np.unique(bucket[order], return_index=True)
        for number, chosen in zip(present.tolist(), np.split(order, starts[1:])):
            packed = self._compressor.compress(b"".join([self._texts[i] for i in chosen]))
            self.frames.append((number, self._file.tell(), len(chosen), len(packed)))
            self._file.write(records[chosen].tobytes())
            self._file.write(packed)
        self._clear()


def read_records(frames: Sequence[Frame]) -> np.ndarray:
    """The records of a bucket's frames, RECORD (documents,), without reading their texts."""
    parts = [np.fromfile(frame.spill, RECORD, frame.documents, offset=frame.offset) for frame in frames]
    for frame, part in zip(frames, parts):
        part["source"] = frame.source  # its number may be another than when it was read
    return np.concatenate([np.empty(0, RECORD), *parts])


def read_kept(frames: Sequence[Frame], others: np.ndarray) -> tuple[np.ndarray, list[bytes]]:
    """What deduplication keeps of a bucket's frames, in the order of the hashes: records (documents,) and texts, each
    with its tokens behind it.

    `others` are the records of the bucket's documents that are in no frame, RECORD (others,).
    """
    records = read_records(frames)
    sizes = np.split(records["size"] + records["tokens"], np.cumsum([frame.documents for frame in frames])[:-1])
    texts = []
    for frame, size in zip(frames, sizes):
        packed = np.fromfile(frame.spill, np.uint8, frame.packed, offset=frame.offset + records.itemsize * len(size))
        texts += cut_texts(zstandard.ZstdDecompressor().decompress(packed.data), size)
    keep, _ = deduplicate(np.concatenate([records, others]))
    keep = keep[keep < len(records)]
    return records[keep], [texts[i] for i in keep]


def cut_texts(data: bytes, sizes: np.ndarray) -> list[bytes]:
    """Texts of the given sizes (bytes) that follow one another in `data`."""
    ends = np.cumsum(sizes)
    return [data[start:end] for start, end in zip((ends - sizes).tolist(), ends.tolist())]


def deduplicate(records: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Which of a bucket's records stay: of equal hashes the first source's in the recipe.

    Gives the kept records' indices in the order of the hashes, (kept,), and for each record the source that
    keeps its text, (documents,).
    """
    order = np.lexsort((records["source"], records["low"], records["high"]))
    ordered = records[order]
    is_first = np.ones(len(order), bool)
    is_first[1:] = (ordered["high"][1:] != ordered["high"][:-1]) | (ordered["low"][1:] != ordered["low"][:-1])
    keep = order[is_first]
    keeper = np.empty(len(order), np.int32)
    keeper[order] = records["source"][keep][np.cumsum(is_first) - 1]
    return keep, keeper
