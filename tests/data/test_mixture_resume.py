"""Bugs prevented: a run resumed on other data than it read without a word, a source begun again from its first window,
a harmless change refused, and a damaged state believed."""

from __future__ import annotations

import copy
import json
from collections import Counter
from collections.abc import Iterator
from functools import reduce
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gloria.data import mixture as mixture_module
from gloria.data.mixture import Mixture, mixture_from_state, new_mixture
from gloria.data.weights import Source
from gloria.errors import UserError
from tests.data.mixture_reference import Reference
from tests.data.test_mixture import LENGTH, WEIGHTS, WINDOWS, assert_epochs_whole, by_source, listed, sources_of

STATE_DAMAGED = "it is damaged, continue from an older checkpoint"


def run_of(
    weights: dict[str, float] | None = None,
    *,
    sources: dict[str, Source] | None = None,
    length: int = LENGTH,
    batch: int = 24,
    period: int = 1000,
    seed: int = 1,
    tokenizer: str = "tokenizer print",
) -> Mixture:
    sources = sources or sources_of(WINDOWS | {"web": 400})
    return new_mixture(
        seed, length, sources, weights or WEIGHTS, global_batch=batch, period=period, tokenizer=tokenizer
    )


def state_at(sample: int, mixture: Mixture | None = None) -> dict[str, Any]:
    """What a checkpoint holds, as it comes back from a file."""
    mixture = mixture or run_of()
    mixture.next_sample = sample
    return json.loads(json.dumps(mixture.state_dict()))


def refusal(mixture: Mixture, state: dict[str, Any], **permitted: Any) -> list[str]:
    before = mixture.state_dict()
    with pytest.raises(UserError) as caught:
        mixture.load_state_dict(state, **permitted)
    assert mixture.state_dict() == before, "a refused state must change nothing"
    return list(caught.value.problems)


# --- what changes nothing


@pytest.mark.parametrize("step", [0, 1, 41, 42, 100, 333])
def test_the_same_run_continues_at_any_step(step: int) -> None:
    resumed = run_of()
    assert resumed.load_state_dict(state_at(step * 24)) == []
    assert resumed.next_sample == step * 24
    assert listed(resumed, 0, 9000) == listed(run_of(), 0, 9000)
    assert len(resumed.stages) == len(resumed.batches) == 1


def test_a_state_is_plain_json_and_small() -> None:
    state = run_of().state_dict()
    assert json.loads(json.dumps(state)) == state
    assert list(state) == ["version", "seed", "next_sample", "stages", "batches", "fingerprints"]
    assert len(json.dumps(state)) < 1000


def test_a_new_source_that_is_not_used_is_no_change() -> None:
    more = run_of(sources=sources_of(WINDOWS | {"new": 5}))
    assert more.load_state_dict(state_at(240)) == []


# --- what begins a stage


def test_new_weights_sources_and_batch_begin_at_the_next_sample() -> None:
    resumed = run_of({"news": 0.2, "books": 0.3, "web": 0.5}, batch=48)
    assert resumed.load_state_dict(state_at(2400)) == [
        'data.weights: from sample 2400 (step 100) on: "news" 0.2 (0.6 before), "poems" left out after 1.23 epochs, '
        '"web" 0.5 (new)',
        "train.global_batch: from step 100 on: 48 (24 before)",
    ]
    assert listed(resumed, 0, 2400) == listed(run_of(), 0, 2400)
    assert resumed.samples_of_step(99) == range(2376, 2400)
    assert resumed.samples_of_step(100) == range(2400, 2448)
    again = run_of()
    assert again.load_state_dict(state_at(2400 + 48 * 10, resumed)) == [
        'data.weights: from sample 2880 (step 110) on: "news" 0.6 (0.2 before), "poems" 0.1 (used again after 1.23 '
        'epochs), "web" left out after 0.60 epochs',
        "train.global_batch: from step 110 on: 24 (48 before)",
    ]
    assert_epochs_whole(listed(again, 0, 9000), WINDOWS | {"web": 400})
    assert again.samples_of_step(111) == range(2904, 2928)


def test_another_period_begins_a_stage_only_if_the_quotas_are_others() -> None:
    resumed = run_of(period=2000)
    assert resumed.load_state_dict(state_at(240)) == []  # shares are as they were: nothing to report
    assert [stage.period for stage in resumed.stages] == [1000, 2000]
    assert_epochs_whole(listed(resumed, 0, 5000), WINDOWS)


def test_a_change_taken_back_before_a_step_leaves_no_trace() -> None:
    changed = run_of({"news": 1.0, "web": 1.0})
    changed.load_state_dict(state_at(240))
    back = run_of()
    back.load_state_dict(state_at(240, changed))
    assert listed(back, 0, 240) == listed(run_of(), 0, 240)
    assert_epochs_whole(listed(back, 0, 5000), WINDOWS)
    assert mixture_from_state(back.state_dict()).names == ("news", "books", "poems")


# --- what is refused, and what the flags allow


def test_another_sequence_length_needs_new_epoch() -> None:
    longer = run_of(length=32)
    assert refusal(longer, state_at(2400), allow_change=True) == [
        "train.sequence_length: the run's windows are of 16, not 32; set 16, or begin each source's next epoch with "
        "--data.new-epoch"
    ]
    assert longer.load_state_dict(state_at(2400), new_epoch=True) == [
        'data.corpus: from sample 2400 (step 100) on: "news" has new windows, epoch 2 begins; 902 windows (14432 '
        "tokens) of epoch 1 stay unread",
        'data.corpus: from sample 2400 (step 100) on: "books" has new windows, epoch 2 begins; 452 windows (7232 '
        "tokens) of epoch 1 stay unread",
        'data.corpus: from sample 2400 (step 100) on: "poems" has new windows, epoch 2 begins; 150 windows (2400 '
        "tokens) of epoch 1 stay unread",
    ]
    assert listed(longer, 0, 2400) == listed(run_of(), 0, 2400)
    after = by_source(listed(longer, 2400, 4000))
    for name, windows in WINDOWS.items():
        half = (windows * 16 + windows % 3) // 32
        assert sorted(window for epoch, window in after[name] if epoch == 2) == list(range(half))
        assert min(epoch for epoch, _ in after[name]) == 2
    assert longer.count_before(6400) == {"news": 3840, "books": 1920, "poems": 640}
    # And on with the new length, without the flag; then back to the old one.
    assert run_of(length=32).load_state_dict(state_at(2424, longer)) == []
    assert len(run_of().load_state_dict(state_at(2424, longer), new_epoch=True)) == 3


def test_a_sequence_length_thought_better_of() -> None:
    longer = run_of(length=32)
    longer.load_state_dict(state_at(2400), new_epoch=True)
    back = run_of()
    back.load_state_dict(state_at(2400, longer), new_epoch=True)
    assert listed(back, 0, 5000) == listed(run_of(), 0, 2400) + listed(back, 2400, 2600)
    assert_epochs_whole(listed(back, 0, 5000), WINDOWS)
    assert mixture_from_state(back.state_dict()) is not None


def test_what_is_unread_where_an_epoch_has_just_ended() -> None:
    place = 'data.corpus: from sample {} (step {}) on: "poems" has new windows, epoch {} begins; '
    for sample, epoch, unread in (
        (390, 2, "none stays unread"),
        (395, 3, "190 windows (3040 tokens) of epoch 2 stay unread"),
    ):
        state = state_at(sample, run_of({"poems": 1.0}, batch=5))
        lines = run_of({"poems": 1.0}, batch=5, length=32).load_state_dict(state, new_epoch=True)
        assert lines == [place.format(sample, sample // 5, epoch) + unread]


def test_other_shards_need_allow_change() -> None:
    other = sources_of(WINDOWS) | {"books": Source(100 * 16 + 1, "another print")}
    resumed = run_of(sources=other)
    assert refusal(resumed, state_at(2400), new_epoch=True) == [
        'data.corpus: the shards of source "books" were print of books, not another print; use the same, or begin its '
        "next epoch with --data.allow-change"
    ]
    assert resumed.load_state_dict(state_at(2400), allow_change=True) == [
        'data.corpus: from sample 2400 (step 100) on: "books" has new windows, epoch 2 begins; 452 windows (7232 '
        "tokens) of epoch 1 stay unread"
    ]
    after = by_source(listed(resumed, 2400, 3000))
    assert sorted(window for epoch, window in after["books"] if epoch == 2) == list(range(100))
    samples = [sample for sample in listed(resumed, 0, 5400) if sample[0] != "books"]
    assert_epochs_whole(samples, WINDOWS)
    assert run_of(sources=other).load_state_dict(state_at(2424, resumed)) == []


def test_another_tokenizer_makes_all_windows_others() -> None:
    resumed = run_of(tokenizer="another")
    assert refusal(resumed, state_at(24)) == [
        "data.corpus: the tokenizer of the run was tokenizer print, not another; use the same, or begin each source's "
        "next epoch with --data.allow-change"
    ]
    assert len(resumed.load_state_dict(state_at(24), allow_change=True)) == 3
    assert {epoch for _, epoch, _ in listed(resumed, 24, 100)} == {1}


def test_a_source_that_is_gone() -> None:
    fewer = {"news": 1171, "poems": 195}
    weights = {"news": 0.6, "poems": 0.1}
    resumed = run_of(weights, sources=sources_of(fewer))
    assert refusal(resumed, state_at(240)) == [
        'data.corpus: source "books" of the run is not there; put it back, or continue without it '
        "with --data.allow-change"
    ]
    lines = resumed.load_state_dict(state_at(240), allow_change=True)
    assert '"books" left out after 0.12 epochs' in lines[0]
    # Where it was out of use already nothing is missing, and it goes on when it is back.
    later = run_of(weights, sources=sources_of(fewer))
    assert later.load_state_dict(state_at(480, resumed)) == []
    back = run_of()
    back.load_state_dict(state_at(720, later))
    assert_epochs_whole(listed(back, 0, 5000), WINDOWS)


def test_another_seed_is_another_run() -> None:
    assert refusal(run_of(seed=2), state_at(24), allow_change=True, new_epoch=True) == [
        "run.seed: the run began with 1, not 2; set 1, or begin another run"
    ]


def test_all_refusals_come_at_once() -> None:
    other = sources_of(WINDOWS) | {"books": Source(2000, "another print")}
    resumed = run_of(seed=3, sources=other, length=8, tokenizer="another")
    places = [line.split(":")[0] for line in refusal(resumed, state_at(24))]
    assert places == ["run.seed", "train.sequence_length", "data.corpus", "data.corpus"]


def test_the_order_of_another_version(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its past can't be shown, and what it has read counts."""
    state = state_at(2400)
    state["fingerprints"]["algorithm"] = "gloria-mixture-0"
    resumed = run_of()
    assert refusal(resumed, state) == [
        "data.corpus: the data order of the run was gloria-mixture-0, not gloria-mixture-1; use the same, or begin "
        "each source's next epoch with --data.allow-change"
    ]
    assert len(resumed.load_state_dict(state, allow_change=True)) == 3
    assert {epoch for _, epoch, _ in listed(resumed, 2400, 100)} == {2}
    assert resumed.count_before(2500) == {"news": 1500, "books": 750, "poems": 250}
    with pytest.raises(UserError) as caught:
        resumed.plan(2399, 1)
    assert caught.value.problems == ("sample 2399: is of an older version's order; name one from 2400 on",)
    again = run_of()
    assert again.load_state_dict(state_at(2424, resumed)) == []
    assert listed(again, 2400, 500) == listed(resumed, 2400, 500)
    assert mixture_module.ALGORITHM == "gloria-mixture-1"


# --- damage


def two_stages() -> dict[str, Any]:
    mixture = run_of()
    mixture.begin_stage(240, {"news": 1, "web": 1})
    mixture.change_batch(20, 480, 48)
    return state_at(480 + 48, mixture)


DAMAGE = [
    (lambda s: s.pop("seed"), "mixture state: seed: missing; give it"),
    (lambda s: s.update(extra=1), "mixture state: extra: unknown key; known: {keys}"),
    (
        lambda s: s.update(next_sample="9"),
        'mixture state: next_sample: must be a whole number, not "9"; for example 1000',
    ),
    (
        lambda s: s.update(version=3),
        "mixture state: has version 3, this program reads up to 2; use the one that wrote it",
    ),
    (lambda s: s.update(next_sample=481), "mixture state: next_sample: no step begins at 481; {damaged}"),
    (
        lambda s: s.update(next_sample=0),
        "mixture state: next_sample: no step begins at 0; {damaged}",
    ),
    (lambda s: s.update(seed=-1), "mixture state: seed: -1 is too small; give at least 0"),
    (
        lambda s: s["batches"][1].update(batch=2**40),
        "mixture state: batches[1].batch: 1099511627776 is too large; give at most 16777216",
    ),
    (
        lambda s: [stage["names"].__setitem__(0, "\ud800") for stage in s["stages"]],
        "mixture state: stages[0]: has an impossible name; {damaged}",
    ),
    (
        lambda s: s["stages"][1]["bases"].__setitem__(3, 1),
        "mixture state: stages[1]: does not continue where the one before it stopped; {damaged}",
    ),
    (lambda s: s.update(stages=[]), "mixture state: has no stages or no batches; {damaged}"),
    (lambda s: s.update(batches=[]), "mixture state: has no stages or no batches; {damaged}"),
    (lambda s: s["stages"].reverse(), "mixture state: stages[1]: does not follow the one before it; {damaged}"),
    (
        lambda s: s["stages"][0]["quotas"].reverse(),
        "mixture state: stages[0]: its quotas are not those of its weights; {damaged}",
    ),
    (lambda s: s["stages"][1]["names"].pop(), "mixture state: stages[1]: its lists do not fit its names; {damaged}"),
    (
        lambda s: s["stages"][1]["names"].__setitem__(3, "news"),
        "mixture state: stages[1]: its lists do not fit its names; {damaged}",
    ),
    (
        lambda s: s["stages"][1]["redefined"].append("x"),
        "mixture state: stages[1]: redefines a source it does not have; {damaged}",
    ),
    (
        lambda s: s["stages"][1].update(quotas=[0, 0, 0, 0]),
        "mixture state: stages[1]: has an impossible period of 0; {damaged}",
    ),
    (
        lambda s: s["stages"][1]["taken"].__setitem__(0, 145),
        "mixture state: stages[1]: begins at 240, after 241 samples; {damaged}",
    ),
    (
        lambda s: s["stages"][1]["bases"].__setitem__(1, 7),
        "mixture state: stages[1]: does not continue where the one before it stopped; {damaged}",
    ),
    (
        lambda s: s["stages"][0]["bases"].__setitem__(1, 7),
        "mixture state: stages[1]: does not continue where the one before it stopped; {damaged}",
    ),
    (
        lambda s: s["stages"][0]["windows"].__setitem__(0, 0),
        "mixture state: stages[0].windows[0]: 0 is too small; give at least 1",
    ),
    (lambda s: s["batches"].pop(0), "mixture state: batches[0]: is not the first step's; {damaged}"),
    (
        lambda s: s["batches"][1].update(sample=481),
        "mixture state: batches[1]: does not follow the one before it; {damaged}",
    ),
    (
        lambda s: s["batches"][1].update(batch=0),
        "mixture state: batches[1].batch: 0 is too small; give at least 1",
    ),
    (
        lambda s: s["fingerprints"]["sources"].pop("news"),
        "mixture state: fingerprints.sources: are not those of the stages' sources; {damaged}",
    ),
    (
        lambda s: s["fingerprints"].update(sequence_length=8),
        "mixture state: fingerprints.sequence_length: is not that of the last stage; {damaged}",
    ),
]


@pytest.mark.parametrize("number", range(len(DAMAGE)))
def test_a_damaged_state_is_refused(number: int) -> None:
    damage, line = DAMAGE[number]
    state = two_stages()
    mixture_from_state(copy.deepcopy(state))  # sound as it is
    damage(state)
    keys = "version, seed, next_sample, stages, batches, fingerprints"
    assert refusal(run_of(), state) == [line.format(damaged=STATE_DAMAGED, keys=keys)]


def test_a_state_that_does_not_fit_its_shards_or_its_step_is_refused() -> None:
    state = state_at(240)
    state["stages"][0]["windows"][1] += 1
    assert refusal(run_of(), state, allow_change=True, new_epoch=True) == [
        'mixture state: has 587 windows of source "books", whose shards hold 586; ' + STATE_DAMAGED
    ]
    assert refusal(run_of(), state_at(240), step=11) == [
        f"mixture state: next_sample: step 10 begins at 240, and 11 steps were done; {STATE_DAMAGED}"
    ]
    assert run_of().load_state_dict(state_at(240), step=10) == []


WRONG = [None, -1, 0, 2**62, 2**64, 10**30, 0.5, 1e308, "", "\ud800", True, [], {}, [1], [[]], {"a": 1}]


def places_in(tree: Any, place: tuple = ()) -> Iterator[tuple]:
    for key in tree if isinstance(tree, dict) else range(len(tree)) if isinstance(tree, list) else ():
        yield (*place, key)
        yield from places_in(tree[key], (*place, key))


def test_any_forged_value_is_refused_or_leaves_a_state_that_works() -> None:
    """Of 190 forged values 53 were tracebacks."""
    gap = run_of()
    gap.leave_out(range(480, 500))
    for sound in (two_stages(), state_at(24, gap)):
        for place in places_in(sound):
            for value in WRONG:
                state = copy.deepcopy(sound)
                parent = reduce(lambda tree, key: tree[key], place[:-1], state)
                parent[place[-1]] = value
                try:
                    run_of().load_state_dict(state, allow_change=True, new_epoch=True)
                except UserError:
                    continue
                mixture = mixture_from_state(state)
                mixture.plan(mixture.next_sample, 24)
                mixture.count_before(mixture.next_sample + 1000)


@pytest.mark.parametrize("state", [None, [], "state", 3])
def test_a_state_that_is_no_object(state: Any) -> None:
    assert refusal(run_of(), state) == ["mixture state: is not a JSON object; continue from an older checkpoint"]


# --- any changes, one after the other


changes = st.lists(
    st.tuples(
        st.integers(0, 30),  # steps since the last change
        st.sampled_from([4, 8, 16]),  # sequence length
        st.dictionaries(st.sampled_from("abcd"), st.integers(0, 5), min_size=1).filter(lambda w: any(w.values())),
        st.sampled_from([2, 3, 5]),  # global batch
    ),
    min_size=1,
    max_size=5,
)


@settings(max_examples=60, deadline=None)
@given(changes, st.lists(st.integers(17, 400), min_size=4, max_size=4))
def test_any_chain_of_resumed_runs_is_the_reference(plan: list[tuple], tokens: list[int]) -> None:
    """Each run resumes the one before from its state with other weights, lengths and batches, also after no step."""
    sources = {name: Source(count, f"print of {name}") for name, count in zip("abcd", tokens)}
    reference = Reference(1, 100)
    state, start, last_length, expected_steps = None, 0, None, []
    for steps, length, weights, batch in plan:
        mixture = run_of(weights, sources=sources, length=length, batch=batch, period=100)
        if state:
            mixture.load_state_dict(state, new_epoch=True)
        windows = {name: source.windows(length) for name, source in sources.items()}
        if steps:  # a run that took no step leaves no trace
            if last_length != length or not reference.has(weights):
                renewed = tuple(sources) if last_length not in (None, length) else ()
                reference.add(start, weights, windows, renewed)
            last_length = length
        expected_steps += [range(start + n * batch, start + (n + 1) * batch) for n in range(steps)]
        start += steps * batch
        state = state_at(start, mixture)
    samples = listed(mixture_from_state(state), 0, start) if start else []
    assert samples == [reference.at(sample) for sample in range(start)]
    assert [mixture.samples_of_step(step) for step in range(len(expected_steps))] == expected_steps
    assert Counter(name for name, _, _ in samples) == Counter(
        {name: count for name, count in mixture.count_before(start).items() if count}
    )
