"""torchrun with quiet ends: `python -m gloria.dist.torchrun ...` takes torchrun's arguments.

Ctrl-C is passed on to the ranks, which save and stop, and this waits for them; torchrun itself would kill them after
30 s and end with a traceback. A rank that has ended by itself has said why, so torchrun's report of
exit statuses, which ends with a traceback, is left out. torchrun itself gives the same runs.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
from contextlib import suppress
from pathlib import Path
from types import FrameType

from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.run import parse_args, run


def pass_on(number: int, frame: FrameType | None) -> None:
    """Send a signal to the ranks, which torchrun starts in sessions of their own."""
    for children in Path("/proc/self/task").glob("*/children"):
        for pid in children.read_text().split():
            with suppress(ProcessLookupError):
                os.kill(int(pid), number)


def main(argv: list[str]) -> int:
    """Run until all ranks have ended; the exit status is that of the rank that failed first."""
    arguments = parse_args(argv)
    arguments.signals_to_handle = "SIGTERM,SIGHUP,SIGQUIT"
    signal.signal(signal.SIGINT, pass_on)
    logging.disable(logging.ERROR)  # in this process only
    try:
        run(arguments)
    except ChildFailedError as error:
        _, failure = error.get_first_failure()
        if failure.exitcode >= 0:
            return failure.exitcode
        name = signal.Signals(-failure.exitcode).name
        print(f"error: rank {failure.local_rank}: ended by {name}; its last lines are above", file=sys.stderr)
        return 128 - failure.exitcode
    except SignalException as error:
        return 128 + error.sigval
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
