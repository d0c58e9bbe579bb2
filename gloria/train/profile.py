"""A torch profiler trace of some steps, for chrome://tracing or Perfetto."""

from __future__ import annotations

import torch

from gloria.train.run import Run
from gloria.train.sections import parse_range


def trace_steps(run: Run) -> None:
    """Begin the profiler at the first step of `train.profile_steps`, and write its trace after the last one."""
    steps = parse_range(run.config.train.profile_steps)
    inside = steps is not None and run.step in steps
    if inside and not run.profiler:
        run.profiler = torch.profiler.profile()
        run.profiler.start()
    elif run.profiler and not inside:
        end_trace(run)


def end_trace(run: Run) -> None:
    """Write the trace of a running profiler under DIR/profile; one file a rank."""
    profiler, run.profiler = run.profiler, None
    if not profiler:
        return
    profiler.stop()
    steps = parse_range(run.config.train.profile_steps)
    assert steps is not None  # a profiler runs in them alone
    name = f"steps-{steps.start}-{steps.stop}-rank-{run.process.rank:05d}.json.gz"
    path = run.folder / "profile" / name
    path.parent.mkdir(exist_ok=True)
    profiler.export_chrome_trace(str(path))
    if run.log:
        run.log.event(run.step, "profile", path=str(path))
