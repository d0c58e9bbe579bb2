"""A run from its recipe to the first step: processes, model, optimizer, mixture, and all of it from a checkpoint.

`open_run` gives the loop everything it works with; `close_run` takes it apart so that no rank is left behind.
"""

from __future__ import annotations

import secrets
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

import gloria
from gloria.config.cli import to_mapping
from gloria.data.loader import Batch, Loader, validation_windows
from gloria.data.mixture import Mixture
from gloria.data.stream import TokenStream
from gloria.dist.agreement import require_shared
from gloria.dist.checkpoint import Save, checkpoint_bytes
from gloria.dist.checkpoint_read import open_reader, read_trainer
from gloria.dist.loss_scale import loss_scale_for, restore
from gloria.dist.manifest import checkpoint_path
from gloria.dist.process import (
    Process,
    leave_process_group,
    rank0_decides,
    start_process_group,
    stop_process_group,
)
from gloria.dist.rank_log import open_rank_log
from gloria.dist.retention import check_free_space
from gloria.dist.run_lock import LOCK, RunLock, lock_run, release_run, write_status
from gloria.dist.sharding import build_mesh, fill_parameters, precision_and_reason, shard
from gloria.dist.signals import set_time_budget
from gloria.dist.state import load_rng_state_dict, load_training_state, training_state
from gloria.dist.step_sums import new_running_norm
from gloria.dist.watchdog import Watchdog, start_watch
from gloria.errors import UserError, warn
from gloria.files import to_json, write_whole
from gloria.model.config import TransformerConfig
from gloria.model.huggingface import read_tensors
from gloria.model.transformer import Transformer, initial_value
from gloria.optim import schedules
from gloria.optim.optimizers import build_optimizer
from gloria.train.config import PretrainConfig, RunPlan, check_epochs, span, with_location
from gloria.train.metrics import Meter, RunLog, open_log, peak_flops
from gloria.train.resume import changes_since, choose_step, leave_if_asked
from gloria.train.run import Run as AnyRun
from gloria.train.run import close_folder, require_same_recipe
from gloria.train.summary import describe

RNG_SCHEME = "seed/step/rank"  # each step reseeds from these three, see dist.sharding.reseed


@dataclass
class Run(AnyRun):
    """What the loop works with. Equal on all ranks but for the shards, the rank and what rank 0 alone holds."""

    config: PretrainConfig
    plan: RunPlan
    process: Process
    mesh: DeviceMesh
    launch: str  # names this launch in file names and the lock
    folder: Path
    precision: str  # fp32, bf16 or fp16
    why: str  # it is that one, in words
    model: Transformer
    optimizer: torch.optim.Optimizer
    mixture: Mixture
    meter: Meter
    valid_streams: dict[str, tuple[TokenStream, np.ndarray]]  # by source: held-out tokens, windows (n,)
    watch: Watchdog  # over this rank's progress
    claim: RunLock | None = None  # rank 0's hold on the run folder
    loader: Loader | None = None  # opened last: its thread starts with the first batch
    log: RunLog | None = None  # rank 0's
    first_step: int = 0  # steps that were done when this launch took over
    step: int = 0  # steps done; a skipped update counts, for its samples are consumed
    tokens: int = 0  # predicted so far
    validated_step: int = -1  # steps done at the last whole validation
    skips: int = 0  # updates left out in all, and without a good one in between
    skips_in_a_row: int = 0
    overflows: int = 0  # updates left out for the loss scale, which are no skips
    running_norm: Tensor | None = None  # of the gradients, where spikes are skipped; see dist.step_sums.decide_update
    loss_scale: Tensor | None = None  # of fp16; see dist.loss_scale
    profiler: torch.profiler.profile | None = None  # at work in the steps of train.profile_steps
    save: Save | None = None  # under way in the background
    saved_step: int = 0  # of the newest durable checkpoint
    staging: dict[str, Tensor] = field(default_factory=dict)  # host memory of background saves

    @property
    def validation_due(self) -> bool:
        """Whether a validation belongs here, before the next step, and has not been."""
        every = self.config.valid.every if self.valid_streams else 0
        here = bool(every) and (self.step % every == 0 or self.step == self.plan.total_steps)
        return here and self.validated_step != self.step


@dataclass
class PendingStep:
    """A step that is on its way: its sums may still be in the making on the device."""

    step: int  # steps done once it is
    batch: Batch
    lr: float
    sums: Tensor  # float64, over all ranks
    next_sample: int
    seconds: float = 0.0
    data_seconds: float = 0.0


def open_run(config: PretrainConfig, plan: RunPlan) -> Run:
    """Start the process group, claim the run folder, build the model and go on where the newest checkpoint ends."""
    set_time_budget(config.run.max_minutes)
    process = start_process_group(config.run.device, max(config.dist.timeout_minutes, config.dist.step_timeout_minutes))
    patience, limit = 60 * config.dist.timeout_minutes, 60 * config.dist.step_timeout_minutes
    watch = Watchdog(Path(config.run.dir) / "logs", process.rank, process.world, patience, limit)
    start_watch(watch)
    try:
        run, changes = _open_run(config, plan, process, watch)
    except BaseException:
        watch.ended.set()
        if watch.claim:
            release_run(watch.claim)
        leave_process_group()
        raise
    if process.is_main:
        print(describe(config, plan, run.precision, run.why), flush=True)
        for warning in plan.warnings:
            warn(warning)
        for line in changes:
            print(f"changed: {line}", flush=True)
        if not run.optimizer.defaults.get("fused"):
            print(f"optim.name: {config.optim.name} waits for the device once a step, to skip one that is not finite")
        about = {"launch": run.launch, "ranks": process.world}
        run.log = open_log(
            run.folder, run.step, plan.total_steps, config.log, validated_step=run.validated_step, **about
        )
    streams = {name: plan.corpus.stream(name) for name, share in run.mixture.shares.items() if share}
    run.loader = Loader(streams, run.mixture, rank=process.rank, world=process.world, prefetch=config.data.prefetch)
    return run


def _open_run(config: PretrainConfig, plan: RunPlan, process: Process, watch: Watchdog) -> tuple[Run, list[str]]:
    """All that a user's mistake can end; the lines that tell what has changed since the checkpoint."""
    if config.run.deterministic:
        torch.use_deterministic_algorithms(True)
    precision, why = _choose_precision(config, process)
    require_same_recipe(process, config, plan.corpus.manifest, precision=precision)
    mesh = build_mesh(process, config.dist.replicas)
    watch.launch = f"{rank0_decides(process, lambda: secrets.randbits(40)):010x}"
    folder = Path(config.run.dir)
    resume_step = rank0_decides(process, lambda: _claim_and_choose(config, watch))
    require_shared(process, folder / LOCK, watch.launch)
    open_rank_log(folder, process.rank, process.world)
    leave_if_asked(watch, resume_step)
    model = _build_model(config, plan, process, mesh, precision)
    run = Run(
        config=config,
        plan=plan,
        process=process,
        mesh=mesh,
        launch=watch.launch,
        folder=folder,
        precision=precision,
        why=why,
        model=model,
        optimizer=build_optimizer(config.optim, model.named_parameters()),
        mixture=plan.mixture,
        meter=_new_meter(plan, process.device, precision),
        valid_streams=_open_validation(config, plan),
        watch=watch,
        claim=watch.claim,
        loss_scale=loss_scale_for(precision, process.device),
    )
    if config.train.skip_spikes is not None:
        run.running_norm = new_running_norm(process.device)
    changes = _load(run, checkpoint_path(folder, resume_step)) if resume_step else _initialise(run)
    if samples := span(config.data.skip_samples):
        changes += _leave_out(run, samples)
    rank0_decides(process, lambda: _prepare_folder(run))
    return run, changes


def close_run(run: Run, status: str, reason: str = "") -> None:
    """Write the run's last status and leave the process group together with the other ranks."""
    run.watch.beat(run.step, "end", slow=True)
    if run.loader:
        run.loader.close()
    close_folder(run, status, reason)
    stop_process_group()
    run.watch.ended.set()


def trainer_state(run: Run) -> dict[str, Any]:
    """All that a checkpoint remembers besides tensors: plain JSON, the same on every rank."""
    config, plan = run.config, run.plan
    return {
        "tokens": run.tokens,
        "validated_step": run.validated_step,
        "skips": run.skips,
        "skips_in_a_row": run.skips_in_a_row,
        "overflows": run.overflows,
        "running_norm": None if run.running_norm is None else run.running_norm.tolist(),
        "precision": run.precision,
        "loss_scale": None if run.loss_scale is None else run.loss_scale.tolist(),
        "mixture": run.mixture.state_dict(),
        "schedule": schedules.state_dict(config.schedule, config.optim.lr, run.step, plan.total_steps),
        "rng": {"scheme": RNG_SCHEME, "seed": config.run.seed},
        "meter": run.meter.state_dict(),
        "model": plan.shape.to_dict(),
        "recipe": to_mapping(config),
        "world": run.process.world,
        "versions": {"gloria": gloria.__version__, "torch": str(torch.__version__), "numpy": np.__version__},
    }


def _claim_and_choose(config: PretrainConfig, watch: Watchdog) -> int:
    """For rank 0: take the run folder's lock (`watch.claim`), and the step to go on from; 0 to begin."""
    folder = Path(config.run.dir)
    watch.claim = lock_run(folder, watch.launch)
    return choose_step(folder, config.run.resume, watch.launch, config.data.skip_samples)


def _choose_precision(config: PretrainConfig, process: Process) -> tuple[str, str]:
    try:
        return precision_and_reason(config.train.precision, process.device)
    except UserError as error:
        raise with_location(config, error) from None


def _build_model(
    config: PretrainConfig, plan: RunPlan, process: Process, mesh: DeviceMesh, precision: str
) -> Transformer:
    compile_blocks = process.device.type == "cuda" if config.train.compile == "auto" else config.train.compile
    return shard_model(
        plan.shape,
        mesh,
        process.device,
        precision=precision,
        activation_checkpointing=config.train.activation_checkpointing,
        compile_blocks=compile_blocks,
    )


def shard_model(
    shape: TransformerConfig,
    mesh: DeviceMesh,
    device: torch.device,
    *,
    precision: str,
    activation_checkpointing: str,
    compile_blocks: bool,
) -> Transformer:
    """A Transformer whose parameters live in shards on `mesh`; their values are not set yet (`fill_parameters`).

    Order: checkpointing is a call inside `Block.forward`, then `block.compile()` in place (`torch.compile(block)`
    would put `_orig_mod.` in the parameter names), then `fully_shard(block)`, then the root, whose group holds the
    tied embedding whole while the loss is computed inside the root's forward.

    The two setters are not recursive. Without them on *every* FSDPModule gradients are averaged over ranks (they
    must be sums: the loss is divided by the global token count) or, set on the root alone, wrong by a factor.
    """
    with torch.device("meta"):
        model = Transformer(shape, activation_checkpointing=activation_checkpointing)
    if compile_blocks:
        for block in model.transformer.h:
            block.compile()
    shard(model, model.transformer.h, mesh, precision)
    model.to_empty(device=device)
    # The head reads wte.weight, so a second copy after to_empty would train apart from the first.
    assert sum(name.endswith("wte.weight") for name, _ in model.named_parameters()) == 1
    return model


def _initialise(run: Run) -> list[str]:
    """The starting weights: a Hugging Face folder's, or random ones that no number of ranks changes. Always []."""
    config, shape = run.config, run.plan.shape
    if config.model.from_:
        tensors = read_tensors(config.model.from_)
        fill_parameters(run.model, lambda name, size: tensors[name])
    else:
        fill_parameters(run.model, lambda name, size: initial_value(name, size, shape, config.run.seed))
    return []


def _load(run: Run, checkpoint: Path) -> list[str]:
    """Everything from a checkpoint, saved by any number of ranks; a line for each change since."""
    reader, trainer = open_reader(checkpoint), read_trainer(checkpoint)
    data = run.config.data
    try:
        changes = changes_since(trainer, run.config, run.plan, reader.step)
        changes += run.mixture.load_state_dict(
            trainer["mixture"], allow_change=data.allow_change, new_epoch=data.new_epoch
        )
        check_epochs(run.config, run.mixture, run.plan.total_steps)
    except UserError as error:
        raise with_location(run.config, error) from None
    load_training_state(run.model, run.optimizer, reader.read_into)
    if states := reader.read_rng(run.process.rank):
        load_rng_state_dict(states)
    # A source of an earlier stage keeps its place among the names, so the meter is made for those of now.
    run.meter.names = run.mixture.names
    run.meter.load_state_dict(trainer["meter"])
    run.first_step = run.step = run.saved_step = reader.step
    run.tokens, run.skips, run.skips_in_a_row = (trainer[key] for key in ("tokens", "skips", "skips_in_a_row"))
    run.validated_step = trainer.get("validated_step", reader.step)
    if run.running_norm is not None and (seen := trainer.get("running_norm")):
        run.running_norm.copy_(torch.tensor(seen, dtype=torch.float64))
    return changes + _load_precision(run, trainer)


def _load_precision(run: Run, trainer: dict[str, Any]) -> list[str]:
    """The loss scale as the run left it; a line where the precision is another one, or the scale begins anew."""
    run.overflows = trainer.get("overflows", 0)
    lines = []
    before = trainer.get("precision", run.precision)
    if before != run.precision and trainer["recipe"]["train"]["precision"] == run.config.train.precision:
        lines.append(f"train.precision: {before} before, {run.precision} now, for the GPUs are others")
    return lines + restore(run.loss_scale, trainer.get("loss_scale"))


def _leave_out(run: Run, samples: range) -> list[str]:
    try:
        return run.mixture.leave_out(samples)
    except UserError as error:
        raise with_location(run.config, error) from None


def _prepare_folder(run: Run) -> int:
    """For rank 0, before the first step: is there room, and what `show` and `export` read."""
    shards = training_state(run.model, run.optimizer)
    check_free_space(run.folder, checkpoint_bytes(shards), run.config.checkpoint.keep)
    target = run.folder / "tokenizer"
    shutil.copytree(run.plan.corpus.tokenizer_folder, target, dirs_exist_ok=True)
    start = {"recipe": to_mapping(run.config), "mixture": run.mixture.state_dict()}
    write_whole(run.folder / "mixture.json", to_json(start))
    if run.claim:
        write_status(run.claim, "running", run.step)
    return 0


def _new_meter(plan: RunPlan, device: torch.device, precision: str) -> Meter:
    card = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    return Meter(
        plan.mixture.names,
        plan.mixture.sequence_length,
        plan.flops_per_token,
        plan.world,
        peak_flops(card, precision) if card else None,
    )


def _open_validation(config: PretrainConfig, plan: RunPlan) -> dict[str, tuple[TokenStream, np.ndarray]]:
    """The held-out windows of every source that has any."""
    if not config.valid.every:
        return {}
    found = {}
    for name in plan.mixture.names:
        if plan.corpus.source(name).valid.tokens <= config.train.sequence_length:
            continue  # told by plan_run
        stream = plan.corpus.stream(name, "valid")
        found[name] = (
            stream,
            validation_windows(stream, config.train.sequence_length, config.valid.windows),
        )
    return found
