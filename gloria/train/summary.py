"""What a run amounts to, in a few lines for the user to read before the hours are spent."""

from __future__ import annotations

import textwrap

from gloria.dist.gpus import gpus_here, precision_on, usable_memory
from gloria.optim import schedules
from gloria.train.config import PretrainConfig, RunPlan, located, peak_of_step
from gloria.train.forecast import Gathered, keep_gathered
from gloria.train.metrics import short_number


def precision_here(config: PretrainConfig) -> tuple[str, str, bool]:
    """The precision of a run on this machine, why, and whether it is on a GPU, as far as nvidia-smi can tell.

    UserError as the run's.
    """
    found = None if config.run.device == "cpu" else gpus_here()
    with located(config):
        return *precision_on(config.train.precision, found and found[1]), found is not None


def gathered_here(config: PretrainConfig, plan: RunPlan, precision: str) -> Gathered:
    """What `dist.reshard` means on this machine, as far as nvidia-smi can tell."""
    found = None if config.run.device == "cpu" else gpus_here()
    usable = usable_memory(found[1].memory * 2**20) if found else None
    return keep_gathered(config, plan.shape, plan.world, precision=precision, usable=usable)


def describe(config: PretrainConfig, plan: RunPlan, precision: str, why: str, on_gpu: bool, gathered: Gathered) -> str:
    """The run in a few lines, for the user to read before it starts; `why` it has its precision."""
    train, shape, counts = config.train, plan.shape, plan.parameters
    parts = ", ".join(f"{name.replace('_', ' ')} {n:,}" for name, n in counts.items() if name != "total")
    of_keys = f" ({shape.kv_heads} of keys)" if shape.kv_heads < shape.num_heads else ""
    step_tokens = train.global_batch * train.sequence_length
    keep = gathered.keep
    memory = peak_of_step(config, shape, plan.world, precision=precision, on_gpu=on_gpu, keep_gathered=keep)
    seconds = plan.tokens * plan.flops_per_token / 1e12 / plan.world
    rows = {
        "run": f"{config.run.dir}, seed {config.run.seed}, recipe {config.source_file}"
        + (f", a branch of {config.run.branch}" if config.run.branch else ""),
        "model": f"{shape.architecture}: {shape.num_layers} layers x {shape.hidden_size}, {shape.num_heads} "
        f"heads{of_keys}, {shape.max_positions} positions, vocabulary {shape.vocab_size:,}",
        "parameters": f"{counts['total']:,} ({parts})",
        "precision": f"{precision}: {why}",
        "memory": f"{memory.describe()}; more: python -m gloria.plan",
        "weights": gathered.describe(),
        "step": f"{train.global_batch} windows x {train.sequence_length} = {step_tokens:,} tokens "
        f"({plan.world} ranks x {plan.accumulation} passes x micro-batch {train.micro_batch})",
        "length": f"{plan.total_steps:,} steps, {short_number(plan.tokens)} tokens ({plan.tokens:,})",
        "time": f"{duration_text(seconds)} if a rank keeps up 1 TFLOP/s, {duration_text(seconds / 100)} if 100",
        "lr": schedules.describe(config.schedule, config.optim.lr, plan.total_steps),
    }
    # For a terminal of 80 columns; a row that is longer goes on below.
    lines = [textwrap.fill(f"{name:<11} {text}", 79, subsequent_indent=" " * 12) for name, text in rows.items()]
    return "\n".join([*lines, "", *_source_table(config, plan)])


def duration_text(seconds: float) -> str:
    """Seconds for people: `3.4 days`."""
    for size, unit in ((86400, "days"), (3600, "hours"), (60, "minutes")):
        if seconds >= 2 * size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.1f} seconds"


def _source_table(config: PretrainConfig, plan: RunPlan) -> list[str]:
    row = "{:<17} {:>14} {:>11} {:>6} {:>7} {:>7} {:>7}".format
    lines = [row("source", "tokens", "windows", "tail", "weight", "share", "epochs")]
    for name, weight in plan.weights.items():
        tokens = plan.corpus.source(name).train.tokens
        windows = plan.mixture.sources[name].windows(config.train.sequence_length)
        # The tail fills no window, and is not read.
        tail = max(tokens - 1, 0) - windows * config.train.sequence_length
        share, epochs = plan.mixture.shares.get(name, 0.0), plan.epochs.get(name, 0.0)
        numbers = (f"{tokens:,}", f"{windows:,}", tail, f"{weight:g}", f"{share:.4f}", f"{epochs:.2f}")
        lines.append(row(name, *numbers))
    return lines
