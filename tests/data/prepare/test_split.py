"""Prevents: a validation split that is too small to mean anything, so large that it eats the source, or one that
depends on how the documents were dealt to buckets.
"""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gloria.data.prepare.scatter import RECORD
from gloria.data.prepare.split import Split, candidates, most_bytes, validation_bound

DOCUMENTS = st.lists(
    st.tuples(st.integers(0, 2), st.integers(0, 2**64 - 1), st.integers(1, 9_000_000)),
    max_size=60,
    unique_by=lambda row: row[1],
)


def records_of(rows: list[tuple[int, int, int]]) -> np.ndarray:
    records = np.zeros(len(rows), RECORD)
    for key, column in zip(("source", "low", "size"), zip(*rows)):
        records[key] = column
    return records


def split_of(records: np.ndarray, parts: int = 1) -> Split:
    """The split as `prepare` finds it, from candidates of so many parts."""
    total = np.array([records["size"][records["source"] == source].sum() for source in range(3)])
    split = Split(most_bytes(total), np.zeros(3, np.uint64))

    def choose(rows: np.ndarray) -> np.ndarray:
        return rows[candidates(rows["source"], rows["low"], rows["size"], split.most)]

    chosen = choose(np.concatenate([choose(part) for part in np.array_split(records, parts)]))
    for source in range(3):
        own = chosen[chosen["source"] == source]
        split.bounds[source] = validation_bound(own["low"], own["size"], int(total[source]))
    return split


@pytest.mark.parametrize(
    ("sizes", "documents"),
    [
        ([33_000] * 10, [0]),  # ten cantos: one is 10 %, a second would be too much
        ([100] * 100_000, range(1000)),  # 10 MB: 1 %
        ([100] * 10_000, range(640)),  # 1 MB: 64 KB, which is more
        ([100] * 1000, range(100)),  # 100 KB: 10 % at most
        ([500_000] * 2000, range(16)),  # 1 GB: 8 MB, less than 1 %
        ([321_150, 500, 700, 900, 600, 807], range(1, 6)),  # the large one would be all but everything
        ([500, 321_150, 700, 900, 600, 807], [0, 2, 3, 4, 5]),
        ([9_000_000, 500_000, *[900_000] * 200], [1, 2, 3]),  # 1 % of 189.5 MB; above 8 MB never
        ([900_000, 10], [1]),
        ([3, 3], []),  # two books: none is within the bound
        ([7], []),
    ],
)
def test_how_much_is_for_validation(sizes: list[int], documents: list[int]) -> None:
    records = records_of([(1, number, size) for number, size in enumerate(sizes)])
    assert np.flatnonzero(split_of(records).is_valid(records)).tolist() == list(documents)


@settings(deadline=None)
@given(DOCUMENTS)
def test_no_split_is_above_the_bound_or_depends_on_parts(rows: list[tuple[int, int, int]]) -> None:
    records = records_of(rows)
    split = split_of(records)
    assert split_of(records, 4).bounds.tolist() == split.bounds.tolist()
    valid = split.is_valid(records)
    for source in range(3):
        own = records["source"] == source
        share = int(records["size"][own & valid].sum())
        total = int(records["size"][own].sum())
        assert share <= min(total / 10, 8_000_000)
        assert share or not (own & (records["size"] <= split.most[source])).any(), "one fits and none was taken"
