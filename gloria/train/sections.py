"""The sections of a recipe that pre-training and fine-tuning share. Imports no torch."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

from gloria.config.cli import option
from gloria.config.schema import NO_KEY, label
from gloria.dist.gpus import precision_option

Problem = tuple[tuple[str, ...], str]  # the keys it is about, and what is wrong; as `gloria.config.cli.parse` takes it


@dataclass(frozen=True)
class RunSection:
    """Where a run keeps what it writes, and what makes it repeatable."""

    dir: str = option(help="folder of the run: checkpoints, metrics.jsonl, tensorboard; a run that is in it goes on")
    max_minutes: float | None = option(
        None, "minutes after its start at which a launch saves and stops, to go on in the next one", above=0
    )
    deterministic: bool = option(
        False, "on CUDA, too, the same bits in every run, by slower kernels (CPU always has them)"
    )
    device: str = option("auto", "auto takes the GPU where there is one", choices=("auto", "cpu", "cuda"))


@dataclass(frozen=True)
class StepSection:
    """How a step is computed, and which steps are left out."""

    precision: str = precision_option()
    activation_checkpointing: str = option(
        "none",
        "what the backward pass computes again instead of keeping it: full takes the least memory and a third more "
        "time, selective (not for models of transformers) keeps the matrix products",
        choices=("none", "full", "selective"),
    )
    compile: Literal["auto", True, False] = option(
        "auto", "torch.compile each block: faster steps after a slow first one; auto does on GPU only"
    )
    clip_norm: float = option(1.0, "gradients with a greater global norm are scaled down to it", above=0)
    max_skips: int = option(
        10,
        "steps in a row that may be skipped (loss or gradient not finite, or a spike) before the run stops",
        minimum=1,
    )
    skip_spikes: float | None = option(
        None,
        "skips a step whose gradient norm is so many standard deviations above its running mean, from step 100 on",
        above=0,
    )
    profile_steps: str = option(
        "", "A:B writes a torch profiler trace of the steps from A to before B, of each rank, under DIR/profile"
    )


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Where the keys of a recipe came from, for its error lines."""

    source_file: str = field(default="recipe", compare=False, repr=False, metadata=NO_KEY)  # as it was named
    key_sources: dict[str, str] = field(default_factory=dict, compare=False, repr=False, metadata=NO_KEY)

    def label(self, key: str) -> str:
        """How an error line about `key` begins: the flag that gave it, or file and key."""
        return label(key, self.source_file, self.key_sources)


def parse_range(text: str) -> range | None:
    """The numbers that `A:B` names, from A to before B; None for an empty text. ValueError for any other."""
    if not text:
        return None
    first, last = (int(part) for part in text.split(":"))
    if not 0 <= first < last:
        raise ValueError(text)
    return range(first, last)


def range_problems(**ranges: str) -> Iterator[Problem]:
    """A problem for each key (with `__` for its dot) whose value is no range."""
    for key, text in ranges.items():
        try:
            parse_range(text)
        except ValueError:
            yield (key.replace("__", "."),), f'"{text}" is no range; give A:B with A before B, such as 96:120'


def length_problems(train: Any) -> Iterator[Problem]:
    """A problem where steps and epochs are both given, or neither."""
    if (train.steps is None) == (train.epochs is None):
        found = "neither is given" if train.steps is None else "both are given"
        yield ("train.steps", "train.epochs"), f"steps and epochs: {found}; give one of them"


def replica_problems(replicas: int, world: int) -> Iterator[Problem]:
    """A problem where `dist.replicas` does not divide the ranks."""
    if world % replicas:
        divisors = ", ".join(str(number) for number in range(1, world + 1) if world % number == 0)
        yield ("dist.replicas",), f"{replicas} does not divide the number of ranks, {world}; give one of {divisors}"


def batch_problem(global_batch: int, micro_batch: int | None, world: int) -> str | None:
    """What is wrong where the ranks' micro-batches do not divide the global batch."""
    at_once = (micro_batch or 1) * world
    if global_batch % at_once == 0:
        return None
    if global_batch % world:
        whole = -(-global_batch // at_once) * at_once
        return f"{world} ranks do not divide train.global_batch {global_batch}; set that to {whole}"
    share = global_batch // world
    nearest = min(
        (size for size in range(1, share + 1) if share % size == 0), key=lambda size: abs(size - at_once // world)
    )
    return (
        f"{micro_batch} x {world} ranks = {at_once} does not divide train.global_batch {global_batch}; "
        f"set it to {nearest}"
    )
