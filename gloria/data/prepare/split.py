"""Which documents of a source are for validation: those of the smallest split-hashes, up to a share of its text.

The choice hangs on the documents' contents alone, so neither files nor workers nor other documents' order
move it.
"""

from __future__ import annotations

import numpy as np

SHARE = 0.01  # of a source's text
LEAST_BYTES = 64_000  # some windows also for a small source, but never more than:
MOST_SHARE = 0.10
MOST_BYTES = 8_000_000  # more would only make validation slow


def candidates(source: np.ndarray, split_hash: np.ndarray, size: np.ndarray) -> np.ndarray:
    """Indices of the documents that can be in a validation split: of each source the smallest split-hashes
    until their bytes reach MOST_BYTES, ordered by source and split-hash.

    All three arrays are (documents,). Candidates of parts, put together and chosen from again, are those of
    the whole, so memory stays bounded.
    """
    order = np.lexsort((size, split_hash, source))  # size: so that equal hashes have an order of their own too
    ordered, size = source[order], size[order].astype(np.int64)
    before = np.cumsum(size) - size
    first = np.searchsorted(ordered, ordered)  # where each document's source begins
    return order[before - before[first] < MOST_BYTES]


def validation_bound(split_hash: np.ndarray, size: np.ndarray, documents: int, total: int) -> int:
    """The bound below which a split-hash means validation, for one source of `documents` and `total` bytes.

    `split_hash` and `size` (bytes) are its candidates in ascending order. The smallest go to validation
    until they are 1 % or 64 KB of text, whichever is more; at least one document, and beyond that never
    more than 10 % or 8 MB. A source of a single document keeps it for training: the bound is 0.
    """
    if documents < 2:
        return 0
    most = min(total * MOST_SHARE, MOST_BYTES)
    goal = min(max(total * SHARE, LEAST_BYTES), most)
    reached = np.cumsum(size.astype(np.int64))
    count = min(np.searchsorted(reached, goal) + 1, np.searchsorted(reached, most, side="right"))
    return min(int(split_hash[max(count, 1) - 1]) + 1, 2**64 - 1)
