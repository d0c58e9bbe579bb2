"""Bugs prevented: a sample lost, repeated or moved by resuming, by another number of ranks, by new weights or sources;
shares that drift; and data order that hangs on anything but (seed, stages, sample)."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterable
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gloria.data.mixture import Mixture, mixture_from_state, new_mixture
from gloria.data.stages import largest_remainder, period_for, plan_period
from gloria.data.weights import Source, resolve_weights
from gloria.errors import UserError
from tests.data.mixture_reference import Reference, quotas_of

LENGTH = 16
WEIGHTS = {"news": 0.6, "books": 0.3, "poems": 0.1}
WINDOWS = {"news": 1171, "books": 586, "poems": 195}


def sources_of(windows: dict[str, int], length: int = LENGTH) -> dict[str, Source]:
    """Sources of just so many windows, their last one whole and some tail left over."""
    return {name: Source(count * length + 1 + count % 3, f"print of {name}") for name, count in windows.items()}


def mixture_of(
    windows: dict[str, int], weights: dict[str, float], *, seed: int = 1, period: int = 1000, batch: int = 24
) -> Mixture:
    return new_mixture(
        seed, LENGTH, sources_of(windows), weights, global_batch=batch, period=period, tokenizer="tokenizer print"
    )


def listed(mixture: Mixture, first: int, count: int) -> list[tuple[str, int, int]]:
    planned = mixture.plan(first, count)
    triples = zip(*(array.tolist() for array in planned))
    return [(mixture.names[source], epoch, window) for source, epoch, window in triples]


def by_source(samples: Iterable[tuple[str, int, int]]) -> dict[str, list[tuple[int, int]]]:
    found: dict[str, list[tuple[int, int]]] = {}
    for name, epoch, window in samples:
        found.setdefault(name, []).append((epoch, window))
    return found


def assert_epochs_whole(samples: Iterable[tuple[str, int, int]], windows: dict[str, int]) -> None:
    """Each source's epochs follow each other, each whole but for the last, no window twice in any."""
    for name, taken in by_source(samples).items():
        epochs = [epoch for epoch, _ in taken]
        expected = [number // windows[name] for number in range(len(taken))]
        assert epochs == expected, name
        assert len(set(taken)) == len(taken), name


# --- the order itself


GOLDEN = {  # sha256 of the first 10,000 (source, epoch, window) as little-endian int64
    1: "48fcfe15fca6f016500e53f78f9f127706c9bf02a8b931851ad93f2ae21d87a3",
    42: "7ec7516dd3ee8342a6fccbcd9a54125d807a320de73a302f6fd7261ea545a714",
    2**63 + 11: "2a2984af2dccd2fa249215c26da6eadea6ce2d73897c6d67110cedc23db5244b",
}


@pytest.mark.parametrize("seed", GOLDEN)
def test_golden_order(seed: int) -> None:
    """These values never change: a run of today must be resumed by the program of tomorrow."""
    mixture = mixture_of(WINDOWS, WEIGHTS, seed=seed, period=65536)
    samples = np.stack(mixture.plan(0, 10_000), axis=1).astype("<i8")  # (samples, 3)
    assert hashlib.sha256(samples.tobytes()).hexdigest() == GOLDEN[seed]


def test_equals_the_reference_over_a_default_period() -> None:
    mixture = mixture_of(WINDOWS, WEIGHTS, period=65536)
    reference = Reference(1, 65536)
    reference.add(0, WEIGHTS, WINDOWS)
    assert listed(mixture, 0, 4000) == list(reference.walk(4000))
    last = range(65_400, 65_700)  # over the end of a period
    assert listed(mixture, last.start, len(last)) == [reference.at(sample) for sample in last]


def test_tiny_sources_equal_the_reference() -> None:
    windows = {"one": 1, "two": 2, "three": 3, "many": 700}
    weights = {"one": 0.2, "two": 0.1, "three": 0.3, "many": 0.4}
    mixture = mixture_of(windows, weights)
    reference = Reference(1, 1000)
    reference.add(0, weights, windows)
    samples = listed(mixture, 0, 3500)
    assert samples == list(reference.walk(3500))
    assert_epochs_whole(samples, windows)


def test_one_source_is_the_special_case() -> None:
    mixture = mixture_of({"only": 50}, {"only": 3.0})
    reference = Reference(1, 1000)
    reference.add(0, {"only": 3.0}, {"only": 50})
    samples = listed(mixture, 0, 1200)
    assert samples == list(reference.walk(1200))
    assert_epochs_whole(samples, {"only": 50})


def test_a_thousand_sources_at_a_sample_of_1e15() -> None:
    windows = {f"source {number}": 1 + number * number % 977 for number in range(1000)}
    weights = {name: 1 / (number + 1) for number, name in enumerate(windows)}
    mixture = mixture_of(windows, weights, period=16384)
    reference = Reference(1, 16384)
    reference.add(0, weights, windows)
    for first in (0, 10**15):
        samples = range(first, first + 400)
        assert listed(mixture, first, 400) == [reference.at(sample) for sample in samples]
    assert mixture.count_before(10**15 + 7) == reference.ordinals(10**15 + 7)


def test_a_far_sample_costs_what_a_near_one_does() -> None:
    """One period is planned for a few samples, wherever they lie, and none for what comes before them."""
    for first in (0, 10**15):
        mixture = mixture_of(WINDOWS, WEIGHTS, period=65536)
        plan_period.cache_clear()
        mixture.plan(first + 5, 100)
        mixture.count_before(first + 105)
        mixture.epochs_at(first + 205)
        assert plan_period.cache_info().misses == 1


def test_planned_periods_kept_are_few() -> None:
    mixture = mixture_of(WINDOWS, WEIGHTS, period=1000)
    mixture.plan(0, 50_000)
    assert plan_period.cache_info().currsize <= 4


@pytest.mark.parametrize("weights", [WEIGHTS, {"news": 1, "books": 1, "poems": 1}])
def test_one_epoch_covers_every_window_once(weights: dict[str, float]) -> None:
    samples = listed(mixture_of(WINDOWS, weights), 0, 6000)
    taken = by_source(samples)
    for name, count in WINDOWS.items():
        assert sorted(window for epoch, window in taken[name] if epoch == 0) == list(range(count))
    assert_epochs_whole(samples, WINDOWS)


@pytest.mark.parametrize(
    "weights",
    [
        WEIGHTS,
        {"a": 0.10, "b": 0.08, "c": 0.63, "d": 0.06, "e": 0.08, "f": 0.06},
        {f"s{number}": 1 / (number + 1) for number in range(100)},
        {"half": 199.0} | {f"s{number}": 1.0 for number in range(199)},
        {"half": 999.0} | {f"s{number}": 1.0 for number in range(999)},
    ],
)
def test_every_prefix_holds_each_share_to_the_bound_that_is_promised(weights: dict[str, float]) -> None:
    """1 + share * (sources - 2) windows always: each source is within one window of its share by place in the period,
    so their sum is within as many as there are. 1 + 2 * share * sqrt(sources) as a rule: a place's error has a variance
    of 1/6 on average, so that this is 4.9 standard deviations (and 181 windows in an independent draw)."""
    mixture = mixture_of(dict.fromkeys(weights, 10_000), weights, period=65536)
    source = mixture.plan(0, 80_000).source
    samples = np.arange(1, source.size + 1)
    for number, (name, share) in enumerate(mixture.shares.items()):
        off = np.abs(np.cumsum(source == number) - share * samples).max()
        assert off < 1 + share * (len(weights) - 2) + 1e-6, name
        assert off < 1 + 2 * share * len(weights) ** 0.5, name
        total = sum(weights.values())
        assert abs(share - weights[name] / total) <= 1 / 65536


def test_shares_are_exact_after_a_period() -> None:
    mixture = mixture_of(WINDOWS, WEIGHTS, period=1000)
    counts = Counter(mixture.plan(7000, 1000).source.tolist())
    assert counts == {0: 600, 1: 300, 2: 100}


@given(
    st.lists(st.floats(1e-3, 1e3), min_size=1, max_size=8),
    st.integers(1, 5000),
)
def test_quotas_are_the_nearest_whole_numbers(weights: list[float], period: int) -> None:
    quotas = largest_remainder(weights, period)
    named = {str(number): weight for number, weight in enumerate(weights)}
    assert quotas == list(quotas_of(named, period).values())
    assert sum(quotas) == period
    assert all(abs(quota - weight * period / sum(weights)) < 1 + 1e-6 for quota, weight in zip(quotas, weights))
    assert min(largest_remainder(weights, period_for(weights))) >= 1


def test_a_sources_order_hangs_on_its_name_alone() -> None:
    """Other weights, other sources and another order of them move nothing within a source."""
    plain = by_source(listed(mixture_of(WINDOWS, WEIGHTS), 0, 3000))
    others = {"web": 90, "poems": 195, "news": 1171}
    mixed = by_source(listed(mixture_of(others, {"web": 1, "poems": 3, "news": 1}), 0, 3000))
    for name in ("news", "poems"):
        common = min(len(plain[name]), len(mixed[name]))
        assert common > 250
        assert plain[name][:common] == mixed[name][:common]


def test_seeds_and_epochs_have_orders_of_their_own() -> None:
    one, two = (by_source(listed(mixture_of({"a": 100}, {"a": 1}, seed=seed), 0, 200))["a"] for seed in (1, 2))
    assert len({tuple(window for _, window in order) for order in (one[:100], one[100:], two[:100], two[100:])}) == 4


# --- stages


plans = st.lists(
    st.tuples(st.integers(0, 90), st.dictionaries(st.sampled_from("abcdef"), st.integers(0, 9), min_size=1)),
    min_size=1,
    max_size=5,
).filter(lambda plan: all(any(weights.values()) for _, weights in plan))


@settings(max_examples=75, deadline=None)
@given(plans, st.integers(60, 150), st.lists(st.integers(1, 40), min_size=6, max_size=6), st.integers(0, 2**64 - 1))
def test_any_stages_leave_the_past_and_continue_exactly(
    plan: list[tuple[int, dict[str, int]]], period: int, sizes: list[int], seed: int
) -> None:
    """Re-weighted, added, dropped, taken up again, at any sample: always the reference, and every epoch whole."""
    windows = dict(zip("abcdef", sizes))
    mixture = mixture_of(windows, plan[0][1], seed=seed, period=period)
    reference = Reference(seed, period)
    reference.add(0, plan[0][1], windows)
    start = 0
    for gap, weights in plan[1:]:
        start += gap + 1
        before = listed(mixture, 0, start)
        mixture.begin_stage(start, weights)
        reference.add(start, weights, windows)
        assert listed(mixture, 0, start) == before
    total = start + 200
    samples = listed(mixture, 0, total)
    assert samples == [reference.at(sample) for sample in range(total)]
    assert_epochs_whole(samples, windows)
    for sample in (0, start, start + 1, total - 1, total):
        counts = Counter(name for name, _, _ in samples[:sample])
        assert {name: count for name, count in mixture.count_before(sample).items() if count} == counts
        epochs = {name: counts[name] / windows[name] for name in mixture.count_before(sample)}
        assert mixture.epochs_at(sample) == epochs
    copy = mixture_from_state(json.loads(json.dumps(mixture.state_dict())))
    assert listed(copy, 0, total) == samples


def test_a_stage_in_place_of_one_that_was_not_begun() -> None:
    """Weights changed twice between two steps: the first change leaves no trace."""
    once, twice = mixture_of(WINDOWS, WEIGHTS), mixture_of(WINDOWS, WEIGHTS)
    once.begin_stage(333, {"books": 1, "poems": 1})
    twice.begin_stage(333, {"poems": 1})
    twice.begin_stage(333, {"books": 1, "poems": 1})
    assert listed(once, 0, 2000) == listed(twice, 0, 2000)
    assert len(twice.stages) == 2


def test_wrong_weights_change_nothing() -> None:
    mixture = mixture_of(WINDOWS, WEIGHTS)
    before = mixture.state_dict()
    with pytest.raises(UserError):
        mixture.begin_stage(100, {"nwes": 1.0})
    assert mixture.state_dict() == before


# --- steps


def test_steps_stay_exact_over_changes_of_the_batch() -> None:
    mixture = mixture_of(WINDOWS, WEIGHTS, batch=24)
    mixture.change_batch(10, 240, 48)
    mixture.change_batch(13, 384, 8)
    expected = [24] * 10 + [48] * 3 + [8] * 7
    sample = 0
    for step, batch in enumerate(expected):
        assert mixture.samples_of_step(step) == range(sample, sample + batch)
        assert {mixture.step_of_sample(s) for s in mixture.samples_of_step(step)} == {step}
        sample += batch
    mixture.change_batch(13, 384, 24)  # thought better of before step 13
    assert mixture.samples_of_step(14) == range(408, 432)
    assert mixture.samples_of_step(9) == range(216, 240)
    assert mixture.global_batch == 24


# --- what can't be


def error_lines(call: Any, *args: Any, **kwargs: Any) -> list[str]:
    with pytest.raises(UserError) as caught:
        call(*args, **kwargs)
    return list(caught.value.problems)


def test_weights_that_cannot_be_are_all_reported_at_once() -> None:
    sources = sources_of(WINDOWS) | {"verse": Source(14, "p"), "void": Source(0, "p")}
    weights = {"nwes": 1.0, "news": float("nan"), "books": -1.0, "verse": 0.5, "void": 0.1, "poems": 1.0}
    assert error_lines(new_mixture, 1, LENGTH, sources, weights, global_batch=8) == [
        'data.weights.nwes: the corpus has no source "nwes"; did you mean "news"?',
        "data.weights.news: nan is not a share; give a positive number, or 0",
        "data.weights.books: -1.0 is not a share; give a positive number, or 0",
        "data.weights.verse: its 14 tokens hold no window of 16 + 1; lower train.sequence_length, prepare more text or "
        "set the weight to 0",
        "data.weights.void: its 0 tokens hold no window of 16 + 1; lower train.sequence_length, prepare more text or "
        "set the weight to 0",
    ]


def test_no_weight_at_all() -> None:
    lines = error_lines(mixture_of, WINDOWS, {"news": 0, "books": 0})
    assert lines == ["data.weights: no weight is positive; give one source a positive weight"]


def test_a_share_without_a_place_names_the_period_it_needs() -> None:
    weights = {"news": 0.99999, "poems": 0.000001}
    lines = error_lines(mixture_of, WINDOWS, weights, period=65536)
    assert lines == ["data.weights.poems: a share of 1e-06 gets none of 65536 places; set data.period to 999991"]
    mixture = mixture_of(WINDOWS, weights, period=999991)
    assert mixture.shares["poems"] == 1 / 999991


def test_a_share_that_no_period_has_a_place_for() -> None:
    lines = error_lines(mixture_of, WINDOWS, {"news": 1, "poems": 1e-9}, period=65536)
    assert lines == [
        "data.weights.poems: a share of 1e-09 gets none of 65536 places; raise the weight or set it to 0 (data.period "
        "can be 1048576 at most)"
    ]


def test_recipe_weights_stand_in_for_the_corpus_ones() -> None:
    assert resolve_weights(WEIGHTS, {}) == WEIGHTS
    assert resolve_weights(WEIGHTS, {"books": 0, "poems": 2}) == {"news": 0.6, "books": 0, "poems": 2}
    assert error_lines(resolve_weights, WEIGHTS, {"poem": 1, "x": 2}) == [
        'data.weights.poem: the corpus has no source "poem"; did you mean "poems"?',
        'data.weights.x: the corpus has no source "x"; known: news, books, poems',
    ]
