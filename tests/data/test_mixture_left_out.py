"""Prevents: samples that are left out but come back on resume, take others with them, or are counted as trained."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gloria.data.exhaustion import check_exhaustion
from gloria.data.mixture import Mixture, mixture_from_state
from gloria.data.mixture_state import read_state
from gloria.errors import UserError
from tests.data.test_mixture import WEIGHTS, WINDOWS, listed, mixture_of

LATER = {"news": 0.2, "books": 0.3, "poems": 0.5}


def saved(mixture: Mixture) -> dict[str, Any]:
    return json.loads(json.dumps(mixture.state_dict()))


@settings(max_examples=25, deadline=None)
@given(
    gaps=st.lists(
        st.tuples(st.integers(0, 2500), st.integers(1, 1500)), min_size=1, max_size=3, unique_by=lambda gap: gap[0]
    )
)
def test_all_other_samples_come_as_they_would_have(gaps: list[tuple[int, int]]) -> None:
    """Against a list from which the samples are cut out; counts against counting; and the state says it all."""
    order = listed(mixture_of(WINDOWS, WEIGHTS), 0, 9000)
    mixture = mixture_of(WINDOWS, WEIGHTS)
    for start, length in sorted(gaps):
        assert len(mixture.leave_out(range(start, start + length))) == 1
        del order[start : start + length]
    for one in (mixture, mixture_from_state(saved(mixture))):
        assert listed(one, 0, 4000) == order[:4000]
        assert listed(one, 1234, 99) == order[1234:1333]
        for sample in (0, 1000, 2501, 3999):
            counts = one.count_before(sample)
            assert counts == {name: sum(taken == name for taken, _, _ in order[:sample]) for name in WINDOWS}


def test_a_later_stage_continues_behind_the_samples_left_out() -> None:
    mixture = mixture_of(WINDOWS, WEIGHTS)
    mixture.leave_out(range(480, 960))
    mixture.next_sample = 1200
    mixture.begin_stage(1200, LATER)
    for name in WINDOWS:
        following = next(sample for sample in listed(mixture_of(WINDOWS, WEIGHTS), 1680, 3000) if sample[0] == name)
        assert next(sample for sample in listed(mixture, 1200, 3000) if sample[0] == name) == following
    again = mixture_of(WINDOWS, LATER)
    assert again.load_state_dict(saved(mixture)) == []
    assert listed(again, 0, 4000) == listed(mixture, 0, 4000)


def test_a_run_that_continues_keeps_them_out_and_asks_no_second_time() -> None:
    mixture = mixture_of(WINDOWS, WEIGHTS)
    mixture.next_sample = 240
    assert mixture.leave_out(range(480, 500)) == [
        "data.skip_samples: 480:500: left out from step 20 on; sample 480 is the former sample 500"
    ]
    for next_sample in (240, 480, 504, 2400):
        mixture.next_sample = next_sample
        resumed = mixture_of(WINDOWS, WEIGHTS)
        assert resumed.load_state_dict(saved(mixture)) == []
        assert resumed.leave_out(range(480, 500)) == []
        assert resumed.left_out == (range(480, 500),)
        assert resumed.state_dict() == mixture.state_dict()


@settings(max_examples=50, deadline=None)
@given(
    requests=st.lists(
        st.tuples(st.sampled_from([100, 120, 150, 300]), st.sampled_from([20, 50, 100, 150])), min_size=1, max_size=5
    )
)
def test_requests_that_repeat_or_overlap_leave_out_what_the_longest_of_each_start_does(
    requests: list[tuple[int, int]],
) -> None:
    """100:150 and then 100:200, twice, left out 100:350: a gap is as long as its longest request, in any order."""
    mixture, longest = mixture_of(WINDOWS, WEIGHTS), {}
    for start, length in requests:
        if start < max(longest, default=0) and length > longest.get(start, 0):
            with pytest.raises(UserError, match="begin there or later"):
                mixture.leave_out(range(start, start + length))
            continue
        changes = mixture.leave_out(range(start, start + length))
        assert len(changes) == (length != longest.get(start))  # one that is shorter than the gap is reported, too
        longest[start] = max(length, longest.get(start, 0))
        assert mixture.leave_out(range(start, start + longest[start])) == []
    assert mixture.left_out == tuple(range(start, start + length) for start, length in sorted(longest.items()))
    once = mixture_of(WINDOWS, WEIGHTS)
    for start, length in sorted(longest.items()):
        once.leave_out(range(start, start + length))
    assert once.state_dict() == mixture.state_dict()


def test_a_gap_grows_where_other_weights_begin() -> None:
    """There the stage that begins is no gap, and what is left out at it is counted apart."""
    mixture = mixture_of(WINDOWS, WEIGHTS)
    mixture.begin_stage(240, LATER)
    order = listed(mixture, 0, 1000)
    mixture.leave_out(range(240, 250))
    assert mixture.leave_out(range(240, 280)) == [
        "data.skip_samples: 240:280: left out from step 10 on; sample 240 is the former sample 280"
    ]
    assert mixture.leave_out(range(240, 260)) == [
        "data.skip_samples: 240:260: 240:280 are left out already, and stay so"
    ]
    assert listed(mixture, 0, 900) == order[:240] + order[280:940]


def test_samples_behind_a_run_cannot_be_left_out() -> None:
    mixture = mixture_of(WINDOWS, WEIGHTS)
    mixture.next_sample = 480
    with pytest.raises(UserError) as caught:
        mixture.leave_out(range(250, 300))
    assert caught.value.problems == (
        "data.skip_samples: 250:300: the run continues at sample 480; go back with run.resume to a checkpoint of "
        "step 10 or before",
    )
    mixture.leave_out(range(960, 961))
    with pytest.raises(UserError) as caught:
        mixture.leave_out(range(500, 510))
    assert caught.value.problems == (
        "data.skip_samples: 500:510: samples are left out, or weights change, at 960; begin there or later",
    )


def test_weights_do_not_change_where_samples_are_left_out() -> None:
    mixture = mixture_of(WINDOWS, WEIGHTS)
    mixture.leave_out(range(480, 500))
    mixture.next_sample = 480
    other = mixture_of(WINDOWS, LATER)
    with pytest.raises(UserError, match="samples are left out at sample 480, where the run continues"):
        other.load_state_dict(saved(mixture))


def test_the_end_of_a_source_counts_the_windows_left_out() -> None:
    mixture = mixture_of({"only": 1000}, {"only": 1.0})
    mixture.leave_out(range(100, 200))
    check_exhaustion(mixture, 900, 1.0)
    with pytest.raises(UserError, match="runs out at sample 900 "):
        check_exhaustion(mixture, 901, 1.0)


@pytest.mark.parametrize(
    ("change", "line"),
    [
        ({"drawn": 479}, "stages[1]: does not continue after the samples before it"),
        ({"order": 7}, "stages[1]: does not continue after the samples before it"),
        ({"bases": [1, 0, 0]}, "stages[1]: does not continue where the one before it stopped"),
    ],
)
def test_a_damaged_gap_is_refused(change: dict[str, Any], line: str) -> None:
    mixture = mixture_of(WINDOWS, WEIGHTS)
    mixture.leave_out(range(480, 500))
    state = saved(mixture)
    state["stages"][1] |= change
    with pytest.raises(UserError) as caught:
        read_state(state)
    assert caught.value.problems == (f"mixture state: {line}; it is damaged, continue from an older checkpoint",)


def test_a_state_of_the_first_version_is_read() -> None:
    state = saved(mixture_of(WINDOWS, WEIGHTS))
    state["version"] = 1
    for stage in state["stages"]:
        stage.pop("drawn")
        stage.pop("order", None)
    assert listed(mixture_from_state(state), 0, 500) == listed(mixture_of(WINDOWS, WEIGHTS), 0, 500)
