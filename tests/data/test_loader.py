"""Bugs prevented: ranks that read the same rows or another stream than one rank would; a position that runs ahead with
what was read ahead; a thread that dies in silence or outlives its loader."""

from __future__ import annotations

import itertools
import json
import threading
from collections.abc import Iterator

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gloria.data.loader import Batch, Loader, validation_windows
from gloria.data.mixture import Mixture, new_mixture
from gloria.data.stream import TokenStream
from gloria.data.weights import Source
from gloria.errors import UserError
from tests.world import run_world

LENGTH = 8
TOKENS = {"news": 900, "books": 500, "poems": 90, "web": 300}
WEIGHTS = {"news": 0.6, "books": 0.3, "poems": 0.1}


def streams_of(dtype: str = "<u2") -> dict[str, TokenStream]:
    """Sources whose tokens encode source and place; each in three shards."""
    streams = {}
    for number, (name, count) in enumerate(TOKENS.items()):
        tokens = np.arange(count, dtype=dtype) + np.array(10_000 * number, dtype)
        streams[name] = TokenStream(np.split(tokens, [count // 3, count // 2]), f"print of {name}")
    return streams


def mixture_of(weights: dict[str, float] | None = None, batch: int = 24, length: int = LENGTH) -> Mixture:
    sources = {name: Source(count, f"print of {name}") for name, count in TOKENS.items()}
    return new_mixture(5, length, sources, weights or WEIGHTS, global_batch=batch, period=1000)


def take(loader: Loader, count: int) -> list[Batch]:
    return list(itertools.islice(loader, count))


def as_rows(batches: list[Batch]) -> list[tuple[int, int, int, int, list[int]]]:
    """(sample, source, epoch, window, tokens) of each row."""
    return [
        (batch.first_sample + row, source, epoch, window, tokens)
        for batch in batches
        for row, source, epoch, window, tokens in zip(
            *(array.tolist() for array in (batch.rows, *batch[4:7], batch[3]))
        )
    ]


@pytest.fixture(autouse=True)
def _no_thread_stays() -> Iterator[None]:
    yield
    assert [thread for thread in threading.enumerate() if thread.name == "loader"] == []


def alone(steps: int, weights: dict[str, float] | None = None, batch: int = 24) -> list[tuple]:
    with Loader(streams_of(), mixture_of(weights, batch)) as loader:
        return as_rows(take(loader, steps))


def test_tokens_are_those_of_the_planned_windows() -> None:
    mixture = mixture_of()
    planned = mixture.plan(0, 24 * 70)
    rows = alone(70)
    assert [row[:4] for row in rows] == list(zip(range(24 * 70), *(array.tolist() for array in planned)))
    for _, source, _, window, tokens in rows:
        first = 10_000 * source + window * LENGTH
        assert tokens == list(range(first, first + LENGTH + 1))


@pytest.mark.parametrize("prefetch", [1, 64])
@pytest.mark.parametrize("world", [1, 2, 3, 4, 8])
def test_any_number_of_ranks_reads_one_stream(world: int, prefetch: int) -> None:
    shares = []
    for rank in range(world):
        with Loader(streams_of(), mixture_of(), rank=rank, world=world, prefetch=prefetch) as loader:
            batches = take(loader, 90)
            assert loader.mixture.next_sample == 90 * 24
        assert [batch.step for batch in batches] == list(range(90))
        assert all(batch.rows.tolist() == list(range(rank, 24, world)) for batch in batches)
        shares.append(as_rows(batches))
    assert sorted(itertools.chain(*shares)) == alone(90)


def rows_of_a_rank(rank: int, world: int, steps: int) -> list[tuple]:
    with Loader(streams_of(), mixture_of(), rank=rank, world=world) as loader:
        return as_rows(take(loader, steps))


@pytest.mark.parametrize("world", [2, 4])
def test_real_processes_read_that_stream(world: int) -> None:
    """What a process has of its own (hash seeds, threads, caches) changes nothing."""
    together = itertools.chain.from_iterable(run_world(rows_of_a_rank, world, 70))
    assert sorted(together) == alone(70)


@pytest.mark.parametrize("step", [0, 1, 21, 64, 65, 129])
def test_resumed_at_any_step_by_another_number_of_ranks(step: int) -> None:
    with Loader(streams_of(), mixture_of(), rank=1, world=2) as loader:
        take(loader, step)
        state = json.loads(json.dumps(loader.mixture.state_dict()))
    resumed = []
    for rank in range(3):
        with Loader(streams_of(), mixture_of(), rank=rank, world=3) as loader:
            take(loader, 2)  # begun before the state is loaded: what was read ahead must go
            assert loader.mixture.load_state_dict(state) == []
            resumed += as_rows(take(loader, 20))
    assert sorted(resumed) == alone(step + 20)[step * 24 :]


def test_a_state_is_of_the_last_batch_handed_out() -> None:
    with Loader(streams_of(), mixture_of()) as loader:
        assert loader.mixture.state_dict()["next_sample"] == 0
        for step in range(5):
            assert next(loader).step == step
            assert loader.mixture.state_dict()["next_sample"] == (step + 1) * 24


@settings(max_examples=15, deadline=None)
@given(
    st.lists(
        st.tuples(
            st.integers(0, 12),
            st.sampled_from([None, {"news": 1}, {"web": 2, "poems": 1}, {"books": 1, "news": 3}]),
            st.sampled_from([None, 8, 24, 48]),
        ),
        max_size=4,
    )
)
def test_changes_between_two_batches_take_effect_at_once(changes: list) -> None:
    """Stages and batch sizes, changed under a thread that has read ahead, by one rank and by four."""
    streams = []
    for world in (1, 4):
        mixtures = [mixture_of() for _ in range(world)]
        loaders = [Loader(streams_of(), mix, rank=rank, world=world, prefetch=3) for rank, mix in enumerate(mixtures)]
        rows = []
        for steps, weights, batch in [*changes, (5, None, None)]:
            for loader, mixture in zip(loaders, mixtures):
                rows += as_rows(take(loader, steps))
                step = mixture.step_of_sample(mixture.next_sample)
                if batch:
                    mixture.change_batch(step, mixture.next_sample, batch)
                if weights:
                    mixture.begin_stage(mixture.next_sample, weights)
        for loader in loaders:
            loader.close()
        planned = mixtures[0].plan(0, mixtures[0].next_sample)
        assert [row[:4] for row in sorted(rows)] == list(zip(range(len(rows)), *(array.tolist() for array in planned)))
        streams.append(sorted(rows))
    assert streams[0] == streams[1]


def test_the_type_of_the_tokens_is_the_narrowest_that_holds_them() -> None:
    with Loader(streams_of(), mixture_of()) as loader:
        assert next(loader).tokens.dtype == np.uint16
    mixed = streams_of() | {"books": streams_of("<i4")["books"]}
    with Loader(mixed, mixture_of()) as loader:
        batches = take(loader, 70)
    assert batches[0].tokens.dtype == np.int32
    assert as_rows(batches) == alone(70)


def test_ranks_that_do_not_divide_the_batch() -> None:
    line = "train.global_batch: 24 rows cannot be divided among 5 ranks; set 25"
    with pytest.raises(UserError, match=f"^{line}$"):
        Loader(streams_of(), mixture_of(), rank=0, world=5)
    with Loader(streams_of(), mixture_of(), rank=0, world=4) as loader:
        take(loader, 2)
        loader.mixture.change_batch(2, 48, 18)
        with pytest.raises(UserError, match="18 rows cannot be divided among 4 ranks; set 20"):
            next(loader)
        assert loader.mixture.next_sample == 48


def test_what_goes_wrong_in_the_thread_is_raised_where_the_batch_is_asked_for() -> None:
    class Broken(TokenStream):
        def gather(self, windows: np.ndarray, *arguments) -> None:
            if windows.size and windows[0] >= 0 and broken:
                raise OSError(5, "the disk is gone")
            super().gather(windows, *arguments)

    broken = False
    streams = streams_of()
    streams["books"] = Broken(streams["books"].shards, "print")
    with Loader(streams, mixture_of(), prefetch=1) as loader:
        take(loader, 3)
        broken = True
        with pytest.raises(OSError, match="the disk is gone"):
            take(loader, 10)
        lost = loader.mixture.next_sample
        broken = False
        assert as_rows([next(loader)]) == alone(30)[lost : lost + 24]


def test_a_batch_stays_as_it_is() -> None:
    with Loader(streams_of(), mixture_of(), prefetch=2) as loader:
        batches = take(loader, 50)
    assert as_rows(batches) == alone(50)


def test_closed_at_once_and_twice() -> None:
    """Before a batch, in the middle, and while the thread waits for room: the thread is gone each time."""
    loader = Loader(streams_of(), mixture_of(), prefetch=1)
    loader.close()
    for count in (1, 3):
        take(loader, count)
        loader.close()
        loader.close()
        assert all(thread.name != "loader" for thread in threading.enumerate())
    assert loader.mixture.next_sample == 4 * 24
    assert next(loader).step == 4
    loader.close()


def test_validation_windows_are_fixed_and_evenly_spread() -> None:
    stream = streams_of()["poems"]  # 11 windows
    assert validation_windows(stream, LENGTH, 4).tolist() == [0, 2, 5, 8]
    assert validation_windows(stream, LENGTH, 100).tolist() == list(range(11))
    assert validation_windows(stream, LENGTH, 1).tolist() == [0]
    assert validation_windows(stream, 90, 4).tolist() == []
    assert validation_windows(stream, LENGTH, 4).dtype == np.int64
