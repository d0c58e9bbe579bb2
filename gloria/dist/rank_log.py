"""Each rank's own log, RUN/logs/rank-00003.log: all that it prints; the console keeps rank 0 and what goes wrong."""

from __future__ import annotations

import faulthandler
import io
import os
import sys
import time
from pathlib import Path
from typing import BinaryIO, TextIO

from gloria.files import open_plain, os_errors

APPEND = os.O_WRONLY | os.O_APPEND | os.O_CREAT


class Tee(io.TextIOBase):
    """Text that goes to a log as well as to `stream`, where there is one; in all else it is that stream."""

    def __init__(self, stream: TextIO | None, log: BinaryIO, path: Path) -> None:
        self.stream, self.log, self.path = stream, log, path
        self.failing = False

    def write(self, text: str) -> int:
        if self.stream:
            self.stream.write(text)
        try:
            self.log.write(text.encode(errors="replace"))
            self.failing = False
        except OSError as error:  # a full disk must not end the run from inside a print
            if not self.failing:
                self.failing = True
                print(f"warning: {self.path}: cannot be written ({error.strerror})", file=sys.__stderr__, flush=True)
        return len(text)

    def flush(self) -> None:
        if self.stream:
            self.stream.flush()

    def isatty(self) -> bool:
        return self.stream is not None and self.stream.isatty()

    def fileno(self) -> int:
        return (self.stream or self.log).fileno()


def open_rank_log(run_dir: Path, rank: int, world: int) -> None:
    """From here on stdout and stderr of this rank are logged, of other ranks than 0 stdout in the log alone.

    One process needs no second copy of its console. A crash in native code leaves its stack in the log.
    """
    if world == 1:
        return
    path = rank_log_path(run_dir, rank)
    with os_errors("choose another run.dir"):
        path.parent.mkdir(parents=True, exist_ok=True)
        # Unbuffered: a rank that is killed leaves all that it has written.
        log = open(open_plain(path, APPEND), "ab", buffering=0)  # noqa: SIM115 (open for the process's life)
        begun = f"== {time.strftime('%F %T')} rank {rank} of {world}, {os.uname().nodename}, process {os.getpid()}\n"
        log.write(begun.encode())
    sys.stdout = Tee(sys.stdout if rank == 0 else None, log, path)
    sys.stderr = Tee(sys.stderr, log, path)
    faulthandler.enable(log)


def rank_log_path(run_dir: Path, rank: int) -> Path:
    """Where a rank's log lies."""
    return run_dir / "logs" / f"rank-{rank:05d}.log"
