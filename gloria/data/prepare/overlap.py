"""How much of validation is also in training text: runs of 16 tokens that both hold (as Brown et al. 2020, appendix C,
do it with runs of 13 words).

Equal documents are never on both sides; documents that are nearly equal may be, and make a validation loss too low.
It is read from the finished shards, so that no text of a source that has not changed is needed.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from gloria.data.corpus import SourceEntry
from gloria.data.prepare.workers import Workers
from gloria.data.shards import map_tokens, read_index

RUN_TOKENS = 16  # a power of two; about 12 words
NEAR_SHARE = 0.5  # of a document's runs: from here on it is a near-duplicate
CHUNK_TOKENS = 1 << 17  # of a shard, looked at in the processor's cache
_FACTORS = (0x9E3779B97F4A7C15, 0xC2B2AE3D27D4EB4F, 0x165667B19E3779F9, 0xD6E8FEB86659FD93)  # odd: no bit is lost


def runs_of_tokens(tokens: np.ndarray) -> np.ndarray:
    """A hash of each run of RUN_TOKENS tokens, uint64 (tokens - RUN_TOKENS + 1,); none of fewer tokens."""
    runs = tokens.astype(np.uint64)
    width = 1
    for factor in _FACTORS:  # a run of 2n tokens from two of n, modulo 2^64
        if len(runs) <= width:
            return runs[:0]
        runs = runs[:-width] * np.uint64(factor) + runs[width:]
        width *= 2
    return runs * np.uint64(_FACTORS[0])


def documents_runs(prefix: str | os.PathLike[str]) -> list[np.ndarray]:
    """The runs of each document of a shard, uint64 (runs,), without its EOS; documents without any are left out."""
    runs, offsets = runs_of_tokens(map_tokens(prefix, in_order=True)), read_index(prefix).document_offsets()
    found = [runs[start : max(start, end - RUN_TOKENS)] for start, end in itertools.pairwise(offsets)]
    return [own for own in found if len(own)]


class OverlapTask(NamedTuple):
    """A shard of training, and validation's runs: NAME.npy, ascending, and NAME-table.npy."""

    prefix: str
    known: str


def meet(task: OverlapTask) -> np.ndarray:
    """Which of validation's runs a shard of training holds, int64 (places,)."""
    known, table = np.load(f"{task.known}.npy", mmap_mode="r"), np.load(f"{task.known}-table.npy", mmap_mode="r")
    tokens = map_tokens(task.prefix, in_order=True)
    met = np.zeros(len(known), bool)
    for start in range(0, len(tokens), CHUNK_TOKENS):  # a run across two documents has EOS inside: no validation run
        runs = runs_of_tokens(tokens[start : start + CHUNK_TOKENS + RUN_TOKENS - 1])
        met[places_of(runs[table[runs >> _shift(table)]], known)] = True
    return np.flatnonzero(met)


def _shift(table: np.ndarray) -> np.uint64:
    """By how many bits a run is shifted to be a place in a table that says whether there may be such a run."""
    return np.uint64(65 - len(table).bit_length())


def places_of(runs: np.ndarray, known: np.ndarray) -> np.ndarray:
    """Where those of `runs` that are among `known` (ascending) stand in it."""
    places = np.minimum(np.searchsorted(known, runs), max(len(known) - 1, 0))
    return places[known[places] == runs] if len(known) else places[:0]


def count_near(sources: Sequence[SourceEntry], folder: Path, work: Path, pool: Workers) -> list[int]:
    """How many validation documents of each source are near-duplicates of training text of any, in a corpus folder."""
    documents = [
        (number, runs)
        for number, source in enumerate(sources)
        for shard in source.valid.shards
        for runs in documents_runs(folder / shard.path)
    ]
    known = np.unique(np.concatenate([np.empty(0, np.uint64), *(runs for _, runs in documents)]))
    table = np.zeros(1 << max(16, (8 * len(known)).bit_length()), bool)
    table[known >> _shift(table)] = True
    np.save(work / "runs.npy", known)
    np.save(work / "runs-table.npy", table)
    met = np.zeros(len(known), bool)
    train = [str(folder / shard.path) for source in sources for shard in source.train.shards]
    for places in pool.map(meet, [OverlapTask(prefix, str(work / "runs")) for prefix in train], "comparing the splits"):
        met[places] = True
    near = [source for source, runs in documents if met[np.searchsorted(known, runs)].sum() >= NEAR_SHARE * len(runs)]
    return np.bincount(np.array(near, np.int64), minlength=len(sources)).tolist()
