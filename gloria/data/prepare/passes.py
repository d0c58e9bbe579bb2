"""The passes of `gloria.prepare` put together: from the files of a recipe to a corpus folder.

The parent plans, the workers do, and what crosses between them is counts and places, never text. Every plan
(which worker reads what, how many buckets) leaves the result as it is.
"""

from __future__ import annotations

import functools
import shutil
import time
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from gloria.data.corpus import FORMAT, SPLITS, TOKENIZER, Manifest, SourceEntry, SplitEntry, TokenizerEntry
from gloria.data.prepare.buckets import (
    Draft,
    GatherTask,
    Segment,
    choose,
    gather,
    survey,
    tokenise,
)
from gloria.data.prepare.inputs import (
    INPUTS,
    InputState,
    SourceRecord,
    differences,
    input_keys,
    read_inputs,
    read_states,
    shorten,
    text_bytes,
    write_inputs,
)
from gloria.data.prepare.overlap import count_near
from gloria.data.prepare.recipe import Recipe, SourceFile, to_record, tokenizer_place
from gloria.data.prepare.report import NEAR, heading, in_order
from gloria.data.prepare.reuse import (
    LIST,
    VERSION,
    ListTask,
    find_known,
    key_of_pieces,
    take_over,
    write_list,
)
from gloria.data.prepare.scatter import (
    RECORD,
    Piece,
    count_buckets,
    long_documents,
    read_sources,
    shared_tokenizer,
)
from gloria.data.prepare.split import Split, candidates, most_bytes, validation_bound
from gloria.data.prepare.training import make_tokenizer, warn_of_lossy, warn_of_training
from gloria.data.prepare.units import Unit, hash_values, run_units
from gloria.data.prepare.workers import Workers
from gloria.data.tokenizer import TextTokenizer, import_tokenizer
from gloria.errors import UserError
from gloria.files import size_text

DISK_PER_TEXT_BYTE = 1.5  # the texts compressed, and two copies of their tokens
MOST_FRESH = 1 << 20  # candidates for validation that wait to be chosen from


@dataclass
class PrepareStats:
    """What the passes took, training a tokenizer apart."""

    text: int  # bytes that were tokenised
    seconds: float  # by the clock
    encoding: float  # seconds in the tokenizer, summed over the workers
    workers: int

    def __str__(self) -> str:
        megabytes, spent = self.text / 1e6, self.seconds * self.workers
        return (
            f"{megabytes:,.1f} MB of text tokenised, in {self.seconds:.1f} s with {self.workers} workers: "
            f"{megabytes / spent:.2f} MB/s each, {self.encoding / spent:.0%} of their time in the tokenizer"
        )


def make_corpus(
    recipe: Recipe,
    files: Sequence[Sequence[SourceFile]],
    where: str,
    work: Path,
    workers: int,
    old: Path | None = None,
) -> tuple[Manifest, PrepareStats]:
    """Make the corpus of a recipe (read from `where`) in `work`/corpus, and return the manifest it lacks.

    `files` are those of each source, as `find_files` gives them; `UserError` says what is wrong with them. What an
    earlier launch has finished in `work` is not done again, nor is what the corpus `old` holds of unchanged sources.
    """
    draft = Draft(recipe, work, count_buckets(files))
    shutil.rmtree(draft.folder, ignore_errors=True)
    draft.folder.mkdir()
    shared_tokenizer.cache_clear()  # of another corpus, whose tokenizer lay in the same place
    start = time.perf_counter()
    try:
        with Workers(workers) as pool:
            states = read_states(files, where, pool, recorded_states(work, old))
            write_inputs(work / INPUTS, states, {})
            tokenizer = None
            if recipe.tokenizer.path:
                tokenizer = import_tokenizer(tokenizer_place(recipe, where), draft.folder / TOKENIZER)
                warn_of_lossy(recipe, tokenizer)
            hashes = {path: states[key].hash for key, path in input_keys(files, where).items()}

            def key_of(number: int, pieces: Sequence[Piece]) -> str:
                return key_of_pieces(recipe, number, pieces, hashes, tokenizer.fingerprint if tokenizer else "")

            def read(numbers: Iterable[int]) -> None:
                require_disk([file for number in numbers for file in files[number]], work)
                keys = {number: functools.partial(key_of, number) for number in numbers}
                chosen = {number: files[number] for number in keys}
                draft.readings |= read_sources(recipe, chosen, keys, work, draft.buckets, pool)

            keys = [key_of(number, [Piece(number, file) for file in found]) for number, found in enumerate(files)]
            if old and tokenizer:
                draft.known = find_known(old, recipe, keys, tokenizer.fingerprint, pool)
            elif old:
                warn_of_training(old)
            read([number for number in range(len(files)) if number not in draft.known])
            as_read = draft.counts()
            counts, size, identity = survey_buckets(draft, pool)
            if changed := drop_changed(draft, identity):
                read(changed)
            if changed_files := differences(states, files, where):
                raise UserError(f"{shorten(changed_files)} while it was read; start again when the files are complete")
            split = split_documents(draft, size, pool)
            trained = -time.perf_counter()
            if tokenizer is None:
                tokenizer = make_tokenizer(draft, size, split, pool)
            trained += time.perf_counter()
            segments, text, encoding = tokenise_buckets(draft, split, tokenizer, pool)
            sources = gather_shards(draft, counts, segments, tokenizer.vocab_size, pool)
            lists = list_documents(draft, pool)
    except (BrokenProcessPool, MemoryError):
        raise UserError(_why_died(work, workers)) from None
    records = {
        source.name: SourceRecord(keys[number], dict(as_read[number]), lists[number], identity[number].tolist())
        for number, source in enumerate(recipe.source)
    }
    write_inputs(draft.folder / INPUTS, states, records)
    stats = PrepareStats(text, time.perf_counter() - start - trained, encoding, workers)
    entry = TokenizerEntry(tokenizer.fingerprint, tokenizer.vocab_size, tokenizer.eos_id, tokenizer.pad_id)
    return Manifest(FORMAT, entry, sources, to_record(recipe)), stats


def require_disk(files: Sequence[SourceFile], work: Path) -> None:
    """`UserError` if the disk may not hold what making a corpus of these files needs; some may be in `work` already."""
    needed = int(DISK_PER_TEXT_BYTE * sum(map(text_bytes, files)))
    free = shutil.disk_usage(work).free + sum(path.stat().st_size for path in work.rglob("*"))
    if free < needed:
        raise UserError(
            f"{work.parent}: making the corpus takes about {size_text(needed)} of disk and {size_text(free)} are free; "
            "free some, or give another --out"
        )


def recorded_states(work: Path, old: Path | None) -> dict[str, InputState]:
    """The states of files that the older corpus and an earlier launch have read."""
    found: dict[str, InputState] = {}
    for folder in (old, work):
        if folder and (inputs := read_inputs(folder)):
            found |= inputs[0]
    return found


def drop_changed(draft: Draft, identity: np.ndarray) -> list[int]:
    """Take the sources of which other documents are kept than before out of the known ones; their numbers.

    An earlier source holds other texts, which are duplicates of theirs.
    """
    changed = [number for number, known in draft.known.items() if identity[number].tolist() != known.record.kept]
    for number in changed:
        name = draft.recipe.source[number].name
        print(f'source "{name}": an earlier source has changed which of its documents are duplicates', flush=True)
        del draft.known[number]
    if draft.known:
        total = len(draft.recipe.source)
        print(f"{len(draft.known)} of {total} sources are unchanged, and taken over", flush=True)
    return changed


def _why_died(work: Path, workers: int) -> str:
    """What to say when a worker was killed or had no memory left: with the longest documents, if any are long."""
    found = [f"{place} ({size_text(size)})" for size, place in long_documents(work)]
    what = "a worker was killed, or ran out of memory"
    fewer = ", use fewer --workers" if workers > 1 else ""
    if found:
        return f"{what}; the longest documents are {shorten(found)}: cut them up{fewer}, or give it more memory"
    return f"{what}; give it more memory{fewer}"


def survey_buckets(draft: Draft, pool: Workers) -> tuple[list[Counter[str]], np.ndarray, np.ndarray]:
    """Pass 2, first look: counts of documents by source; bytes of text of what is kept, (sources,), and which these
    documents are, `Survey.identity`, (sources, 2).
    """
    sources = draft.recipe.source
    counts = draft.counts()
    size, identity = np.zeros(len(sources), np.int64), np.zeros((len(sources), 2), np.uint64)
    for found in pool.map(survey, draft.tasks(), "deduplicating"):
        size += found.size
        identity += found.identity
        for key in ("kept", "duplicate", "duplicate_elsewhere"):
            for count, number in zip(counts, getattr(found, key).tolist()):
                count[key] += number
    problems = []
    for source, count in zip(sources, counts):
        if not count["kept"]:
            reasons = [f"{number:,} {heading(key)}" for key, number in count.items() if number and key != "read"]
            left = f"no document is left of {count['read']:,} ({', '.join(reasons)})"
            problems.append(
                f'source "{source.name}": {left if reasons else "its files hold no document"}; '
                "check its paths and options, or remove it"
            )
    if problems:
        raise UserError(*problems)
    return counts, size, identity


def split_documents(draft: Draft, size: np.ndarray, pool: Workers) -> Split:
    """Which documents are for validation, of sources of `size` bytes each, (sources,)."""
    split = Split(most_bytes(size), np.zeros(len(size), np.uint64))
    chosen = np.empty(0, RECORD)
    fresh: list[np.ndarray] = []
    for records in pool.map(choose, draft.tasks(split=split), "splitting"):
        fresh.append(records)
        if sum(map(len, fresh)) > MOST_FRESH:
            chosen, fresh = _choose([chosen, *fresh], split), []
    chosen = _choose([chosen, *fresh], split)
    for number, total in enumerate(size.tolist()):
        own = chosen[chosen["source"] == number]
        split.bounds[number] = validation_bound(own["low"], own["size"], total)
    return split


def _choose(parts: Sequence[np.ndarray], split: Split) -> np.ndarray:
    records = np.concatenate(parts)
    return records[candidates(records["source"], records["low"], records["size"], split.most)]


def tokenise_buckets(
    draft: Draft, split: Split, tokenizer: TextTokenizer, pool: Workers
) -> tuple[dict[tuple[int, bool], list[Segment]], int, float]:
    """Pass 2, second look: the buckets' tokens by (source, is validation); bytes of text that this launch has
    tokenised, and seconds spent on it in the tokenizer.
    """
    folder = draft.work / "tokens"
    folder.mkdir(exist_ok=True)
    read = {number: reading.keys for number, reading in draft.readings.items()}
    taken_over = {number: known.record.key for number, known in draft.known.items()}
    of_split = [split.most.tolist(), split.bounds.tolist()]
    key = hash_values([VERSION, draft.buckets, read, taken_over, of_split, tokenizer.fingerprint])
    units = [
        Unit(replace(task, out=str(folder / f"{task.number:05d}")), str(folder / f"{task.number:05d}"), key)
        for task in draft.tasks(split=split, tokenizer=str(draft.folder / TOKENIZER))
        if task.frames
    ]
    segments: dict[tuple[int, bool], list[Segment]] = defaultdict(list)
    text, seconds = 0, 0.0
    for unit, (value, is_kept) in run_units(tokenise, units, pool, "tokenising"):
        found = [Segment(unit.out, *row) for row in value["segments"]]
        for segment in found:
            segments[segment.source, segment.valid].append(segment)
        if not is_kept:
            text += sum(segment.size for segment in found)
            seconds += value["seconds"]
    return segments, text, seconds


def gather_shards(
    draft: Draft,
    counts: Sequence[Counter[str]],
    segments: dict[tuple[int, bool], list[Segment]],
    vocab_size: int,
    pool: Workers,
) -> list[SourceEntry]:
    """Pass 3: the shards of each source, for training and validation, and what the manifest says of them."""
    recipe = draft.recipe
    tasks = {
        (number, valid): GatherTask(
            segments.get((number, valid), []),
            str(draft.folder),
            f"{recipe.source[number].name}/{SPLITS[valid]}",
            vocab_size,
            recipe.shard_tokens,
        )
        for number in sorted(draft.readings)
        for valid in (False, True)
    }
    splits = {
        place: split
        for number, known in draft.known.items()
        for place, split in (((number, False), known.entry.train), ((number, True), known.entry.valid))
    }
    for (place, task), shards in zip(tasks.items(), pool.map(gather, list(tasks.values()), "writing shards")):
        documents, tokens, size, words = (
            sum(getattr(segment, key) for segment in task.segments) for key in ("documents", "tokens", "size", "words")
        )
        splits[place] = SplitEntry(documents, tokens, size, words, shards)
    for known in draft.known.values():
        take_over(known, draft.folder)
    entries = [
        SourceEntry(source.name, source.weight, splits[number, False], splits[number, True], {})
        for number, source in enumerate(recipe.source)
    ]
    near = count_near(entries, draft.folder, draft.work, pool)
    return [
        replace(entry, counts=in_order({**count, NEAR: number})) for entry, count, number in zip(entries, counts, near)
    ]


def list_documents(draft: Draft, pool: Workers) -> dict[int, str]:
    """Write the lists of the documents of the sources that were read; the hashes of all lists, by source."""
    tasks = {
        number: ListTask(
            [reading.frames.get(bucket, []) for bucket in range(draft.buckets)],
            str(draft.folder / draft.recipe.source[number].name / LIST),
        )
        for number, reading in draft.readings.items()
    }
    hashes = dict(zip(tasks, pool.map(write_list, list(tasks.values()), "listing documents")))
    return {**{number: known.record.documents for number, known in draft.known.items()}, **hashes}
