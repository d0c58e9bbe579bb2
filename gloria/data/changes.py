"""What has changed when a run continues: which changes are permitted, and the lines that report them."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import zip_longest

from gloria.data.mixture_state import ALGORITHM, MixtureState
from gloria.data.stages import Stage, is_renewed, ordinals_at
from gloria.data.weights import Source
from gloria.errors import UserError

EACH = "or begin each source's next epoch with"


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
        problems.append(f"run.seed: the run began with {past.seed}, not {seed}; set {past.seed}, or begin another run")
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
            f'data.corpus: source "{name}" of the run is not there; put it back, or continue without it with '
            f"--data.allow-change"
            for name in used
            if name not in sources
        ]
    problems += [
        f'mixture state: has {size} windows of source "{name}", whose shards hold {now}; it is damaged, '
        "continue from an older checkpoint"
        for name, size in used.items()
        if name in sources and name not in changed and (now := sources[name].windows(old.sequence_length)) != size
    ]
    if problems:
        raise UserError(*problems)
    return list(old.sources) if whole else changed


def report_shares(seed: int, before: Stage, new: Stage, place: str) -> list[str]:
    """One line with every share that differs between `new` and the stage it follows; none if all are equal."""
    shares = {name: quota / before.period for name, quota in zip(before.names, before.quotas)}
    epochs = [ordinal / size for ordinal, size in zip(ordinals_at(seed, before, new.start), before.windows)]
    changes = []
    for name, quota, passes in zip_longest(new.names, new.quotas, epochs):
        share, was = quota / new.period, shares.get(name)
        if was is None:
            changes.append(f'"{name}" {share:.5g} (new)')
        elif was and not share:
            changes.append(f'"{name}" left out after {passes:.2f} epochs')
        elif share and not was:
            changes.append(f'"{name}" {share:.5g} (used again after {passes:.2f} epochs)')
        elif share != was:
            changes.append(f'"{name}" {share:.5g} ({was:.5g} before)')
    return [f"data.weights: {place}: {', '.join(changes)}"] if changes else []


def report_windows(seed: int, before: Stage, new: Stage, place: str) -> list[str]:
    """A line for each source whose windows change in `new`, with the rest of its epoch that is never read."""
    lines = []
    for source, (name, ordinal) in enumerate(zip(before.names, ordinals_at(seed, before, new.start))):
        size, old_size = new.windows[source], before.windows[source]
        if is_renewed(before, source, new.sequence_length, size, new.redefined):
            rest, old_epoch = -ordinal % old_size, ordinal // old_size
            unread = f"{rest} windows ({rest * before.sequence_length} tokens) of epoch {old_epoch} stay"
            epoch = new.bases[source] // size
            lines.append(
                f'data.corpus: {place}: "{name}" has new windows, epoch {epoch} begins; '
                f"{unread if rest else 'none stays'} unread"
            )
    return lines
