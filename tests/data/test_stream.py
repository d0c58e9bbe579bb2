"""Bug prevented: windows that lose or repeat tokens where a shard ends and the next begins, or wrap ids to 16 bits."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gloria.data.stream import TokenStream
from gloria.errors import UserError


def stream_of(sizes: list[int], dtype: str = "<u2") -> TokenStream:
    """Shards of these sizes with the tokens 0, 1, 2, ..."""
    ends = np.cumsum(sizes)
    return TokenStream([np.arange(end - size, end, dtype=dtype) for size, end in zip(sizes, ends)], "print")


@given(st.lists(st.integers(0, 30), min_size=1, max_size=8), st.integers(1, 12), st.randoms())
def test_windows_are_those_of_all_tokens_in_a_row(sizes: list[int], length: int, random) -> None:
    stream = stream_of(sizes)
    tokens = np.arange(sum(sizes))
    assert stream.num_tokens == tokens.size
    assert stream.num_windows(length) == max(0, tokens.size - 1) // length
    windows = list(range(stream.num_windows(length))) * 2
    random.shuffle(windows)
    out = np.zeros((len(windows), length + 1), np.uint16)
    stream.gather(np.array(windows, np.int64), length, out)
    assert out.tolist() == [tokens[w * length : (w + 1) * length + 1].tolist() for w in windows]


def test_windows_go_to_the_rows_that_are_named() -> None:
    out = np.full((5, 4), 9999, np.uint16)
    stream_of([10, 3, 20]).gather(np.array([3, 0, 2]), 3, out, np.array([4, 1, 0]))
    assert out.tolist() == [[6, 7, 8, 9], [0, 1, 2, 3], [9999] * 4, [9999] * 4, [9, 10, 11, 12]]


def test_shards_of_both_kinds_are_widened_and_never_wrapped() -> None:
    wide = np.array([70_000, 70_001, 70_002, 70_003], "<i4")
    stream = TokenStream([np.arange(5, dtype="<u2"), wide], "print")
    assert stream.dtype == np.int32
    out = np.zeros((4, 3), np.int32)
    stream.gather(np.arange(4), 2, out)
    assert out.tolist() == [[0, 1, 2], [2, 3, 4], [4, 70_000, 70_001], [70_001, 70_002, 70_003]]


def test_small_ids_stay_small() -> None:
    assert stream_of([3, 4]).dtype == np.uint16


def test_a_stream_without_tokens_has_no_windows() -> None:
    for shards in ([], [np.empty(0, np.uint16)]):
        stream = TokenStream(shards, "print")
        assert (stream.num_tokens, stream.num_windows(4)) == (0, 0)


def test_a_window_that_is_not_there_is_not_made_up() -> None:
    for sizes in ([10], [5, 5]):
        with pytest.raises(IndexError):
            stream_of(sizes).gather(np.array([3]), 3, np.zeros((1, 4), np.uint16))


def test_mapped_shards_are_read_in_place(tmp_path: Path) -> None:
    np.arange(1000, dtype="<u2").tofile(tmp_path / "shard.bin")
    mapped = np.memmap(tmp_path / "shard.bin", dtype="<u2", mode="r").view(np.ndarray)
    stream = TokenStream([mapped], "print")
    out = np.zeros((2, 101), np.uint16)
    stream.gather(np.array([8, 2]), 100, out)
    assert out[:, 0].tolist() == [800, 200]
    assert all(np.shares_memory(view, mapped) for view in stream._windows_as_items(100))


@pytest.mark.parametrize(("dtype", "wrong"), [("<u2", 500), ("<u2", 65535), ("<i4", 500), ("<i4", -1)])
def test_ids_outside_the_vocabulary_are_named(dtype: str, wrong: int) -> None:
    tokens = np.full(40, 499, dtype)
    tokens[33] = wrong
    stream = TokenStream([tokens[:20], tokens[20:]], "print", 500, ["one", "two"])
    out = np.zeros((8, 5), np.int32)
    stream.gather(np.arange(8), 4, out)
    with pytest.raises(UserError, match=rf"^two: token 13 is {wrong}, outside the vocabulary of 500; "):
        stream.gather(np.array([0, 8]), 4, out)
