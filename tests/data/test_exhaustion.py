"""Bug prevented: a run that dies, or silently changes its shares, on the day a source runs out."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gloria.data.exhaustion import check_exhaustion, steps_for_epochs, weight_for
from gloria.data.mixture import Mixture
from gloria.errors import UserError
from tests.data.test_mixture import WEIGHTS, WINDOWS, listed, mixture_of


def refusal(mixture: Mixture, end: int, max_epochs: float | None) -> list[str]:
    with pytest.raises(UserError) as caught:
        check_exhaustion(mixture, end, max_epochs)
    return list(caught.value.problems)


def test_the_sample_where_a_source_runs_out_is_named() -> None:
    mixture = mixture_of(WINDOWS, WEIGHTS)
    assert refusal(mixture, 24 * 100, 1) == [
        'data.max_epochs: source "news" runs out at sample 1951 (step 81): 100 steps read its 1171 windows 1.23 times, '
        "more than 1; set data.weights.news to 0.378, train fewer steps or allow more",
        'data.max_epochs: source "books" runs out at sample 1955 (step 81): 100 steps read its 586 windows 1.23 times, '
        "more than 1; set data.weights.books to 0.223, train fewer steps or allow more",
        'data.max_epochs: source "poems" runs out at sample 1954 (step 81): 100 steps read its 195 windows 1.23 times, '
        "more than 1; set data.weights.poems to 0.0776, train fewer steps or allow more",
    ]
    samples = listed(mixture, 0, 2400)
    for name, sample in (("news", 1951), ("books", 1955), ("poems", 1954)):
        assert next(number for number, (n, epoch, _) in enumerate(samples) if n == name and epoch == 1) == sample
    check_exhaustion(mixture, 1951, 1)
    check_exhaustion(mixture, 24 * 100, 1.5)
    check_exhaustion(mixture, 10**15, None)


def test_one_source_alone_has_no_weight_that_would_do() -> None:
    assert refusal(mixture_of({"only": 100}, {"only": 1}), 240, 2) == [
        'data.max_epochs: source "only" runs out at sample 200 (step 8): 10 steps read its 100 windows 2.40 times, '
        "more than 2; train fewer steps or allow more"
    ]


def test_a_new_stage_is_checked_from_where_the_run_stands() -> None:
    mixture = mixture_of(WINDOWS, WEIGHTS)
    mixture.next_sample = 2400
    mixture.begin_stage(2400, {"news": 0.5, "poems": 0.5})
    assert refusal(mixture, 2424, 1)[0].startswith(
        'data.max_epochs: source "news" runs out at sample 2400 (step 100): '
    )
    check_exhaustion(mixture, 2700, 2)
    assert [line.split('"')[1] for line in refusal(mixture, 3000, 2)] == ["poems"]
    mixture.begin_stage(2400, {"news": 1})  # what is out of use runs out no more
    check_exhaustion(mixture, 3000, 2)


def test_many_passes_are_reported_with_the_weight_that_avoids_them() -> None:
    windows = WINDOWS | {"poems": 20}
    mixture = mixture_of(windows, WEIGHTS)
    assert mixture.epochs_at(1200)["poems"] == 6.0
    assert weight_for(mixture, "poems", 1200, 4) == 0.0615
    assert mixture_of(windows, WEIGHTS | {"poems": 0.0615}).epochs_at(1200)["poems"] <= 4


@settings(max_examples=60, deadline=None)
@given(st.integers(5, 60), st.integers(5, 60), st.floats(0.5, 5), st.integers(300, 3000), st.integers(0, 50))
def test_the_weight_that_is_advised_does_what_it_says(
    small: int, other: int, epochs: float, end: int, begun: int
) -> None:
    mixture = mixture_of({"small": small, "other": other}, {"small": 1, "other": 2}, period=1000)
    mixture.next_sample = begun
    weight = weight_for(mixture, "small", end, epochs)
    if mixture.epochs_at(end)["small"] > epochs and weight:
        mixture.begin_stage(begun, {"small": weight, "other": 2})
        assert mixture.epochs_at(end)["small"] <= epochs
        assert mixture.epochs_at(end)["small"] <= epochs


def test_epochs_are_counted_in_windows_of_the_sources_in_use() -> None:
    mixture = mixture_of(WINDOWS, {"news": 1, "poems": 1})
    assert steps_for_epochs(mixture, 1) == 57  # (1171 + 195) / 24 = 56.9
    assert steps_for_epochs(mixture, 0.1) == 6
    assert steps_for_epochs(mixture, 24) == 1366
