"""Values of a metric with intervals and paired tests, from columns of one row an example. Whole sets, never batches.

A metric is written once, for any weights of the examples: weights of a resample give its bootstrap, weights that
swap two models' answers give a paired test. The figure itself comes from scikit-learn or scipy.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
CHUNK = 100  # resamples at a time: weights are (CHUNK, examples)


@dataclass(frozen=True)
class Measure:
    """A metric on a set: `exact` of its columns (n,) is a float, `weighted` of weights (draws, n) and them (draws,).

    Examples of a group are drawn together. `share`: it is the mean of a column of values from 0 to 1. `reason` says why
    there is no value, `note` what to know of it.
    """

    exact: Callable[..., float]
    weighted: Callable[..., Array] | None
    columns: tuple[Array, ...]
    groups: NDArray[np.int64]
    share: bool = False
    reason: str = ""
    note: str = ""

    @property
    def n(self) -> int:
        return len(self.columns[0])


def mean(weights: Array, values: Array) -> Array:
    return weights @ values / weights.sum(1)


def f1(weights: Array, gold: Array, found: Array, classes: range) -> Array:
    """The mean over `classes` of F1, 0 for a class that is neither there nor predicted (`zero_division=0`)."""
    scores = []
    for each in classes:
        right = weights @ ((gold == each) & (found == each))
        either = weights @ ((gold == each).astype(float) + (found == each))
        scores.append(2 * right / np.maximum(either, 1))
    return np.mean(scores, 0)


def correlation(weights: Array, x: Array, y: Array) -> Array:
    """Pearson's r; x and y are (n,) or (draws, n). NaN where a draw is constant."""

    def average(values: Array) -> Array:
        rows = weights @ values if values.ndim == 1 else np.einsum("rn,rn->r", weights, values)
        return rows / weights.sum(1)

    x, y = x - x.mean(), y - y.mean()  # sums of squares lose digits where the mean is large
    a, b = average(x), average(y)
    spread_x, spread_y = average(x * x) - a * a, average(y * y) - b * b
    constant = (spread_x < 1e-12 * x.var()) | (spread_y < 1e-12 * y.var())
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where(constant, np.nan, (average(x * y) - a * b) / np.sqrt(spread_x * spread_y))


def rank_correlation(weights: Array, x: Array, y: Array) -> Array:
    """Spearman's rho: Pearson's r of the mean ranks within each draw."""
    return correlation(weights, _ranks(weights, x), _ranks(weights, y))


def _ranks(weights: Array, values: Array) -> Array:
    _, place = np.unique(values, return_inverse=True)
    order = np.argsort(place, kind="stable")
    starts = np.searchsorted(place[order], np.arange(place.max() + 1))
    counts = np.add.reduceat(weights[:, order], starts, axis=1)  # (draws, different values)
    return (np.cumsum(counts, 1) - (counts - 1) / 2)[:, place]


def interval(measure: Measure, resamples: int, seed: int) -> tuple[float | None, float | None]:
    """The 95 % interval: Wilson's for a proportion of independent examples, else the bootstrap's percentiles.

    Where all are 0 or all are 1 every resample is the same, which is no interval: it is Wilson's, too, of the groups.
    """
    column = measure.columns[0]
    same = measure.share and column.min() == column.max() and column[0] in (0, 1)
    if same or (measure.share and _is_proportion(measure)):
        from scipy.stats import binomtest

        n = int(measure.groups.max()) + 1
        limits = binomtest(round(float(column.mean()) * n), n).proportion_ci(method="wilson")
        return float(limits.low), float(limits.high)
    if not resamples or measure.weighted is None:
        return None, None
    draws = np.concatenate([measure.weighted(w, *measure.columns) for w in _resamples(measure.groups, resamples, seed)])
    if np.isnan(draws).all():
        return None, None
    low, high = np.nanquantile(draws, [0.025, 0.975])
    return float(low), float(high)


def _is_proportion(measure: Measure) -> bool:
    """Each example is a group of its own, right (1) or wrong (0)."""
    return len(np.unique(measure.groups)) == measure.n and bool(np.isin(measure.columns[0], (0, 1)).all())


def _resamples(groups: NDArray[np.int64], resamples: int, seed: int) -> Iterator[Array]:
    """Weights (draws, n): how often each example is in a resample of as many groups as there are."""
    generator, count = np.random.default_rng(seed), int(groups.max()) + 1
    for start in range(0, resamples, CHUNK):
        size = min(CHUNK, resamples - start)
        drawn = generator.integers(0, count, (size, count)) + np.arange(size)[:, None] * count
        yield np.bincount(drawn.ravel(), minlength=size * count).reshape(size, count)[:, groups].astype(float)


@dataclass(frozen=True)
class Difference:
    """A metric of model A less that of model B on the same examples, its interval and the p-value of a paired test."""

    value: float | None
    low: float | None
    high: float | None
    p: float | None
    n: int
    test: str  # "McNemar, exact" or "randomisation of pairs", or why there is none


def difference(a: Measure, b: Measure, resamples: int, seed: int) -> Difference:
    """Paired: both models are resampled by the same examples; the test swaps their answers group by group.

    A share of independent right answers is tested by McNemar's exact test.
    """
    weighted = a.weighted
    reason = a.reason or b.reason or ("" if weighted else "no paired test for a threshold chosen on these examples")
    if reason or weighted is None:
        return Difference(None, None, None, None, a.n, reason)
    both = tuple(np.concatenate(pair) for pair in zip(a.columns, b.columns))

    def apart(of_a: Array, of_b: Array) -> Array:
        """The difference when A's metric takes the rows of both models with these weights, and B's with those."""
        return weighted(of_a, *both) - weighted(of_b, *both)

    found = float(a.exact(*a.columns) - b.exact(*b.columns))
    draws = np.concatenate(
        [apart(np.hstack([w, 0 * w]), np.hstack([0 * w, w])) for w in _resamples(a.groups, resamples, seed)]
    )
    low, high = map(float, np.nanquantile(draws, [0.025, 0.975]))
    if a.share and _is_proportion(a) and _is_proportion(b):
        from scipy.stats import binomtest

        only_a, only_b = int((a.columns[0] > b.columns[0]).sum()), int((b.columns[0] > a.columns[0]).sum())
        p = binomtest(only_a, only_a + only_b).pvalue if only_a + only_b else 1.0
        return Difference(found, low, high, float(p), a.n, "McNemar, exact")
    generator, extreme = np.random.default_rng(seed), 0
    for start in range(0, resamples, CHUNK):
        size = (min(CHUNK, resamples - start), int(a.groups.max()) + 1)
        swap = generator.integers(0, 2, size)[:, a.groups].astype(float)
        shuffled = apart(np.hstack([1 - swap, swap]), np.hstack([swap, 1 - swap]))
        extreme += int((~(np.abs(shuffled) < abs(found) - 1e-12)).sum())
    return Difference(found, low, high, (extreme + 1) / (resamples + 1), a.n, "randomisation of pairs")
