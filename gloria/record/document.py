"""When a run has read a document: where it lies in the corpus, which windows hold it, in which steps they were drawn.

A text is looked for as `gloria.prepare` stores it: cleaned, then as the corpus's own tokens with EOS behind them.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import xxhash

from gloria.data.corpus import SPLITS, Corpus, SplitEntry
from gloria.data.prepare.report import NEAR
from gloria.data.prepare.text import clean
from gloria.data.shards import map_tokens, read_index
from gloria.data.stages import draws_of_window
from gloria.data.tokenizer import load_tokenizer
from gloria.errors import UserError
from gloria.record.history import History
from gloria.record.ledger import stages_before

_ID = re.compile(r"(?P<source>[A-Za-z0-9][A-Za-z0-9._-]*)(/(?P<split>train|valid))?:(?P<number>\d+)")
MOST_STEPS = 20  # that are listed


@dataclass(frozen=True)
class Place:
    """Where a document lies."""

    source: str
    split: str  # train or valid
    number: int  # of the document in the split
    first: int  # token of the split
    end: int


def describe_document(wanted: str, corpus: Corpus, history: History) -> list[str]:
    """Lines that answer whether and when a run has read a document.

    `wanted` is a text, `@FILE` with one, or `SOURCE:NUMBER` (`SOURCE/valid:NUMBER`): a document of a source by number.
    """
    match = _ID.fullmatch(wanted)
    if match and match["source"] in corpus.names:
        places = [_numbered(corpus, match["source"], match["split"] or "train", int(match["number"]))]
        lines = []
    else:
        text = clean(Path(wanted[1:]).read_text(encoding="utf-8") if wanted.startswith("@") else wanted)
        if not text:
            raise UserError("--document: the text is empty once it is cleaned; give another")
        digest = xxhash.xxh3_128_hexdigest(text.encode(), corpus.manifest.recipe.get("seed", 0))
        lines = [f"document  hash {digest}, {len(text.encode()):,} bytes once cleaned"]
        places = list(find_text(text, corpus))
    counts = sum((Counter(source.counts) for source in corpus.manifest.sources), Counter[str]())
    copies = counts["duplicate"] + counts["duplicate_elsewhere"]
    if not places:
        lost = counts.total() - counts["read"] - counts["kept"] - counts[NEAR] - copies
        lines.append(
            f"not in the corpus, so never read: no document of {', '.join(corpus.names)} has exactly this text "
            f"({lost:,} documents were dropped for other reasons than being a duplicate)"
        )
    else:
        lines.append(f"one copy of a text is kept, the first source's; {copies:,} duplicates were dropped in all")
    for place in places:
        lines += _describe(place, history)
    return lines


def find_text(text: str, corpus: Corpus) -> Iterator[Place]:
    """Every document of the corpus that is exactly this cleaned text."""
    tokenizer = load_tokenizer(corpus.tokenizer_folder)
    (ids,) = tokenizer.encode_batch([text])
    ids = np.append(ids, np.array([tokenizer.eos_id], ids.dtype))
    for name in corpus.names:
        for split in SPLITS:
            number = position = 0
            for shard in _shards(corpus, name, split):
                offsets, tokens = read_index(shard).document_offsets(), map_tokens(shard)
                for found in np.flatnonzero(np.diff(offsets) == ids.size).tolist():
                    first = int(offsets[found])
                    if np.array_equal(tokens[first : first + ids.size], ids):
                        yield Place(name, split, number + found, position + first, position + first + ids.size)
                number, position = number + offsets.size - 1, position + int(offsets[-1])


def _shards(corpus: Corpus, name: str, split: str) -> list[Path]:
    entry: SplitEntry = getattr(corpus.source(name), split)
    return [corpus.folder / shard.path for shard in entry.shards]


def _numbered(corpus: Corpus, name: str, split: str, number: int) -> Place:
    rest, position = number, 0
    for shard in _shards(corpus, name, split):
        offsets = read_index(shard).document_offsets()
        if rest < offsets.size - 1:
            first, end = (position + int(offset) for offset in offsets[rest : rest + 2])
            return Place(name, split, number, first, end)
        rest, position = rest - offsets.size + 1, position + int(offsets[-1])
    raise UserError(f"--document: {split} of {name} has {number - rest:,} documents, counted from 0; name one of them")


def _describe(place: Place, history: History) -> Iterator[str]:
    what = f"{place.source}, document {place.number:,} of {place.split}"
    yield f"found     {what}, tokens {place.first:,} to {place.end - 1:,}"
    if place.split == "valid":
        yield "never read: it is held out for validation"
        return
    end = history.mixture.next_sample
    reads = sorted(reads_of(place, history, end))
    if not reads:
        yield f"never read in the {history.mixture.step_of_sample(end):,} steps so far"
        return
    skipped = history.skipped
    yield f"read      in {len({step for step, *_ in reads}):,} steps, {len(reads):,} windows:"
    for step, sample, epoch, window, part in reads[:MOST_STEPS]:
        note = ", whose update was left out" if step + 1 in skipped else ""
        yield f"  step {step:,} (sample {sample:,}): epoch {epoch}, window {window:,} holds {part}{note}"
    if len(reads) > MOST_STEPS:
        yield f"  and {len(reads) - MOST_STEPS:,} more, the last in step {reads[-1][0]:,}"


def reads_of(place: Place, history: History, end: int) -> Iterator[tuple[int, int, int, int, str]]:
    """(step, sample, epoch, window, which part) of each window drawn before `end` that holds tokens of a document."""
    mixture, name = history.mixture, place.source
    for stage, last in stages_before(mixture, end):
        if name not in stage.names or _had_other_tokens(history, name, stage.start):
            continue
        source, length = stage.names.index(name), stage.sequence_length
        first = max(-(-place.first // length) - 1, 0)
        for window in range(first, min((place.end - 1) // length + 1, stage.windows[source])):
            begin, stop = window * length, (window + 1) * length + 1
            held = min(stop, place.end) - max(begin, place.first)
            whole = "all of it" if held == place.end - place.first else f"{held:,} of its tokens"
            for epoch, sample in draws_of_window(mixture.seed, stage, source, window, last):
                yield mixture.step_of_sample(sample), sample, epoch, window, whole


def _had_other_tokens(history: History, name: str, start: int) -> bool:
    """Whether a source had other shards in the stage that begins at `start` than it has now."""
    return any(
        name in stage.redefined for stage in history.mixture.stages if stage.start > start and stage.order is None
    )
