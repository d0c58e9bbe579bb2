"""How often a run will have read each source by its end, computed in closed form before its first step."""

from __future__ import annotations

from collections.abc import Iterator
from decimal import ROUND_FLOOR, Context
from fractions import Fraction

from gloria.data.mixture import Mixture
from gloria.data.stages import ordinals_at, sample_of_ordinal, stage_at
from gloria.errors import UserError


def check_exhaustion(mixture: Mixture, end_sample: int, max_epochs: float | None) -> None:
    """A `UserError` for each source that the samples before `end_sample` would read more than `max_epochs` times.

    To be called before the first step, on resume and after a change of stage. None permits any number.
    """
    if max_epochs is None:
        return
    problems = []
    for name, windows, sample in _exhausted(mixture, end_sample, max_epochs):
        epochs = mixture.epochs_at(end_sample)[name]
        step = mixture.step_of_sample(sample)
        steps = mixture.step_of_sample(end_sample - 1) + 1
        weight = weight_for(mixture, name, end_sample, max_epochs)
        lower = "" if weight is None else f"set data.weights.{name} to {weight:g}, "
        problems.append(
            f'data.max_epochs: source "{name}" runs out at sample {sample} (step {step}): {steps} steps read its '
            f"{windows} windows {epochs:.2f} times, more than {max_epochs:g}; {lower}train fewer steps or allow more"
        )
    if problems:
        raise UserError(*problems)


def weight_for(mixture: Mixture, name: str, end_sample: int, epochs: float) -> float | None:
    """The weight from `next_sample` on that keeps a source within `epochs` until `end_sample`.

    The other weights are as they are. Three digits, rounded down; 0 if too little is left to read, and None if no
    weight does, since there is no other source.
    """
    stage = mixture.stages[-1]
    begin = max(mixture.next_sample, stage.start)
    number = stage.names.index(name)
    room = _limit(epochs, stage.windows[number]) - ordinals_at(mixture.seed, stage, begin)[number]
    others = sum(Fraction(str(weight)) for other, weight in zip(stage.names, stage.weights) if other != name)
    if not others:
        return None
    # A quota may be one too large, and a prefix of a period two samples ahead.
    share = Fraction(room - 2, end_sample - begin) - Fraction(1, stage.period)
    if share <= 0:
        return 0.0
    exact = share / (1 - share) * others
    weight = Context(prec=3, rounding=ROUND_FLOOR).divide(exact.numerator, exact.denominator)
    has_a_place = Fraction(weight) * stage.period >= Fraction(weight) + others
    return float(weight) if has_a_place else 0.0


def steps_for_epochs(mixture: Mixture, epochs: float) -> int:
    """The steps that read `epochs` times as many windows as the sources in use have: ceil(epochs * windows / batch)."""
    stage = mixture.stages[-1]
    windows = sum(size for size, quota in zip(stage.windows, stage.quotas) if quota)
    return -(-Fraction(str(epochs)) * windows // mixture.global_batch)


def _exhausted(mixture: Mixture, end_sample: int, max_epochs: float) -> Iterator[tuple[str, int, int]]:
    """(name, its windows, the first sample beyond the limit) of each source, at most once."""
    found = set()
    stages = mixture.stages
    for number in range(max(0, stage_at(stages, mixture.next_sample)), len(stages)):
        stage = stages[number]
        begin = max(stage.start, mixture.next_sample)
        end = min(end_sample, stages[number + 1].start) if number + 1 < len(stages) else end_sample
        if begin >= end:
            continue
        before, after = (ordinals_at(mixture.seed, stage, sample) for sample in (begin, end))
        for source, (first, last) in enumerate(zip(before, after)):
            name, first = stage.names[source], max(first, _limit(max_epochs, stage.windows[source]))
            if last > first and name not in found:
                found.add(name)
                yield name, stage.windows[source], sample_of_ordinal(mixture.seed, stage, source, first)


def _limit(epochs: float, windows: int) -> int:
    return int(Fraction(str(epochs)) * windows)
