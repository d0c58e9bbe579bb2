"""The training loop, of pre-training and fine-tuning alike. Read it from top to bottom.

`train` is a run; the functions below it are its parts in the order in which they happen. What is learnt (which batches,
which loss, how it is evaluated) is the run's `objective`: `train/pretraining.py` and `train/finetuning.py`.

Killed at any moment and started again with the same command, a run goes on from its newest checkpoint with the same
samples and, on CPU, the same bits.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from time import perf_counter
from typing import Any, NamedTuple

import torch
from torch import Tensor

from gloria.dist.checkpoint import abandon
from gloria.dist.loss_scale import FACTOR, LEAST, adjust
from gloria.dist.process import on_any_rank
from gloria.dist.sharding import (
    all_reduce_sums,
    begin_pass,
    clip_coefficient,
    gradient_square_sum,
    local_gradients,
    reseed,
    update,
)
from gloria.dist.signals import ASKED, stop_reason
from gloria.dist.state import training_state
from gloria.dist.step_sums import StepSums, decide_update, overflowed, pack_sums, unpack_sums
from gloria.dist.transfer import HostCopy, start_copy_to_host
from gloria.optim.schedules import learning_rate
from gloria.train import checkpointing
from gloria.train.failure import fail
from gloria.train.garbage import collect_by_itself, collect_garbage
from gloria.train.meter import peak_memory
from gloria.train.profile import end_trace, trace_steps
from gloria.train.run import SKIPS, TAKEN_OVER, UNSAVED, Run, close_run, flags_of, trainer_state
from gloria.train.samples import write_samples


class StepBatch(NamedTuple):
    """This rank's part of a step's global batch."""

    parts: Sequence[Any]  # micro-batches on the device, for the objective's `losses`; as many on all ranks
    groups: Tensor  # (rows,) int64, on the device: the loss of a row is reported under objective.groups[i]
    denominator: int  # of the loss: tokens (pre-training) or rows (fine-tuning) of the *global* batch
    tokens: int  # of the global batch


@dataclass
class PendingStep:
    """A step whose sums the host has not read yet: the device may still be at work on it."""

    step: int  # steps done once it is
    lr: float
    tokens: int
    sums: HostCopy  # float64, over all ranks
    metrics: Sequence[str]  # names of the objective's own sums
    seconds: float = 0.0
    data_seconds: float = 0.0


def train(run: Run) -> tuple[int, bool]:
    """Take steps until the plan is done or a stop is requested, then save; the exit status, and whether it is done."""
    try:
        status, reason = end(run, take_steps(run))
        if status == "done" and not run.objective.finish(run):
            status, reason = "stopped", stop_reason() or ASKED
        close_run(run, status, reason)
    except Exception as error:
        return fail(run, error, close_run), False
    finally:
        collect_by_itself()
    if run.process.is_main and status == "failed":
        print(f"error: {run.folder}: {reason}; the newest checkpoint is of step {run.saved_step}", file=sys.stderr)
    return int(status == "failed"), status == "done"


def take_steps(run: Run) -> str:
    """All steps, with their evaluations and checkpoints; why it stopped before the last one, or "".

    The host reads the sums of a step while the device works on the next one, except before an evaluation or a
    checkpoint, which need the step to be finished.
    """
    objective = run.objective
    save_every = run.config.checkpoint.every or objective.evaluate_every
    pending: PendingStep | None = None
    stop = ASKED if on_any_rank(bool(stop_reason())) else ""
    if run.saved_step != run.step and not stop:
        save(run, asynchronous=False)  # a branch's first checkpoint: from here on it can do without its trunk
    if run.evaluation_due and not stop:
        stop = objective.evaluate(run)  # where the curves start, or what the last launch was stopped in
    while run.step < run.total_steps and not stop:
        trace_steps(run)
        run.watch.beat(run.step, "data")
        started = perf_counter()
        batch = objective.next_batch(run)
        data_seconds = perf_counter() - started
        step = take_step(run, batch)
        if pending:
            stop = finish_step(run, pending)
        pending = step
        pending.seconds, pending.data_seconds = perf_counter() - started, data_seconds
        collect_garbage(run.step - run.first_step)

        save_due = run.step % save_every == 0
        due = run.evaluation_due or run.samples_due or save_due or run.step == run.total_steps
        if (due or stop) and stop not in UNSAVED:
            stop = finish_step(run, pending) or stop
            pending = None
        if run.evaluation_due and not stop:
            stop = objective.evaluate(run)
        if run.samples_due and not stop:
            write_samples(run)
        if save_due and stop not in UNSAVED:
            save(run, asynchronous=run.config.checkpoint.asynchronous)
    return stop


def take_step(run: Run, batch: StepBatch) -> PendingStep:
    """Forward, backward, one all-reduce, clipping and the update. Nothing here waits for the device."""
    config, num_groups = run.config, len(run.objective.groups)
    lr = learning_rate(config.schedule, config.optim.lr, run.step, run.total_steps)
    for parameters in run.optimizer.param_groups:
        parameters["lr"] = lr
    reseed(run.seed, run.step, run.process.rank)
    first = run.step == run.first_step  # it compiles
    run.watch.beat(run.step, "forward and backward", slow=first)
    row_losses, metrics = forward_backward(run, batch)  # (rows,), sums by name

    run.watch.beat(run.step, "update", slow=first)
    gradients = local_gradients(run.model)
    grad_square = gradient_square_sum(gradients, run.mesh)
    sums = pack_sums(grad_square, row_losses, batch.groups, num_groups, flags_of(run), metrics.values())
    all_reduce_sums(sums)
    spikes = config.train.skip_spikes or 0.0
    grad_norm, good = decide_update(sums, num_groups, run.running_norm, spikes, run.loss_scale)
    coefficient = clip_coefficient(grad_norm, config.train.clip_norm)
    if run.loss_scale is not None:
        coefficient = coefficient / run.loss_scale[0]
        adjust(run.loss_scale, ~overflowed(sums))
    on_its_way = start_copy_to_host(sums)  # before the update, for which the host need not wait to read them
    update(run.optimizer, gradients, coefficient, good)
    run.step += 1
    return PendingStep(run.step, lr, batch.tokens, on_its_way, tuple(metrics))


def forward_backward(run: Run, batch: StepBatch) -> tuple[Tensor, dict[str, Tensor]]:
    """Gradients of the mean loss of the *global* batch; this rank's loss of each row, (rows,), and its own sums.

    The sum is divided by the global count before backward, so any split into ranks and micro-batches gives the same
    gradient (in fp16 times the loss scale). Gradients travel between ranks with the last micro-batch only.
    """
    row_losses: list[Tensor] = []
    metrics: dict[str, Tensor] = {}
    for number, part in enumerate(batch.parts, start=1):
        begin_pass(run.model, last=number == len(batch.parts), keep_gathered=run.keep_gathered)
        loss, losses, sums = run.objective.losses(run, part)  # a sum with its graph, (rows of the part,)
        loss = loss / batch.denominator
        (loss if run.loss_scale is None else loss * run.loss_scale[0]).backward()
        row_losses.append(losses.detach())
        for name, value in sums.items():
            metrics[name] = metrics[name] + value.detach() if name in metrics else value.detach()
    return torch.cat(row_losses), metrics


def finish_step(run: Run, pending: PendingStep) -> str:
    """Read a step's sums on the host and act on them, on all ranks alike; why to stop, or ""."""
    run.watch.beat(pending.step, "sums", slow=pending.step == run.first_step + 1)
    sums = unpack_sums(pending.sums.read(), len(run.objective.groups), pending.metrics)
    if sums.locks_lost:
        return TAKEN_OVER
    run.tokens += pending.tokens
    run.meter.add(sums, pending.tokens, pending.seconds, pending.data_seconds)
    count_skips(run, pending, sums)
    if pending.step % run.config.log.every == 0:
        report_step(run, pending, sums)
    if run.log:
        run.log.progress(pending.step)
    if run.run_lock:
        run.run_lock.step = pending.step

    checkpointing.poll(run, sums)
    if run.skips_in_a_row >= run.config.train.max_skips:
        return SKIPS
    return ASKED if sums.stop_requests else ""


def count_skips(run: Run, pending: PendingStep, sums: StepSums) -> None:
    """Count a step whose update was left out, and report which samples it held.

    An overflow is the loss scale's doing and expected now and then: it neither counts among the skips in a row nor
    ends them, and is reported each time the scale has come down to a further sixteenth.
    """
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
        why = "spike" if sums.spike else "not finite" if run.loss_scale is None else "not finite; fp16 ends at 65504"
        if run.log:
            held = run.objective.describe_step(pending.step - 1, sums)
            in_a_row = run.skips_in_a_row
            run.log.event(pending.step, "skipped", why=why, grad_norm=sums.grad_norm, **held, in_a_row=in_a_row)


def report_step(run: Run, pending: PendingStep, sums: StepSums) -> None:
    """A line of the log: what the steps since the last one were like."""
    means, losses = run.meter.read()
    overflows = means.pop("overflows")
    values = {"loss": means.pop("loss"), "lr": pending.lr, "grad_norm": means.pop("grad_norm"), "tokens": run.tokens}
    values |= {**means, "memory": peak_memory(run.process.device.type)}
    if run.loss_scale is not None:
        values |= {"overflows": overflows, "loss_scale": sums.loss_scale}
    values |= run.objective.log_values(run, pending.step, values, losses)
    if run.log:
        run.log.train(pending.step, values)


def save(run: Run, *, asynchronous: bool) -> None:
    """Start the checkpoint of this step: model and optimizer by shard, and all else that the run remembers."""
    tensors = training_state(run.model, run.optimizer)
    if run.log:
        run.log.sync()  # the run goes on from this checkpoint: no line before it may be lost to a power cut
    checkpointing.begin(run, tensors, trainer_state(run), asynchronous=asynchronous)


def end(run: Run, stop: str) -> tuple[str, str]:
    """Save what is not saved yet; how the run ended (done, stopped or failed), and why."""
    run.watch.beat(run.step, "checkpoint", slow=True)
    end_trace(run)
    if run.save and stop == TAKEN_OVER:
        abandon(run.save)
    else:
        checkpointing.wait(run)
    if stop == SKIPS:
        return "failed", f"{run.skips_in_a_row} steps in a row had to be skipped"
    if stop == TAKEN_OVER:
        return "failed", stop
    if run.saved_step != run.step:
        save(run, asynchronous=False)
    if run.saved_step != run.step:
        return "failed", "the last checkpoint could not be written"
    # A stop after the last step may have left an evaluation to do.
    done = run.step == run.total_steps and not run.evaluation_due
    return ("done", "") if done else ("stopped", stop_reason() or stop)
