"""Bug prevented: a shuffle that loses or repeats an index, favours some orders of a small source, or changes with the
machine, the numpy version or the other groups it is computed with."""

from __future__ import annotations

import math
from collections import Counter
from itertools import chain

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gloria.data.permutation import absorb, absorb_array, derive_key, mix, mix_array, permute, random_numbers
from tests.data import mixture_reference as reference

numbers = st.integers(0, 2**64 - 1)


def permute_one(index: list[int], size: int, key: int, *, inverse: bool = False) -> list[int]:
    arrays = (np.array(values, np.uint64) for values in (index, [size], [key]))
    index, sizes, keys = arrays
    return permute(index, np.array([0]), sizes, keys, inverse=inverse).tolist()


@given(st.lists(numbers, min_size=1, max_size=5), numbers)
def test_arrays_hash_as_whole_numbers_do(values: list[int], key: int) -> None:
    array = np.array(values, np.uint64)
    assert mix_array(array).tolist() == [mix(value) for value in values] == [reference.splitmix(v) for v in values]
    keys = np.full(len(values), key, np.uint64)
    assert absorb_array(keys, array).tolist() == [absorb(key, value) for value in values]
    stream = [reference.splitmix((key + i * 0x9E3779B97F4A7C15) % 2**64) for i in range(3)]
    assert random_numbers(key, 3).tolist() == stream


@given(st.integers(0, 2**70), st.lists(st.text() | st.integers(0, 2**63), max_size=4))
def test_keys_are_those_of_the_reference(seed: int, parts: list[str | int]) -> None:
    assert derive_key(seed, *parts) == reference.key_of(seed, *parts)


def test_keys_tell_names_apart() -> None:
    names = ["", "\0", "a", "a\0", "ab", "ba", "wiki", "wiki2", "abcdefgh", "abcdefghi", "ção", "cao"]
    assert len({derive_key(1, "win", name) for name in names}) == len(names)
    assert derive_key(1, "a", "b") != derive_key(1, "ab", "")
    assert derive_key(1, "mix", 2, 3) != derive_key(1, "mix", 3, 2)


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 7, 8, 9, 255, 256, 257, 1171, 4096, 4097, 39062])
def test_every_index_comes_once(size: int) -> None:
    assert sorted(permute_one(list(range(size)), size, 12345)) == list(range(size))


@settings(max_examples=60)
@given(st.integers(1, 2**62), numbers, st.data())
def test_any_size_is_as_in_the_reference(size: int, key: int, data: st.DataObject) -> None:
    index = data.draw(st.lists(st.integers(0, size - 1), min_size=1, max_size=4))
    shuffled = permute_one(index, size, key)
    assert shuffled == [reference.shuffled(i, size, key) for i in index]
    assert permute_one(shuffled, size, key, inverse=True) == index


def test_groups_do_not_touch_each_other() -> None:
    """Long groups are computed one by one and short ones together: both as if each were alone."""
    sizes = [1000, 3, 1, 2, 700, 1, 5000]
    index = [np.arange(size) for size in sizes]
    heads = np.cumsum([0, *sizes[:-1]])
    keys = np.arange(len(sizes), dtype=np.uint64)
    alone = [permute_one(part.tolist(), size, key) for part, size, key in zip(index, sizes, keys.tolist())]
    together = permute(np.concatenate(index).astype(np.uint64), heads, np.array(sizes, np.uint64), keys)
    assert together.tolist() == list(chain(*alone))
    short = slice(1, 4)
    few = np.concatenate(index[short]).astype(np.uint64)
    together = permute(few, heads[short] - heads[1], np.array(sizes[short], np.uint64), keys[short])
    assert together.tolist() == list(chain(*alone[short]))


@pytest.mark.parametrize("size", [2, 3, 4])
def test_all_orders_of_a_small_source_come_alike(size: int) -> None:
    """Chi-squared over the orders that 6,000 keys give; 3.5 standard deviations above its mean would be 1 in 1,000."""
    trials, orders = 6000, math.factorial(size)
    index = np.tile(np.arange(size, dtype=np.uint64), trials)
    keys = random_numbers(99, trials)
    shuffled = permute(index, np.arange(trials) * size, np.full(trials, size, np.uint64), keys).reshape(trials, size)
    counts = Counter(map(tuple, shuffled.tolist()))
    expected = trials / orders
    assert len(counts) == orders
    chi_squared = sum((count - expected) ** 2 for count in counts.values()) / expected
    assert chi_squared < (orders - 1) + 3.5 * math.sqrt(2 * (orders - 1))


def test_neighbours_are_torn_apart() -> None:
    """A source's windows lie in the order of its documents: neighbours must not stay neighbours."""
    size = 10_000
    shuffled = np.array(permute_one(list(range(size)), size, 7), np.int64)
    assert np.count_nonzero(np.abs(np.diff(shuffled)) == 1) < 12  # 2 are expected
    assert abs(np.corrcoef(shuffled, np.arange(size))[0, 1]) < 0.04  # 4 standard deviations
