"""The passes of `gloria.prepare` put together: from the files of a recipe to a corpus folder.

The parent plans, the workers do, and what crosses between them is counts and places, never text. Every plan
(which worker reads what, how many buckets) leaves the result as it is.
"""

from __future__ import annotations

import shutil
import time
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from gloria.data.corpus import FORMAT, SPLITS, TOKENIZER, Manifest, SourceEntry, SplitEntry
from gloria.data.prepare.buckets import (
    AdoptTask,
    BucketTask,
    GatherTask,
    Segment,
    adopt,
    draw,
    gather,
    read_sample,
    survey,
    tokenise,
)
from gloria.data.prepare.recipe import MEGATRON, Recipe, SourceFile, to_record, tokenizer_place
from gloria.data.prepare.report import DROPPED
from gloria.data.prepare.scatter import RECORD, Frame, read_sources
from gloria.data.prepare.split import candidates, validation_bound
from gloria.data.prepare.workers import Workers
from gloria.data.tokenizer import TextTokenizer, import_tokenizer, train_tokenizer
from gloria.errors import UserError, warn

MOST_FRESH = 1 << 20  # candidates for validation that wait to be chosen from


@dataclass
class PrepareStats:
    """What the passes took, training a tokenizer apart."""

    text: int  # bytes that were kept
    seconds: float  # by the clock
    encoding: float  # seconds in the tokenizer, summed over the workers
    workers: int

    def __str__(self) -> str:
        megabytes, spent = self.text / 1e6, self.seconds * self.workers
        return (
            f"{megabytes:,.1f} MB of text in {self.seconds:.1f} s with {self.workers} workers: "
            f"{megabytes / spent:.2f} MB/s each, {self.encoding / spent:.0%} of their time in the tokenizer"
        )


@dataclass(frozen=True)
class DedupResult:
    """What deduplication leaves, by source, and where validation begins."""

    documents: np.ndarray  # int64 (sources,)
    size: np.ndarray  # int64 (sources,), bytes of text
    bounds: np.ndarray  # uint64 (sources,), split-hashes below are for validation


def make_corpus(
    recipe: Recipe, files: Sequence[Sequence[SourceFile]], where: str, work: Path, workers: int
) -> tuple[Manifest, PrepareStats]:
    """Make the corpus of a recipe (read from `where`) in `work`/corpus, and return the manifest it lacks.

    `files` are those of each source, as `find_files` gives them; `UserError` tells what is wrong with them.
    """
    folder = work / "corpus"
    folder.mkdir()
    start = time.perf_counter()
    with Workers(workers) as pool:
        counts, frames = read_sources(recipe, files, work, pool)
        kept = survey_buckets(recipe, counts, frames, pool)
        trained = -time.perf_counter()
        tokenizer = make_tokenizer(recipe, where, kept, frames, work, pool)
        trained += time.perf_counter()
        segments, encoding = tokenise_buckets(kept, frames, work, pool)
        shutil.rmtree(work / "spill")
        sources = gather_shards(recipe, counts, segments, tokenizer.vocab_size, folder, pool)
        adopted = adopt_shards(recipe, files, folder, pool)
    effort = PrepareStats(int(kept.size.sum()), time.perf_counter() - start - trained, encoding, workers)
    sources = [adopted.get(source.name, entry) for source, entry in zip(recipe.source, sources)]
    values = {key: getattr(tokenizer, key) for key in ("fingerprint", "vocab_size", "eos_id", "pad_id")}
    return Manifest(FORMAT, values, sources, to_record(recipe)), effort


def survey_buckets(
    recipe: Recipe, counts: Sequence[Counter[str]], frames: Sequence[Sequence[Frame]], pool: Workers
) -> DedupResult:
    """Pass 2, first look: what is kept, added to the `counts`, and the bounds of validation."""
    sources = len(recipe.source)
    size = np.zeros(sources, np.int64)
    chosen = np.empty(0, RECORD)
    fresh: list[np.ndarray] = []
    tasks = [BucketTask(bucket, sources) for bucket in frames]
    for found in pool.map(survey, tasks, "deduplicating"):
        size += found.size
        for key in ("kept", "duplicate", "duplicate_elsewhere"):
            for count, number in zip(counts, getattr(found, key).tolist()):
                count[key] += number
        fresh.append(found.candidates)
        if sum(map(len, fresh)) > MOST_FRESH:
            chosen, fresh = _choose([chosen, *fresh]), []
    chosen = _choose([chosen, *fresh])
    bounds = np.zeros(sources, np.uint64)
    problems = []
    for number, (source, count) in enumerate(zip(recipe.source, counts)):
        if source.format == MEGATRON:
            continue
        if not count["kept"]:
            reasons = [f"{count[key]:,} {reason}" for key, reason in DROPPED.items() if count[key]]
            left = f"no document is left of {count['read']:,} ({', '.join(reasons)})"
            problems.append(
                f'source "{source.name}": {left if reasons else "its files hold no document"}; '
                "check its paths and options, or remove it"
            )
            continue
        if count["kept"] == 1:
            warn(f'source "{source.name}": has one document, which is for training; it has no validation')
        own = chosen[chosen["source"] == number]
        bounds[number] = validation_bound(own["low"], own["size"], count["kept"], int(size[number]))
    if problems:
        raise UserError(*problems)
    return DedupResult(np.array([count["kept"] for count in counts]), size, bounds)


def _choose(parts: Sequence[np.ndarray]) -> np.ndarray:
    records = np.concatenate(parts)
    return records[candidates(records["source"], records["low"], records["size"])]


def make_tokenizer(
    recipe: Recipe, where: str, kept: DedupResult, frames: Sequence[Sequence[Frame]], work: Path, pool: Workers
) -> TextTokenizer:
    """The tokenizer in `work`/corpus/tokenizer: taken over, or trained on a sample that is drawn by weight.

    Each source gives its share of `sample_bytes`, as documents of training, or all of them where it has less.
    """
    folder = work / "corpus" / TOKENIZER
    config = recipe.tokenizer
    if config.path:
        return import_tokenizer(tokenizer_place(recipe, where), folder)
    weights = np.array([source.weight for source in recipe.source])
    chances = config.sample_bytes * weights / weights.sum() / kept.size
    (work / "sample").mkdir()
    tasks = [
        BucketTask(bucket, len(weights), kept.bounds, chances, out=str(work / "sample" / f"{number:05d}"))
        for number, bucket in enumerate(frames)
    ]
    drawn = sum(pool.map(draw, tasks, "drawing a sample"), np.zeros(len(weights), np.int64))
    parts = ", ".join(f"{source.name} {size / 1e6:.2f}" for source, size in zip(recipe.source, drawn.tolist()))
    print(f"tokenizer: training on {drawn.sum() / 1e6:.2f} MB drawn by weight ({parts})", flush=True)
    tokenizer = train_tokenizer(config, read_sample([task.out for task in tasks]), folder)
    shutil.rmtree(work / "sample")
    return tokenizer


def tokenise_buckets(
    kept: DedupResult, frames: Sequence[Sequence[Frame]], work: Path, pool: Workers
) -> tuple[dict[tuple[int, bool], list[Segment]], float]:
    """Pass 2, second look: the buckets' tokens by (source, is validation); seconds spent in the tokenizer."""
    (work / "tokens").mkdir()
    folder = str(work / "corpus" / TOKENIZER)
    tasks = [
        BucketTask(
            bucket,
            len(kept.bounds),
            kept.bounds,
            tokenizer=folder,
            out=str(work / "tokens" / f"{number:05d}"),
        )
        for number, bucket in enumerate(frames)
    ]
    segments: dict[tuple[int, bool], list[Segment]] = defaultdict(list)
    seconds = 0.0
    for found, spent in pool.map(tokenise, tasks, "tokenising"):
        seconds += spent
        for segment in found:
            segments[segment.source, segment.valid].append(segment)
    return segments, seconds


def gather_shards(
    recipe: Recipe,
    counts: Sequence[Counter[str]],
    segments: dict[tuple[int, bool], list[Segment]],
    vocab_size: int,
    folder: Path,
    pool: Workers,
) -> list[SourceEntry]:
    """Pass 3: the shards of each source, for training and validation, and what the manifest says of them."""
    tasks = [
        GatherTask(
            segments.get((number, valid), []),
            str(folder),
            f"{source.name}/{SPLITS[valid]}",
            vocab_size,
            recipe.shard_tokens,
        )
        for number, source in enumerate(recipe.source)
        for valid in (False, True)
    ]
    entries = []
    for task, shards in zip(tasks, pool.map(gather, tasks, "writing shards")):
        documents, tokens, size, words = (
            sum(getattr(segment, key) for segment in task.segments) for key in ("documents", "tokens", "size", "words")
        )
        entries.append(SplitEntry(documents, tokens, size, words, shards))
    return [
        SourceEntry(source.name, source.weight, train, valid, {key: count[key] for key in ("read", *DROPPED, "kept")})
        for source, train, valid, count in zip(recipe.source, entries[::2], entries[1::2], counts)
    ]


def adopt_shards(
    recipe: Recipe, files: Sequence[Sequence[SourceFile]], folder: Path, pool: Workers
) -> dict[str, SourceEntry]:
    """The sources that are token shards made elsewhere, by name."""
    tasks = [
        AdoptTask(str(folder), source, [file.path for file in found], recipe.seed, recipe.shard_tokens)
        for source, found in zip(recipe.source, files)
        if source.format == MEGATRON
    ]
    return {entry.name: entry for entry in pool.map(adopt, tasks, "adopting shards")}
