"""Columns of a log of any length in a bounded number of rows: of each bucket of lines the least and the greatest."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

Key = tuple[str, str]  # (what, of which source; "" for all of them)


@dataclass
class Table:
    """Values by step. Where `width` lines fall into one bucket, it has two rows: the extremes in their order."""

    width: int = 1  # lines of a bucket; up to 2, every line is a row as it is
    steps: list[int] = field(default_factory=list)
    columns: dict[Key, list[float | None]] = field(default_factory=dict)
    means: dict[Key, list[float | None]] = field(
        default_factory=dict
    )  # of the bucket, beside each row; empty unthinned
    out_of_order: int = 0  # rows left out, for they went back to an earlier step: no run of ours writes such
    bucket: list[tuple[int, dict[Key, float]]] = field(default_factory=list)

    def add(self, step: int, values: dict[Key, float]) -> None:
        """One line of the log; steps rise, and a step that comes again takes the place of the one before."""
        if self.bucket and self.bucket[-1][0] == step:
            self.bucket[-1][1].update(values)
            return
        self.bucket.append((step, values))
        if len(self.bucket) > self.width:
            self._flush(self.bucket[:-1])
            self.bucket = self.bucket[-1:]

    def close(self) -> None:
        """After the last line."""
        if self.bucket:
            self._flush(self.bucket)
        self.bucket = []

    def _flush(self, lines: list[tuple[int, dict[Key, float]]]) -> None:
        if len(lines) <= 2:
            for step, values in lines:
                self._row(step, values, values if self.width > 2 else {})
            return
        found: dict[Key, list[float]] = {}
        for _, values in lines:
            for key, value in values.items():
                found.setdefault(key, []).append(value)
        first, second, mean = {}, {}, {}
        for key, of_key in found.items():
            low, high = min(of_key), max(of_key)
            falls = of_key.index(high) < of_key.index(low)
            first[key], second[key] = (high, low) if falls else (low, high)
            mean[key] = sum(of_key) / len(of_key)
        self._row(lines[0][0], first, mean)
        self._row(lines[-1][0], second, mean)

    def _row(self, step: int, values: Mapping[Key, float], mean: Mapping[Key, float]) -> None:
        if self.steps and step <= self.steps[-1]:
            self.out_of_order += 1
            return
        for table, row in ((self.columns, values), (self.means, mean)):
            for key in row:
                if key not in table:
                    table[key] = [None] * len(self.steps)
            for key, column in table.items():
                column.append(row.get(key))
        self.steps.append(step)
