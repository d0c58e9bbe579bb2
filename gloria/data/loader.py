"""Batches of one rank, in the order of the mixture, read ahead by one thread.

There are no worker processes: planning and copying windows out of mapped files costs well under a microsecond a
sample, and tokens stay as small as they are on disk until they are on the device.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import pairwise, repeat
from typing import Any, NamedTuple

import numpy as np

from gloria.data.mixture import Mixture
from gloria.data.stream import TokenStream
from gloria.errors import UserError

CHUNK_BYTES = 1 << 20  # of tokens copied at once: many small steps share the cost of handing them over
PLACE_TOKENS = 128  # flash attention's backward rounds each document up to so many, so that more places cost memory


class Batch(NamedTuple):
    """One rank's rows of one step's global batch; all arrays have one entry (of `tokens`: one row) for each."""

    step: int
    first_sample: int  # of the global batch: row r is sample first_sample + r
    rows: np.ndarray  # int64 (n,): rank, rank + world, ...
    tokens: np.ndarray  # uint16 or int32 (n, sequence_length + 1)
    source: np.ndarray  # int64 (n,), counts in mixture.names
    epoch: np.ndarray  # int64 (n,)
    window: np.ndarray  # int64 (n,)


class Loader:
    """An endless iterator over the batches that a run takes from `mixture.next_sample` on.

    A batch that has been returned counts as consumed: `mixture.next_sample` is then after it, whatever the thread
    has read ahead, and its `state_dict` is of that moment. A change of the mixture between two batches (a stage, a
    batch size, a loaded state, another `next_sample`) takes effect at once: what was read ahead is dropped.

    `streams` are the sources by name, of which those in use must be there. Raises `UserError` for a global batch that
    the ranks do not divide; an error in the thread is raised by the next batch. `close` (or leaving
    a `with`) ends the thread and waits for it.
    """

    def __init__(
        self,
        streams: Mapping[str, TokenStream],
        mixture: Mixture,
        *,
        rank: int = 0,
        world: int = 1,
        prefetch: int = 128,
    ) -> None:
        assert 0 <= rank < world, "a rank lies in its world"
        check_world(mixture.global_batch, world)
        self.mixture = mixture
        self._streams = streams
        self._rank, self._world, self._prefetch = rank, world, prefetch
        self._thread: threading.Thread | None = None
        self._close = threading.Event()
        self._chunks: queue.Queue[Iterator[Batch] | BaseException] = queue.Queue()
        self._ready: Iterator[Batch] = iter(())  # the rest of a chunk
        self._plan: tuple[Any, Any, int] = ((), (), -1)  # the stages, batches and sample the next batch belongs to

    def __iter__(self) -> Loader:
        return self

    def __next__(self) -> Batch:
        mixture = self.mixture
        stages, batches, sample = self._plan
        if mixture.stages is not stages or mixture.batches is not batches or mixture.next_sample != sample:
            self._start()
        while (batch := next(self._ready, None)) is None:
            chunk = self._chunks.get()
            if isinstance(chunk, BaseException):
                self.close()
                raise chunk
            self._ready = chunk
        mixture.next_sample = batch.first_sample + batch.rows.size * self._world
        self._plan = (mixture.stages, mixture.batches, mixture.next_sample)
        return batch

    def __enter__(self) -> Loader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the thread and drop what it has read; a later batch begins at `mixture.next_sample`."""
        self._ready = iter(())
        self._plan = ((), (), -1)
        if self._thread is None:
            return
        self._close.set()
        # The thread looks at the event after each chunk it hands over; an empty queue has room for that one.
        while not self._chunks.empty():
            self._chunks.get()
        self._thread.join()
        self._thread = None

    def _start(self) -> None:
        self.close()
        mixture = self.mixture
        check_world(mixture.global_batch, self._world)
        row_bytes = _dtype(self._streams, mixture).itemsize * (mixture.sequence_length + 1)
        step_bytes = row_bytes * mixture.global_batch // self._world
        steps = max(1, min(self._prefetch, CHUNK_BYTES // step_bytes))
        self._close = threading.Event()
        self._chunks = queue.Queue(maxsize=max(1, self._prefetch // steps))
        chunks = _read_chunks(self._streams, replace(mixture), self._rank, self._world, steps)
        arguments = (chunks, self._chunks, self._close)
        self._thread = threading.Thread(target=_read_ahead, args=arguments, name="loader", daemon=True)
        self._thread.start()
        self._plan = (mixture.stages, mixture.batches, mixture.next_sample)


def check_world(global_batch: int, world: int) -> None:
    """A `UserError` if the ranks do not divide the rows of a step."""
    if global_batch % world:
        raise UserError(
            f"train.global_batch: {global_batch} rows cannot be divided among {world} ranks; "
            f"set {-(-global_batch // world) * world}"
        )


def validation_windows(stream: TokenStream, length: int, limit: int) -> np.ndarray:
    """At most `limit` windows, always the same and evenly spread: int64 (n,), none if the stream is too short."""
    total = stream.num_windows(length)
    count = min(limit, total)
    return np.arange(count, dtype=np.int64) * total // max(1, count)


def text_windows(count: int, length: int, stride: int) -> Iterator[tuple[int, int, int]]:
    """A text of `count` tokens as windows (begin, end, scored) of at most `length` + 1: each but the first scored once.

    Each window but the first scores its last `scored` tokens, at most `stride`, given `length` - `stride` before them.
    """
    assert 1 <= stride <= length
    begin, done = 0, 1
    while done < count:
        end = min(begin + length + 1, count)
        yield begin, end, end - done
        begin, done = begin + stride, end


def document_bounds(ids: np.ndarray, eos_id: int) -> np.ndarray:
    """Where the documents in rows `ids` (rows, seq) begin, the rows laid end to end, and where the last ends.

    A row begins a document, and so does what follows an EOS. (places + 1,) int32 from 0 to rows * seq, with documents
    without tokens behind the last: attention is compiled for a number of places, so that it is nearly always the same,
    one for 128 tokens, and doubled until it is enough.
    """
    rows, length = ids.shape
    begins = np.ones((rows, length), bool)
    np.equal(ids[:, :-1], eos_id, out=begins[:, 1:])
    first = np.flatnonzero(begins)
    places = rows * max(2, -(-length // PLACE_TOKENS))
    while places < first.size:
        places *= 2
    bounds = np.full(places + 1, rows * length, np.int32)
    bounds[: first.size] = first
    return bounds


def _read_ahead(chunks: Iterator[Iterator[Batch]], into: queue.Queue, close: threading.Event) -> None:
    try:
        for chunk in chunks:
            into.put(chunk)
            if close.is_set():
                return
    except BaseException as error:  # raised again by the consumer
        into.put(error)


def _read_chunks(
    streams: Mapping[str, TokenStream], mixture: Mixture, rank: int, world: int, steps: int
) -> Iterator[Iterator[Batch]]:
    """Batches from `mixture.next_sample` on, without end, at most `steps` of them at a time."""
    step = mixture.step_of_sample(mixture.next_sample)
    length, dtype = mixture.sequence_length, _dtype(streams, mixture)
    while True:
        samples = mixture.samples_of_step(step)
        changes = [size.step - step for size in mixture.batches if size.step > step]
        count, size = min([steps, *changes]), len(samples)
        planned = mixture.plan(samples.start, count * size)
        # (steps, rows of this rank)
        source, epoch, window = (array.reshape(count, size)[:, rank::world] for array in planned)
        tokens = np.empty((*source.shape, length + 1), dtype)
        flat = tokens.reshape(-1, length + 1)
        _gather(streams, mixture.names, source.ravel(), window.ravel(), length, flat)
        numbers = range(step, step + count)
        firsts = range(samples.start, samples.start + count * size, size)
        rows = repeat(np.arange(rank, size, world))
        yield map(Batch, numbers, firsts, rows, tokens, source, epoch, window)
        step += count


def _gather(
    streams: Mapping[str, TokenStream],
    names: Sequence[str],
    source: np.ndarray,
    window: np.ndarray,
    length: int,
    out: np.ndarray,
) -> None:
    """Copy all windows (n,) into the rows of `out`, one source after the other."""
    order = np.argsort(source, kind="stable")
    in_order = source[order]
    begins = (np.flatnonzero(in_order[1:] != in_order[:-1]) + 1).tolist()
    for begin, end in pairwise([0, *begins, order.size]):
        rows = order[begin:end]
        streams[names[in_order[begin]]].gather(window[rows], length, out, rows)


def _dtype(streams: Mapping[str, TokenStream], mixture: Mixture) -> np.dtype:
    """The narrowest type that holds the tokens of every source the mixture may draw."""
    return np.result_type(*(streams[name].dtype for name in mixture.names if name in streams))
