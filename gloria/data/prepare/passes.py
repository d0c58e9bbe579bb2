"""The passes of `gloria.prepare` put together: from the files of a recipe to a corpus folder.

The parent plans, the workers do, and what crosses between them is counts and places, never text. Every plan
(which worker reads what, how many buckets) leaves the result as it is.
"""

from __future__ import annotations

import shutil
import time
from collections import Counter, defaultdict
from collections.abc import Sequence
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from gloria.data.corpus import FORMAT, SPLITS, TOKENIZER, Manifest, SourceEntry, SplitEntry, TokenizerEntry
from gloria.data.prepare.buckets import (
    BucketTask,
    GatherTask,
    Segment,
    choose,
    collect_runs,
    draw,
    gather,
    read_sample,
    survey,
    tokenise,
)
from gloria.data.prepare.inputs import differences, read_states, shorten, write_states
from gloria.data.prepare.overlap import near_duplicates
from gloria.data.prepare.recipe import MEGATRON, Recipe, SourceFile, to_record, tokenizer_place
from gloria.data.prepare.report import NEAR, heading, in_order
from gloria.data.prepare.scatter import RECORD, Frame, long_documents, read_sources
from gloria.data.prepare.split import Split, candidates, most_bytes, validation_bound
from gloria.data.prepare.text import clean
from gloria.data.prepare.workers import Workers
from gloria.data.tokenizer import TextTokenizer, import_tokenizer, train_tokenizer
from gloria.errors import UserError, warn
from gloria.files import size_text

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


def make_corpus(
    recipe: Recipe, files: Sequence[Sequence[SourceFile]], where: str, work: Path, workers: int
) -> tuple[Manifest, PrepareStats]:
    """Make the corpus of a recipe (read from `where`) in `work`/corpus, and return the manifest it lacks.

    `files` are those of each source, as `find_files` gives them; `UserError` says what is wrong with them.
    """
    folder = work / "corpus"
    folder.mkdir()
    start = time.perf_counter()
    try:
        with Workers(workers) as pool:
            states = read_states(files, where, pool)
            if recipe.tokenizer.path:
                tokenizer = import_tokenizer(tokenizer_place(recipe, where), folder / TOKENIZER)
                warn_of_lossy(recipe, tokenizer)
            counts, frames = read_sources(recipe, files, work, str(folder / TOKENIZER), pool)
            if changed := differences(states, files, where):
                raise UserError(f"{shorten(changed)} while it was read; start again when the files are complete")
            size, split = survey_buckets(recipe, counts, frames, pool)
            trained = -time.perf_counter()
            if not recipe.tokenizer.path:
                tokenizer = make_tokenizer(recipe, size, split, frames, work, pool)
            trained += time.perf_counter()
            segments, encoding = tokenise_buckets(counts, split, frames, work, pool)
            shutil.rmtree(work / "spill")
            sources = gather_shards(recipe, counts, segments, tokenizer.vocab_size, folder, pool)
    except (BrokenProcessPool, MemoryError):
        raise UserError(_why_died(work, workers)) from None
    write_states(folder, states)
    stats = PrepareStats(int(size.sum()), time.perf_counter() - start - trained, encoding, workers)
    entry = TokenizerEntry(tokenizer.fingerprint, tokenizer.vocab_size, tokenizer.eos_id, tokenizer.pad_id)
    return Manifest(FORMAT, entry, sources, to_record(recipe)), stats


def warn_of_lossy(recipe: Recipe, tokenizer: TextTokenizer) -> None:
    """Warn where a document can be tokens in one source and text in another without being found to be equal."""
    probe = "Ação, «Ébano»: 12\n  dois"
    if len({source.format == MEGATRON for source in recipe.source}) > 1 and (
        clean(tokenizer.decode(tokenizer.encode(probe))) != probe
    ):
        warn("tokenizer: changes texts, so equal documents in token shards and in text sources may not be found")


def _why_died(work: Path, workers: int) -> str:
    """What to say when a worker was killed or had no memory left: with the longest documents, if any are long."""
    found = [f"{place} ({size_text(size)})" for size, place in long_documents(work)]
    what = "a worker was killed, or ran out of memory"
    fewer = ", use fewer --workers" if workers > 1 else ""
    if found:
        return f"{what}; the longest documents are {shorten(found)}: cut them up{fewer}, or give it more memory"
    return f"{what}; give it more memory{fewer}"


def survey_buckets(
    recipe: Recipe, counts: Sequence[Counter[str]], frames: Sequence[Sequence[Frame]], pool: Workers
) -> tuple[np.ndarray, Split]:
    """Pass 2, first look: what is kept, added to the `counts`; bytes of text by source, (sources,); the split."""
    sources = len(recipe.source)
    size = np.zeros(sources, np.int64)
    for found in pool.map(survey, [BucketTask(bucket, sources) for bucket in frames], "deduplicating"):
        size += found.size
        for key in ("kept", "duplicate", "duplicate_elsewhere"):
            for count, number in zip(counts, getattr(found, key).tolist()):
                count[key] += number
    problems = []
    for source, count in zip(recipe.source, counts):
        if not count["kept"]:
            reasons = [f"{number:,} {heading(key)}" for key, number in count.items() if number and key != "read"]
            left = f"no document is left of {count['read']:,} ({', '.join(reasons)})"
            problems.append(
                f'source "{source.name}": {left if reasons else "its files hold no document"}; '
                "check its paths and options, or remove it"
            )
    if problems:
        raise UserError(*problems)
    split = Split(most_bytes(size), np.zeros(sources, np.uint64))
    chosen = np.empty(0, RECORD)
    fresh: list[np.ndarray] = []
    for records in pool.map(choose, [BucketTask(bucket, sources, split) for bucket in frames], "splitting"):
        fresh.append(records)
        if sum(map(len, fresh)) > MOST_FRESH:
            chosen, fresh = _choose([chosen, *fresh], split), []
    chosen = _choose([chosen, *fresh], split)
    for number in range(sources):
        own = chosen[chosen["source"] == number]
        split.bounds[number] = validation_bound(own["low"], own["size"], int(size[number]))
    return size, split


def _choose(parts: Sequence[np.ndarray], split: Split) -> np.ndarray:
    records = np.concatenate(parts)
    return records[candidates(records["source"], records["low"], records["size"], split.most)]


def make_tokenizer(
    recipe: Recipe, size: np.ndarray, split: Split, frames: Sequence[Sequence[Frame]], work: Path, pool: Workers
) -> TextTokenizer:
    """The tokenizer in `work`/corpus/tokenizer, trained on a sample that is drawn by weight.

    Each source gives its share of `sample_bytes`, as documents of training, or all of them where it has less.
    """
    folder = work / "corpus" / TOKENIZER
    config = recipe.tokenizer
    weights = np.array([source.weight for source in recipe.source])
    chances = config.sample_bytes * weights / weights.sum() / size
    (work / "sample").mkdir()
    tasks = [
        BucketTask(bucket, len(weights), split, chances=chances, out=str(work / "sample" / f"{number:05d}"))
        for number, bucket in enumerate(frames)
    ]
    drawn = sum(pool.map(draw, tasks, "drawing a sample"), np.zeros(len(weights), np.int64))
    parts = ", ".join(f"{source.name} {size / 1e6:.2f}" for source, size in zip(recipe.source, drawn.tolist()))
    print(f"tokenizer: training on {drawn.sum() / 1e6:.2f} MB drawn by weight ({parts})", flush=True)
    tokenizer = train_tokenizer(config, read_sample([task.out for task in tasks]), folder)
    shutil.rmtree(work / "sample")
    return tokenizer


def tokenise_buckets(
    counts: Sequence[Counter[str]], split: Split, frames: Sequence[Sequence[Frame]], work: Path, pool: Workers
) -> tuple[dict[tuple[int, bool], list[Segment]], float]:
    """Pass 2, second look: the buckets' tokens by (source, is validation); seconds spent in the tokenizer.

    Adds to the `counts` how many validation documents are near-duplicates of training text.
    """
    (work / "tokens").mkdir()
    tasks = [
        BucketTask(
            bucket,
            len(counts),
            split,
            tokenizer=str(work / "corpus" / TOKENIZER),
            runs=str(work / "runs.npy"),
            out=str(work / "tokens" / f"{number:05d}"),
        )
        for number, bucket in enumerate(frames)
    ]
    held_out = [document for found in pool.map(collect_runs, tasks, "reading validation") for document in found]
    runs = [runs for _, runs in held_out]
    np.save(work / "runs.npy", np.unique(np.concatenate(runs)) if runs else np.empty(0, np.uint64))
    segments: dict[tuple[int, bool], list[Segment]] = defaultdict(list)
    met = np.empty(0, np.uint64)
    seconds = 0.0
    for found in pool.map(tokenise, tasks, "tokenising"):
        seconds += found.seconds
        met = np.union1d(met, found.met)
        for segment in found.segments:
            segments[segment.source, segment.valid].append(segment)
    for count, number in zip(counts, near_duplicates(held_out, met, len(counts)).tolist()):
        count[NEAR] += number
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
        SourceEntry(source.name, source.weight, train, valid, in_order(count))
        for source, train, valid, count in zip(recipe.source, entries[::2], entries[1::2], counts)
    ]
