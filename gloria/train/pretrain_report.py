"""What a run says of its steps and saves: called on every rank, for some of it is counted on all; rank 0 writes."""

from __future__ import annotations

import math

import numpy as np
import torch

from gloria.dist.loss_scale import FACTOR, LEAST
from gloria.dist.step_sums import StepSums
from gloria.train.config import span
from gloria.train.metrics import peak_memory
from gloria.train.pretrain_run import PendingStep, Run


def report_step(run: Run, pending: PendingStep, sums: StepSums) -> None:
    """A line of the log: what the steps since the last one were like."""
    mixture = run.mixture
    taken, stage = mixture.count_before(pending.next_sample), mixture.stages[-1]
    since = {name: taken[name] - before for name, before in zip(stage.names, stage.taken)}
    values = run.meter.read(
        lr=pending.lr,
        tokens=run.tokens,
        asked=mixture.shares,
        taken=since,
        epochs=mixture.epochs_at(pending.next_sample),
        memory=peak_memory(run.process.device.type),
        loss_scale=sums.loss_scale,
    )
    if run.log:
        run.log.train(pending.step, values)


def add_step(run: Run, pending: PendingStep, sums: StepSums) -> None:
    """Count a step; of a skipped one tell why, which samples it held, and the sources whose loss was not finite.

    An overflow is the loss scale's doing, now and then to be expected: it neither counts among the skips in a row nor
    ends them, and is told where the scale has come down to a further sixteenth.
    """
    run.tokens += int(sums.source_rows.sum()) * run.mixture.sequence_length
    run.meter.add(
        sums.source_loss,
        sums.source_rows,
        sums.grad_norm,
        sums.applied,
        pending.seconds,
        pending.data_seconds,
        sums.overflow,
    )
    if sums.applied:
        run.skips_in_a_row = 0
    elif sums.overflow:
        run.overflows += 1
        scale = max(sums.loss_scale / FACTOR, LEAST)
        if run.log and math.log2(scale) % 4 == 0:
            run.log.event(pending.step, "overflows", so_far=run.overflows, loss_scale=scale)
    else:
        run.skips += 1
        run.skips_in_a_row += 1
        _report_skip(run, pending, sums)


def _report_skip(run: Run, pending: PendingStep, sums: StepSums) -> None:
    if not run.log:
        return
    samples = run.mixture.samples_of_step(pending.step - 1)
    bad = [name for name, loss in zip(run.mixture.names, sums.source_loss) if not np.isfinite(loss)]
    run.log.event(
        pending.step,
        "skipped",
        samples=f"{samples.start}:{samples.stop}",
        why="spike" if sums.spike else "not finite" if run.loss_scale is None else "not finite; fp16 ends at 65504",
        grad_norm=sums.grad_norm,
        sources=bad or ("all" if sums.spike else "all finite: the gradient was not"),
        in_a_row=run.skips_in_a_row,
    )


def trace_steps(run: Run) -> None:
    """Begin the profiler at the first step of `train.profile_steps`, and write its trace behind the last one."""
    steps = span(run.config.train.profile_steps)
    if steps and run.step in steps and not run.profiler:
        run.profiler = torch.profiler.profile()
        run.profiler.start()
    elif run.profiler and run.step not in steps:
        end_trace(run)


def end_trace(run: Run) -> None:
    """Write the trace of a profiler at work, for chrome://tracing or Perfetto; one file a rank."""
    profiler, run.profiler = run.profiler, None
    if not profiler:
        return
    profiler.stop()
    steps = span(run.config.train.profile_steps)
    name = f"steps-{steps.start}-{steps.stop}-rank-{run.process.rank:05d}.json.gz"
    path = run.folder / "profile" / name
    path.parent.mkdir(exist_ok=True)
    profiler.export_chrome_trace(str(path))
    if run.log:
        run.log.event(run.step, "profile", path=str(path))
