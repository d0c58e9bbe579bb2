"""A pool of processes for work that Python can't spread over threads, which never outlives its parent."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing.connection import Connection
from typing import TypeVar

T = TypeVar("T")
R = TypeVar("R")

_SECONDS_BETWEEN_LINES = 15.0


def available_cores() -> int:
    """Cores this process may use: Slurm and containers give fewer than the machine has."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class Workers:
    """`count` fresh processes (spawned: they hold nothing of the parent's), started at the first task.

    Leaving the `with` block by an exception ends them at once, and so does the parent's death, even by
    SIGKILL: each waits in a thread for the parent's end of a pipe to close. One worker means this process
    itself.
    """

    def __init__(self, count: int) -> None:
        self.count = count
        context = multiprocessing.get_context("spawn")
        held, self._lifeline = context.Pipe(duplex=False)
        self._executor = ProcessPoolExecutor(count, context, _start_worker, (held,)) if count > 1 else None
        self._held = held

    def __enter__(self) -> Workers:
        return self

    def __exit__(self, kind: object, *exception: object) -> None:
        if kind is not None:
            self._lifeline.close()
        if self._executor is not None:
            self._executor.shutdown(cancel_futures=True)
        self._lifeline.close()
        self._held.close()

    def map(self, function: Callable[[T], R], tasks: Sequence[T], label: str) -> Iterator[R]:
        """`function` of each task, in the order of the tasks, with progress under `label` on stderr.

        A task's exception is raised here; a worker that dies (killed for want of memory) is a `BrokenProcessPool`.
        """
        results = map(function, tasks) if self._executor is None else self._executor.map(function, tasks)
        yield from _progress(results, len(tasks), label)


def _start_worker(lifeline: Connection) -> None:
    # Signals reach the whole process group: the parent decides. The pool is already one process a core.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    threading.Thread(target=_die_with_parent, args=(lifeline,), daemon=True).start()


def _die_with_parent(lifeline: Connection) -> None:
    lifeline.poll(None)  # nothing is sent: it returns when the other end closes
    os._exit(1)


def _progress(results: Iterator[R], total: int, label: str) -> Iterator[R]:
    """Passes results on, and shows how many came: a bar on a terminal, else a line every 15 seconds."""
    if sys.stderr.isatty():
        from tqdm import tqdm

        yield from tqdm(results, label, total, leave=False, dynamic_ncols=True)
        return
    reported = time.monotonic()
    for number, result in enumerate(results, 1):
        yield result
        if time.monotonic() - reported > _SECONDS_BETWEEN_LINES:
            reported = time.monotonic()
            print(f"{label}: {number} of {total}", file=sys.stderr, flush=True)
