"""The order of samples within one stage of a mixture, as pure functions of (seed, stage, sample).

A stage mixes its sources by integer quotas in periods of `period` samples. Within a period the k-th place of a source
with quota c falls somewhere in [k/c, (k+1)/c) of the period, and the source's windows come in an order shuffled anew
each epoch. Any sample is found without drawing those before.

In every prefix a source of share w among n sources has its share to within 1 + w (n - 2) windows, and in practice to
within 1 + 2 w sqrt(n), for the sources' errors are independent: a source of one half to within 2.5 windows among 6
sources and 28 among 1,000 (181 in an independent draw).
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from typing import NamedTuple

import numpy as np

from gloria.config.cli import option
from gloria.data.permutation import absorb_array, derive_key, permute, random_numbers

LARGEST_PERIOD = 1 << 20  # (quota << 40) stays below 2**64, and a planned period below 25 MB
LARGEST = (1 << 62) - 1  # ordinals and samples stay far from the end of int64


class Samples(NamedTuple):
    """Which windows some samples are: three int64 arrays of one length; `source` counts in the stage's names."""

    source: np.ndarray
    epoch: np.ndarray
    window: np.ndarray


@dataclass(frozen=True, eq=False)
class Stage:
    """One unchanging mixture, from sample `start` to the start of the next stage.

    The lists go by source, in order of first use in the run; a source that is left out has quota 0 and keeps its
    place. A source's *ordinal* counts its windows over all epochs: ordinal o is epoch o // windows.
    """

    start: int = option(minimum=0, maximum=LARGEST)
    sequence_length: int = option(minimum=1, maximum=LARGEST)
    names: tuple[str, ...] = option()
    weights: tuple[float, ...] = option(minimum=0)
    quotas: tuple[int, ...] = option(minimum=0, maximum=LARGEST_PERIOD)
    bases: tuple[int, ...] = option(minimum=0, maximum=LARGEST)  # ordinal of the first window in this stage
    taken: tuple[int, ...] = option(minimum=0, maximum=LARGEST)  # samples before this stage
    windows: tuple[int, ...] = option(minimum=1, maximum=LARGEST)
    redefined: tuple[str, ...] = option(())  # sources that have had other shards, or another tokenizer, before
    # A stage that leaves samples out continues the order of an earlier one, which began at `order`, after them:
    # its first sample is that order's draw number `drawn`. `bases` are those of draw 0.
    order: int | None = option(None, minimum=0, maximum=LARGEST)
    drawn: int = option(0, minimum=0, maximum=LARGEST)

    @property
    def period(self) -> int:
        """Samples after which every share is met exactly."""
        return sum(self.quotas)

    def draw_of(self, sample: int) -> int:
        """The number of a sample in the order of this stage."""
        return sample - self.start + self.drawn


def largest_remainder(weights: Sequence[float], period: int) -> list[int]:
    """Quotas that sum to `period`, each within one of its exact share; a tie goes to the earlier weight.

    A weight counts as the decimal number it prints as, so that .6, .3 and .1 sum to one.
    """
    exact = [Fraction(str(weight)) for weight in weights]
    total = sum(exact)
    shares = [weight * period / total for weight in exact]
    quotas = [int(share) for share in shares]
    by_remainder = sorted(range(len(shares)), key=lambda number: quotas[number] - shares[number])
    for number in by_remainder[: period - sum(quotas)]:
        quotas[number] += 1
    return quotas


def period_for(weights: Sequence[float]) -> int:
    """The smallest period that surely gives every positive weight a place."""
    exact = [Fraction(str(weight)) for weight in weights if weight > 0]
    return -(-sum(exact) // min(exact))


@lru_cache(maxsize=4)
def plan_period(seed: int, stage: Stage, number: int) -> Samples:
    """All samples of the stage's `number`-th period, in order; read-only arrays (period,), the last few kept."""
    sources = np.flatnonzero(np.asarray(stage.quotas))  # (sources in use,)
    quotas = np.asarray(stage.quotas)[sources].astype(np.uint64)
    starts = np.concatenate(([0], np.cumsum(quotas)))[:-1].astype(np.uint64)
    of_place = np.repeat(np.arange(sources.size), quotas.astype(np.int64))  # (period,)
    place = np.arange(stage.period, dtype=np.uint64)
    count = place - starts[of_place]  # the k of a source's k-th place

    key = derive_key(seed, "mix", stage.start if stage.order is None else stage.order, number)
    jitter = random_numbers(key, stage.period) >> 24  # 40 bits
    order = np.argsort(((count << 40) + jitter) // quotas[of_place], kind="stable")

    first = np.asarray(stage.bases, dtype=np.uint64)[sources] + np.uint64(number) * quotas
    sizes = np.asarray(stage.windows, dtype=np.uint64)[sources]
    epoch, rest = np.divmod(first[of_place] + count, sizes[of_place])
    changes = np.flatnonzero((np.diff(of_place) != 0) | (np.diff(epoch) != 0)) + 1
    heads = np.concatenate(([0], changes))  # where a (source, epoch) begins; each has a permutation of its own
    keys = np.array([derive_key(seed, "win", stage.names[source]) for source in sources], dtype=np.uint64)
    keys = absorb_array(keys[of_place[heads]], epoch[heads])
    window = permute(rest, heads, sizes[of_place[heads]], keys)

    planned = (sources[of_place[order]], epoch[order].astype(np.int64), window[order].astype(np.int64))
    for array in planned:
        array.flags.writeable = False  # shared by all callers
    return Samples(*planned)


def count_sources(seed: int, stage: Stage, sample: int) -> np.ndarray:
    """How many samples of [stage.start, sample) each source has: int64 (names,), in closed form."""
    counts = _count_draws(seed, stage, stage.draw_of(sample))
    return counts - _count_draws(seed, stage, stage.drawn) if stage.drawn else counts


def _count_draws(seed: int, stage: Stage, draw: int) -> np.ndarray:
    """How many of the draws before `draw` each source has, those left out among them: int64 (names,)."""
    number, rest = divmod(draw, stage.period)
    counts = np.asarray(stage.quotas, dtype=np.int64) * number
    if rest:
        counts += np.bincount(plan_period(seed, stage, number).source[:rest], minlength=counts.size)
    return counts


def ordinals_at(seed: int, stage: Stage, sample: int) -> list[int]:
    """The ordinal of the window that each source gives next, at `sample` of this stage."""
    counts = _count_draws(seed, stage, stage.draw_of(sample))
    return [base + count for base, count in zip(stage.bases, counts.tolist())]


def is_renewed(last: Stage, source: int, sequence_length: int, windows: int, redefined: Collection[str]) -> bool:
    """Whether a source's windows in the stage after `last`, of which the rest is known, are others than in `last`."""
    same = (last.sequence_length, last.windows[source]) == (sequence_length, windows)
    return not same or last.names[source] in redefined


def next_bases(
    seed: int, last: Stage, start: int, sequence_length: int, windows: Sequence[int], redefined: Collection[str]
) -> list[int]:
    """The ordinal at which each source continues in the stage after `last` (its names come first in `windows`).

    It is the source's next ordinal. Where its windows change, it is the beginning of its next epoch, or of this one if
    nothing was read of it. A new source begins at 0.
    """
    bases = [0] * len(windows)
    for source, ordinal in enumerate(ordinals_at(seed, last, start)):
        bases[source] = ordinal
        if is_renewed(last, source, sequence_length, windows[source], redefined):
            bases[source] = -(-ordinal // last.windows[source]) * windows[source]
    return bases


def sample_of_ordinal(seed: int, stage: Stage, source: int, ordinal: int) -> int:
    """The sample at which this stage draws a source's `ordinal`-th window (not before its first sample)."""
    number, count = divmod(ordinal - stage.bases[source], stage.quotas[source])
    places = np.flatnonzero(plan_period(seed, stage, number).source == source)
    return stage.start - stage.drawn + number * stage.period + int(places[count])


def draws_of_window(seed: int, stage: Stage, source: int, window: int, end: int) -> list[tuple[int, int]]:
    """(epoch, sample) of each time that this stage draws a source's `window` before the sample `end`."""
    size = stage.windows[source]
    first, last = (ordinals_at(seed, stage, sample)[source] for sample in (stage.start, end))
    epochs = np.arange(first // size, -(-last // size), dtype=np.uint64)
    if not epochs.size:
        return []
    keys = absorb_array(np.full(epochs.size, derive_key(seed, "win", stage.names[source]), np.uint64), epochs)
    sizes, windows = (np.full(epochs.size, value, np.uint64) for value in (size, window))
    rest = permute(windows, np.arange(epochs.size), sizes, keys, inverse=True)
    ordinals = (epochs * np.uint64(size) + rest).tolist()
    return [
        (ordinal // size, sample_of_ordinal(seed, stage, source, ordinal))
        for ordinal in ordinals
        if first <= ordinal < last
    ]


def stage_at(stages: Sequence[Stage], sample: int) -> int:
    """The number of the stage that `sample` lies in; -1 before the first one."""
    return bisect_right(stages, sample, key=lambda stage: stage.start) - 1


def plan_samples(seed: int, stages: Sequence[Stage], first: int, count: int) -> Samples:
    """The samples [first, first + count), whatever periods and stages they lie in."""
    pieces = []
    end = first + count
    while first < end:
        current = stage_at(stages, first)
        stage = stages[current]
        number, begin = divmod(stage.draw_of(first), stage.period)
        stop = min(end, stages[current + 1].start) if current + 1 < len(stages) else end
        taken = min(stop - first, stage.period - begin)
        planned = plan_period(seed, stage, number)
        pieces.append([array[begin : begin + taken] for array in planned])
        first += taken
    return Samples(*map(np.concatenate, zip(*pieces))) if len(pieces) > 1 else Samples(*pieces[0])
