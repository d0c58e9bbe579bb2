"""A schedule that remembers instead of computing: resumed, it restarts its warm-up or draws another curve.

Also: a first step at rate 0, `restarts` left out so that the rate stays constant, a longer run that changes
the rates of steps long done.
"""

from __future__ import annotations

import json
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gloria.optim.schedules import ScheduleConfig, changes, describe, learning_rate, problems, state_dict

CONFIGS = {
    "linear": ScheduleConfig("linear", warmup_steps=7),
    "cosine": ScheduleConfig("cosine", warmup_steps=7),
    "cosine_hard": ScheduleConfig("cosine_hard", warmup_steps=7, restarts=3),
    "constant": ScheduleConfig("constant", warmup_steps=7),
}


def peer_lambda(kind: str, warmup: int, total: int, cycles: int):
    """The multiplier of transformers' own schedule as a function of the step."""
    import torch
    from transformers import optimization

    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    made = {
        "linear": lambda: optimization.get_linear_schedule_with_warmup(optimizer, warmup, total),
        "cosine": lambda: optimization.get_cosine_schedule_with_warmup(optimizer, warmup, total),
        "constant": lambda: optimization.get_constant_schedule_with_warmup(optimizer, warmup),
        "cosine_hard": lambda: optimization.get_cosine_with_hard_restarts_schedule_with_warmup(
            optimizer, warmup, total, num_cycles=cycles
        ),
    }[kind]()
    return made.lr_lambdas[0]


@pytest.mark.parametrize("kind", list(CONFIGS))
def test_after_warmup_the_curve_is_that_of_transformers(kind: str) -> None:
    peer = peer_lambda(kind, 7, 100, 3)
    for step in range(7, 100):
        ours = learning_rate(CONFIGS[kind], 1.0, step, 100)
        assert ours == pytest.approx(peer(step), abs=1e-12), (kind, step)


def test_wsd_is_constant_and_then_one_minus_the_root_of_the_share_of_the_decay_done() -> None:
    config = ScheduleConfig("wsd", warmup_steps=5, decay_steps=20, min_ratio=0.1)
    assert [learning_rate(config, 2.0, step, 100) for step in (5, 50, 80)] == [2.0, 2.0, 2.0]
    assert learning_rate(config, 2.0, 85, 100) == pytest.approx(2.0 * (0.1 + 0.9 * 0.5))
    last = learning_rate(config, 2.0, 99, 100)
    assert last == pytest.approx(2.0 * (0.1 + 0.9 * (1 - math.sqrt(19 / 20))))
    assert last > 0.2, "the last step still learns more than the floor"


def test_warmup_starts_above_zero_and_reaches_the_peak_at_its_last_step() -> None:
    config = ScheduleConfig("cosine", warmup_steps=4)
    assert [learning_rate(config, 1.0, step, 40) for step in range(5)] == [0.25, 0.5, 0.75, 1.0, 1.0]
    assert learning_rate(ScheduleConfig("linear"), 1.0, 0, 40) == 1.0, "no warm-up: the peak at once"


def test_restarts_by_length_go_back_to_the_peak_every_cycle() -> None:
    config = ScheduleConfig("cosine_hard", warmup_steps=10, restart_steps=25)
    rates = [learning_rate(config, 1.0, step, 90) for step in range(90)]
    assert [step for step in range(10, 90) if rates[step] == 1.0] == [10, 35, 60, 85]
    assert rates[34] == pytest.approx(0.5 * (1 + math.cos(math.pi * 24 / 25)))


def test_the_floor_is_a_share_of_the_peak() -> None:
    config = ScheduleConfig("linear", min_ratio=0.25)
    assert learning_rate(config, 4.0, 50, 100) == pytest.approx(4.0 * (0.25 + 0.75 * 0.5))
    assert learning_rate(config, 4.0, 100, 100) == 1.0


schedules = st.one_of(
    st.builds(ScheduleConfig, st.just("constant"), st.integers(0, 50)),
    st.builds(
        ScheduleConfig,
        st.just("cosine_hard"),
        st.integers(0, 50),
        st.floats(0, 1),
        restart_steps=st.integers(1, 200),
    ),
    st.builds(ScheduleConfig, st.just("wsd"), st.integers(0, 50), st.floats(0, 1), decay_steps=st.integers(1, 50)),
)


@settings(max_examples=200, deadline=None)
@given(schedules, st.integers(101, 1000), st.integers(1, 1000), st.data())
def test_a_longer_run_keeps_the_rates_of_its_past(
    config: ScheduleConfig, total: int, more: int, data: st.DataObject
) -> None:
    end = total - (config.decay_steps or 0)  # of wsd the steps before its decay
    step = data.draw(st.integers(0, end))
    assert learning_rate(config, 3e-4, step, total) == learning_rate(config, 3e-4, step, total + more)


@settings(max_examples=200, deadline=None)
@given(st.sampled_from([*CONFIGS.values(), ScheduleConfig("wsd", 3, 0.1, decay_steps=5)]), st.integers(10, 10**6))
def test_every_rate_of_a_run_is_above_zero_and_at_most_the_peak(config: ScheduleConfig, total: int) -> None:
    for step in {0, 1, total // 2, total - 2, total - 1}:
        assert 0 < learning_rate(config, 1.0, step, total) <= 1.0, step


def test_the_state_is_plain_and_a_change_of_curve_is_reported() -> None:
    config = ScheduleConfig("cosine", warmup_steps=10)
    state = json.loads(json.dumps(state_dict(config, 1e-3, 40, 100)))
    assert state["lr"] == learning_rate(config, 1e-3, 40, 100)
    assert changes(state, config, 1e-3, 100) == []
    assert changes(state, config, 1e-3, 200) == [
        "total_steps: 100 before, 200 now",
        f"lr: {state['lr']} before, {learning_rate(config, 1e-3, 40, 200)} now",
    ]


@pytest.mark.parametrize(
    ("config", "total", "expected"),
    [
        (
            ScheduleConfig("cosine_hard"),
            None,
            "schedule.restarts: restarts and restart_steps: neither is given; give cosine_hard one of them",
        ),
        (
            ScheduleConfig("cosine_hard", restarts=2, restart_steps=5),
            None,
            "schedule.restarts: restarts and restart_steps: both are given; give cosine_hard one of them",
        ),
        (
            ScheduleConfig("cosine", restart_steps=5),
            None,
            'schedule.restart_steps: is for kind "cosine_hard", but kind is "cosine"; leave it out or change the kind',
        ),
        (
            ScheduleConfig("linear", decay_steps=5),
            None,
            'schedule.decay_steps: is for kind "wsd", but kind is "linear"; leave it out or change the kind',
        ),
        (
            ScheduleConfig("wsd"),
            None,
            'schedule.decay_steps: missing; kind "wsd" needs it, for example a tenth of the steps',
        ),
        (
            ScheduleConfig("constant", min_ratio=0.5),
            None,
            'schedule.min_ratio: 0.5 has no meaning for kind "constant"; leave it out',
        ),
        (
            ScheduleConfig("linear", warmup_steps=11),
            10,
            "schedule.warmup_steps: 11 exceeds the run's 10 steps; shorten the warm-up",
        ),
        (
            ScheduleConfig("wsd", warmup_steps=6, decay_steps=5),
            10,
            "schedule.decay_steps: 5 and warmup_steps 6 together exceed the run's 10 steps; shorten one",
        ),
    ],
)
def test_contradictions_are_reported(config: ScheduleConfig, total: int | None, expected: str) -> None:
    assert [f"{keys[0]}: {what}" for keys, what in problems(config, total)] == [expected]


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (
            ScheduleConfig("cosine_hard", warmup_steps=625, restart_steps=31250),
            "peak 0.0001, warm-up over 625 steps, then cosine to 0 in cycles of 31,250 steps (5.98 of them); "
            "187,500 steps in all",
        ),
        (
            ScheduleConfig("wsd", decay_steps=18_750, min_ratio=0.1),
            "peak 0.0001, constant, then 1 - sqrt to 1e-05 over the last 18,750 steps; 187,500 steps in all",
        ),
        (ScheduleConfig("linear"), "peak 0.0001, linear to 0; 187,500 steps in all"),
    ],
)
def test_a_schedule_is_described_with_its_numbers(config: ScheduleConfig, expected: str) -> None:
    assert list(problems(config, 187_500)) == []
    assert describe(config, 1e-4, 187_500) == expected
