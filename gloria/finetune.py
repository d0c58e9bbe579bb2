"""Fine-tune a model on a task, choose the checkpoint on the task's dev set, and score it.

    python -m gloria.finetune --task assin2 --run.dir runs/assin2      # the demo's model, a small sample of the task
    torchrun --nproc_per_node 4 -m gloria.finetune --task rte --model runs/gloria-1.3b --data ../rte --run.dir runs/rte

A run's folder holds checkpoints, metrics.jsonl, `model` (the best one so far, a Hugging Face folder with
head.safetensors and task.json), `huggingface` (the same as a class of transformers, where there is one), the
predictions and results.json. Killed and started again with the same command, it goes on from its newest checkpoint,
and on CPU to the same bits. The test set is read and scored once, at the end.
"""

from __future__ import annotations

import sys
from pathlib import Path
from time import perf_counter

from gloria.dist.signals import ASKED, install_stop_handlers, set_time_budget, stop_reason
from gloria.errors import UserError, run_command
from gloria.tasks.catalog import find_task
from gloria.tasks.examples import Example
from gloria.tasks.samples import describe_sample, sample_folder
from gloria.tasks.task import Task
from gloria.train.finetune_config import DEMO_MODEL, FinetuneConfig, read_finetune_config


def check(argv: list[str] | None) -> tuple[FinetuneConfig, Task, Path, list[Example], list[Example]]:
    """The recipe, its task, where its files are, the examples to train on and those that choose; or a UserError."""
    config = read_finetune_config(argv)
    task = find_task(config.task)
    if task.family not in ("pair", "span"):
        raise UserError(
            f"{task.name}: has nothing to train a head on; score a language model on it with gloria.evaluate"
        )
    if config.model == DEMO_MODEL and not Path(DEMO_MODEL).is_dir():
        raise UserError(
            f"--model: {DEMO_MODEL} is not there; make it with `make demo`, or name a run or a model's folder"
        )
    folder = sample_folder(task) if config.data is None else Path(config.data)
    train, selection = task.training(folder)
    for name, examples in (("train", train), ("selection", selection)):
        if not examples:
            raise UserError(f"{folder}: the {name} set of {task.name} has no labelled examples; check the files")
    return config, task, folder, train, selection


if __name__ == "__main__":
    # Before torch is imported (seconds): a stop signal is kept from here on, and a wrong recipe is told at once.
    install_stop_handlers()
    checked = []
    if status := run_command(lambda argv: checked.append(check(argv)), sys.argv[1:], stop_reason):
        raise SystemExit(status)

import torch
from torch import Tensor

from gloria.dist.checkpoint import abandon
from gloria.dist.loss_scale import adjust
from gloria.dist.process import leave_process_group, on_any_rank, rank0_decides, start_process_group, stop_process_group
from gloria.dist.rank_log import open_rank_log
from gloria.dist.sharding import all_reduce_sums, clip_coefficient, gradient_square_sum, reseed, update
from gloria.dist.state import training_state
from gloria.dist.step_sums import StepSums, decide_update, overflowed, pack_sums, unpack_sums
from gloria.files import parse_json_object, read_bounded
from gloria.optim import schedules
from gloria.tasks.models.encode import collate, epoch_batches
from gloria.tasks.models.finetuned import pad_id
from gloria.tasks.models.heads import row_losses
from gloria.tasks.report import RESULTS, mean_over_seeds, table, write_results
from gloria.train import checkpointing
from gloria.train.failure import fail
from gloria.train.finetune_report import report_step
from gloria.train.finetune_run import Batch, Plan, Run, Step, check_seeds, close_run, is_done, open_run, trainer_state
from gloria.train.run import SKIPS, TAKEN_OVER, UNSAVED, flags_of, require_same_recipe
from gloria.train.selection import choose, score_best


def main(argv: list[str] | None = None, checked: tuple | None = None) -> int:
    """Fine-tune with each seed; several give a mean and a deviation. `checked`: what `check` returned before."""
    plan = Plan(*(checked or check(argv)))
    config = plan.config
    set_time_budget(config.run.max_minutes)
    process = start_process_group(config.run.device, max(config.dist.timeout_minutes, config.dist.step_timeout_minutes))
    torch.use_deterministic_algorithms(config.run.deterministic)
    folder, seeds, status = Path(config.run.dir), config.run.seeds, 0
    own = {seed: folder / f"seed-{seed}" if len(seeds) > 1 else folder for seed in seeds}
    try:
        require_same_recipe(process, config)
        rank0_decides(process, lambda: check_seeds(folder, seeds))
        open_rank_log(folder, process.rank, process.world)
        if process.is_main and config.data is None:
            print(describe_sample(plan.task), flush=True)
        for seed in seeds:
            if rank0_decides(process, lambda seed=seed: is_done(own[seed], config, seed)):
                if process.is_main:
                    print(f"{own[seed]}: done before", flush=True)
                continue
            status, done = tune(open_run(plan, seed, own[seed], process))
            if not done:
                break
        else:
            if process.is_main:
                report_results(folder, own, config.model)
    except (UserError, SystemExit):
        leave_process_group()
        raise
    stop_process_group()
    return status


def report_results(folder: Path, own: dict[int, Path], model: str) -> None:
    """Print the scores of each seed, whose results are in its `own` folder; of several write and print the mean."""
    found = {seed: parse_json_object(read_bounded(path / RESULTS), path / RESULTS) for seed, path in own.items()}
    for seed, results in found.items():
        print(f"seed {seed}:", table(results), sep="\n")
    if len(found) > 1:
        about = {"seeds": list(found), "from": model}
        summary = write_results(folder / RESULTS, about, mean_over_seeds(found))
        print("mean over the seeds:", table(summary), sep="\n", flush=True)


def tune(run: Run) -> tuple[int, bool]:
    """One run: train until the plan is done or somebody asks to stop, then score the best model.

    Returns the exit status, and whether the run is done.
    """
    try:
        status, reason = end(run, take_steps(run))
        if status == "done" and not score_best(run):
            status, reason = "stopped", stop_reason() or ASKED
    except Exception as error:
        return fail(run, error, close_run), False
    close_run(run, status, reason)
    if status == "failed" and run.process.is_main:
        print(
            f"error: {run.folder}: {reason}; the newest checkpoint is of step {run.saved_step}; see its metrics.jsonl",
            file=sys.stderr,
        )
    return int(status == "failed"), status == "done"


def take_steps(run: Run) -> str:
    """All steps, with their evaluations and checkpoints; why it stopped before the last one, or ""."""
    config = run.config
    save_every = config.checkpoint.every or run.evaluate_every
    stop = ASKED if on_any_rank(bool(stop_reason())) else ""
    if run.choice_due and not stop:
        stop = "" if choose(run) else ASKED  # what the last launch was stopped before, or in
    while run.step < run.total_steps and not stop:
        run.watch.beat(run.step, "data")
        started = perf_counter()
        batch = read_batch(run)
        data_seconds = perf_counter() - started
        lr, sums = take_step(run, batch)
        tokens = sum(len(run.rows[number].ids) for number in batch.numbers)
        stop = finish_step(run, Step(lr, batch.numbers, tokens, sums, perf_counter() - started, data_seconds))
        if run.choice_due and not stop:
            stop = "" if choose(run) else ASKED
        if run.step % save_every == 0 and stop not in UNSAVED:
            checkpointing.begin(
                run,
                training_state(run.tuned.model, run.optimizer),
                trainer_state(run),
                asynchronous=config.checkpoint.asynchronous,
            )
    return stop


def read_batch(run: Run) -> Batch:
    """The global batch of this step, a function of seed and step alone, and what this rank works on.

    Every rank makes the same number of passes; one that has no row left takes one that does not count.
    """
    process, global_batch = run.process, run.config.train.global_batch
    epoch, number = divmod(run.step, run.batches)
    if run.epoch[0] != epoch:
        run.epoch = epoch, epoch_batches([len(row.ids) for row in run.rows], global_batch, run.seed, epoch)
    numbers = run.epoch[1][number]
    own = numbers[process.rank :: process.world]
    share = -(-len(numbers) // process.world)
    micro_batch = run.config.train.micro_batch or share
    parts = []
    for first in range(0, share, micro_batch):
        chosen = own[first : first + micro_batch]
        rows = [run.rows[number] for number in chosen or numbers[:1]]
        tensors = collate(rows, pad_id(run.tuned.tokenizer), process.device, run.tuned.inputs.heads)
        parts.append((tensors, len(chosen)))
    return Batch(numbers, parts)


def take_step(run: Run, batch: Batch) -> tuple[float, StepSums]:
    """Forward, backward, one all-reduce, clipping and the update, left out on all ranks where it is not finite."""
    lr = schedules.learning_rate(run.config.schedule, run.config.optim.lr, run.step, run.total_steps)
    for group in run.optimizer.param_groups:
        group["lr"] = lr
    reseed(run.seed, run.step, run.process.rank)
    first = run.step == run.first_step  # it compiles
    run.watch.beat(run.step, "forward and backward", slow=first)
    losses = forward_backward(run, batch)  # (rows,)

    run.watch.beat(run.step, "update", slow=first)
    # A parameter that the task has no use for (BERT's pooler, under a span head) has no gradient.
    parameters = (parameter for parameter in run.tuned.model.parameters() if parameter.grad is not None)
    gradients = [parameter.grad.to_local() for parameter in parameters]
    one_source = torch.zeros(len(losses), dtype=torch.int64, device=losses.device)
    sums = pack_sums(gradient_square_sum(gradients, run.mesh), losses, one_source, 1, flags_of(run))
    all_reduce_sums(sums)
    grad_norm, good = decide_update(sums, 1, loss_scale=run.loss_scale)
    coefficient = clip_coefficient(grad_norm, run.config.train.clip_norm)
    if run.loss_scale is not None:
        coefficient = coefficient / run.loss_scale[0]
        adjust(run.loss_scale, ~overflowed(sums))
    update(run.optimizer, gradients, coefficient, good)
    run.optimizer.zero_grad()
    run.step += 1
    run.watch.beat(run.step, "sums", slow=first)
    return lr, unpack_sums(sums, 1)


def forward_backward(run: Run, batch: Batch) -> Tensor:
    """Gradients of the mean loss of the *global* batch (fp16: times the loss scale); this rank's losses, (rows,)."""
    model, losses = run.tuned.model, []
    for number, (tensors, rows) in enumerate(batch.parts):
        model.set_requires_gradient_sync(number + 1 == len(batch.parts))
        found = row_losses(model(tensors), tensors)
        loss = found.sum() * bool(rows) / len(batch.numbers)
        (loss if run.loss_scale is None else loss * run.loss_scale[0]).backward()
        losses.append(found.detach()[:rows])
    return torch.cat(losses)


def finish_step(run: Run, step: Step) -> str:
    """Draw a step's consequences, on all ranks alike; why to stop, or ""."""
    sums = step.sums
    if sums.locks_lost:
        return TAKEN_OVER
    run.tokens += step.tokens
    if not sums.overflow:  # which is the loss scale's doing: it neither counts nor ends a series
        run.skips_in_a_row = 0 if sums.applied else run.skips_in_a_row + 1
    if run.claim:
        run.claim.step = run.step
    report_step(run, step)
    checkpointing.poll(run, sums)
    if run.skips_in_a_row >= run.config.train.max_skips:
        return SKIPS
    return ASKED if sums.stop_requests else ""


def end(run: Run, stop: str) -> tuple[str, str]:
    """Save what is not saved yet; how the run ended (done, stopped or failed), and why."""
    run.watch.beat(run.step, "checkpoint", slow=True)
    if run.save and stop == TAKEN_OVER:
        abandon(run.save)
    else:
        checkpointing.wait(run)
    if stop == SKIPS:
        return "failed", f"loss or gradient not finite in {run.skips_in_a_row} steps in a row"
    if stop == TAKEN_OVER:
        return "failed", stop
    if run.saved_step != run.step:
        checkpointing.begin(run, training_state(run.tuned.model, run.optimizer), trainer_state(run), asynchronous=False)
    if run.saved_step != run.step:
        return "failed", "the last checkpoint could not be written"
    # Asked to stop behind the last step it may still have to choose.
    done = run.step == run.total_steps and not run.choice_due
    return ("done", "") if done else ("stopped", stop_reason() or stop)


if __name__ == "__main__":
    raise SystemExit(run_command(lambda argv: main(argv, *checked), sys.argv[1:], stop_reason))
