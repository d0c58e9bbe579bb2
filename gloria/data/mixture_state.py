"""The mixture's state as plain JSON, and the checks that refuse a damaged one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from gloria.config.cli import from_mapping, option
from gloria.data.stages import LARGEST, LARGEST_PERIOD, Stage, count_sources, largest_remainder, next_bases
from gloria.errors import UserError

VERSION = 2  # of the state's layout
READABLE = (1, VERSION)  # in version 1 no samples could be left out
LARGEST_BATCH = 1 << 24  # samples in a step; a plan of them takes 400 MB
ALGORITHM = "gloria-mixture-1"  # of the order of samples: another name wherever one sample would be another


@dataclass(frozen=True)
class BatchSize:
    """From step `step` on, which begins at sample `sample`, a step takes `batch` samples."""

    step: int = option(minimum=0, maximum=LARGEST)
    sample: int = option(minimum=0, maximum=LARGEST)
    batch: int = option(minimum=1, maximum=LARGEST_BATCH)


@dataclass(frozen=True)
class Fingerprints:
    """What the order of samples was made from; any difference would make other windows of the same numbers."""

    algorithm: str
    tokenizer: str
    sequence_length: int = option(minimum=1, maximum=LARGEST)
    sources: dict[str, str] = option()


@dataclass(frozen=True)
class MixtureState:
    """All that determines a run's samples, as of its last consumed step."""

    version: int
    seed: int = option(minimum=0, maximum=(1 << 64) - 1)
    next_sample: int = option(minimum=0, maximum=LARGEST)
    stages: tuple[Stage, ...] = option()
    batches: tuple[BatchSize, ...] = option()
    fingerprints: Fingerprints = option()


def read_state(values: Mapping[str, Any], where: str = "mixture state", step: int | None = None) -> MixtureState:
    """The state in a JSON mapping, if `step` is not None as of that many steps; a `UserError` if it is damaged."""
    if not isinstance(values, Mapping):
        raise UserError(f"{where}: is not a JSON object; continue from an older checkpoint")
    if values.get("version", VERSION) not in READABLE:
        raise UserError(
            f"{where}: has version {values['version']}, this program reads up to {VERSION}; use the one that wrote it"
        )
    state = from_mapping(MixtureState, dict(values), where)
    if problem := _shape_problem(state) or _history_problem(state) or _progress_problem(state, step):
        raise UserError(f"{where}: {problem}; it is damaged, continue from an older checkpoint")
    return state


def number_left_out(last: Stage | None, stage: Stage) -> int:
    """How many samples are left out where `stage` follows `last` (None: begins the run)."""
    if last is None or stage.order is None:
        return stage.drawn
    order = last.start if last.order is None else last.order
    keys = ("quotas", "windows", "sequence_length", "redefined")
    same = stage.order == order and all(getattr(stage, key) == getattr(last, key) for key in keys)
    return stage.drawn - last.draw_of(stage.start) if same else -1


def _shape_problem(state: MixtureState) -> str | None:
    if not state.stages or not state.batches:
        return "has no stages or no batches"
    for number, stage in enumerate(state.stages):
        columns = (stage.weights, stage.quotas, stage.bases, stage.taken, stage.windows)
        if len(set(stage.names)) != len(stage.names) or any(len(c) != len(stage.names) for c in columns):
            return f"stages[{number}]: its lists do not fit its names"
        if not all(name.isprintable() for name in stage.names):  # half of a surrogate pair cannot be hashed
            return f"stages[{number}]: has an impossible name"
        if not set(stage.redefined) <= set(stage.names):
            return f"stages[{number}]: redefines a source it does not have"
        if not 0 < stage.period <= LARGEST_PERIOD or sum(stage.weights) <= 0:
            return f"stages[{number}]: has an impossible period of {stage.period}"
        if list(stage.quotas) != largest_remainder(stage.weights, stage.period):
            return f"stages[{number}]: its quotas are not those of its weights"
        if sum(stage.taken) != stage.start:
            return f"stages[{number}]: begins at {stage.start}, after {sum(stage.taken)} samples"
    return None


def _history_problem(state: MixtureState) -> str | None:
    """Each stage must continue where the one before it stopped, which can be computed."""
    foreign = state.fingerprints.algorithm != ALGORITHM
    for number, (last, stage) in enumerate(pairwise(state.stages), start=1):
        known = len(last.names)
        if stage.start <= last.start or stage.names[:known] != last.names:
            return f"stages[{number}]: does not follow the one before it"
        if number_left_out(last, stage) < 0:
            return f"stages[{number}]: does not continue after the samples before it"
        if foreign:  # another version's counts cannot be computed here
            continue
        counts = count_sources(state.seed, last, stage.start).tolist()
        taken = [before + count for before, count in zip(last.taken, counts)]
        bases = list(last.bases)
        if stage.order is None:
            bases = next_bases(state.seed, last, stage.start, stage.sequence_length, stage.windows, stage.redefined)
        if list(stage.taken[:known]) != taken or list(stage.bases) != bases:
            return f"stages[{number}]: does not continue where the one before it stopped"
    if state.stages[0].start == 0 and (any(state.stages[0].bases) or state.stages[0].order is not None):
        return "stages[0]: does not begin at the beginning"
    return None


def _progress_problem(state: MixtureState, step: int | None) -> str | None:
    if (state.batches[0].step, state.batches[0].sample) != (0, 0):
        return "batches[0]: is not the first step's"
    for number, (last, size) in enumerate(pairwise(state.batches), start=1):
        if size.step <= last.step or size.sample != last.sample + (size.step - last.step) * last.batch:
            return f"batches[{number}]: does not follow the one before it"
    size, begun = state.batches[-1], state.next_sample - state.batches[-1].sample
    if state.next_sample < state.stages[0].start or begun < 0 or begun % size.batch:
        return f"next_sample: no step begins at {state.next_sample}"
    if step not in (None, begun_step := size.step + begun // size.batch):
        return f"next_sample: step {begun_step} begins at {state.next_sample}, and {step} steps were done"
    if set(state.fingerprints.sources) != set(state.stages[-1].names):
        return "fingerprints.sources: are not those of the stages' sources"
    if state.fingerprints.sequence_length != state.stages[-1].sequence_length:
        return "fingerprints.sequence_length: is not that of the last stage"
    return None
