"""Fine-tuning as an objective of the loop: rows of a task, the loss of its heads, the best model on a selection set."""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from xxhash import xxh3_128

from gloria.config.cli import to_mapping
from gloria.config.schema import flatten
from gloria.dist.agreement import on_all_ranks, require_same
from gloria.dist.checkpoint_read import open_reader
from gloria.dist.manifest import checkpoint_path
from gloria.dist.process import Process, rank0_decides
from gloria.dist.run_lock import STATUS, lock_run, read_status, release_run, write_status
from gloria.dist.sharding import build_mesh, precision_and_reason
from gloria.dist.signals import ASKED
from gloria.dist.step_sums import StepSums
from gloria.errors import UserError
from gloria.files import parse_json_object, read_bounded, remove_partial
from gloria.model.kernels import use_cudnn_attention
from gloria.optim import schedules
from gloria.optim.optimizers import build_optimizer
from gloria.tasks.examples import Example
from gloria.tasks.models.adapters import add_adapters
from gloria.tasks.models.backbones import load_model
from gloria.tasks.models.encode import Encoded, Row, collate, epoch_batches
from gloria.tasks.models.finetuned import (
    MODEL,
    FinetunedModel,
    Inputs,
    encode,
    is_finetuned,
    pad_id,
    read_task_file,
    task_heads,
)
from gloria.tasks.models.heads import (
    SCORE,
    TaskModel,
    count_parameters,
    initialise_heads,
    row_losses,
    shard_task_model,
)
from gloria.tasks.report import RESULTS
from gloria.tasks.task import Task
from gloria.train.finetune_config import FinetuneConfig
from gloria.train.loop import StepBatch
from gloria.train.meter import Meter
from gloria.train.resume import read_run_state
from gloria.train.run import (
    Run,
    begin_log,
    compiles_blocks,
    load_checkpoint,
    lock_and_choose,
    opening,
    prepare_folder,
)
from gloria.train.selection import choose, score_best

# Of the recipe, what may change between two launches of a run.
_FREE = (
    *("log.", "checkpoint.", "dist.", "run.", "eval.batch"),
    *("train.micro_batch", "train.activation_checkpointing", "train.compile"),
)


@dataclass(frozen=True)
class Plan:
    """What a fine-tuning is about: its recipe, its task, the task's files, and the examples of two of its sets."""

    config: FinetuneConfig
    task: Task
    folder: Path
    train: list[Example]
    selection: list[Example]  # those that choose the model


@dataclass
class Finetuning:
    """The objective: the task's labels, scores or spans."""

    plan: Plan
    finetuned: FinetunedModel
    rows: list[Row]
    fingerprint: str  # of the rows, and of the examples that choose the model
    frozen: str  # fingerprint of the weights that are not trained; "": all are
    seed: int
    evaluate_every: int
    best: dict[str, Any] = field(default_factory=dict)  # step and scores of the best model so far, that in `model`
    epoch: tuple[int, list[list[int]]] = (-1, [])  # the epoch that is being read, and its batches
    groups: tuple[str, ...] = ("task",)

    def batch_rows(self, step: int) -> list[int]:
        """The row numbers of the global batch of a step: a function of the seed and the step alone."""
        global_batch = self.plan.config.train.global_batch
        epoch, number = divmod(step, steps_of_epoch(self.rows, global_batch))
        if self.epoch[0] != epoch:
            lengths = [len(row.ids) for row in self.rows]
            self.epoch = epoch, epoch_batches(lengths, global_batch, self.seed, epoch)
        return self.epoch[1][number]

    def next_batch(self, run: Run) -> StepBatch:
        """The rows of this rank; a micro-batch is its tensors and how many of its rows count.

        Every rank makes the same number of passes: one that has no row left takes one that does not count.
        """
        process, numbers = run.process, self.batch_rows(run.step)
        own = numbers[process.rank :: process.world]
        share = -(-len(numbers) // process.world)
        micro_batch = run.config.train.micro_batch or share
        parts = []
        for first in range(0, share, micro_batch):
            chosen = own[first : first + micro_batch]
            rows = [self.rows[number] for number in chosen or numbers[:1]]
            tensors = collate(rows, pad_id(self.finetuned.tokenizer), process.device, self.finetuned.inputs.heads)
            parts.append((tensors, len(chosen)))
        groups = torch.zeros(len(own), dtype=torch.int64, device=process.device)
        return StepBatch(parts, groups, len(numbers), sum(len(self.rows[number].ids) for number in numbers))

    def losses(self, run: Run, part: tuple[dict[str, Tensor], int]) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """The summed loss, that of each row that counts, (rows,); there are no other sums."""
        tensors, count = part
        losses = row_losses(run.model(tensors), tensors)[:count]
        return losses.sum(), losses, {}

    def evaluate(self, run: Run) -> str:
        """Choose the best model; why to stop, or ""."""
        return "" if choose(run) else ASKED

    def log_values(
        self, run: Run, step: int, values: dict[str, Any], losses: dict[str, float | None]
    ) -> dict[str, Any]:
        return {"epoch": step / steps_of_epoch(self.rows, self.plan.config.train.global_batch)}

    def describe_step(self, step: int, sums: StepSums) -> dict[str, Any]:
        return {"rows": self.batch_rows(step)[:8]}

    def finish(self, run: Run) -> bool:
        """Score the best model; False where a stop was requested meanwhile."""
        return score_best(run)

    def close(self) -> None:
        """There is nothing to close."""

    def state_dict(self) -> dict[str, Any]:
        return {"task": self.finetuned.inputs.task, "rows": self.fingerprint, "frozen": self.frozen}


def steps_of_epoch(rows: list[Row], global_batch: int) -> int:
    """Steps in which every row comes once."""
    return -(-len(rows) // global_batch)


def _clean(folder: Path) -> int:
    """For rank 0: remove what a launch that died has left of the best model."""
    remove_partial(folder / MODEL)
    return 0


def open_finetuning(plan: Plan, seed: int, folder: Path, process: Process) -> Run:
    """Lock the folder, load and shard the model, encode the examples, and go on from the newest checkpoint."""
    config, train = plan.config, plan.config.train
    use_cudnn_attention(False)
    with opening(config, process) as watch:
        resume_step = lock_and_choose(config, process, folder, watch)
        rank0_decides(process, lambda: _clean(folder))
        mesh = build_mesh(process, config.dist.replicas)
        precision, why = precision_and_reason(train.precision, process.device)
        require_same(process, {"train.precision": precision})
        finetuned, encoded, cut = on_all_ranks(process, lambda: _prepare(plan, seed))
        fingerprint, frozen = _fingerprint(encoded.rows, plan.selection), _frozen_fingerprint(finetuned.model)
        require_same(process, {f"{plan.folder}: rows": fingerprint, f"{config.model}: frozen weights": frozen})
        keep = config.dist.reshard == "never"  # auto is always: there is no forecast of other people's models
        model = shard_task_model(  # which moves a layer to the device at a time, so that it never holds them all whole
            finetuned.model,
            mesh,
            precision,
            activation_checkpointing=train.activation_checkpointing,
            compile_blocks=compiles_blocks(config, process),
            keep_gathered=keep,
        ).train()
        epoch = steps_of_epoch(encoded.rows, train.global_batch)
        total_steps = train.steps or math.ceil((train.epochs or 0.0) * epoch)
        if problems := [f"{keys[0]}: {what}" for keys, what in schedules.problems(config.schedule, total_steps)]:
            raise UserError(*problems)
        run = Run(
            config=config,
            objective=Finetuning(plan, finetuned, encoded.rows, fingerprint, frozen, seed, config.eval.every or epoch),
            process=process,
            mesh=mesh,
            folder=folder,
            seed=seed,
            precision=precision,
            model=model,
            optimizer=build_optimizer(config.optim, model.named_parameters()),
            total_steps=total_steps,
            meter=Meter(Finetuning.groups),
            watch=watch,
            keep_gathered=keep,
            evaluated_step=0,  # there is nothing to choose before the first step
        )
        changes = _load(run, checkpoint_path(folder, resume_step)) if resume_step else []
        prepare_folder(run)
        if process.is_main:
            print(*_about(run, encoded, cut, f"{precision}: {why}"), sep="\n", flush=True)
        begin_log(run, changes)
    return run


def is_done(folder: Path, config: FinetuneConfig, seed: int) -> int:
    """For rank 0: whether the folder has the results of this very run, also where its launch was killed before it
    could say so.
    """
    results = folder / RESULTS
    if not results.is_file():
        return 0
    if problems := recipe_changes(folder, parse_json_object(read_bounded(results), results), config, seed):
        raise UserError(*problems)
    before = read_status(folder)
    if before.status != "done":
        run_lock = lock_run(folder, before.launch)
        write_status(run_lock, "done", before.step)
        release_run(run_lock)
    return 1


def check_seeds(folder: Path, seeds: list[int]) -> int:
    """For rank 0: one seed has its run in the folder itself, several have folders of their own; never both."""
    several = any(folder.glob(f"seed-*/{STATUS}"))
    one = (folder / STATUS).exists()
    if one and len(seeds) > 1:
        raise UserError(f"run.seeds: {folder} holds the run of one seed; choose another run.dir for {seeds}")
    if several and len(seeds) == 1:
        raise UserError(f"run.seeds: {folder} holds runs of several seeds; choose another run.dir for one, {seeds[0]}")
    return 0


def _prepare(plan: Plan, seed: int) -> tuple[FinetunedModel, Encoded, str]:
    """The model with its heads, whole and on CPU; the rows to train on; what to say of a length that was cut."""
    config, train, heads = plan.config, plan.config.train, task_heads(plan.task)
    torch.manual_seed(seed)  # weights that a folder lacks (BERT's pooler) start at random
    loaded = load_model(config.model)
    if train.lora_rank is not None:
        add_adapters(loaded.backbone, train.lora_rank, loaded.at_random)
    length, cut = train.max_length, ""
    if loaded.max_length is not None and loaded.max_length < length:
        cut = f"train.max_length: {length} is more than the model sees; {loaded.max_length} it is"
        length = loaded.max_length
    inputs = Inputs(
        task=plan.task.source or plan.task.name,
        labels=plan.task.labels,
        heads=heads,
        max_length=length,
        stride=train.stride,
        max_answer_tokens=train.max_answer_tokens,
        no_answer=any(getattr(example, "impossible", False) for example in plan.train),
    )
    finetuned = FinetunedModel(
        loaded.source, TaskModel(loaded.backbone, heads, train.dropout), loaded.tokenizer, inputs
    )
    encoded = encode(finetuned, plan.train, training=True)
    if not encoded.rows:
        raise UserError(f"{plan.folder}: no answer of {len(plan.train)} questions is in its context; check the files")
    scores = [row.targets[SCORE] for row in encoded.rows if SCORE in heads]
    initialise_heads(finetuned.model, seed, float(np.mean(scores)) if scores else 0.0)
    return finetuned, encoded, cut


def _about(run: Run, encoded: Encoded, cut: str, precision: str) -> list[str]:
    """What a person should know before the first step."""
    plan, inputs, source = run.objective.plan, run.objective.finetuned.inputs, run.objective.finetuned.source
    notes = [f"{encoded.truncated} longer than {inputs.max_length} tokens"]
    if encoded.unanswerable:
        notes.append(f"{encoded.unanswerable} left out, their answer is not in the context")
    trained = sum(math.prod(each.shape) for each in run.model.parameters() if each.requires_grad)
    rank = run.config.train.lora_rank
    lora = "" if rank is None else f"; LoRA of rank {rank}: {trained:,} are trained, and checkpoints hold these alone"
    lines = [
        f"task       {plan.task.name}: {len(plan.train)} examples, {len(encoded.rows)} rows ({'; '.join(notes)}); "
        f"{len(plan.selection)} examples choose the model by {plan.task.selection}",
        f"model      {source}: {count_parameters(run.model):,} parameters, heads {inputs.heads}{lora}",
        f"lr         {schedules.describe(run.config.schedule, run.config.optim.lr, run.total_steps)}",
        f"precision  {precision}",
    ]
    return [cut, *lines] if cut else lines


def _load(run: Run, checkpoint: Path) -> list[str]:
    """Everything from a checkpoint, if it is of the very same run; a line for each change since."""
    trainer, saved = read_run_state(checkpoint, "seed")
    objective = run.objective
    problems = recipe_changes(run.folder, trainer, run.config, run.seed)
    if not problems and trainer.get("rows") != objective.fingerprint:
        problems = [
            f"{run.folder}: the set to train on or the one that chooses the model is another than its run began with; "
            "choose another run.dir"
        ]
    if not problems and trainer.get("frozen", "") != objective.frozen:
        problems = [
            f"{run.folder}: its checkpoints hold only what was trained, and the other weights of {run.config.model} "
            "have changed since; bring them back, or choose another run.dir"
        ]
    if problems:
        raise UserError(*problems)
    # Of the model that is there: a launch that was killed after this checkpoint may have found a better one since.
    if is_finetuned(run.folder / MODEL):
        objective.best = {key: read_task_file(run.folder / MODEL)[key] for key in ("step", "scores")}
    return load_checkpoint(run, open_reader(checkpoint), trainer, saved)


def recipe_changes(folder: Path, before: dict[str, Any], config: FinetuneConfig, seed: int) -> list[str]:
    """A line for each key in which the folder's run, as `before` records it, differs from the recipe."""
    old = flatten(before["recipe"]) | {"run.seeds": before["seed"]}
    new = flatten(to_mapping(config)) | {"run.seeds": seed}
    return [
        f"{folder}: its run has {key} = {old.get(key)}, not {value}; set that, or choose another run.dir"
        for key, value in new.items()
        if old.get(key) != value and (key == "run.seeds" or not key.startswith(_FREE))
    ]


def _frozen_fingerprint(model: TaskModel) -> str:
    """Of the parameters that stand still, which checkpoints leave out: "" where there are none."""
    digest, frozen = xxh3_128(), [each for each in model.parameters() if not each.requires_grad]
    for parameter in frozen:
        digest.update(parameter.detach().contiguous().view(torch.uint8).numpy().data)
    return digest.hexdigest() if frozen else ""


def _fingerprint(rows: list[Row], selection: list[Example]) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for row in rows:
        digest.update(repr((row.ids, row.types, row.targets)).encode())
    digest.update(repr(selection).encode())
    return digest.hexdigest()
