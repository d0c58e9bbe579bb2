"""Going on with a run: from which checkpoint, and what of the recipe may have changed since.

Steps, batches, weights, rates and intervals may change, and each change is told. What makes it another model, or
another meaning of the saved state, may not.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gloria.config.cli import from_mapping, option, to_mapping
from gloria.config.schema import flatten, keys
from gloria.dist.checkpoint_read import find_checkpoint, open_reader, read_trainer
from gloria.dist.manifest import TRAINER, checkpoint_path, saved_steps
from gloria.dist.process import Process, on_any_rank, rank0_decides
from gloria.dist.retention import remove_incomplete, set_aside_newer
from gloria.dist.run_lock import STATUS, read_status, write_status
from gloria.dist.signals import ASKED, stop_reason
from gloria.dist.watchdog import Watchdog
from gloria.errors import UserError
from gloria.files import brief
from gloria.model.config import TransformerConfig
from gloria.optim import schedules
from gloria.train.branch import Ancestor, BranchSection, require_trunk
from gloria.train.config import PretrainConfig, RunPlan
from gloria.train.meter import SavedMeter

# Told by the mixture (what it means for the samples), or of no consequence for what is computed.
_TOLD_ELSEWHERE = ("data.", "train.global_batch", "train.sequence_length", "schedule.", "run.", "dry_run", "verify")


def leave_if_asked(watch: Watchdog, step: int) -> None:
    """End all ranks, the run stopped at `step`, if one was asked to: before the minutes that loading may take."""
    if on_any_rank(bool(stop_reason())):
        if watch.run_lock:
            write_status(watch.run_lock, "stopped", step, stop_reason() or ASKED)
        raise SystemExit(0)


def choose_step(folder: Path, resume: int | str, launch: str, skip_samples: str = "") -> int:
    """The step whose checkpoint the run goes on from, or 0 to begin; for rank 0, with the run's lock.

    `resume` is "auto" (the newest whole checkpoint), "never" (begin, in a folder without a run), or a step, whose
    later checkpoints are set aside. A step is gone back to once: started again by the same command (a requeued job),
    a run goes on from what it has done since. `skip_samples` is the recipe's, a part of that command. Raises
    UserError rather than beginning afresh where a run has been.
    """
    for line in remove_incomplete(folder):
        print(line, flush=True)
    steps = saved_steps(folder)
    if resume == "never":
        if steps:
            raise UserError(
                f"run.resume: never, but {folder} holds checkpoints up to step {steps[-1]}; choose another run.dir, "
                "or go on with auto"
            )
        return 0
    if isinstance(resume, int):
        if since := _done_since(folder, resume, skip_samples):
            print(
                f"run.resume: the run has gone back to step {resume} before, and goes on from step {since}; to go "
                "back again, name another step or move the checkpoints after it away",
                flush=True,
            )
            return since
        step = open_reader(find_checkpoint(folder, resume)).step
        for path in set_aside_newer(folder, step, launch):
            print(f"{path}: set aside, for the run goes on from step {step}", flush=True)
        return step
    if steps:
        return open_reader(find_checkpoint(folder)).step
    if (folder / STATUS).exists():
        status = read_status(folder)
        if status.status in ("stopped", "done") and status.step > 0:
            raise UserError(
                f"{folder}: its run is {status.status} at step {status.step}, but has no checkpoint; put the "
                "checkpoints back, or choose another run.dir"
            )
    return 0


def choose_trunk(section: BranchSection, folder: Path, process: Process) -> Path:
    """The checkpoint that the branch in `folder` begins from, the same on all ranks, once every byte is checked."""
    run, step = section.trunk

    def decide() -> int:
        require_trunk(section, folder)
        return open_reader(find_checkpoint(run, step)).step

    return checkpoint_path(run, rank0_decides(process, decide))


def _done_since(folder: Path, resume: int, skip_samples: str) -> int:
    """The newest checkpoint's step, where the run came to it after going back to `resume` by this command; or 0."""
    if not any(step > resume for step in saved_steps(folder)):
        return 0
    newest = find_checkpoint(folder)
    recipe, step = flatten(read_run_state(newest)[0]["recipe"]), open_reader(newest).step
    same = (recipe.get("run.resume"), recipe.get("data.skip_samples", "")) == (resume, skip_samples)
    return step if same and step > resume else 0


@dataclass(frozen=True)
class SavedState:
    """The fields of a checkpoint's trainer.json, with their kinds and bounds; the mixture checks its own.

    Fine-tuning and pre-training save different ones, and older versions fewer: what is needed is said on reading.
    """

    seed: int = option(0, "of the run", minimum=0)
    world: int = option(1, "ranks that saved it", minimum=1)
    tokens: int = option(0, "consumed", minimum=0)
    evaluated_step: int | None = option(None, "of the last whole evaluation", minimum=-1)
    skips: int = option(0, "updates left out", minimum=0)
    skips_in_a_row: int = option(0, "of them since the last good one", minimum=0)
    overflows: int = option(0, "of the loss scale", minimum=0)
    running_norm: list[float] | None = option(None, "of gradients: count, mean, variance", minimum=0)
    loss_scale: list[float] | None = option(None, "scale and steps since it changed", minimum=0)
    precision: str | None = option(None, "what was computed with", choices=("fp32", "bf16", "fp16"))
    schedule: schedules.SavedSchedule | None = None
    meter: SavedMeter | None = None
    ancestors: list[Ancestor] = option([], "checkpoints of other runs that this one comes from, the nearest first")


def read_run_state(checkpoint: Path, *required: str) -> tuple[dict[str, Any], SavedState]:
    """A checkpoint's trainer.json, as it stands and with its fields checked; `required` must be among them."""
    state = read_trainer(checkpoint)
    for older in ("validated_step", "chosen_step"):
        state.setdefault("evaluated_step", state.get(older))
    problems = [f"{key}: missing" for key in ("recipe", *required) if key not in state]
    tables = {key: state.get(key, {}) for key in ("recipe", "model", "mixture")}
    problems += [
        f"{key}: must be a table, not {brief(table)}" for key, table in tables.items() if type(table) is not dict
    ]
    saved = SavedState()
    try:
        saved = from_mapping(SavedState, {key: state[key] for key in keys(SavedState) if key in state}, "state")
    except UserError as error:
        problems += [problem.removeprefix("state: ") for problem in error.problems]
    if problems:
        remedy = "go on from an older checkpoint with run.resume"
        raise UserError(*(f"{checkpoint / TRAINER}: {problem}; {remedy}" for problem in problems))
    return state, saved


def changes_since(trainer: Mapping[str, Any], config: PretrainConfig, plan: RunPlan, step: int) -> list[str]:
    """A line for each change of the recipe since a checkpoint of `step` was saved (the mixture tells its own).

    Raises UserError with every change that cannot be: it names the key, both values and the remedy.
    """
    before, now = TransformerConfig.from_dict(trainer["model"]).to_dict(), plan.shape.to_dict()
    problems = [
        f"model.{key}: the run's is {before.get(key)}, not {value}; set {before.get(key)}, or begin another run"
        for key, value in now.items()
        if key != "dropout" and before.get(key) != value
    ]
    old, new = flatten(trainer["recipe"]), flatten(to_mapping(config))
    if old.get("optim.name") != new["optim.name"]:
        problems.append(
            f"optim.name: the run's state is {old.get('optim.name')}'s, not {new['optim.name']}'s; "
            f"set {old.get('optim.name')}, or begin another run from an export"
        )
    if problems:
        raise UserError(*problems)
    lines = [
        f"{key}: {old.get(key)} before, {value} now"
        for key, value in new.items()
        if old.get(key) != value and not key.startswith((*_TOLD_ELSEWHERE, "model."))
    ]
    return lines + _schedule_changes(trainer["schedule"], config, plan, step)


def _schedule_changes(saved: Mapping[str, Any], config: PretrainConfig, plan: RunPlan, step: int) -> list[str]:
    """What is otherwise about the learning rate, and, where the past curve would have been another, the jump."""
    base_lr, total_steps = config.optim.lr, plan.total_steps
    lines = schedules.changes(dict(saved), config.schedule, base_lr, total_steps)
    if not lines:
        return []
    keys = to_mapping(config.schedule).keys()
    old = from_mapping(schedules.ScheduleConfig, {key: saved[key] for key in keys if saved.get(key) is not None}, "")
    moved = [
        (at, was, now)
        for at in range(0, step, max(1, step // 1000))
        if (was := schedules.learning_rate(old, saved["base_lr"], at, saved["total_steps"]))
        != (now := schedules.learning_rate(config.schedule, base_lr, at, total_steps))
    ]
    kept = "keeps its past"
    if moved:
        at, was, now = moved[-1]
        kept = f"is another one: step {at} had {was:.4g} and would have {now:.4g}"
    following = sorted({step, (step + total_steps) // 2, total_steps - 1})
    rates = ", ".join(
        f"{schedules.learning_rate(config.schedule, base_lr, at, total_steps):.4g} at {at}"
        for at in following
        if step <= at < total_steps
    )
    return [f"schedule.{line}" for line in lines if not line.startswith("lr:")] + [
        f"schedule: the curve {kept}; {rates}"
    ]
