"""A training run from its lock to its last status: what the loop works with, and what a checkpoint remembers.

`train/pretraining.py` and `train/finetuning.py` open one, each with its objective; `train/loop.py` takes its steps.
"""

from __future__ import annotations

import platform
import secrets
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

import gloria
from gloria.config.cli import to_mapping
from gloria.config.schema import flatten
from gloria.data.corpus import Manifest, source_fingerprint
from gloria.dist.agreement import require_same, require_shared
from gloria.dist.checkpoint import Save, SaveState, checkpoint_bytes
from gloria.dist.checkpoint_read import Reader
from gloria.dist.loss_scale import loss_scale_for, restore
from gloria.dist.process import Process, rank0_decides
from gloria.dist.retention import check_free_space
from gloria.dist.run_lock import LOCK, RunLock, lock_run, record_end, release_run, write_status
from gloria.dist.signals import stop_reason
from gloria.dist.state import load_rng_state_dict, load_training_state, training_state
from gloria.dist.step_sums import Flags, StepSums, new_running_norm
from gloria.dist.watchdog import Watchdog, start_watch, stop_watch
from gloria.optim import schedules
from gloria.train.branch import Ancestor, describe_ancestors
from gloria.train.meter import Meter
from gloria.train.metrics import RunLog, open_log
from gloria.train.resume import SavedState, choose_step, leave_if_asked

# Why a run ends in the state of its last checkpoint, before its plan is done (a stop that is requested saves first).
SKIPS, TAKEN_OVER = UNSAVED = "too many skips", "another launch has taken the run over"
MAX_FAILED_SAVES = 3  # in a row; then the run stops, for nothing keeps its work
RNG_SCHEME = "seed/step/rank"  # each step reseeds from these three, see dist.sharding.reseed


class Objective(Protocol):
    """What a run learns: all in which pre-training and fine-tuning differ inside the loop."""

    groups: Sequence[str]  # names that losses are reported under
    evaluate_every: int  # steps; 0: never

    def next_batch(self, run: Run) -> Any:
        """The `StepBatch` of step `run.step`."""

    def losses(self, run: Run, part: Any) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """The summed loss with its graph, the part of each row that counts, (rows,), and more sums to log by name.

        The rows' are what is reported; the sums come out as means over the targets.
        """

    def evaluate(self, run: Run) -> str:
        """Validate, or choose the best model, and set `run.evaluated_step`; why to stop, or ""."""

    def log_values(self, run: Run, step: int, values: dict[str, Any], losses: dict[str, float | None]) -> dict:
        """The line of the log after `step`: the common `values`, the loss by group, and what there is besides."""

    def describe_step(self, step: int, sums: StepSums) -> dict[str, Any]:
        """Which samples step `step` (from 0) held, for the event of a skip."""

    def finish(self, run: Run) -> bool:
        """What is left to do when all steps are done; False where a stop was requested meanwhile."""

    def close(self) -> None:
        """Let go of threads and files."""

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint remembers of it: plain JSON, the same on every rank."""


@dataclass
class Run:
    """What the loop works with. Equal on all ranks but for the shards, the rank and what rank 0 alone holds."""

    config: Any  # PretrainConfig or FinetuneConfig
    objective: Any  # an Objective
    process: Process
    mesh: DeviceMesh
    folder: Path
    seed: int
    precision: str  # fp32, bf16 or fp16
    model: Any  # sharded
    optimizer: torch.optim.Optimizer
    total_steps: int
    meter: Meter
    watch: Watchdog  # over this rank's progress
    keep_gathered: bool = False  # whole weights stay through all passes of a step; see dist.sharding.begin_pass
    log: RunLog | None = None  # rank 0's
    first_step: int = 0  # steps that were done when this launch took over
    step: int = 0  # steps done; a skipped update counts, for its samples are consumed
    tokens: int = 0  # consumed so far
    evaluated_step: int = -1  # steps done at the last whole evaluation
    skips: int = 0  # updates left out in all, and without a good one in between
    skips_in_a_row: int = 0
    overflows: int = 0  # updates left out for the loss scale, which are no skips
    profiler: torch.profiler.profile | None = None  # at work in the steps of train.profile_steps
    save: Save | None = None  # under way in the background
    saved_step: int = 0  # of the newest durable checkpoint
    failed_saves: int = 0  # in a row
    staging: dict[str, Tensor] = field(default_factory=dict)  # host memory of background saves
    ancestors: Sequence[Ancestor] = ()  # of a branch: where it began, where its trunk began, and so on

    def __post_init__(self) -> None:
        device = self.process.device
        self.loss_scale = loss_scale_for(self.precision, device)  # of fp16; see dist.loss_scale
        # Of the gradients, where spikes are skipped; see dist.step_sums.decide_update.
        self.running_norm = None if self.config.train.skip_spikes is None else new_running_norm(device)

    @property
    def launch(self) -> str:
        """The name of this launch in file names and the lock."""
        return self.watch.launch

    @property
    def run_lock(self) -> RunLock | None:
        """Rank 0's lock on the run folder."""
        return self.watch.run_lock

    @property
    def evaluation_due(self) -> bool:
        """Whether an evaluation belongs here, before the next step, and has not been."""
        every = self.objective.evaluate_every
        here = bool(every) and (self.step % every == 0 or self.step == self.total_steps)
        return here and self.evaluated_step != self.step

    @property
    def samples_due(self) -> bool:
        """Whether samples of text belong after the step that was taken last."""
        every = self.config.log.samples_every
        return bool(every) and self.step % every == 0


@contextmanager
def opening(config: Any, process: Process) -> Iterator[Watchdog]:
    """A watchdog over the start-up and the run; where opening the run fails, the run's lock is given back."""
    patience, limit = 60 * config.dist.timeout_minutes, 60 * config.dist.step_timeout_minutes
    watch = Watchdog(Path(config.run.dir) / "logs", process.rank, process.world, patience, limit)
    start_watch(watch)
    try:
        yield watch
    except BaseException:
        stop_watch(watch)
        if watch.run_lock:
            release_run(watch.run_lock)
        raise


def lock_and_choose(config: Any, process: Process, folder: Path, watch: Watchdog, skip_samples: str = "") -> int:
    """Lock the run folder and choose the step to go on from (0: begin), the same on all ranks.

    Ends all ranks where a stop was requested meanwhile: before the minutes that loading may take.
    """
    watch.launch = f"{rank0_decides(process, lambda: secrets.randbits(40)):010x}"

    def decide() -> int:
        watch.run_lock = lock_run(folder, watch.launch)
        return choose_step(folder, config.run.resume, watch.launch, skip_samples)

    step = rank0_decides(process, decide)
    require_shared(process, folder / LOCK, watch.launch)
    leave_if_asked(watch, step)
    return step


def prepare_folder(run: Run) -> None:
    """Before anything else is written: check the room on disk, and write the status."""

    def prepare() -> int:
        shards = training_state(run.model, run.optimizer)
        check_free_space(run.folder, checkpoint_bytes(shards), run.config.checkpoint.keep)
        assert run.run_lock is not None  # rank 0 holds it
        write_status(run.run_lock, "running", run.step)
        return 0

    rank0_decides(run.process, prepare)


def begin_log(run: Run, changes: Sequence[str]) -> None:
    """Open the log on rank 0; it begins with what this launch is, and with what has changed since the checkpoint."""
    if not run.process.is_main:
        return
    if not run.optimizer.defaults.get("fused"):
        name = run.config.optim.name
        print(f"optim.name: {name} waits for the device once a step, to skip one that is not finite", flush=True)
    if run.ancestors:
        print(f"{'branch':<11} {describe_ancestors(run.ancestors)}", flush=True)
    about: dict[str, Any] = {
        "launch": run.launch,
        "ranks": run.process.world,
        "seed": run.seed,
        "versions": versions() | commit(),
        "hardware": hardware(run.process.device),
        "planned_steps": run.total_steps,
        "recipe": to_mapping(run.config),
        **ancestry(run),
    }
    run.log = open_log(
        run.folder, run.step, run.total_steps, run.config.log, evaluated_step=run.evaluated_step, **about
    )
    for line in changes:
        run.log.event(run.step, "changed", f"changed: {line}", what=line)


def close_run(run: Run, status: str, reason: str = "") -> None:
    """Wait for the other ranks, then write the run's last event and status, and release its folder."""
    run.watch.beat(run.step, "end", slow=True)
    run.objective.close()
    dist.barrier()
    if run.log and run.run_lock and not run.run_lock.lost:
        shown = f"{status} at step {run.step}{': ' if reason else ''}{reason}"
        shown += "; the same command goes on from here" if status == "stopped" else ""
        run.log.event(run.step, status, shown, **({"reason": reason} if reason else {}))
    if run.log:
        run.log.close()
    if run.run_lock:
        record_end(run.run_lock, status, run.step, reason)
    stop_watch(run.watch)


def flags_of(run: Run) -> Flags:
    """What this rank reports in the step's all-reduce."""
    state = run.save.state() if run.save else SaveState.PENDING
    return Flags(
        stop=bool(stop_reason()) or run.failed_saves >= MAX_FAILED_SAVES,
        save_done=state == SaveState.DONE,
        save_failed=state == SaveState.FAILED,
        lock_lost=run.run_lock is not None and run.run_lock.lost,
    )


def compiles_blocks(config: Any, process: Process) -> bool:
    """Whether `train.compile` means that blocks are compiled here."""
    return process.device.type == "cuda" if config.train.compile == "auto" else config.train.compile


def versions() -> dict[str, str]:
    """The versions that a run's results depend on."""
    packages = {"gloria": gloria.__version__, "torch": str(torch.__version__), "numpy": np.__version__}
    return packages | {"python": platform.python_version()}


def hardware(device: torch.device) -> str:
    """What a rank computes on: the GPU by CUDA's name, or the processor."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    with suppress(OSError):  # only Linux has it
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return f"CPU, {platform.machine()}"


def commit() -> dict[str, str]:
    """The commit of a checkout, for rank 0 at the start: it asks git in a process of its own. Empty once installed."""
    root = Path(gloria.__file__).resolve().parent.parent
    if not (root / ".git").exists():
        return {}
    command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        return {"commit": subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()}
    except (OSError, subprocess.CalledProcessError):
        return {"commit": "unknown"}  # no git here


def trainer_state(run: Run) -> dict[str, Any]:
    """All that a checkpoint remembers besides tensors: plain JSON, the same on every rank."""
    return {
        "tokens": run.tokens,
        "evaluated_step": run.evaluated_step,
        "skips": run.skips,
        "skips_in_a_row": run.skips_in_a_row,
        "overflows": run.overflows,
        "running_norm": None if run.running_norm is None else run.running_norm.tolist(),
        "precision": run.precision,
        "loss_scale": None if run.loss_scale is None else run.loss_scale.tolist(),
        "schedule": schedules.state_dict(run.config.schedule, run.config.optim.lr, run.step, run.total_steps),
        "rng": {"scheme": RNG_SCHEME, "seed": run.seed},
        "meter": run.meter.state_dict(),
        "seed": run.seed,
        "recipe": to_mapping(run.config),
        "world": run.process.world,
        "versions": versions(),
        **ancestry(run),
        **run.objective.state_dict(),
    }


def ancestry(run: Run) -> dict[str, Any]:
    """The line of runs that a branch comes from, as plain JSON; empty for a run that is none."""
    return {"ancestors": [to_mapping(ancestor) for ancestor in run.ancestors]} if run.ancestors else {}


def load_checkpoint(run: Run, reader: Reader, trainer: Mapping[str, Any], saved: SavedState) -> list[str]:
    """Tensors and counters of a checkpoint that was saved by any number of ranks; a line for each change since."""
    load_training_state(run.model, run.optimizer, reader.read_into)
    if states := reader.read_rng(run.process.rank):
        load_rng_state_dict(states)
    if meter := trainer.get("meter"):
        run.meter.load_state_dict(meter)
    run.first_step = run.step = run.saved_step = reader.step
    run.tokens, run.overflows = saved.tokens, saved.overflows
    run.evaluated_step = reader.step if saved.evaluated_step is None else saved.evaluated_step
    run.skips, run.skips_in_a_row = saved.skips, saved.skips_in_a_row
    run.ancestors = saved.ancestors
    if run.running_norm is not None and saved.running_norm:
        run.running_norm.copy_(torch.tensor(saved.running_norm, dtype=torch.float64))
    lines = []
    before = saved.precision or run.precision
    if before != run.precision and flatten(trainer["recipe"]).get("train.precision") == run.config.train.precision:
        lines.append(f"train.precision: {before} before, {run.precision} now, for the GPUs are others")
    return lines + restore(run.loss_scale, saved.loss_scale)


def require_same_recipe(process: Process, recipe: object, corpus: Manifest | None = None, **more: Any) -> None:
    """`require_same` of every key of a recipe, of what lies in the corpus folder on each node, and `more`."""
    own = flatten(to_mapping(recipe)) | more
    if corpus:
        own["data.corpus: tokenizer"] = corpus.tokenizer.fingerprint
        own |= {f"data.corpus: source {entry.name}": source_fingerprint(entry) for entry in corpus.sources}
    require_same(process, own)
