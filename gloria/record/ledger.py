"""What a run has read of each source: in closed form from the mixture's state, and by counting draw for draw."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from gloria.data.mixture import Mixture
from gloria.data.stages import Stage, count_sources, ordinals_at

CHUNK = 1 << 20  # samples drawn at once, at most


@dataclass(frozen=True)
class Read:
    """What was read of one source."""

    name: str
    windows: int
    tokens: int  # predicted
    asked: float  # mean share of the samples over the stages, as the weights ask
    share: float  # of the samples, as drawn
    epochs: float  # passes over its present windows, counted on from those before


class Counted(NamedTuple):
    """All draws before a sample: int64 (sources,) each."""

    windows: np.ndarray
    epochs: np.ndarray  # the sum of the draws' epoch numbers


def ledger(mixture: Mixture, end: int) -> list[Read]:
    """What the samples before `end` are, by source, in closed form."""
    first = mixture.stages[0].start
    total = max(end - first, 1)
    windows, tokens = dict.fromkeys(mixture.names, 0), dict.fromkeys(mixture.names, 0)
    asked = dict.fromkeys(mixture.names, 0.0)
    for stage, last in stages_before(mixture, end):
        for name, quota, count in zip(stage.names, stage.quotas, count_sources(mixture.seed, stage, last).tolist()):
            windows[name] += count
            tokens[name] += count * stage.sequence_length
            asked[name] += quota / stage.period * (last - stage.start) / total
    epochs = mixture.epochs_at(end)
    return [
        Read(name, windows[name], tokens[name], asked[name], windows[name] / total, epochs.get(name, 0.0))
        for name in mixture.names
    ]


def stages_before(mixture: Mixture, end: int) -> Iterator[tuple[Stage, int]]:
    """Each stage that has samples before `end`, and where it stops."""
    ends = [stage.start for stage in mixture.stages[1:]] + [end]
    for stage, last in zip(mixture.stages, ends):
        if stage.start < min(last, end):
            yield stage, min(last, end)


def tokens_before(mixture: Mixture, end: int) -> int:
    """Tokens that the samples before `end` predict."""
    return sum((last - stage.start) * stage.sequence_length for stage, last in stages_before(mixture, end))


def new_count(mixture: Mixture) -> Counted:
    """Nothing drawn yet."""
    return Counted(*(np.zeros(len(mixture.names), np.int64) for _ in range(2)))


def add_draws(mixture: Mixture, counted: Counted, first: int, end: int) -> None:
    """Draw the samples [first, end) one by one and count them into `counted`."""
    while first < end:
        drawn = mixture.plan(first, min(end - first, CHUNK))
        counted.windows[:] += np.bincount(drawn.source, minlength=counted.windows.size)
        counted.epochs[:] += np.bincount(drawn.source, drawn.epoch, counted.epochs.size).astype(np.int64)
        first += drawn.source.size


def epoch_sums(mixture: Mixture, end: int) -> np.ndarray:
    """The sum of the epoch numbers of each source's samples before `end`, in closed form: int64 (sources,)."""
    sums = np.zeros(len(mixture.names), np.int64)
    for stage, last in stages_before(mixture, end):
        bounds = (ordinals_at(mixture.seed, stage, sample) for sample in (stage.start, last))
        for source, (first, after, size) in enumerate(zip(*bounds, stage.windows)):
            sums[source] += _sum_of_epochs(after, size) - _sum_of_epochs(first, size)
    return sums


def _sum_of_epochs(ordinal: int, size: int) -> int:
    """The sum of o // size over the ordinals o before `ordinal`."""
    epoch, rest = divmod(ordinal, size)
    return size * epoch * (epoch - 1) // 2 + epoch * rest
