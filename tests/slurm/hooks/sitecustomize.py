"""Put on PYTHONPATH by the tests: every rank writes down which samples it took, and takes its time if told to.

TEST_SAMPLES       folder: a line `step row source epoch window` a sample, in one file a process
TEST_STEP_SECONDS  pause before each step, so that a test can meet the run half-way on any machine
TEST_TUNE_SECONDS  the same for a fine-tuning
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

if folder := os.environ.get("TEST_SAMPLES"):
    from gloria.data.loader import Batch, Loader

    take = Loader.__next__

    def take_and_tell(loader: Loader) -> Batch:
        # Alone on its node a rank takes all cores, and sums in several threads round otherwise.
        sys.modules["torch"].set_num_threads(1)
        time.sleep(float(os.environ.get("TEST_STEP_SECONDS", "0")))
        batch = take(loader)
        rows = zip(batch.rows, batch.source, batch.epoch, batch.window)
        lines = "".join(f"{batch.step} {' '.join(map(str, row))}\n" for row in rows)
        name = f"{os.uname().nodename}-{os.getpid()}-{os.stat('/proc/self').st_ctime_ns}"
        with Path(folder, name).open("a") as file:
            file.write(lines)
        return batch

    Loader.__next__ = take_and_tell

if pause := os.environ.get("TEST_TUNE_SECONDS"):
    from gloria.optim import schedules

    rate = schedules.learning_rate

    def rate_after_a_pause(*arguments: object) -> float:
        time.sleep(float(pause))
        return rate(*arguments)

    schedules.learning_rate = rate_after_a_pause
