"""The processes of a run: they join before it is opened, and leave together after it is closed."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from gloria.dist.process import Process, leave_process_group, start_process_group, stop_process_group
from gloria.dist.signals import set_time_budget
from gloria.errors import UserError


@contextmanager
def process_group(config: Any) -> Iterator[Process]:
    """Join the process group as the recipe has it. A user's mistake ends this rank without waiting for others."""
    set_time_budget(config.run.max_minutes)
    process = start_process_group(config.run.device, max(config.dist.timeout_minutes, config.dist.step_timeout_minutes))
    torch.use_deterministic_algorithms(config.run.deterministic)
    try:
        yield process
    except (UserError, SystemExit):
        leave_process_group()
        raise
    stop_process_group()
