"""The recipe of a fine-tuning. Imports no torch."""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from gloria.config.cli import option, parse
from gloria.config.schema import NO_KEY
from gloria.dist.config import DistConfig
from gloria.dist.environment import read_environment
from gloria.dist.gpus import precision_option
from gloria.optim import schedules
from gloria.optim.config import OptimConfig
from gloria.optim.schedules import ScheduleConfig
from gloria.train.metrics import LogConfig

DEMO_MODEL = "models/demo"
LAUNCH = Path(__file__).resolve().parents[2] / "launch"


@dataclass(frozen=True)
class RunSection:
    """Where a run keeps what it writes, and what makes it repeatable."""

    dir: str = option(help="folder of the run; a run that is in it goes on, or is told again if it is done")
    seeds: list[int] = option(
        [42], "a run for each, in DIR/seed-N where there are several: small sets give other scores by chance", minimum=0
    )
    resume: Literal["auto", "never"] = option(
        "auto", "auto goes on from the newest whole checkpoint; never wants a folder without a run"
    )
    max_minutes: float | None = option(
        None, "minutes after its start at which a launch saves and stops, to go on in the next one", above=0
    )
    deterministic: bool = option(
        False, "on CUDA, too, the same bits in every run, by slower kernels (CPU always has them)"
    )
    device: str = option("auto", "auto takes the GPU where there is one", choices=("auto", "cpu", "cuda"))


@dataclass(frozen=True)
class TrainSection:
    """How long, on what batches, in what precision."""

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
    dropout: float = option(
        0.1, "of the vector that the head reads; the backbone's is its own", minimum=0.0, maximum=0.9
    )
    precision: str = precision_option()
    activation_checkpointing: str = option(
        "none",
        "what the backward pass computes again instead of keeping it: full takes the least memory and a third more "
        "time, selective (of GPT-2 and GPT-Neo) keeps the matrix products",
        choices=("none", "full", "selective"),
    )
    compile: Literal["auto", True, False] = option(
        "auto", "torch.compile each layer: faster steps after slow first ones; auto does on GPU only"
    )
    clip_norm: float = option(1.0, "gradients with a greater global norm are scaled down to it", above=0)
    max_skips: int = option(
        10,
        "steps in a row that may be skipped for a loss or gradient that is not finite before the run stops",
        minimum=1,
    )


@dataclass(frozen=True)
class EvalSection:
    """Scores on the set that chooses the model; the last step has one, too."""

    every: int = option(0, "steps from one to the next; 0: at the end of each epoch", minimum=0)
    batch: int = option(64, "rows a rank scores at once", minimum=1)


@dataclass(frozen=True)
class SaveSection:
    """Checkpoints, to go on from after a stop; the best model is kept apart from them."""

    every: int = option(0, "steps from one checkpoint to the next; 0: at each evaluation", minimum=0)
    keep: int = option(2, "newest checkpoints kept; at least 2, so that a damaged one is not the end", minimum=2)
    keep_every: int = option(
        0, "steps; checkpoints at multiples of it are kept for good (0: none), to look back at a run", minimum=0
    )
    asynchronous: bool = option(
        True,
        "write in the background while training goes on, for a second copy of a rank's weights and optimizer state "
        "in host memory; false waits for the disk, without it",
    )


@dataclass(frozen=True)
class FinetuneConfig:
    """All that a fine-tuning is told."""

    task: str = option(help="what to train on; gloria.evaluate --help lists the tasks")
    run: RunSection
    train: TrainSection
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
    where: str = field(default="recipe", compare=False, repr=False, metadata=NO_KEY)


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
    return dataclasses.replace(parsed.config, where=parsed.where)


def _recipe_of(argv: Sequence[str]) -> str | None:
    """launch/finetune-TASK.toml, without the digits of the task where there is none of that very name."""
    text = " ".join(argv)
    found = re.search(r"(?:^|\s)--task[=\s](\S+)", text)
    for name in (found[1], re.split(r"[\d_-]", found[1])[0]) if found else ():
        path = LAUNCH / f"finetune-{name}.toml"
        if path.is_file():
            return os.path.relpath(path) if path.is_relative_to(Path.cwd()) else str(path)
    return None


def _contradictions(config: FinetuneConfig) -> Iterator[tuple[tuple[str, ...], str]]:
    train = config.train
    if (train.steps is None) == (train.epochs is None):
        found = "neither is given" if train.steps is None else "both are given"
        yield ("train.steps", "train.epochs"), f"steps and epochs: {found}; give one of them"
    if train.stride >= train.max_length:
        yield (
            ("train.stride", "train.max_length"),
            f"{train.stride} is no less than max_length {train.max_length}; lower it",
        )
    if len(set(config.run.seeds)) < max(len(config.run.seeds), 1):
        yield ("run.seeds",), f"{config.run.seeds} has none, or one twice; give different seeds"
    world = read_environment().world
    if world % config.dist.replicas:
        yield ("dist.replicas",), f"{config.dist.replicas} does not divide the number of ranks, {world}; give a divisor"
    yield from schedules.problems(config.schedule, train.steps)
