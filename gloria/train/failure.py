"""How a run ends when something is raised in its midst. The next launch goes on from the newest checkpoint in any case.

    what happens                                          status    exit
    a rank is gone (killed, its node lost)                failed    1
    the same, after the run was asked to stop             stopped   0: there is no save without that rank
    out of memory                                         failed    1, in one line with what to do
    the disk is full                                      failed    1, in one line
    anything else                                         failed    1, with its traceback (2 for a user's mistake)

A rank that makes no progress is ended by gloria/dist/watchdog.py.
"""

from __future__ import annotations

import errno
import re
import sys
import traceback
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

from gloria.dist.run_lock import record_end
from gloria.dist.signals import stop_reason
from gloria.dist.watchdog import GRACE_SECONDS, PEER_GONE, failed_ranks, leave, slow_ranks, write_place
from gloria.errors import UserError, warn
from gloria.train.run import Run

# CUDA and NCCL (cudaMalloc, ncclUnhandledCudaError), cuBLAS, cuDNN, and the host's allocator.
_NO_MEMORY = re.compile(
    r"out of memory|can't allocate memory|Failed to CUDA \w*alloc|CU(BLAS|DNN)_STATUS_\w*ALLOC\w*_FAILED"
)


def fail(run: Run, error: Exception, close: Callable[[Any, str, str], None]) -> int:
    """Report what `error` means for the run and end it, by `close` (run, status, reason); the exit status.

    One of several ranks does not return.
    """
    watch = run.watch
    watch.ending.acquire()  # for good: the watch must not end what is ended here
    status, code, step = "failed", 1, run.step
    reason = f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
    peer_gone = is_peer_gone(error)
    if is_out_of_memory(error):
        reason = _out_of_memory(run)
        print(f"error: {reason}", file=sys.stderr)
    elif peer_gone:
        write_place(watch, PEER_GONE)
        asked, failed = stop_reason(), failed_ranks(watch)
        culprits = failed or slow_ranks(watch, 1.0 if asked else GRACE_SECONDS)
        reason = f"{PEER_GONE} in {watch.place}: {culprits}"
        if asked and not failed:
            status, code, step = "stopped", 0, run.saved_step
            reason = f"{asked}, and {reason}; nothing saved"
        print(f"{'error' if code else 'warning'}: rank {watch.rank}: {reason}", file=sys.stderr)
    elif isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        reason = f"{error.filename or run.folder}: {error.strerror}; free some space and start again"
        print(f"error: rank {watch.rank}: {reason}", file=sys.stderr)
    elif isinstance(error, UserError):
        code = 2
        for problem in error.problems:
            print(f"error: {problem}", file=sys.stderr)
    else:
        traceback.print_exception(error)
    if not peer_gone:
        write_place(watch, reason)
    try:
        if watch.world == 1:
            close(run, status, reason)
        elif run.log and watch.run_lock and not watch.run_lock.lost:
            run.log.event(step, status, reason=reason)
    except OSError as last:
        warn(f"{run.folder}: its last event cannot be written ({last})")
        if watch.world == 1 and watch.run_lock:
            record_end(watch.run_lock, status, step, reason)
    if watch.world > 1:
        leave(watch, status, step, reason, code)
    return code


def is_out_of_memory(error: Exception) -> bool:
    """Of a GPU, or of the host: torch has an exception for its own allocator alone, and tells the others' in words."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and bool(_NO_MEMORY.search(str(error)))


def is_peer_gone(error: Exception) -> bool:
    """Whether a collective failed for its other end. Gloo raises a bare RuntimeError with the path of its source."""
    if is_out_of_memory(error):  # of NCCL, here
        return False
    return isinstance(error, dist.DistError) or "/gloo/" in str(error) or "Connection closed by peer" in str(error)


def _out_of_memory(run: Run) -> str:
    train, watch = run.config.train, run.watch
    share = -(-train.global_batch // watch.world)
    micro_batch = train.micro_batch or share
    length = getattr(train, "sequence_length", 0) or train.max_length  # the latter of a fine-tuning
    smaller = max((size for size in range(1, micro_batch) if share % size == 0), default=0)
    lower = f"set train.micro_batch to {smaller}, " if smaller else ""
    lower += "dist.reshard to always, " if run.keep_gathered else ""
    return (
        f"out of memory on rank {watch.rank} in {watch.place}, with train.micro_batch {micro_batch} x "
        f"{length} tokens; {lower}train.activation_checkpointing to full, or take more ranks"
    )
