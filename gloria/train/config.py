"""The recipe of a pre-training run: the rooms' sections as one tree, checked as a whole and put in numbers.

Imports no torch, so that recipe errors are reported at once and `--dry-run` needs no GPU.
"""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeVar

from gloria.config.cli import Parsed, Problems, option, parse
from gloria.config.toml import RECIPES
from gloria.data.corpus import MANIFEST, Corpus, open_corpus, source_fingerprint
from gloria.data.exhaustion import check_exhaustion, steps_for_epochs
from gloria.data.mixture import Mixture, MixtureConfig, new_mixture
from gloria.data.mixture_state import LARGEST_BATCH
from gloria.data.weights import Source, resolve_weights
from gloria.dist.config import CheckpointConfig, DistConfig
from gloria.dist.environment import read_environment
from gloria.dist.gpus import ELEMENT_BYTES
from gloria.errors import UserError
from gloria.model.config import (
    ModelSection,
    TransformerConfig,
    count_parameters,
    flops_per_token,
    resolve_shape,
    start_warnings,
)
from gloria.model.memory import Memory, memory_per_rank
from gloria.optim import schedules
from gloria.optim.optimizers import OptimConfig
from gloria.optim.schedules import ScheduleConfig
from gloria.train.branch import BranchSection, branch_problems, require_trunk
from gloria.train.metrics import LogConfig, log_problems
from gloria.train.sections import (
    Recipe,
    RunSection,
    StepSection,
    batch_problem,
    length_problems,
    range_problems,
    replica_problems,
)
from gloria.train.warnings import warn_of_no_bytes, warn_of_no_validation, warn_of_repeats

T = TypeVar("T")
P = TypeVar("P", bound="PretrainConfig")

DEMO = RECIPES / "demo.toml"


@dataclass(frozen=True)
class RunConfig(BranchSection, RunSection):  # the fields of the last base come first
    """Where a run keeps what it writes, and what makes it repeatable."""

    seed: int = option(0, "decides initial weights, data order and dropout", minimum=0, maximum=2**63 - 1)
    resume: int | Literal["auto", "never"] = option(
        "auto",
        "auto: continue from the newest whole checkpoint; a step: from that one; never: fail if a run exists",
        minimum=1,
    )


@dataclass(frozen=True)
class LengthSection:
    """How long, and on what batches."""

    steps: int | None = option(None, "optimizer steps in all; this or epochs", minimum=1)
    epochs: float | None = option(
        None, "passes over all windows of the sources in use taken together; this or steps", above=0
    )
    global_batch: int = option(
        512,
        "windows a step, over all ranks: what the optimizer sees, whatever the machine",
        minimum=1,
        other_names=("batch_size", "train_batch_size"),
        maximum=LARGEST_BATCH,
    )
    micro_batch: int | None = option(
        None,
        "windows a rank works on at once, which costs memory: a step makes global_batch / (micro_batch * "
        "ranks) passes, which must come out even; default: the rank's whole share, in one pass",
        minimum=1,
    )
    sequence_length: int = option(512, "tokens that are predicted in a window", minimum=1)

    @property
    def filled_micro_batch(self) -> int:
        """`micro_batch`, which `read_pretrain_config` fills in."""
        assert self.micro_batch is not None
        return self.micro_batch


@dataclass(frozen=True)
class TrainConfig(StepSection, LengthSection):  # the fields of the last base come first
    """How long, on what batches, in what precision."""

    attention: str = option(
        "auto",
        "kernel of local layers and masked documents: auto takes varlen (flash) where the GPU has it; "
        "bench/attention.py measures the others",
        choices=("auto", "varlen", "flex", "sdpa"),
    )
    fp8: bool = option(
        False, "float8 matrix products in the blocks (torchao, one scale a tensor), on GPUs from sm_89; extra: fp8"
    )
    z_loss: float = option(
        0.0,
        "adds so many times log(Z)^2 a token to what is minimised, Z the softmax's denominator, against logits that "
        "drift (PaLM: 1e-4); the log has it as z_loss, and its loss is the cross entropy alone",
        minimum=0.0,
    )


@dataclass(frozen=True)
class ValidConfig:
    """Validation by source on held-out windows, always the same."""

    every: int = option(1000, "steps from one validation to the next, and the last step has one; 0: never", minimum=0)
    windows: int = option(256, "windows of each source, evenly spread over what there is", minimum=1)
    paths: dict[str, str] = option(
        {},
        "texts that are not in the corpus, NAME to a file, folder or glob: whole documents, each by itself; runs with "
        "other tokenizers compare by their bits per byte",
    )
    text_field: str = option("text", "key (JSON lines) or column that holds the text in files of paths")


@dataclass(frozen=True)
class PretrainConfig(Recipe):
    """The recipe of a pre-training run."""

    run: RunConfig
    model: ModelSection
    data: MixtureConfig
    train: TrainConfig
    dist: DistConfig
    optim: OptimConfig
    schedule: ScheduleConfig
    valid: ValidConfig
    checkpoint: CheckpointConfig
    log: LogConfig
    dry_run: bool = option(False, "print the recipe and what it amounts to, and stop")
    verify: bool = option(False, "check the hash of every shard at the start, and not only its size")


@dataclass(frozen=True)
class RunPlan:
    """The run in numbers, and the opened corpus."""

    world: int
    accumulation: int  # micro-batches of each rank in a step
    corpus: Corpus
    weights: dict[str, float]  # of all sources of the corpus, as they hold in this run
    mixture: Mixture  # as it is at the start of a run
    shape: TransformerConfig
    total_steps: int
    tokens: int  # predicted in the whole run
    epochs: dict[str, float]  # passes over each source in use
    parameters: dict[str, int]  # by part, and "total"
    flops_per_token: int  # forward and backward
    warnings: tuple[str, ...]


def read_pretrain_config(
    argv: Sequence[str] | None = None,
    cls: type[P] = PretrainConfig,  # type: ignore[assignment]  # mypy has no defaults of type variables here
    *,
    prog: str = "python -m gloria.pretrain",
    description: str = "Pre-train a language model (GPT-2, GPT-Neo, LLaMA, ...) on a weighted mixture of token shards.",
    world: Callable[[P], int] = lambda config: read_environment().world,
    check: Callable[[P], Problems] = lambda config: (),
    needs_corpus: bool = True,
) -> P:
    """The recipe in `--config FILE` (without one, the demo's) with flags laid over it.

    `train.micro_batch` is filled in for `world` ranks, by default those at hand. A `UserError` has every problem:
    unknown keys, wrong values, impossible combinations, and what does not go with the corpus. `gloria.plan` adds
    options of its own (`cls`) and their `check`, and does without a corpus.
    """

    def complete(parsed: Parsed[P]) -> P:
        config = parsed.config
        share = config.train.global_batch // world(config)
        train = dataclasses.replace(config.train, micro_batch=config.train.micro_batch or share)
        return dataclasses.replace(config, train=train, source_file=parsed.where, key_sources=parsed.given)

    def look_further(config: P) -> None:
        corpus_is_there = Path(config.data.corpus, MANIFEST).exists()
        if corpus_is_there or (needs_corpus and not is_demo_to_prepare(config)):
            _open(config)

    demo = os.path.relpath(DEMO) if DEMO.is_relative_to(Path.cwd()) else DEMO
    parsed = parse(
        cls,
        argv,
        prog=prog,
        description=description,
        default_config=demo,
        rivals=[
            ("train.steps", "train.epochs"),
            ("model.preset", "model.from"),
            ("schedule.restarts", "schedule.restart_steps"),
        ],
        check=lambda config: (*check(config), *_contradictions(config, world(config))),
        later=lambda parsed: look_further(complete(parsed)),
    )
    return complete(parsed)


def is_demo_to_prepare(config: PretrainConfig) -> bool:
    """Whether this is the demo's own recipe and its corpus, which is then prepared on first use, is not there yet."""
    return Path(config.source_file).resolve() == DEMO and not Path(config.data.corpus, MANIFEST).exists()


def _contradictions(config: PretrainConfig, world: int) -> Iterator[tuple[tuple[str, ...], str]]:
    train, checkpoint = config.train, config.checkpoint
    yield from range_problems(train__profile_steps=train.profile_steps, data__skip_samples=config.data.skip_samples)
    yield from length_problems(train)
    yield from branch_problems(config.run.branch, config.run.trunk[0], config.run.dir, config.run.resume)
    if problem := batch_problem(train.global_batch, train.micro_batch, world):
        yield ("train.micro_batch", "train.global_batch"), problem
    yield from replica_problems(config.dist.replicas, world)
    yield from log_problems(config.log)
    yield from schedules.problems(config.schedule, train.steps if train.epochs is None else None)
    if config.valid.paths and not config.valid.every:
        yield ("valid.paths", "valid.every"), "is never read, for valid.every is 0; set that to a number of steps"
    if checkpoint.keep_every % checkpoint.every:
        yield (
            ("checkpoint.keep_every", "checkpoint.every"),
            f"{checkpoint.keep_every} is no multiple of every, {checkpoint.every}; give a multiple",
        )


def plan_run(config: PretrainConfig, world: int | None = None) -> RunPlan:
    """Open the corpus, work out model, length and epochs; `UserError` has every problem that shows here.

    `world` is the number of ranks, by default those at hand.
    """
    environment = read_environment()
    world = world or environment.world
    train = config.train
    # One rank hashes every byte; the others would only read them again.
    corpus, shape, mixture, total_steps = _open(config, verify=config.verify and environment.rank == 0)
    assert total_steps is not None
    return RunPlan(
        world=world,
        accumulation=train.global_batch // (train.filled_micro_batch * world),
        corpus=corpus,
        weights=resolve_weights(corpus.weights, config.data.weights),
        mixture=mixture,
        shape=shape,
        total_steps=total_steps,
        tokens=total_steps * train.global_batch * train.sequence_length,
        epochs=mixture.epochs_at(total_steps * train.global_batch),
        parameters=count_parameters(shape),
        flops_per_token=flops_per_token(shape, train.sequence_length),
        warnings=(
            *start_warnings(config.model, shape, corpus.tokenizer_folder),
            *_warnings(config, corpus, mixture, total_steps),
        ),
    )


def continued(config: PretrainConfig, plan: RunPlan, tokens: int) -> RunPlan:
    """The plan of a run that goes on after `tokens`, whose mixture knows its past by now."""
    mixture, end = plan.mixture, plan.mixture.samples_of_step(plan.total_steps).start
    return dataclasses.replace(
        plan,
        tokens=tokens + (end - mixture.next_sample) * mixture.sequence_length,
        epochs=mixture.epochs_at(end),
        warnings=_warnings(config, plan.corpus, mixture, plan.total_steps),
    )


def _open(config: PretrainConfig, *, verify: bool = False) -> tuple[Corpus, TransformerConfig, Mixture, int | None]:
    """The corpus, the model's shape, the mixture at the start of a run and its steps; every problem in one UserError.

    In a recipe that has problems of its own, defaults stand in their places and the steps may be unknown.
    """
    train = config.train
    problems: list[str] = []
    corpus = _attempt(lambda: open_corpus(config.data.corpus, verify=verify), problems)
    vocab_size = corpus.manifest.tokenizer.vocab_size if corpus else 1
    shape = _attempt(
        lambda: resolve_shape(config.model, vocab_size=vocab_size, sequence_length=train.sequence_length),
        problems,
    )
    mixture = _attempt(lambda: _mixture(config, corpus), problems) if corpus else None
    total_steps = train.steps
    if total_steps is None and train.epochs is not None and mixture:
        total_steps = steps_for_epochs(mixture, train.epochs)
    _attempt(lambda: require_trunk(config.run, config.run.dir), problems)
    if total_steps is not None:
        problems += [f"{keys[0]}: {what}" for keys, what in schedules.problems(config.schedule, total_steps)]
        if mixture and not config.run.branch:  # a branch is checked when its past is known
            _attempt(lambda: check_epochs(config, mixture, total_steps), problems)
    if problems:
        raise with_location(config, UserError(*problems))
    assert corpus is not None  # what failed is reported
    assert shape is not None
    assert mixture is not None
    return corpus, shape, mixture, total_steps


def check_epochs(config: PretrainConfig, mixture: Mixture, total_steps: int) -> None:
    """A `UserError` has each source that the run, from where `mixture` stands, reads more than `data.max_epochs`."""
    check_exhaustion(mixture, mixture.samples_of_step(total_steps).start, config.data.max_epochs)


def _warnings(config: PretrainConfig, corpus: Corpus, mixture: Mixture, total_steps: int) -> tuple[str, ...]:
    repeats = warn_of_repeats(mixture, mixture.samples_of_step(total_steps).start)
    if config.run.branch and not mixture.next_sample:
        repeats = [
            f"epochs and tokens are those of a run by this recipe alone, without the past of {config.run.branch}"
        ]
    no_validation = warn_of_no_validation(corpus, mixture) if config.valid.every else []
    return (*corpus.warnings, *repeats, *no_validation, *warn_of_no_bytes(corpus, mixture))


@contextmanager
def located(config: PretrainConfig) -> Iterator[None]:
    """A `UserError` of the block comes out `with_location`."""
    try:
        yield
    except UserError as error:
        raise with_location(config, error) from None


def with_location(config: PretrainConfig, error: UserError) -> UserError:
    """The same problems, with the file or the flag that gave it in front of each key of the recipe."""
    sections = "|".join(section.name for section in dataclasses.fields(config))
    lines = []
    for problem in error.problems:
        found = re.match(rf"((?:{sections})(?:\.[^:\s]+)?): ", problem)
        lines.append(f"{config.label(found[1])}: {problem[found.end() :]}" if found else problem)
    return UserError(*lines)


def peak_of_step(
    config: PretrainConfig,
    shape: TransformerConfig,
    world: int,
    *,
    precision: str,
    on_gpu: bool,
    keep_gathered: bool = False,
) -> Memory:
    """A rank's memory at the worst moment of a step of this recipe on `world` ranks."""
    train = config.train
    return memory_per_rank(
        shape,
        sequence_length=train.sequence_length,
        micro_batch=train.filled_micro_batch,
        accumulation=train.global_batch // (train.filled_micro_batch * world),
        shards=world // config.dist.replicas,
        element_bytes=ELEMENT_BYTES[precision],
        activation_checkpointing=train.activation_checkpointing,
        mask_documents=config.data.mask_documents,
        on_gpu=on_gpu,
        # As model.kernels chooses, as far as is known before the run: GPUs that have bf16 have the kernels.
        by_flash=on_gpu and precision == "bf16" and train.attention != "sdpa" and not shape.dropout,
        keep_gathered=keep_gathered,
        optimizer=config.optim.name,
    )


def _mixture(config: PretrainConfig, corpus: Corpus) -> Mixture:
    sources = {entry.name: Source(entry.train.tokens, source_fingerprint(entry)) for entry in corpus.manifest.sources}
    return new_mixture(
        config.run.seed,
        config.train.sequence_length,
        sources,
        resolve_weights(corpus.weights, config.data.weights),
        global_batch=config.train.global_batch,
        period=config.data.period,
        tokenizer=corpus.manifest.tokenizer.fingerprint,
    )


def _attempt(function: Callable[[], T], problems: list[str]) -> T | None:
    try:
        return function()
    except UserError as error:
        problems.extend(error.problems)
        return None
