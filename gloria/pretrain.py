"""Pre-train a GPT-2 or GPT-Neo language model on a weighted mixture of token shards.

    python -m gloria.pretrain                                   # one process, the demo recipe
    torchrun --nproc_per_node 4 -m gloria.pretrain --config launch/gloria-1.3b.toml --train.steps 1000

Read it from top to bottom: `main` checks the recipe, `train` is the run, and the functions below it are its parts in
the order in which they happen. Killed at any moment and started again with the same command, it goes on from its
newest checkpoint with the same samples and, on CPU, the same bits.
"""

from __future__ import annotations

import sys
from time import perf_counter

import numpy as np

from gloria.config.cli import to_toml
from gloria.dist.signals import ASKED, install_stop_handlers, stop_reason
from gloria.errors import run_command, warn
from gloria.train.config import PretrainConfig, RunPlan, plan_run, read_pretrain_config
from gloria.train.demo import prepare_demo_corpus
from gloria.train.summary import describe, precision_here


def check(argv: list[str] | None) -> tuple[PretrainConfig, RunPlan]:
    """The recipe and what it amounts to, or a UserError with everything that is wrong with it."""
    config = read_pretrain_config(argv)
    prepare_demo_corpus(config)
    return config, plan_run(config)


if __name__ == "__main__":
    # Before torch is imported (seconds): a stop signal is kept from here on, and a wrong recipe is told at once.
    install_stop_handlers()
    checked = []
    if status := run_command(lambda argv: checked.append(check(argv)), sys.argv[1:], stop_reason):
        raise SystemExit(status)

import torch
from torch import Tensor

from gloria.data.loader import Batch
from gloria.dist.checkpoint import abandon
from gloria.dist.loss_scale import adjust
from gloria.dist.process import on_any_rank
from gloria.dist.sharding import (
    all_reduce_sums,
    clip_coefficient,
    gradient_square_sum,
    local_gradients,
    reseed,
    update,
)
from gloria.dist.state import training_state
from gloria.dist.step_sums import decide_update, overflowed, pack_sums, unpack_sums
from gloria.optim.schedules import learning_rate
from gloria.train import checkpointing
from gloria.train.failure import fail
from gloria.train.pretrain_report import add_step, end_trace, report_step, trace_steps
from gloria.train.pretrain_run import PendingStep, Run, close_run, open_run, trainer_state
from gloria.train.run import SKIPS, TAKEN_OVER, UNSAVED, flags_of


def main(argv: list[str] | None = None, checked: tuple[PretrainConfig, RunPlan] | None = None) -> int:
    """Check the recipe unless it is `checked`, then train; `--dry-run` stops after the check."""
    config, plan = checked or check(argv)
    if config.dry_run:
        print(to_toml(config), describe(config, plan, *precision_here(config)), sep="\n")
        for warning in plan.warnings:
            warn(warning)
        return 0
    return train(open_run(config, plan))


def train(run: Run) -> int:
    """Take steps until the plan is done or somebody asks to stop, then save; returns the exit status."""
    try:
        return end(run, take_steps(run))
    except Exception as error:
        return fail(run, error, close_run)


def take_steps(run: Run) -> str:
    """All steps, with their validations and checkpoints; why it stopped before the last one, or "".

    The sums of a step are read one step late, while the device works on the next one, except before a validation or
    a checkpoint, which need the step settled.
    """
    config, total_steps = run.config, run.plan.total_steps
    pending: PendingStep | None = None
    stop = ASKED if on_any_rank(bool(stop_reason())) else ""
    if run.validation_due and not stop:
        stop = validate(run)  # what the curves start from, or what the last launch was stopped in
    while run.step < total_steps and not stop:
        trace_steps(run)
        run.watch.beat(run.step, "data")
        started = perf_counter()
        batch = next(run.loader)
        data_seconds = perf_counter() - started
        step = take_step(run, batch)
        if pending:
            stop = finish_step(run, pending)
        pending = step
        pending.seconds, pending.data_seconds = perf_counter() - started, data_seconds

        save_due = run.step % config.checkpoint.every == 0
        if (run.validation_due or save_due or stop or run.step == total_steps) and stop not in UNSAVED:
            stop = finish_step(run, pending) or stop
            pending = None
        if run.validation_due and not stop:
            stop = validate(run)
        if save_due and stop not in UNSAVED:
            checkpointing.begin(
                run,
                training_state(run.model, run.optimizer),
                trainer_state(run),
                asynchronous=config.checkpoint.asynchronous,
            )
    return stop


def take_step(run: Run, batch: Batch) -> PendingStep:
    """Forward, backward, one all-reduce, clipping and the update. Nothing here waits for the device."""
    config, num_sources = run.config, len(run.mixture.names)
    lr = learning_rate(config.schedule, config.optim.lr, run.step, run.plan.total_steps)
    for group in run.optimizer.param_groups:
        group["lr"] = lr
    reseed(config.run.seed, run.step, run.process.rank)
    first = run.step == run.first_step  # it compiles
    run.watch.beat(run.step, "forward and backward", slow=first)
    row_losses = forward_backward(run, batch)  # (rows,)

    run.watch.beat(run.step, "update", slow=first)
    gradients = local_gradients(run.model)
    sources = torch.tensor(batch.source, device=run.process.device)
    sums = pack_sums(gradient_square_sum(gradients, run.mesh), row_losses, sources, num_sources, flags_of(run))
    all_reduce_sums(sums)
    grad_norm, good = decide_update(
        sums, num_sources, run.running_norm, config.train.skip_spikes or 0.0, run.loss_scale
    )
    coefficient = clip_coefficient(grad_norm, config.train.clip_norm)
    if run.loss_scale is not None:
        coefficient = coefficient / run.loss_scale[0]
        adjust(run.loss_scale, ~overflowed(sums))
    update(run.optimizer, gradients, coefficient, good)
    run.optimizer.zero_grad()
    run.step += 1
    return PendingStep(run.step, batch, lr, sums, run.mixture.next_sample)


def forward_backward(run: Run, batch: Batch) -> Tensor:
    """Gradients of the mean token loss of the *global* batch; returns this rank's summed loss of each row (rows,).

    The sum is divided by the global token count before backward, so any split into ranks and micro-batches gives
    the same gradient (fp16: times the loss scale). Gradients travel between ranks with the last micro-batch only.
    """
    tokens = widen(batch.tokens, run.process.device)  # (rows, seq + 1)
    micro_batch = run.config.train.micro_batch
    global_tokens = run.mixture.global_batch * run.mixture.sequence_length
    row_losses = []
    for first in range(0, len(tokens), micro_batch):
        part = tokens[first : first + micro_batch]
        run.model.set_requires_gradient_sync(first + micro_batch >= len(tokens))
        losses = row_loss_sums(run, part, labels=part[:, 1:])
        loss = losses.sum() / global_tokens
        (loss if run.loss_scale is None else loss * run.loss_scale[0]).backward()
        row_losses.append(losses.detach())
    return torch.cat(row_losses)


def row_loss_sums(run: Run, tokens: Tensor, labels: Tensor) -> Tensor:
    """The model's summed token loss of each row, (rows,), on windows `tokens` (rows, seq + 1)."""
    ids = tokens[:, :-1]
    documents = None
    if run.config.data.mask_documents:
        ends = (ids == run.plan.corpus.manifest.tokenizer["eos_id"]).long()
        documents = ends.cumsum(dim=1) - ends  # an EOS belongs to the document it ends
    return run.model(ids, labels, documents)


def widen(tokens: np.ndarray, device: torch.device) -> Tensor:
    """Token ids as the embedding wants them (int64); they travel to the device as small as they are on disk."""
    narrow = torch.from_numpy(tokens)
    if device.type == "cuda":
        narrow = narrow.pin_memory().to(device, non_blocking=True)
    return narrow.to(torch.int64)


def finish_step(run: Run, pending: PendingStep) -> str:
    """Read a step's sums on the host and draw the consequences, on all ranks alike; why to stop, or ""."""
    run.watch.beat(pending.step, "sums", slow=pending.step == run.first_step + 1)
    sums = unpack_sums(pending.sums, len(run.mixture.names))
    if sums.locks_lost:
        return TAKEN_OVER
    add_step(run, pending, sums)
    if pending.step % run.config.log.every == 0:
        report_step(run, pending, sums)
    if run.log:
        run.log.progress(pending.step)
    if run.claim:
        run.claim.step = pending.step

    checkpointing.poll(run, sums)
    if run.skips_in_a_row >= run.config.train.max_skips:
        return SKIPS
    return ASKED if sums.stop_requests else ""


@torch.no_grad()
def validate(run: Run) -> str:
    """Loss of every source on its held-out windows, always the same ones; why to stop, or "".

    The model's forward is a collective, so every rank takes the same number of batches: a rank that has no window
    left takes one whose labels are all masked. Behind each batch the ranks agree whether to go on.
    """
    run.model.eval()
    process, micro_batch, length = run.process, run.config.train.micro_batch, run.mixture.sequence_length
    losses: dict[str, float] = {}
    for name, (stream, windows) in run.valid_streams.items():
        own = windows[process.rank :: process.world]
        batches = -(-len(windows) // (process.world * micro_batch))
        losses[name] = 0.0
        for number in range(batches):
            run.watch.beat(run.step, "validation", slow=run.step == 0)
            chosen = own[number * micro_batch : (number + 1) * micro_batch]
            tokens = np.zeros((micro_batch, length + 1), stream.dtype)
            stream.gather(chosen, length, tokens[: len(chosen)])
            ids = widen(tokens, process.device)
            labels = ids[:, 1:].clone()
            labels[len(chosen) :] = -100
            sums = torch.zeros(3, dtype=torch.float64, device=process.device)
            sums[0] = row_loss_sums(run, ids, labels).sum(dtype=torch.float64)
            flags = flags_of(run)
            sums[1:] = torch.tensor([flags.stop, flags.lock_lost])
            all_reduce_sums(sums)
            loss, wishes, locks_lost = sums.tolist()
            if wishes or locks_lost:
                run.model.train()
                return TAKEN_OVER if locks_lost else ASKED
            losses[name] += loss / (len(windows) * length)
    run.model.train()
    run.validated_step = run.step
    if run.log:
        shares = run.mixture.shares
        weight = {name: shares.get(name, 0.0) for name in losses}
        mean = sum(weight[name] * loss for name, loss in losses.items()) / sum(weight.values())
        run.log.valid(run.step, mean, losses)
    return ""


def end(run: Run, stop: str) -> int:
    """Save what is not saved yet, say how the run ended, and give the exit status."""
    run.watch.beat(run.step, "checkpoint", slow=True)
    end_trace(run)
    if run.save and stop == TAKEN_OVER:
        abandon(run.save)
    else:
        checkpointing.wait(run)
    if stop == SKIPS:
        status, reason = "failed", f"{run.skips_in_a_row} steps in a row had to be skipped"
    elif stop == TAKEN_OVER:
        status, reason = "failed", stop
    else:
        if run.saved_step != run.step:
            checkpointing.begin(run, training_state(run.model, run.optimizer), trainer_state(run), asynchronous=False)
        status, reason = "done" if run.step == run.plan.total_steps else "stopped", stop_reason() or stop
        if run.saved_step != run.step:
            status, reason = "failed", "the last checkpoint could not be written"
    close_run(run, status, reason)
    if status == "failed" and run.process.is_main:
        print(f"error: {run.folder}: {reason}; the newest checkpoint is of step {run.saved_step}", file=sys.stderr)
    return 1 if status == "failed" else 0


if __name__ == "__main__":
    raise SystemExit(run_command(lambda argv: main(argv, *checked), sys.argv[1:], stop_reason))
