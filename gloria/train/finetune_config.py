"""The recipe of a fine-tuning. Imports no torch."""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from gloria.config.cli import option, parse
from gloria.config.toml import RECIPES
from gloria.dist.config import CheckpointConfig, DistConfig
from gloria.dist.environment import read_environment
from gloria.optim import schedules
from gloria.optim.optimizers import OptimConfig
from gloria.optim.schedules import ScheduleConfig
from gloria.tasks.catalog import TASKS, find_task
from gloria.train.metrics import LogConfig, log_problems
from gloria.train.sections import Recipe, RunSection, StepSection, length_problems, range_problems, replica_problems

DEMO_MODEL = "models/demo"


@dataclass(frozen=True)
class FinetuneRunSection(RunSection):
    """Where a run keeps what it writes, and what makes it repeatable."""

    seeds: list[int] = option(
        [42], "a run for each, in DIR/seed-N where there are several: small sets give other scores by chance", minimum=0
    )
    resume: Literal["auto", "never"] = option(
        "auto", "auto: continue from the newest whole checkpoint; never: fail if a run exists"
    )


@dataclass(frozen=True)
class FinetuneLengthSection:
    """How long, on what batches, and how inputs are cut."""

    steps: int | None = option(None, "optimizer steps in all; this or epochs", minimum=1)
    epochs: float | None = option(None, "passes over the training set; this or steps", above=0)
    global_batch: int = option(32, "examples (of questions: windows) a step, over all ranks", minimum=1)
    micro_batch: int | None = option(
        None, "rows a rank works on at once, which costs memory; default: its whole share", minimum=1
    )
    max_length: int = option(
        128, "tokens of an input; longer pairs are cut and counted, contexts read in windows", minimum=8
    )
    stride: int = option(32, "tokens that neighbouring windows of a context share", minimum=0)
    max_answer_tokens: int = option(30, "longest answer to a question that is considered", minimum=1)
    lora_rank: int | None = option(
        None,
        "LoRA: trains matrices of this rank beside those of the backbone's layers (alpha is twice the rank), and the "
        "heads; the rest needs no gradients and no optimizer state; the rate is usually ten times higher; extra: lora",
        minimum=1,
    )
    dropout: float = option(
        0.1, "of the vector that the head reads; the backbone's is its own", minimum=0.0, maximum=0.9
    )


@dataclass(frozen=True)
class FinetuneTrainSection(StepSection, FinetuneLengthSection):  # the fields of the last base come first
    """How long, on what batches, in what precision."""


@dataclass(frozen=True)
class EvalSection:
    """Scores on the set that chooses the model; the last step has one, too."""

    every: int = option(0, "steps from one to the next; 0: at the end of each epoch", minimum=0)
    batch: int = option(64, "rows a rank scores at once", minimum=1)


@dataclass(frozen=True)
class SaveSection(CheckpointConfig):
    """Checkpoints, to go on from after a stop; the best model is kept apart from them."""

    every: int = option(0, "steps from one checkpoint to the next; 0: at each evaluation", minimum=0)
    keep: int = option(2, "newest checkpoints kept; at least 2, so that a damaged one is not the end", minimum=2)


@dataclass(frozen=True, kw_only=True)
class FinetuneConfig(Recipe):
    """The recipe of a fine-tuning."""

    task: str = option(help="what to train on; gloria.evaluate --help lists the tasks")
    run: FinetuneRunSection
    train: FinetuneTrainSection
    eval: EvalSection
    dist: DistConfig
    optim: OptimConfig
    schedule: ScheduleConfig
    checkpoint: SaveSection
    log: LogConfig
    model: str = option(
        DEMO_MODEL, "a run, one of its checkpoints, or a Hugging Face folder of any family; the default is the demo's"
    )
    data: str | None = option(None, "folder of the task's files; default: a small sample that comes with gloria")


def read_finetune_config(argv: Sequence[str] | None = None) -> FinetuneConfig:
    """The recipe in `--config FILE`, else that of the task's family, with flags laid over it."""
    argv = list(argv or ())
    parsed = parse(
        FinetuneConfig,
        argv,
        prog="python -m gloria.finetune",
        description="Fine-tune a model on a task, and choose the checkpoint on the task's dev set.",
        default_config=_recipe_of(argv),
        rivals=[("train.steps", "train.epochs"), ("schedule.restarts", "schedule.restart_steps")],
        check=_contradictions,
    )
    return dataclasses.replace(parsed.config, source_file=parsed.where, key_sources=parsed.given)


def _recipe_of(argv: Sequence[str]) -> str | None:
    """launch/finetune-TASK.toml, else finetune-FAMILY.toml of the task's family."""
    text = " ".join(argv)
    found = re.search(r"(?:^|\s)--task[=\s](\S+)", text)
    if not found or not (found[1] in TASKS or Path(found[1]).is_file()):
        return None
    for name in (found[1], find_task(found[1]).family):
        path = RECIPES / f"finetune-{name}.toml"
        if path.is_file():
            return os.path.relpath(path) if path.is_relative_to(Path.cwd()) else str(path)
    return None


def _contradictions(config: FinetuneConfig) -> Iterator[tuple[tuple[str, ...], str]]:
    train = config.train
    yield from range_problems(train__profile_steps=train.profile_steps)
    yield from length_problems(train)
    if train.lora_rank is not None and config.optim.name == "muon":
        yield ("train.lora_rank", "optim.name"), "muon updates whole matrices, and LoRA trains factors; choose adamw"
    yield from log_problems(config.log)
    if config.log.samples_every:
        yield ("log.samples_every",), "a fine-tuning has no text to continue; leave it out"
    if train.stride >= train.max_length:
        yield (
            ("train.stride", "train.max_length"),
            f"{train.stride} is no less than max_length {train.max_length}; lower it",
        )
    if len(set(config.run.seeds)) < max(len(config.run.seeds), 1):
        yield ("run.seeds",), f"{config.run.seeds} has none, or one twice; give different seeds"
    yield from replica_problems(config.dist.replicas, read_environment().world)
    yield from schedules.problems(config.schedule, train.steps)
