"""Keyed hashing and shuffling in plain uint64 arithmetic: the same bits on every machine and numpy version.

The hash is splitmix64 (Steele, Lea and Flood, 2014). The shuffle is a Feistel network over `[0, 2**bits)` with
murmur3's 32-bit finaliser as its round function, walked along its cycles until it lands in `[0, size)` (Black and
Rogaway, 2002): a permutation of any size that costs no memory and answers for one index as well as for all.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

ROUNDS = 8
_MASK = (1 << 64) - 1
_GAMMA = 0x9E3779B97F4A7C15
_FIRST = 0xBF58476D1CE4E5B9
_SECOND = 0x94D049BB133111EB
_LONG_GROUP = 256  # indices; below, a numpy call costs more than it does
_POWERS_OF_TWO = np.uint64(1) << np.arange(64, dtype=np.uint64)


def mix(value: int) -> int:
    """splitmix64's output for the state `value`: a bijection of 64-bit numbers."""
    value = (value + _GAMMA) & _MASK
    value = ((value ^ (value >> 30)) * _FIRST) & _MASK
    value = ((value ^ (value >> 27)) * _SECOND) & _MASK
    return value ^ (value >> 31)


def absorb(key: int, value: int) -> int:
    """The key that `key` and a further 64-bit number make together."""
    return mix(key ^ mix(value & _MASK))


def derive_key(seed: int, *parts: str | int) -> int:
    """A 64-bit key for `seed` and any parts; a string counts by its length and its UTF-8 bytes, eight at a time."""
    key = mix(seed & _MASK)
    for part in parts:
        if isinstance(part, str):
            data = part.encode()
            key = absorb(key, len(data))
            for start in range(0, len(data), 8):
                key = absorb(key, int.from_bytes(data[start : start + 8], "little"))
        else:
            key = absorb(key, part)
    return key


def mix_array(values: np.ndarray) -> np.ndarray:
    """`mix` of each number of a uint64 array."""
    values = values + _GAMMA
    values ^= values >> 30
    values *= _FIRST
    values ^= values >> 27
    values *= _SECOND
    values ^= values >> 31
    return values


def absorb_array(keys: np.ndarray, values: np.ndarray) -> np.ndarray:
    """`absorb` of each pair of two uint64 arrays."""
    return mix_array(keys ^ mix_array(values))


def random_numbers(key: int, count: int) -> np.ndarray:
    """The first `count` outputs of splitmix64 started at `key`: uint64 (count,)."""
    return mix_array(np.arange(count, dtype=np.uint64) * _GAMMA + np.uint64(key))


def permute(
    index: np.ndarray, heads: np.ndarray, sizes: np.ndarray, keys: np.ndarray, *, inverse: bool = False
) -> np.ndarray:
    """Send each index through the permutation of its group, or back with `inverse`.

    `index` uint64 (n,) holds one group after the other, group `j` from `heads[j]` on; `sizes` and `keys` are uint64
    (groups,). Group `j` takes the permutation of `[0, sizes[j])` that `keys[j]` names; its indices lie below its
    size. Returns uint64 (n,). A walk takes less than two passes on average (four for a size of 1).
    """
    bits = np.maximum(np.searchsorted(_POWERS_OF_TWO, sizes - np.uint64(1), side="right"), 2).astype(np.uint64)
    low_bits = bits >> 1
    low_mask = ((np.uint64(1) << low_bits) - np.uint64(1)).astype(np.uint32)
    high_mask = ((np.uint64(1) << (bits - low_bits)) - np.uint64(1)).astype(np.uint32)
    round_keys = [mix_array(keys + np.uint64(i * _GAMMA & _MASK)).astype(np.uint32) for i in range(ROUNDS)]
    rounds = list(enumerate(round_keys))  # each undoes itself, so the way back takes them from the last
    network = _Network(sizes, low_bits, low_mask, high_mask, rounds[::-1] if inverse else rounds)
    ends = np.append(heads[1:], index.size)
    if index.size < _LONG_GROUP * heads.size:
        return _walk(index, np.repeat(np.arange(heads.size), ends - heads), network)
    # A scalar for each of a group's parameters is twice as fast as an array that repeats it.
    bounds = zip(np.arange(heads.size), heads.tolist(), ends.tolist())
    return np.concatenate([_walk(index[begin:end], group, network) for group, begin, end in bounds])


class _Network(NamedTuple):
    """Parameters by group: uint64 (groups,), and uint32 (groups,) for what is applied to the halves."""

    sizes: np.ndarray
    low_bits: np.ndarray
    low_mask: np.ndarray
    high_mask: np.ndarray
    rounds: list[tuple[int, np.ndarray]]  # number and keys, in the order in which they are taken


def _walk(index: np.ndarray, group: np.ndarray | np.intp, network: _Network) -> np.ndarray:
    """`index` through the network until it is inside its group's size; `group` is (n,), or one number for all."""
    result = np.empty_like(index)
    places = np.arange(index.size)
    while places.size:
        moved = _pass(index, group, network)
        result[places] = moved
        outside = np.flatnonzero(moved >= network.sizes[group])
        index, places = moved[outside], places[outside]
        group = group[outside] if isinstance(group, np.ndarray) else group
    return result


def _pass(index: np.ndarray, group: np.ndarray | np.intp, network: _Network) -> np.ndarray:
    """The high half takes the hash of the low half, then the low half that of the high half, in turn."""
    shift, low_mask, high_mask = network.low_bits[group], network.low_mask[group], network.high_mask[group]
    high, low = (index >> shift).astype(np.uint32), index.astype(np.uint32) & low_mask
    for number, keys in network.rounds:
        hashed = (high if number % 2 else low) ^ keys[group]
        hashed ^= hashed >> 16
        hashed *= 0x85EBCA6B
        hashed ^= hashed >> 13
        hashed *= 0xC2B2AE35
        hashed ^= hashed >> 16
        if number % 2:
            low ^= hashed & low_mask
        else:
            high ^= hashed & high_mask
    return (high.astype(np.uint64) << shift) | low
