"""What a pre-training run will need and cost, before anything is spent. Needs no GPU, no torch and no corpus.

    python -m gloria.plan --config launch/gloria-1.3b.toml --gpus 4xA100-40GB [--mfu 0.4] [--network 25] [--KEY VALUE]
    python -m gloria.plan --config RECIPE --ladder [RUN RUN RUN ...]

Parameters, length, FLOPs and hours, memory of a rank by activation checkpointing, checkpoints and disk, traffic, and
all of it from 1 to 1,024 GPUs. Without --gpus the plan is for this machine. With no corpus yet, the vocabulary is
taken from the preset, and what cannot be known is said.
"""

from __future__ import annotations

import dataclasses
import json
import os
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from gloria.config.cli import option
from gloria.dist.environment import read_environment
from gloria.dist.gpus import CARDS, ELEMENT_BYTES, GPU, gpus_here, precision_on, read_gpus, usable_memory
from gloria.errors import UserError, run_command, warn
from gloria.files import size_text
from gloria.model.config import PRESETS, TransformerConfig, count_parameters, flops_per_token, read_shape, resolve_shape
from gloria.model.memory import Memory, executed_flops_per_token, newton_schulz_flops, saved_bytes
from gloria.train.config import PretrainConfig, located, peak_of_step, plan_run, read_pretrain_config
from gloria.train.forecast import (
    MFU,
    NETWORK,
    NODE,
    Gathered,
    Network,
    advice,
    compute_seconds,
    keep_gathered,
    step_traffic,
)
from gloria.train.ladder import prediction_lines, proposal_lines
from gloria.train.metrics import short_number
from gloria.train.summary import duration_text

MODES = ("none", "selective", "full")
COUNTS = tuple(2**power for power in range(11))


@dataclass(frozen=True)
class Machine:
    """What the run is planned for."""

    gpus: int
    card: GPU
    mfu: float
    network: float  # GB/s that one GPU sends to other nodes

    @property
    def usable(self) -> float:
        """Bytes of a GPU that tensors can have."""
        return usable_memory(self.card.memory * 2**20)

    @property
    def links(self) -> Network:
        """Between the GPUs."""
        return Network(self.card.link, self.network)

    @property
    def limit(self) -> float | None:
        """`usable` of a GPU; None of a processor, whose memory the ranks share."""
        return None if self.card.name == "processor" else self.usable


@dataclass(frozen=True)
class Job:
    """A recipe, and what is known of it."""

    config: PretrainConfig
    shape: TransformerConfig
    total_steps: int
    precision: str  # of what is computed with
    why: str
    sources: tuple[str, ...]  # lines on the mixture
    unknown: tuple[str, ...]  # lines on what could not be known
    warnings: tuple[str, ...] = ()

    @property
    def element_bytes(self) -> int:
        """Of a number as it is computed with."""
        return ELEMENT_BYTES[self.precision]

    @property
    def micro_batch(self) -> int:
        """Windows a rank works on at once."""
        return self.config.train.filled_micro_batch

    @property
    def step_tokens(self) -> int:
        """Tokens that a step predicts, over all ranks."""
        return self.config.train.global_batch * self.config.train.sequence_length


@dataclass(frozen=True)
class Estimate:
    """A step on some number of GPUs."""

    micro_batch: int
    passes: int
    gathered: Gathered
    memory: Memory
    fits: bool
    compute: float | None  # seconds; None where the card's peak is not known
    sent: int  # bytes, by one GPU
    network: float  # seconds

    @property
    def seconds(self) -> float | None:
        """A step's, traffic behind computing: whichever is slower."""
        return None if self.compute is None else max(self.compute, self.network)


@dataclass(frozen=True)
class PlanConfig(PretrainConfig):
    """A recipe of gloria.pretrain, and the machine it is planned for."""

    gpus: str | None = option(
        None, f"NUMBERxCARD, by default this machine's; cards: {' '.join(card.name for card in CARDS)}"
    )
    mfu: float = option(MFU, "share of the dense peak that training reaches", above=0, maximum=1)
    ladder: list[str] | None = option(
        None, "alone: proposes three small runs; followed by their folders: predicts this run's loss from theirs"
    )
    network: float = option(NETWORK, f"GB/s that a GPU sends to other nodes (of {NODE} GPUs)", above=0)


def main(argv: list[str] | None = None) -> int:
    """Print the plan."""
    config = read_pretrain_config(
        _ladder_as_list(argv),
        PlanConfig,
        prog="python -m gloria.plan",
        description="What a pre-training run will need and cost.",
        world=lambda config: _gpus(config)[0],
        check=_unknown_gpus,
        needs_corpus=False,
    )
    machine = Machine(*_gpus(config), config.mfu, config.network)
    job = read_job(config, machine)
    if config.ladder is not None:
        tokens = job.total_steps * job.step_tokens
        about = (job.shape, tokens, config.ladder) if config.ladder else (config, job.shape, job.total_steps)
        print(*(prediction_lines if config.ladder else proposal_lines)(*about), sep="\n")
        return 0
    for line in lines_of(job, machine):
        print(textwrap.fill(line, 116, subsequent_indent=" " * 13))
    for line in (*job.warnings, *faster(job, machine)):
        warn(line)
    return 0


def _ladder_as_list(argv: list[str] | None) -> list[str]:
    """The words behind --ladder, up to the next flag, as one value."""
    words = list(argv or ())
    if "--ladder" in words:
        first = end = words.index("--ladder") + 1
        while end < len(words) and not words[end].startswith("--"):
            end += 1
        words[first - 1 : end] = [f"--ladder={json.dumps(words[first:end], ensure_ascii=False)}"]
    return words


def faster(job: Job, machine: Machine) -> Iterator[str]:
    """Lines on what would make a step on these GPUs faster."""
    here = estimate(job, machine, machine.gpus, job.micro_batch)
    if machine.limit is not None:
        yield from advice(
            *(job.config, job.shape, machine.gpus, machine.card, machine.links, job.precision),
            kept=here.gathered.keep,
            usable=machine.limit,
            mfu=machine.mfu,
        )


def this_machine() -> tuple[int, GPU]:
    """This machine's GPUs, or without any its processor, shared by the ranks at hand: a card without peaks."""
    ranks = read_environment().world
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2**20 // ranks
    return gpus_here() or (
        ranks,
        GPU("processor", "", memory, None, None, None, None, "no GPU here; name one with --gpus"),
    )


def _gpus(config: PlanConfig) -> tuple[int, GPU]:
    """How many GPUs of which kind; where `_unknown_gpus` has a problem, those of this machine."""
    try:
        return read_gpus(config.gpus) if config.gpus else this_machine()
    except UserError:
        return this_machine()


def _unknown_gpus(config: PlanConfig) -> Iterator[tuple[tuple[str, ...], str]]:
    try:
        read_gpus(config.gpus or CARDS[0].name)
    except UserError as error:
        yield ("gpus",), str(error)


def read_job(config: PretrainConfig, machine: Machine) -> Job:
    """The recipe as it would run on the machine; `UserError` has everything that is wrong with it."""
    with located(config):
        precision, why = precision_on(
            config.train.precision, None if machine.card.name == "processor" else machine.card
        )
    if (Path(config.data.corpus) / "manifest.json").exists():
        plan = plan_run(config, machine.gpus)
        shares = plan.mixture.shares
        sources = tuple(
            f"{name}: share {shares[name]:.4f}, {epochs:.2f} epochs of {plan.mixture.sources[name].tokens:,} tokens"
            for name, epochs in plan.epochs.items()
        )
        return Job(config, plan.shape, plan.total_steps, precision, why, sources, (), plan.warnings)
    return without_corpus(config, precision, why)


def without_corpus(config: PretrainConfig, precision: str, why: str) -> Job:
    """A job from the recipe alone."""
    train, model, corpus = config.train, config.model, config.data.corpus
    if train.steps is None:
        raise UserError(
            f"{config.label('train.epochs')}: {train.epochs:g} epochs of what? There is no corpus at {corpus} yet; "
            "prepare it or give --train.steps"
        )
    with located(config):
        own = PRESETS[model.preset].vocab_size if model.preset in PRESETS else 1
        vocab_size = model.vocab_size or (read_shape(model.from_).vocab_size if model.from_ else own)
        shape = resolve_shape(model, vocab_size=vocab_size, sequence_length=train.sequence_length)
    weights = config.data.weights
    total = sum(weights.values()) or 1.0
    shares = ", ".join(f"{name} {weight / total:.4f}" for name, weight in weights.items())
    unknown = (
        f"no corpus at {corpus} yet: a vocabulary of {vocab_size:,} is assumed, and epochs are unknown",
        f"shares of the recipe: {shares}" if shares else "shares: those of the corpus",
    )
    return Job(config, shape, train.steps, precision, why, (), unknown)


def estimate(job: Job, machine: Machine, gpus: int, micro_batch: int) -> Estimate:
    """A step of the job on `gpus` GPUs, which share the global batch evenly, in passes of `micro_batch`."""
    train = dataclasses.replace(job.config.train, micro_batch=micro_batch)
    config = dataclasses.replace(job.config, train=train)
    shape, precision, replicas = job.shape, job.precision, config.dist.replicas
    gathered = keep_gathered(config, shape, gpus, precision=precision, usable=machine.limit)
    memory = peak_of_step(config, shape, gpus, precision=precision, on_gpu=True, keep_gathered=gathered.keep)
    sent = step_traffic(config, shape, gpus, replicas=replicas, precision=precision, kept=gathered.keep)
    return Estimate(
        micro_batch,
        train.global_batch // (micro_batch * gpus),
        gathered,
        memory,
        fits=memory.total <= machine.usable,
        compute=compute_seconds(config, shape, gpus, machine.card, job.precision, machine.mfu),
        sent=sum(sent),
        network=machine.links.seconds(sent, gpus, replicas),
    )


def largest_that_fits(job: Job, machine: Machine, gpus: int, at_most: int) -> Estimate | None:
    """The step with the largest micro-batch that divides a GPU's share, is at most `at_most`, and fits."""
    share = job.config.train.global_batch // gpus
    for size in range(min(share, at_most), 0, -1):
        if share % size == 0 and (found := estimate(job, machine, gpus, size)).fits:
            return found
    return None


def lines_of(job: Job, machine: Machine) -> Iterator[str]:
    """The plan, line by line."""
    shape, train, card = job.shape, job.config.train, machine.card
    counts, length = count_parameters(shape), train.sequence_length
    here = estimate(job, machine, machine.gpus, job.micro_batch)
    parts = ", ".join(f"{name.replace('_', ' ')} {n:,}" for name, n in counts.items() if name != "total")
    layers = f"{shape.num_layers} layers x {shape.hidden_size}"
    yield f"model        {shape.architecture}, {layers}, vocabulary {shape.vocab_size:,}"
    yield f"parameters   {counts['total']:,} ({parts})"
    tokens = job.total_steps * job.step_tokens
    steps = f"{job.total_steps:,} steps x {train.global_batch} windows x {length}"
    yield f"length       {steps} = {short_number(tokens)} tokens ({tokens:,})"
    yield from (f"source       {line}" for line in job.sources)
    yield from (f"unknown      {line}" for line in job.unknown)
    if train.precision == "auto":
        yield f"precision    {job.precision}: {job.why}"
    model_flops = flops_per_token(shape, length)
    executed = executed_flops_per_token(shape, length, train.activation_checkpointing)
    yield (
        f"compute      {model_flops / 1e9:.3g} GFLOP a token (local attention by its window), "
        f"{model_flops * tokens:.3g} FLOP in all; the GPUs do {executed / model_flops:.2f} times that"
    )
    yield f"time         {time_text(job, machine, here)}"
    yield f"memory       {here.memory.describe()}"
    yield f"  {card.name} has {machine.usable / 2**30:.2f} GiB for tensors: {'fits' if here.fits else 'DOES NOT FIT'}"
    yield f"weights      {here.gathered.describe()}"
    if job.config.optim.name == "radam":
        yield "  not counted: what a step of radam works with besides its two averages"
    if job.config.optim.name == "muon":
        more = newton_schulz_flops(shape) * job.config.dist.replicas / (model_flops * job.step_tokens)
        yield f"muon         its products add {100 * more:.2g} % to a step's operations"
    yield from mode_lines(job, machine)
    yield from disk_lines(job, machine)
    behind = "" if here.compute is None else f", behind {here.compute:.3g} s of computing"
    links, replicas = machine.links, job.config.dist.replicas
    speeds = {links.speed(machine.gpus // replicas), links.speed(machine.gpus)}
    yield (
        f"network      a GPU sends {size_text(here.sent)} a step ({here.passes} passes): {here.network:.3g} s at "
        f"{' and '.join(f'{speed:g}' for speed in sorted(speeds, reverse=True))} GB/s{behind}"
    )
    yield ""
    yield from table_lines(job, machine)


def time_text(job: Job, machine: Machine, step: Estimate) -> str:
    """How long the run takes, and by what reckoning."""
    card = machine.card
    if step.seconds is None:
        return f"unknown: no peak is known of {card.name} ({card.source})"
    peak, kind = (card.bf16 or card.fp16, "16-bit") if job.element_bytes == 2 else (card.fp32, "fp32")
    seconds = step.seconds * job.total_steps
    return (
        f"{duration_text(seconds)}, {machine.gpus * seconds / 3600:,.0f} GPU-hours on {machine.gpus} x {card.name} at "
        f"{100 * machine.mfu:g} % of {peak:g} TFLOP/s ({kind} dense; {card.source})"
    )


def mode_lines(job: Job, machine: Machine) -> Iterator[str]:
    """Memory of a rank and the largest micro-batch, for each way of activation checkpointing."""
    train = job.config.train
    share = train.global_batch // machine.gpus
    for mode in MODES:
        other = dataclasses.replace(job.config, train=dataclasses.replace(train, activation_checkpointing=mode))
        variant = dataclasses.replace(job, config=other)
        now = estimate(variant, machine, machine.gpus, job.micro_batch)
        largest = largest_that_fits(variant, machine, machine.gpus, share)
        best = f"{largest.micro_batch} ({largest.memory.total / 2**30:.2f} GiB)" if largest else "none"
        yield (
            f"  checkpointing {mode:<10} micro-batch {train.micro_batch}: {now.memory.total / 2**30:6.2f} GiB; "
            f"largest of {share} a GPU that fits: {best}"
        )


def disk_lines(job: Job, machine: Machine) -> Iterator[str]:
    """Size of a checkpoint, how many there are at most, and the host memory of a save in the background."""
    keep = job.config.checkpoint
    each = saved_bytes(job.shape, job.config.optim.name)
    saved = -(-job.total_steps // keep.every)
    most = keep.most_at_once(job.total_steps)
    yield (
        f"checkpoints  {size_text(each)} each, {saved:,} in all; at most {most} at once (one of them being written): "
        f"{size_text(most * each)}"
    )
    if keep.asynchronous:
        host = each * job.config.dist.replicas // machine.gpus
        yield f"host memory  {host / 2**30:.2f} GiB a rank while a checkpoint is written in the background"


def table_lines(job: Job, machine: Machine) -> Iterator[str]:
    """The run on 1 to 1,024 of these cards; the micro-batch is the recipe's, or the largest below it that fits."""
    row = "{:>5}{:>12}{:>8}{:>10}{:>11}{:>11}{:>11}{:>12}".format
    yield row("GPUs", "micro-batch", "passes", "GiB", "compute s", "network s", "days", "GPU-hours")
    batch, replicas = job.config.train.global_batch, job.config.dist.replicas
    for gpus in COUNTS:
        if batch % gpus or gpus % replicas:
            what = f"global batch {batch}" if batch % gpus else f"dist.replicas {replicas}"
            yield f"{gpus:>5}  not possible: {what}"
            continue
        step = largest_that_fits(job, machine, gpus, job.micro_batch)
        if step is None:
            smallest = estimate(job, machine, gpus, 1)
            yield f"{gpus:>5}  does not fit: {smallest.memory.total / 2**30:.2f} GiB with micro-batch 1"
            continue
        days = None if step.seconds is None else step.seconds * job.total_steps / 86400
        yield row(
            gpus,
            step.micro_batch,
            step.passes,
            f"{step.memory.total / 2**30:.2f}",
            "-" if step.compute is None else f"{step.compute:.3g}",
            f"{step.network:.3g}",
            "-" if days is None else f"{days:,.2f}",
            "-" if days is None else f"{days * 24 * gpus:,.0f}",
        )


if __name__ == "__main__":
    raise SystemExit(run_command(main))
