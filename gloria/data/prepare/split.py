"""Which documents of a source are for validation: those of the smallest split-hashes, up to a share of its text.

The choice depends on the documents' contents alone, so neither files nor workers nor other documents' order
change it.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

SHARE = 0.01  # of a source's text
LEAST_BYTES = 64_000  # some windows also for a small source, but never more than:
MOST_SHARE = 0.10
MOST_BYTES = 8_000_000  # more would only make validation slow


@dataclass(frozen=True)
class Split:
    """Which documents are for validation, by source."""

    most: np.ndarray  # int64 (sources,), bytes; longer documents are always for training
    bounds: np.ndarray  # uint64 (sources,), split-hashes up to it are for validation

    def is_valid(self, records: np.ndarray) -> np.ndarray:
        """Whether each document is for validation, bool (documents,), from its hash, size and source."""
        source = records["source"]
        return (records["low"] <= self.bounds[source]) & (records["size"] <= self.most[source])


def most_bytes(total: np.ndarray) -> np.ndarray:
    """The most bytes that may be for validation, int64 (sources,), of sources of `total` bytes each."""
    return np.minimum(total * MOST_SHARE, MOST_BYTES).astype(np.int64)


def candidates(source: np.ndarray, split_hash: np.ndarray, size: np.ndarray, most: np.ndarray) -> np.ndarray:
    """Indices of the documents that can be in a validation split: of each source the smallest split-hashes
    of documents of at most `most` bytes, (sources,), until their bytes reach it, ordered by source and split-hash.

    The first three arrays are (documents,). Candidates of parts, put together and chosen from again, are those of
    the whole, so memory stays bounded.
    """
    order = np.lexsort((size, split_hash, source))  # size: so that equal hashes have an order of their own too
    order = order[size[order].astype(np.int64) <= most[source[order]]]
    ordered, size = source[order], size[order].astype(np.int64)
    before = np.cumsum(size) - size
    first = np.searchsorted(ordered, ordered)  # where each document's source begins
    return order[before - before[first] < most[ordered]]


def validation_bound(split_hash: np.ndarray, size: np.ndarray, total: int) -> int:
    """The highest split-hash that means validation, for one source of `total` bytes.

    `split_hash` and `size` (bytes) are its candidates in ascending order. The smallest go to validation until
    they are 1 % or 64 KB of text, whichever is more, and never more than 10 % or 8 MB: a document that is more by
    itself is passed over. A source that has only such documents (no candidates) keeps them all for training.
    """
    if len(size) == 0:
        return 0
    most = int(most_bytes(np.array(total)))
    goal = min(max(total * SHARE, LEAST_BYTES), most)
    reached = np.cumsum(size.astype(np.int64))
    count = min(np.searchsorted(reached, goal) + 1, np.searchsorted(reached, most, side="right"))
    return int(split_hash[count - 1])
