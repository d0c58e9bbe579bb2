"""How much of validation is also in training text: runs of 13 words that both hold (Brown et al. 2020, appendix C).

Equal documents are never on both sides; documents that are nearly equal may be, and make a validation loss too low.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import xxhash

WORDS = 13
NEAR_SHARE = 0.5  # of a document's runs: from here on it is a near-duplicate
_FACTOR = np.uint64(0x9E3779B97F4A7C15)  # odd, so that no bit of a word's hash is lost


def runs_of_words(text: str) -> np.ndarray:
    """A hash of each run of WORDS words, uint64 (words - WORDS + 1,); none in a shorter text."""
    words = np.array([xxhash.xxh3_64_intdigest(word) for word in text.encode().split()], np.uint64)
    count = max(len(words) - WORDS + 1, 0)
    runs = np.zeros(count, np.uint64)
    for offset in range(WORDS):
        runs = runs * _FACTOR + words[offset : offset + count]  # modulo 2^64
    return runs


def places_of(runs: np.ndarray, known: np.ndarray) -> np.ndarray:
    """Where those of `runs` that are among `known` (ascending) stand in it."""
    places = np.minimum(np.searchsorted(known, runs), max(len(known) - 1, 0))
    return places[known[places] == runs] if len(known) else places[:0]


def near_duplicates(documents: Sequence[tuple[int, np.ndarray]], met: np.ndarray, sources: int) -> np.ndarray:
    """How many validation documents of each source are near-duplicates of training text, int64 (sources,).

    `documents` are (source, runs); `met` are those of their runs that are also in training text, ascending.
    """
    near = [source for source, runs in documents if len(places_of(runs, met)) >= NEAR_SHARE * len(runs)]
    return np.bincount(np.array(near, np.int64), minlength=sources)
