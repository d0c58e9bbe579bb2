"""From weights to a stage: the checks of the weights, and where each source continues."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass

from gloria.config.cli import suggest
from gloria.data.stages import LARGEST_PERIOD, Stage, count_sources, largest_remainder, next_bases, period_for
from gloria.errors import UserError


@dataclass(frozen=True)
class Source:
    """What the mixture needs to know of a source: its length in tokens, and what identifies its shards."""

    tokens: int
    fingerprint: str

    def windows(self, sequence_length: int) -> int:
        """Windows of `sequence_length + 1` tokens; each begins with the last target of the one before."""
        return max(0, self.tokens - 1) // sequence_length


def resolve_weights(corpus: Mapping[str, float], recipe: Mapping[str, float]) -> dict[str, float]:
    """The corpus's weights with those of the recipe in their place, in the corpus's order."""
    unknown = [_unknown_source(name, corpus) for name in recipe if name not in corpus]
    if unknown:
        raise UserError(*unknown)
    return {name: recipe.get(name, weight) for name, weight in corpus.items()}


def next_stage(
    seed: int,
    start: int,
    sequence_length: int,
    sources: Mapping[str, Source],
    weights: Mapping[str, float],
    period: int,
    last: Stage | None = None,
    redefined: Collection[str] = (),
) -> Stage:
    """The stage that mixes by `weights` from `start` on, after `last` (or at the beginning of a run).

    A source without a positive weight is left out. Those of `redefined` hold other windows than in `last`: they begin
    their next epoch. Raises `UserError` with a line for each weight that cannot be.
    """
    used = {name: float(weight) for name, weight in weights.items() if weight}
    _check_weights(used, sources, sequence_length)
    known = last.names if last else ()
    names = (*known, *(name for name in used if name not in known))
    shares = tuple(used.get(name, 0.0) for name in names)
    quotas = tuple(largest_remainder(shares, period))
    _check_quotas(names, shares, quotas)

    # A source out of use keeps its old number of windows until it is used again.
    before = dict(zip(known, last.windows)) if last else {}
    windows = tuple(sources[name].windows(sequence_length) if name in used else before[name] for name in names)
    replaced = tuple(name for name in known if name in redefined)
    bases, taken = [0] * len(names), [0] * len(names)
    if last:
        bases = next_bases(seed, last, start, sequence_length, windows, replaced)
        for number, count in enumerate(count_sources(seed, last, start).tolist()):
            taken[number] = last.taken[number] + count
    return Stage(start, sequence_length, names, shares, quotas, tuple(bases), tuple(taken), windows, replaced)


def _unknown_source(name: str, known: Collection[str]) -> str:
    return f'data.weights.{name}: the corpus has no source "{name}"; {suggest(name, known)}'


def _check_weights(used: Mapping[str, float], sources: Mapping[str, Source], sequence_length: int) -> None:
    problems = [] if used else ["data.weights: no weight is positive; give one source a positive weight"]
    for name, weight in used.items():
        if name not in sources:
            problems.append(_unknown_source(name, sources))
        elif not 0 < weight < math.inf:
            problems.append(f"data.weights.{name}: {weight} is not a share; give a positive number, or 0")
        elif not sources[name].windows(sequence_length):
            problems.append(
                f"data.weights.{name}: its {sources[name].tokens} tokens hold no window of {sequence_length} + 1; "
                f"lower train.sequence_length, prepare more text or set the weight to 0"
            )
    if problems:
        raise UserError(*problems)


def _check_quotas(names: tuple[str, ...], weights: tuple[float, ...], quotas: tuple[int, ...]) -> None:
    lost = [(name, weight) for name, weight, quota in zip(names, weights, quotas) if weight and not quota]
    if not lost:
        return
    needed = period_for(weights)
    remedy = f"set data.period to {needed}"
    if needed > LARGEST_PERIOD:
        remedy = f"raise the weight or set it to 0 (data.period can be {LARGEST_PERIOD} at most)"
    total, period = sum(weights), sum(quotas)
    raise UserError(
        *(
            f"data.weights.{name}: a share of {weight / total:.3g} gets none of {period} places; {remedy}"
            for name, weight in lost
        )
    )
