"""A fine-tuning run from its recipe to the first step, and from there to a checkpoint and back."""

from __future__ import annotations

import hashlib
import math
import secrets
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

import gloria
from gloria.config.cli import to_mapping
from gloria.config.schema import flatten
from gloria.dist.agreement import on_all_ranks, require_same, require_shared
from gloria.dist.checkpoint import Save, checkpoint_bytes
from gloria.dist.checkpoint_read import open_reader, read_trainer
from gloria.dist.loss_scale import loss_scale_for, restore
from gloria.dist.manifest import checkpoint_path
from gloria.dist.process import Process, rank0_decides
from gloria.dist.retention import check_free_space
from gloria.dist.run_lock import LOCK, STATUS, RunLock, lock_run, read_status, release_run, write_status
from gloria.dist.sharding import build_mesh, precision_and_reason
from gloria.dist.state import load_training_state, training_state
from gloria.dist.step_sums import StepSums
from gloria.dist.watchdog import Watchdog, start_watch
from gloria.errors import UserError
from gloria.files import parse_json_object, put_back, read_bounded
from gloria.optim import schedules
from gloria.optim.optimizers import build_optimizer
from gloria.tasks.examples import Example
from gloria.tasks.models.backbones import load_model
from gloria.tasks.models.encode import Encoded, Row
from gloria.tasks.models.finetuned import MODEL, FinetunedModel, Inputs, encode, is_tuned, read_task_file, task_heads
from gloria.tasks.models.heads import SCORE, TaskModel, count_parameters, initialise_heads, shard_task_model
from gloria.tasks.report import RESULTS
from gloria.tasks.task import Task
from gloria.train.finetune_config import FinetuneConfig
from gloria.train.metrics import RunLog, open_log
from gloria.train.resume import choose_step, leave_if_asked
from gloria.train.run import Run as AnyRun
from gloria.train.run import close_folder

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


@dataclass(frozen=True)
class Step:
    """What has become of a step. Without its tensors, for steps are kept until the log has a line of them."""

    lr: float
    rows: list[int]  # their numbers, of all ranks
    tokens: int  # of all ranks
    sums: StepSums  # over all ranks
    seconds: float
    data_seconds: float


@dataclass(frozen=True)
class Batch:
    """A step's rows: of all ranks by number, and this rank's as tensors, in micro-batches."""

    numbers: list[int]
    parts: list[tuple[dict[str, Tensor], int]]  # tensors, and how many of their rows count


@dataclass
class Run(AnyRun):
    """What the loop works with. Equal on all ranks but for the shards, the rank and what rank 0 alone holds."""

    config: FinetuneConfig
    plan: Plan
    seed: int
    process: Process
    mesh: DeviceMesh
    folder: Path
    tuned: FinetunedModel
    optimizer: torch.optim.Optimizer
    rows: list[Row]
    fingerprint: str  # of the rows, and of the examples that choose the model
    total_steps: int
    launch: str
    watch: Watchdog  # over this rank's progress
    loss_scale: Tensor | None = None  # of fp16; see dist.loss_scale
    claim: RunLock | None = None  # rank 0's hold on the run folder
    log: RunLog | None = None  # rank 0's
    first_step: int = 0  # steps that were done when this launch took over
    step: int = 0
    tokens: int = 0
    skips_in_a_row: int = 0
    best: dict[str, Any] = field(default_factory=dict)  # step and scores of the best model so far, that in `model`
    chosen_step: int = 0  # steps done at the last whole evaluation that chose
    save: Save | None = None  # under way in the background
    saved_step: int = 0
    staging: dict[str, Tensor] = field(default_factory=dict)  # host memory of background saves
    since: list[Any] = field(default_factory=list)  # steps since the last line of the log
    epoch: tuple[int, list[list[int]]] = (-1, [])  # the epoch that is being read, and its batches

    @property
    def batches(self) -> int:
        """Steps of an epoch."""
        return -(-len(self.rows) // self.config.train.global_batch)

    @property
    def evaluate_every(self) -> int:
        return self.config.eval.every or self.batches

    @property
    def choice_due(self) -> bool:
        """Whether an evaluation that chooses belongs here, before the next step, and has not been."""
        here = self.step % self.evaluate_every == 0 or self.step == self.total_steps
        return here and self.chosen_step != self.step


def open_run(plan: Plan, seed: int, folder: Path, process: Process) -> Run:
    """RunLock the folder, load and shard the model, encode the examples, go on from the newest checkpoint."""
    dist = plan.config.dist
    logs = Path(plan.config.run.dir) / "logs"
    watch = Watchdog(logs, process.rank, process.world, 60 * dist.timeout_minutes, 60 * dist.step_timeout_minutes)
    start_watch(watch)
    try:
        return _open_run(plan, seed, folder, process, watch)
    except BaseException:
        watch.ended.set()
        if watch.claim:
            release_run(watch.claim)
        raise


def close_run(run: Run, status: str, reason: str = "") -> None:
    """Write the run's last status and let go of its folder; the process group stays, for the next seed."""
    close_folder(run, status, reason)
    run.watch.ended.set()


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
        claim = lock_run(folder, before.launch)
        write_status(claim, "done", before.step)
        release_run(claim)
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


def _open_run(plan: Plan, seed: int, folder: Path, process: Process, watch: Watchdog) -> Run:
    config, train = plan.config, plan.config.train
    watch.launch = f"{rank0_decides(process, lambda: secrets.randbits(40)):010x}"

    def claim_and_choose() -> int:
        watch.claim = lock_run(folder, watch.launch)
        put_back(folder / MODEL)
        return choose_step(folder, config.run.resume, watch.launch)

    resume_step = rank0_decides(process, claim_and_choose)
    leave_if_asked(watch, resume_step)
    mesh = build_mesh(process, config.dist.replicas)
    precision, why = precision_and_reason(train.precision, process.device)
    require_same(process, {"train.precision": precision})
    require_shared(process, folder / LOCK, watch.launch)
    tuned, encoded, cut = on_all_ranks(process, lambda: _prepare(plan, seed))
    fingerprint = _fingerprint(encoded.rows, plan.selection)
    require_same(process, {f"{plan.folder}: rows": fingerprint})
    shard_task_model(  # which moves a layer to the device at a time, so that it never holds them all whole
        tuned.model,
        mesh,
        precision,
        activation_checkpointing=train.activation_checkpointing,
        compile_blocks=process.device.type == "cuda" if train.compile == "auto" else train.compile,
    ).train()
    batches = -(-len(encoded.rows) // train.global_batch)
    total_steps = train.steps or math.ceil(train.epochs * batches)
    if problems := [f"{keys[0]}: {what}" for keys, what in schedules.problems(config.schedule, total_steps)]:
        raise UserError(*problems)
    run = Run(
        config=config,
        plan=plan,
        seed=seed,
        process=process,
        mesh=mesh,
        folder=folder,
        tuned=tuned,
        optimizer=build_optimizer(config.optim, tuned.model.named_parameters()),
        rows=encoded.rows,
        fingerprint=fingerprint,
        total_steps=total_steps,
        launch=watch.launch,
        watch=watch,
        loss_scale=loss_scale_for(precision, process.device),
        claim=watch.claim,
    )
    if resume_step:
        load_checkpoint(run, checkpoint_path(folder, resume_step))
    rank0_decides(process, lambda: _prepare_folder(run))
    if process.is_main:
        print(*_about(run, encoded, cut, f"{precision}: {why}"), sep="\n", flush=True)
        about = {"launch": run.launch, "ranks": process.world, "seed": seed}
        run.log = open_log(folder, run.step, total_steps, config.log, **about)
    return run


def _prepare(plan: Plan, seed: int) -> tuple[FinetunedModel, Encoded, str]:
    """The model with its heads, whole and on CPU; the rows to train on; what to say of a length that was cut."""
    config, train, heads = plan.config, plan.config.train, task_heads(plan.task)
    torch.manual_seed(seed)  # weights that a folder lacks (BERT's pooler) start at random
    loaded = load_model(config.model)
    length, cut = train.max_length, ""
    if loaded.max_length is not None and loaded.max_length < length:
        cut = f"train.max_length: {length} is more than the model sees; {loaded.max_length} it is"
        length = loaded.max_length
    inputs = Inputs(
        task=plan.task.name,
        labels=plan.task.labels,
        heads=heads,
        max_length=length,
        stride=train.stride,
        max_answer_tokens=train.max_answer_tokens,
        no_answer=any(getattr(example, "impossible", False) for example in plan.train),
    )
    tuned = FinetunedModel(loaded.source, TaskModel(loaded.backbone, heads, train.dropout), loaded.tokenizer, inputs)
    encoded = encode(tuned, plan.train, training=True)
    if not encoded.rows:
        raise UserError(f"{plan.folder}: no answer of {len(plan.train)} questions is in its context; check the files")
    scores = [row.targets[SCORE] for row in encoded.rows if SCORE in heads]
    initialise_heads(tuned.model, seed, float(np.mean(scores)) if scores else 0.0)
    return tuned, encoded, cut


def _prepare_folder(run: Run) -> int:
    """For rank 0, before the first step: is there room for what will be saved."""
    check_free_space(
        run.folder, checkpoint_bytes(training_state(run.tuned.model, run.optimizer)), run.config.checkpoint.keep
    )
    if run.claim:
        write_status(run.claim, "running", run.step)
    return 0


def _about(run: Run, encoded: Encoded, cut: str, precision: str) -> list[str]:
    """What a person should know before the first step."""
    plan, inputs, model = run.plan, run.tuned.inputs, run.tuned.model
    notes = [f"{encoded.truncated} longer than {inputs.max_length} tokens"]
    if encoded.unanswerable:
        notes.append(f"{encoded.unanswerable} left out, their answer is not in the context")
    lines = [
        f"task       {plan.task.name}: {len(plan.train)} examples, {len(run.rows)} rows ({'; '.join(notes)}); "
        f"{len(plan.selection)} examples choose the model by {plan.task.selection}",
        f"model      {run.tuned.source}: {count_parameters(model):,} parameters, heads {inputs.heads}",
        f"lr         {schedules.describe(run.config.schedule, run.config.optim.lr, run.total_steps)}",
        f"precision  {precision}",
    ]
    if not run.optimizer.defaults.get("fused"):
        lines.append(f"optim.name: {run.config.optim.name} waits for the device once a step, to skip one not finite")
    return [cut, *lines] if cut else lines


def trainer_state(run: Run) -> dict[str, Any]:
    """All that a checkpoint remembers besides tensors: plain JSON, the same on every rank."""
    return {
        "task": run.tuned.inputs.task,
        "seed": run.seed,
        "tokens": run.tokens,
        "skips_in_a_row": run.skips_in_a_row,
        "loss_scale": None if run.loss_scale is None else run.loss_scale.tolist(),
        "chosen_step": run.chosen_step,
        "rows": run.fingerprint,
        "total_steps": run.total_steps,
        "recipe": to_mapping(run.config),
        "versions": {"gloria": gloria.__version__, "torch": str(torch.__version__)},
    }


def load_checkpoint(run: Run, checkpoint: Path) -> None:
    """Everything from a checkpoint, saved by any number of ranks, if it is of the very same run."""
    reader, state = open_reader(checkpoint), read_trainer(checkpoint)
    problems = recipe_changes(run.folder, state, run.config, run.seed)
    if not problems and state.get("rows") != run.fingerprint:
        problems = [
            f"{run.folder}: the set to train on or the one that chooses the model is another than its run began with; "
            "choose another run.dir"
        ]
    if problems:
        raise UserError(*problems)
    load_training_state(run.tuned.model, run.optimizer, reader.read_into)
    run.first_step = run.step = run.saved_step = reader.step
    run.tokens, run.skips_in_a_row, run.chosen_step = (
        state[key] for key in ("tokens", "skips_in_a_row", "chosen_step")
    )
    # Of the model that is there: a launch that was killed after this checkpoint may have found a better one since.
    if is_tuned(run.folder / MODEL):
        run.best = {key: read_task_file(run.folder / MODEL)[key] for key in ("step", "scores")}
    for line in restore(run.loss_scale, state.get("loss_scale")):
        if run.process.is_main:
            print(line, flush=True)


def recipe_changes(folder: Path, before: dict[str, Any], config: FinetuneConfig, seed: int) -> list[str]:
    """A line for each key that makes the run in the folder, of which `before` tells, another one than is asked for."""
    old = flatten(before["recipe"]) | {"run.seeds": before["seed"]}
    new = flatten(to_mapping(config)) | {"run.seeds": seed}
    return [
        f"{folder}: its run has {key} = {old.get(key)}, not {value}; set that, or choose another run.dir"
        for key, value in new.items()
        if old.get(key) != value and (key == "run.seeds" or not key.startswith(_FREE))
    ]


def _fingerprint(rows: list[Row], selection: list[Example]) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for row in rows:
        digest.update(repr((row.ids, row.types, row.targets)).encode())
    digest.update(repr(selection).encode())
    return digest.hexdigest()
