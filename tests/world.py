"""Real processes for the distributed tests: `run_world(function, world, *args)`.

Every rank is a process forked from one server that has torch loaded already (a second or two a world instead
of ten), joined by gloo over a file, so that no port is ever taken. What the ranks print comes out in the
test.
"""

from __future__ import annotations

import faulthandler
import multiprocessing
import multiprocessing.connection
import os
import pickle
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

# Loaded once in the fork server; none of them starts a thread, which a fork would lose.
PRELOADED = ["torch", "torch.distributed.fsdp", "torch.distributed.tensor", "torch._dynamo"]
# Seconds after which nothing will come any more, on any machine; less than pytest's own limit, which says less.
PATIENCE = 300


class WorldError(AssertionError):
    """A rank raised, died or was too slow; the message holds its traceback and what the ranks printed."""


def run_world(function: Callable[..., Any], world: int, *args: Any, timeout: float = PATIENCE) -> list[Any]:
    """Call `function(rank, world, *args)` in `world` processes and give their results in rank order.

    The process group (gloo) is up when the function is called and is ended after a barrier. The function must
    live at the top of a module; arguments and results travel pickled. When one rank raises, dies, or works longer than
    `timeout` seconds (its start does not count), the others are killed and `WorldError` says why.
    """
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # read by the fork server when it starts
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    with tempfile.TemporaryDirectory(prefix="world-") as folder:
        pipes, processes = [], []
        for rank in range(world):
            receiver, sender = context.Pipe(duplex=False)
            process = context.Process(
                target=_rank_main, args=(function, rank, world, args, folder, timeout, sender), daemon=True
            )
            process.start()
            sender.close()
            pipes.append(receiver)
            processes.append(process)
        try:
            answers, problem = _collect(pipes, timeout)
        finally:
            for process in processes:
                process.kill()  # a rank has ended, or its peers will never come
                process.join()
        printed = "".join(_read(Path(folder, f"rank-{rank}.out")) for rank in range(world))
        sys.stdout.write(printed)
    if problem:
        raise WorldError(f"{problem}\n--- printed by the ranks:\n{printed}")
    return answers


def _collect(pipes: list[Any], timeout: float) -> tuple[list[Any], str]:
    """Wait for every rank's answer; the first bad one ends the waiting with a problem."""
    deadline = time.monotonic() + PATIENCE + timeout  # ranks end themselves; this is for one that cannot
    answers: list[Any] = [None] * len(pipes)
    waiting = dict(zip(pipes, range(len(pipes))))
    problem = ""
    while waiting:
        # After a first problem the others get a moment to say theirs, which often is the cause.
        ready = multiprocessing.connection.wait(list(waiting), timeout=max(0.0, deadline - time.monotonic()))
        if not ready:
            silent = sorted(waiting.values())
            return answers, problem or f"ranks {silent} neither answered nor ended"
        for pipe in ready:
            rank = waiting.pop(pipe)
            try:
                good, answer = pickle.loads(pipe.recv_bytes())
            except EOFError:
                good, answer = (
                    False,
                    f"died (killed, ended by os._exit, or busy for {timeout:g} s: then its stack is below)",
                )
            if good:
                answers[rank] = answer
            else:
                problem += f"rank {rank} of {len(pipes)}: {answer}\n"
                deadline = min(deadline, time.monotonic() + 2)
    return answers, problem


def _rank_main(
    function: Callable[..., Any], rank: int, world: int, args: tuple, folder: str, timeout: float, pipe: Any
) -> None:
    output = os.open(os.path.join(folder, f"rank-{rank}.out"), os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    faulthandler.enable()

    import torch
    import torch.distributed as dist

    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))  # the test's own: another number rounds otherwise
    try:
        dist.init_process_group(
            "gloo",
            init_method=f"file://{folder}/rendezvous",
            rank=rank,
            world_size=world,
            timeout=timedelta(seconds=PATIENCE),
        )
        dist.barrier()  # the work's time begins when all are there
        faulthandler.dump_traceback_later(timeout, exit=True)
        answer = (True, function(rank, world, *args))
        dist.barrier()
        dist.destroy_process_group()
        message = pickle.dumps(answer)
        faulthandler.cancel_dump_traceback_later()
    except BaseException:
        message = pickle.dumps((False, traceback.format_exc()))
    sys.stdout.flush()
    sys.stderr.flush()
    pipe.send_bytes(message)
    pipe.close()
    # A rank that failed must not wait in destructors for peers that will never come.
    os._exit(0)


def _read(path: Path) -> str:
    return path.read_text(errors="replace") if path.exists() else ""
