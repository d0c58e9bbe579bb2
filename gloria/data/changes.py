"""What is otherwise when a run goes on: which changes are permitted, and the lines that tell the user of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import zip_longest

from gloria.data.mixture_state import ALGORITHM, MixtureState
from gloria.data.stages import Stage, is_renewed, ordinals_at
from gloria.data.weights import Source
from gloria.errors import UserError

EACH = "or begin each source's next epoch with"


@dataclass(frozen=True)
class Unread:
    """The rest of an epoch, which is left out if a source's windows become others."""

    epoch: int
    windows: int
    tokens: int


def redefined_sources(
    past: MixtureState,
    seed: int,
    tokenizer: str,
    sequence_length: int,
    sources: Mapping[str, Source],
    *,
    allow_change: bool,
    new_epoch: bool,
) -> list[str]:
    """The sources of a run that have other tokens now than in the past.

    Raises `UserError` with a line for each difference between the past and now that was not permitted.
    """
    old, problems, stage = past.fingerprints, [], past.stages[-1]
    used = {name: size for name, quota, size in zip(stage.names, stage.quotas, stage.windows) if quota}
    changed = [name for name in old.sources if name in sources and sources[name].fingerprint != old.sources[name]]
    if past.seed != seed:
        problems.append(
            f"run.seed: the run was begun with {past.seed}, not {seed}; set {past.seed}, or begin another run"
        )
    if old.sequence_length != sequence_length and not new_epoch:
        problems.append(
            f"train.sequence_length: the run's windows are of {old.sequence_length}, not {sequence_length}; "
            f"set {old.sequence_length}, {EACH} --data.new-epoch"
        )
    whole = [("data order", old.algorithm, ALGORITHM), ("tokenizer", old.tokenizer, tokenizer)]
    whole = [(what, before, after) for what, before, after in whole if before != after]
    if not allow_change:
        problems += [
            f"data.corpus: the {what} of the run was {before}, not {after}; use the same, {EACH} --data.allow-change"
            for what, before, after in whole
        ]
        problems += [
            f'data.corpus: the shards of source "{name}" were {old.sources[name]}, not {sources[name].fingerprint}; '
            f"use the same, or begin its next epoch with --data.allow-change"
            for name in changed
        ]
        problems += [
            f'data.corpus: source "{name}" of the run is not there; put it back, or go on without it with '
            f"--data.allow-change"
            for name in used
            if name not in sources
        ]
    problems += [
        f'mixture state: has {size} windows of source "{name}", whose shards hold {now}; it is damaged, go on from an '
        "older checkpoint"
        for name, size in used.items()
        if name in sources and name not in changed and (now := sources[name].windows(old.sequence_length)) != size
    ]
    if problems:
        raise UserError(*problems)
    return list(old.sources) if whole else changed


def unread_windows(seed: int, stage: Stage, sample: int) -> dict[str, Unread]:
    """What a source whose windows became others at `sample` of `stage` would leave unread of its epoch, if anything."""
    facts = {}
    for name, ordinal, size in zip(stage.names, ordinals_at(seed, stage, sample), stage.windows):
        if left := -ordinal % size:
            facts[name] = Unread(ordinal // size, left, left * stage.sequence_length)
    return facts


def report_shares(seed: int, before: Stage, new: Stage, place: str) -> list[str]:
    """A line with every share that is otherwise in `new` than in the stage it follows, if any is."""
    shares = {name: quota / before.period for name, quota in zip(before.names, before.quotas)}
    epochs = [ordinal / size for ordinal, size in zip(ordinals_at(seed, before, new.start), before.windows)]
    told = []
    for name, quota, passes in zip_longest(new.names, new.quotas, epochs):
        share, was = quota / new.period, shares.get(name)
        if was is None:
            told.append(f'"{name}" {share:.5g} (new)')
        elif was and not share:
            told.append(f'"{name}" left out after {passes:.2f} epochs')
        elif share and not was:
            told.append(f'"{name}" {share:.5g} (taken up again after {passes:.2f} epochs)')
        elif share != was:
            told.append(f'"{name}" {share:.5g} ({was:.5g} before)')
    return [f"data.weights: {place}: {', '.join(told)}"] if told else []


def report_windows(seed: int, before: Stage, new: Stage, place: str) -> list[str]:
    """A line for each source whose windows are others in `new` than in the stage it follows."""
    unread, lines = unread_windows(seed, before, new.start), []
    for source, name in enumerate(before.names):
        size = new.windows[source]
        if is_renewed(before, source, new.sequence_length, size, new.redefined):
            rest = unread.get(name)
            left = f"{rest.windows} windows ({rest.tokens} tokens) of epoch {rest.epoch} stay" if rest else "none stays"
            epoch = new.bases[source] // size
            lines.append(f'data.corpus: {place}: "{name}" has other windows, epoch {epoch} begins; {left} unread')
    return lines
