"""The tokens of one source as one long row, cut into windows, wherever its shards begin and end."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from gloria.errors import UserError


class TokenStream:
    """The shards of a source, mapped and in order, read as windows of `length + 1` tokens.

    Window k is tokens [k * length, (k + 1) * length]: its last token is only a target, and the next window begins
    with it. Tokens after the last whole window are never read. `fingerprint` identifies these tokens.

    With a `vocab_size`, a `UserError` is raised where a window holds an id outside of it; the line begins with the
    shard's entry in `places`.
    """

    def __init__(
        self,
        shards: Sequence[np.ndarray],
        fingerprint: str,
        vocab_size: int | None = None,
        places: Sequence[str] = (),
    ) -> None:
        self.shards = [shard for shard in shards if shard.size]
        self.fingerprint = fingerprint
        self._vocab_size, self._places = vocab_size, places
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
        if len(self.shards) == 1:
            self._copy(0, starts, length, out, rows)
            return
        shard = np.searchsorted(self._ends, starts, side="right")  # (n,), where each window begins
        whole = starts + length < self._ends[shard]
        for number in np.unique(shard[whole]).tolist():
            chosen = whole & (shard == number)
            begin = self._ends[number] - self.shards[number].size
            self._copy(number, starts[chosen] - begin, length, out, rows[chosen])
        for place in np.flatnonzero(~whole).tolist():
            out[rows[place]] = self._across_shards(int(starts[place]), length + 1, int(shard[place]))

    def _copy(self, number: int, starts: np.ndarray, length: int, out: np.ndarray, rows: np.ndarray) -> None:
        """Windows that begin at `starts` (n,) of a shard, and end in it, into rows of `out`."""
        taken = self._windows_as_items(length)[number][starts]
        tokens = taken.view(self.shards[number].dtype).reshape(starts.size, length + 1)
        self._require_known(tokens, number, starts)
        if tokens.dtype == out.dtype:
            out.view(taken.dtype)[:, 0][rows] = taken
        else:
            out[rows] = tokens

    def _require_known(self, tokens: np.ndarray, number: int, starts: np.ndarray) -> None:
        """A `UserError` if `tokens` (n, any), copied from a shard at `starts` (n,), have an id that is no token's."""
        unsigned = tokens.view(f"<u{tokens.itemsize}")  # one maximum finds negative ids, too
        if self._vocab_size is None or unsigned.max(initial=0) < self._vocab_size:
            return
        row, column = np.argwhere(unsigned >= self._vocab_size)[0]
        raise UserError(
            f"{self._places[number]}: token {starts[row] + column} is {tokens[row, column]}, outside the vocabulary of "
            f"{self._vocab_size}; copy the file again from where it was made, or prepare the corpus again"
        )

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
            self._require_known(pieces[-1][None], shard, np.array([begin]))
            count -= pieces[-1].size
            begin, shard = 0, shard + 1
        return np.concatenate(pieces)
