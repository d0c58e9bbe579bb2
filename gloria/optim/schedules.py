"""The learning rate as a pure function of the step. Imports no torch.

Steps are optimizer steps, counted from 0; a run of `total_steps` takes the steps 0 ... total_steps - 1.
Warm-up is linear, and its first step has 1 / warmup_steps of the peak, not 0: no step is spent on nothing.
After it, linear, cosine and cosine_hard are the curves that transformers' `get_*_schedule_with_warmup` draw.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from gloria.config.cli import option, to_mapping

# What each kind reads beyond warm-up and floor: the same key beside another kind is an error.
_KEYS_OF_KIND = {"cosine_hard": ("restarts", "restart_steps"), "wsd": ("decay_steps",)}


@dataclass(frozen=True)
class ScheduleConfig:
    """How the learning rate runs over the steps."""

    kind: str = option(
        "cosine",
        "curve after warm-up: linear or cosine to the floor at the end; cosine_hard: cosine that starts "
        "again at the peak; constant; wsd: constant, then 1 - sqrt to the floor (arXiv 2405.18392)",
        choices=("linear", "cosine", "cosine_hard", "constant", "wsd"),
    )
    warmup_steps: int = option(
        0, "steps of linear rise to the peak; Adam's averages are unreliable at first", minimum=0
    )
    min_ratio: float = option(
        0.0, "floor as a share of the peak; above 0 the last steps still learn", minimum=0.0, maximum=1.0
    )
    restarts: int | None = option(
        None,
        "cosine_hard: cycles that the steps after warm-up are cut into; a longer run stretches them",
        minimum=1,
    )
    restart_steps: int | None = option(
        None, "cosine_hard: steps of a cycle; a longer run has more of them and the same past", minimum=1
    )
    decay_steps: int | None = option(None, "wsd: steps of the decay at the end of the run", minimum=1)


@dataclass(frozen=True, kw_only=True)
class SavedSchedule(ScheduleConfig):
    """What a checkpoint remembers of the schedule: `state_dict`."""

    base_lr: float = option(help="peak", minimum=0)
    step: int = option(help="steps done", minimum=0)
    total_steps: int = option(help="of the run", minimum=1)
    lr: float = option(help="of this step", minimum=0)


def problems(config: ScheduleConfig, total_steps: int | None) -> Iterator[tuple[tuple[str, ...], str]]:
    """Contradictions in a schedule as (keys, what); `total_steps` is None while it is not known yet."""
    for kind, keys in _KEYS_OF_KIND.items():
        for key in keys:
            if getattr(config, key) is not None and config.kind != kind:
                yield (
                    (f"schedule.{key}", "schedule.kind"),
                    f'is for kind "{kind}", but kind is "{config.kind}"; leave it out or change the kind',
                )
    if config.kind == "cosine_hard" and (config.restarts is None) == (config.restart_steps is None):
        found = "neither is given" if config.restarts is None else "both are given"
        yield (
            ("schedule.restarts", "schedule.restart_steps"),
            f"restarts and restart_steps: {found}; give cosine_hard one of them",
        )
    if config.kind == "wsd" and config.decay_steps is None:
        yield ("schedule.decay_steps",), 'missing; kind "wsd" needs it, for example a tenth of the steps'
    if config.kind == "constant" and config.min_ratio > 0:
        yield (
            ("schedule.min_ratio", "schedule.kind"),
            f'{config.min_ratio} has no meaning for kind "constant"; leave it out',
        )
    if total_steps is None:
        return
    if config.warmup_steps > total_steps:
        yield (
            ("schedule.warmup_steps", "train.steps", "train.epochs"),
            f"{config.warmup_steps} exceeds the run's {total_steps} steps; shorten the warm-up",
        )
    elif config.kind == "wsd" and config.warmup_steps + (config.decay_steps or 0) > total_steps:
        yield (
            ("schedule.decay_steps", "schedule.warmup_steps", "train.steps", "train.epochs"),
            f"{config.decay_steps} and warmup_steps {config.warmup_steps} together exceed the run's "
            f"{total_steps} steps; shorten one",
        )


def learning_rate(config: ScheduleConfig, base_lr: float, step: int, total_steps: int) -> float:
    """The rate of step `step` (from 0) in a run of `total_steps`."""
    if step < config.warmup_steps:
        return base_lr * (step + 1) / config.warmup_steps
    return base_lr * (config.min_ratio + (1.0 - config.min_ratio) * _height(config, step, total_steps))


def state_dict(config: ScheduleConfig, base_lr: float, step: int, total_steps: int) -> dict[str, Any]:
    """Everything the rate depends on, and the rate of step `step`, as plain JSON values for a checkpoint."""
    rate = learning_rate(config, base_lr, step, total_steps)
    return {**to_mapping(config), "base_lr": base_lr, "step": step, "total_steps": total_steps, "lr": rate}


def changes(state: dict[str, Any], config: ScheduleConfig, base_lr: float, total_steps: int) -> list[str]:
    """What differs between a saved state and the schedule a run goes on with, a line for each key."""
    now = state_dict(config, base_lr, state["step"], total_steps)
    return [f"{key}: {state.get(key)} before, {value} now" for key, value in now.items() if state.get(key) != value]


def describe(config: ScheduleConfig, base_lr: float, total_steps: int) -> str:
    """The schedule in a line, with its numbers."""
    floor = f"{base_lr * config.min_ratio:g}"
    after = total_steps - config.warmup_steps
    if config.kind == "cosine_hard":
        cycle = config.restart_steps or after / (config.restarts or 1)
        curve = f"cosine to {floor} in cycles of {cycle:,.0f} steps ({after / cycle:.2f} of them)"
    elif config.kind == "wsd":
        curve = f"constant, then 1 - sqrt to {floor} over the last {config.decay_steps:,} steps"
    else:
        curve = "constant" if config.kind == "constant" else f"{config.kind} to {floor}"
    warmup = f"warm-up over {config.warmup_steps:,} steps, then " if config.warmup_steps else ""
    return f"peak {base_lr:g}, {warmup}{curve}; {total_steps:,} steps in all"


def _height(config: ScheduleConfig, step: int, total_steps: int) -> float:
    """Where the curve after warm-up stands between floor (0) and peak (1)."""
    after = step - config.warmup_steps  # steps since the end of warm-up
    length = max(total_steps - config.warmup_steps, 1)
    progress = min(after / length, 1.0)
    if config.kind == "constant":
        return 1.0
    if config.kind == "linear":
        return 1.0 - progress
    if config.kind == "cosine":
        return _cosine(progress)
    if config.kind == "wsd":
        decay = config.decay_steps or 1
        return 1.0 - math.sqrt(min(max(step - (total_steps - decay), 0) / decay, 1.0))
    if config.restart_steps is not None:
        return _cosine(after % config.restart_steps / config.restart_steps)
    return _cosine(progress * (config.restarts or 1) % 1.0) if progress < 1.0 else 0.0


def _cosine(progress: float) -> float:
    return 0.5 * (1.0 + math.cos(math.pi * progress))
