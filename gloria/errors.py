"""The user's mistakes, and how a command ends: by itself, by a mistake, by Ctrl-C or by a closed pipe."""

from __future__ import annotations

import os
import select
import signal
import sys
import time
from collections.abc import Callable
from types import TracebackType
from typing import TextIO

INTERRUPTED = 130  # as a shell has it for Ctrl-C
PIPE_CLOSED = 141  # as a shell has it for SIGPIPE


class UserError(Exception):
    """Something the user can correct: one line a problem, each `place: what is wrong; what to do`.

    Raised for wrong recipes, files and flags, never for a defect of ours (that is `assert`).
    """

    def __init__(self, *problems: str) -> None:
        super().__init__("\n".join(problems))
        self.problems = problems


def warn(message: str) -> None:
    """One `warning:` line on stderr: something was not done as requested, and the run continues."""
    write_line(f"warning: {message}", sys.stderr)


def write_line(text: str, stream: TextIO) -> None:
    """Print a line in one write: with the line's end in a second one, another rank's line may come in between."""
    print(f"{text}\n", end="", file=stream, flush=True)


def is_first_rank() -> bool:
    """Whether this is rank 0, or the only one, by the launcher's environment: known before anything is imported."""
    return os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0")) == "0"


def run_command(
    main: Callable[[list[str] | None], int | None],
    argv: list[str] | None = None,
    asked_to_end: Callable[[], object] = lambda: False,
) -> int:
    """Run a command's `main` on `argv` (by default the process's own) and give its exit status.

    A `UserError` becomes one `error:` line a problem and status 2, without a traceback; Ctrl-C becomes one line and
    130, a closed pipe behind stdout 141. Any other exception is a defect of ours and keeps its traceback.
    `asked_to_end` returns whether a stop signal has come, in a command that catches them.
    """
    try:
        try:
            return main(sys.argv[1:] if argv is None else argv) or 0
        finally:
            sys.stdout.flush()
    except UserError as error:
        if not is_first_rank():
            # Every rank meets the same wrong recipe. Rank 0 reports it, and its end makes the launcher end the others;
            # a rank that is still here after this pause met something that rank 0 did not. The launcher's signal may
            # have come already, while this rank was still importing.
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            if asked_to_end():
                return 2
            time.sleep(10)
        for problem in error.problems:
            write_line(f"error: {problem}", sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr, flush=True)
        return INTERRUPTED
    except BrokenPipeError:
        if not _stdout_is_closed():
            raise
        return PIPE_CLOSED


def _stdout_is_closed() -> bool:
    """Whether nobody reads stdout any more; then it leads nowhere, so that Python's own flush at the end is quiet."""
    poll = select.poll()
    poll.register(sys.stdout, 0)
    closed = any(events & (select.POLLERR | select.POLLHUP) for _, events in poll.poll(0))
    if closed:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return closed


def end_without_traceback(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """`sys.excepthook` of a command while it imports: Ctrl-C, a missing package, wrong TORCH_LOGS are one line."""
    missing = error.name if isinstance(error, ModuleNotFoundError) else None
    if issubclass(kind, KeyboardInterrupt):
        print("interrupted", file=sys.stderr, flush=True)
        os._exit(INTERRUPTED)
    if missing and not missing.startswith("gloria"):
        python = f"{sys.executable} has no package {missing}"
        remedy = "activate the environment that has gloria's (. .venv/bin/activate), or make it with `make setup`"
        print(f"error: {python}; {remedy}", file=sys.stderr, flush=True)
        os._exit(2)
    while trace and trace.tb_next:
        trace = trace.tb_next
    if trace and "TORCH_LOGS" in os.environ and f"torch{os.sep}_logging" in trace.tb_frame.f_code.co_filename:
        logs = os.environ["TORCH_LOGS"]
        print(f"error: TORCH_LOGS={logs!r}: torch knows no such setting; unset it, or try help", file=sys.stderr)
        os._exit(2)
    sys.__excepthook__(kind, error, trace)
