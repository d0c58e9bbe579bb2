"""The tokens of one source as one long row, cut into windows, wherever its shards begin and end."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


class TokenStream:
    """The shards of a source, mapped and in order, read as windows of `length + 1` tokens.

    Window k is tokens [k * length, (k + 1) * length]: its last token is only a target, and the next window begins
    with it. Tokens after the last whole window are never read. `fingerprint` tells these tokens from any others.
    """

    def __init__(self, shards: Sequence[np.ndarray], fingerprint: str) -> None:
        self.shards = [shard for shard in shards if shard.size]
        self.fingerprint = fingerprint
        self.dtype = np.result_type(np.uint16, *self.shards)  # holds the tokens of every shard
        self._ends = np.cumsum([shard.size for shard in self.shards], dtype=np.int64)  # (shards,)
        self._items: dict[int, list[np.ndarray]] = {}

    @property
    def num_tokens(self) -> int:
        """Tokens in all shards."""
        return int(self._ends[-1]) if self.shards else 0

    def num_windows(self, length: int) -> int:
        """Whole windows with `length` targets each."""
        return max(0, self.num_tokens - 1) // length

    def gather(self, windows: np.ndarray, length: int, out: np.ndarray, rows: np.ndarray | None = None) -> None:
        """Copy each of `windows` int64 (n,) into a row of `out` (at least n, length + 1), which is contiguous.

        Window i goes to `out[rows[i]]`, or to `out[i]` without `rows`. One index takes all windows of a shard at
        once, more than twice as fast as a slice each.
        """
        rows = np.arange(windows.size) if rows is None else rows
        starts = windows * length  # (n,)
        items = self._windows_as_items(length)
        if len(items) == 1:
            _copy(items[0], starts, self.shards[0].dtype, out, rows)
            return
        shard = np.searchsorted(self._ends, starts, side="right")  # (n,), where each window begins
        whole = starts + length < self._ends[shard]
        for number in np.unique(shard[whole]).tolist():
            chosen = whole & (shard == number)
            begin = self._ends[number] - self.shards[number].size
            _copy(items[number], starts[chosen] - begin, self.shards[number].dtype, out, rows[chosen])
        for place in np.flatnonzero(~whole).tolist():
            out[rows[place]] = self._across_shards(int(starts[place]), length + 1, int(shard[place]))

    def _windows_as_items(self, length: int) -> list[np.ndarray]:
        """Each shard as an array (tokens - length,) whose item i is the window that begins at token i, no copy.

        A window as one item of many bytes is copied in one go; as a row of numbers it takes a fifth longer.
        """
        if length not in self._items:
            self._items[length] = [
                np.ndarray(
                    max(0, shard.size - length),
                    np.dtype((np.void, (length + 1) * shard.itemsize)),
                    buffer=shard,
                    strides=shard.strides,
                )
                for shard in self.shards
            ]
        return self._items[length]

    def _across_shards(self, start: int, count: int, shard: int) -> np.ndarray:
        """`count` tokens that begin at `start` in `shard` and reach into the next ones."""
        pieces = []
        begin = start - (int(self._ends[shard]) - self.shards[shard].size)
        while count:
            pieces.append(self.shards[shard][begin : begin + count])
            count -= pieces[-1].size
            begin, shard = 0, shard + 1
        return np.concatenate(pieces)


def _copy(items: np.ndarray, starts: np.ndarray, dtype: np.dtype, out: np.ndarray, rows: np.ndarray) -> None:
    if dtype == out.dtype:
        out.view(items.dtype)[:, 0][rows] = items[starts]
    else:
        out[rows] = items[starts].view(dtype).reshape(starts.size, -1)
