"""What asks a run to stop: signals, and its time. Torch-free, so that the handlers stand before the slow imports."""

from __future__ import annotations

import math
import os
import signal
import sys
import time
from types import FrameType

# What Slurm, torchrun, a time limit and a person send. All mean: finish the step, save, leave.
STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2)
ASKED = "asked to stop"  # the reason of a rank that stops because another was asked

_received: list[int] = []  # signal numbers in the order they came; a handler may only append
_started = time.monotonic()
_deadline = math.inf
_then = ""


def install_stop_handlers(then: str = "the run saves and stops after this step") -> None:
    """From here on a stop signal is remembered instead of ending the process; a second Ctrl-C ends it at once.

    `then` is what is said to follow when one comes.
    """
    global _then
    _then = then
    for number in STOP_SIGNALS:
        signal.signal(number, _remember)


def end_on_stop_signals(then: str) -> None:
    """From here on SIGTERM and SIGHUP end the process as an exception does, with 128 + the signal as its status.

    `then` is what is said to follow. A SIGHUP that is ignored (nohup) stays so; while it ends, more are ignored.
    """

    def end(number: int, _frame: FrameType | None) -> None:
        signal.signal(number, signal.SIG_IGN)
        os.write(sys.stderr.fileno(), f"{signal.Signals(number).name}: {then}\n".encode())
        raise SystemExit(128 + number)

    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, end)


def _remember(number: int, _frame: FrameType | None) -> None:
    if number == signal.SIGINT and signal.SIGINT in _received:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGINT)
        return
    _received.append(number)
    # os.write: a print inside a handler can meet the interrupted print's own lock.
    os.write(sys.stderr.fileno(), f"{signal.Signals(number).name}: {_then}\n".encode())


def set_time_budget(minutes: float | None) -> None:
    """Ask to stop once the process has run for so many minutes; None: never."""
    global _deadline
    _deadline = math.inf if minutes is None else _started + 60 * minutes


def stop_reason() -> str:
    """The name of the first stop signal received, or that the time is over, or an empty string."""
    if _received:
        return signal.Signals(_received[0]).name
    return "run.max_minutes are over" if time.monotonic() > _deadline else ""
