"""Prevents: a validation split that is too small to tell anything, so large that it eats the source, or one that
depends on how the documents were dealt to buckets.
"""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gloria.data.prepare.split import candidates, validation_bound


@pytest.mark.parametrize(
    ("sizes", "documents"),
    [
        ([33_000] * 10, 1),  # ten cantos: one is 10 %, a second would be too much
        ([100] * 100_000, 1000),  # 10 MB: 1 %
        ([100] * 10_000, 640),  # 1 MB: 64 KB, which is more
        ([100] * 1000, 100),  # 100 KB: 10 % at most
        ([500_000] * 2000, 16),  # 1 GB: 8 MB, less than 1 %
        ([900_000, 10], 1),  # at least one, whatever its size
        ([7], 0),  # a single document is for training
    ],
)
def test_how_much_is_for_validation(sizes: list[int], documents: int) -> None:
    hashes, size = np.arange(len(sizes), dtype=np.uint64), np.array(sizes)
    order = candidates(np.zeros(len(sizes), np.int64), hashes, size)
    bound = validation_bound(hashes[order], size[order], len(sizes), sum(sizes))
    assert int((hashes < np.uint64(bound)).sum()) == documents


@settings(deadline=None)
@given(st.lists(st.tuples(st.integers(0, 2), st.integers(0, 2**64 - 1), st.integers(1, 5_000_000)), max_size=60))
def test_candidates_of_parts_do_for_the_whole(documents: list[tuple[int, int, int]]) -> None:
    def choose(rows: list[tuple[int, int, int]]) -> list[tuple[int, int, int]]:
        source, low, size = (np.array([row[i] for row in rows], np.uint64) for i in range(3))
        return [rows[i] for i in candidates(source.astype(np.int64), low, size)]

    def columns(rows: list[tuple[int, int]]) -> tuple[np.ndarray, np.ndarray]:
        return np.array([low for low, _ in rows], np.uint64), np.array([size for _, size in rows], np.int64)

    half = len(documents) // 2
    chosen = choose(documents)
    assert choose(choose(documents[:half]) + choose(documents[half:])) == chosen
    for number in range(3):
        own = sorted(row[1:] for row in documents if row[0] == number)
        count, total = len(own), sum(size for _, size in own)
        bounds = [
            validation_bound(*columns(rows), count, total)
            for rows in (own, [row[1:] for row in chosen if row[0] == number])
        ]
        assert bounds[0] == bounds[1]
