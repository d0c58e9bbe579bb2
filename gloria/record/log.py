"""Every line of a run's metrics.jsonl against what can be computed without training: the sample stream and the rate."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from itertools import count
from typing import Any

import numpy as np

from gloria.data.stages import Stage, ordinals_at, stage_at
from gloria.record.checks import check_counts
from gloria.record.findings import Finding, conclude
from gloria.record.history import History, Launch, read_lines
from gloria.record.ledger import Counted, add_draws, new_count, tokens_before
from gloria.train.metrics import METRICS, perplexity

CLOSE = 1e-9  # relative: means of sums in float64, added up in another order here


@dataclass
class Reading:
    """How far a log has been read."""

    history: History
    counted: Counted
    due: Iterator[tuple[Launch, int]]  # the train lines that there should be
    next_due: tuple[Launch, int] | None
    skipped: list[int]  # the steps whose updates were left out
    position: int  # the samples before it are counted
    before: np.ndarray | None  # counts at the line before; None: unknown, so that its losses cannot be added up
    start_ordinals: dict[int, np.ndarray] = field(default_factory=dict)  # by the stage's first sample
    lines: int = 0
    last_step: int = -1
    length: int = 0  # tokens of a window, at the line before


def check_log(history: History) -> Iterator[Finding]:
    """Train and validation lines: none missing, doubled, out of order, or saying what the stream does not.

    The counts of `check_counts` come out of the same pass over all draws.
    """
    mixture, first = history.mixture, history.launches[0].step if history.launches else 0
    due = _due_lines(history.launches)
    begin = mixture.stages[0].start
    reading = Reading(history, new_count(mixture), due, next(due, None), sorted(history.skipped), begin, None)
    _advance(reading, max(begin, mixture.samples_of_step(first).start))
    # A branch's first line has losses of steps that its trunk took.
    reading.before = None if first else reading.counted.windows.copy()
    problems = [] if history.launches else [f"{METRICS}: has no launch of this run"]
    validations: list[tuple[int, dict[str, Any]]] = []
    for line, values in read_lines(history.folder) if history.launches else ():
        if values is None:
            problems.append(f"{METRICS}:{line}: is no line of a log")
        elif values["kind"] == "train":
            problems += [f"{METRICS}:{line}: {problem}" for problem in _train_line(reading, line, values)]
        elif values["kind"] == "valid":
            validations.append((line, values))
    problems += _missing_at_the_end(reading)
    _advance(reading, mixture.samples_of_step(max(history.steps, reading.last_step, 0)).start)
    what = f"{reading.lines:,} train lines: no step is missing, and tokens, shares, epochs and rates are as recomputed"
    if unknown := [launch.name for launch in history.launches if not launch.recipe]:
        what += f"; no recipe is left of launch {', '.join(unknown)}, so its rates and intervals are not proved"
    yield from conclude("log", problems, what)
    yield from conclude(
        "validation",
        list(_validations(history, validations)),
        f"{len(validations):,} lines: each in its place, and adds up",
    )
    yield from check_counts(history, reading.position, reading.counted)


def _due_lines(launches: list[Launch]) -> Iterator[tuple[Launch, int]]:
    for launch in launches:
        if every := launch.log_every:
            first = (launch.step // every + 1) * every
            steps = count(first, every) if launch.last_step is None else range(first, launch.last_step + 1, every)
            yield from ((launch, step) for step in steps)


def _advance(reading: Reading, sample: int) -> None:
    if sample > reading.position:
        add_draws(reading.history.mixture, reading.counted, reading.position, sample)
        reading.position = sample


def _train_line(reading: Reading, line: int, values: Mapping[str, Any]) -> Iterator[str]:
    """What is wrong with a train line; the lines come in order."""
    history, step = reading.history, values["step"]
    launch = history.launch_of(line)
    if launch is None:
        yield f"step {step}: stands before the first launch"
        return
    whole = True
    if launch.log_every is None:
        whole = False  # steps between two lines are not known
        out_of_order = step <= reading.last_step
    else:
        skipped = []
        while reading.next_due and (reading.next_due[1] < step and reading.next_due[0].line <= launch.line):
            skipped.append(reading.next_due[1])
            reading.next_due = next(reading.due, None)
        if skipped:
            whole = False
            yield f"step {step}: {_steps(skipped)} missing before it"
        out_of_order = reading.next_due != (launch, step)
        if not out_of_order:
            reading.next_due = next(reading.due, None)
    if out_of_order:
        yield f"step {step}: is doubled, out of order, or not of launch {launch.name}"
        return
    end = history.mixture.samples_of_step(step - 1).stop
    _advance(reading, end)
    yield from _wrong_numbers(reading, launch, values, end, whole=whole)
    reading.lines, reading.last_step, reading.before = reading.lines + 1, step, reading.counted.windows.copy()


def _steps(steps: list[int]) -> str:
    return f"the line of step {steps[0]} is" if len(steps) == 1 else f"{len(steps):,} lines from step {steps[0]} on are"


def _missing_at_the_end(reading: Reading) -> Iterator[str]:
    history, missing = reading.history, []
    while reading.next_due and (reading.next_due[0].last_step is not None or reading.next_due[1] <= history.steps):
        missing.append(reading.next_due[1])
        reading.next_due = next(reading.due, None)
    if missing:
        yield f"{METRICS}: {_steps(missing)} missing at its end"


def _wrong_numbers(
    reading: Reading, launch: Launch, values: Mapping[str, Any], end: int, *, whole: bool
) -> Iterator[str]:
    """What a line says otherwise than the samples before `end` do; `whole`: no line before it is missing."""
    mixture, step, sources = reading.history.mixture, values["step"], values.get("sources")
    if not isinstance(sources, dict) or not all(isinstance(source, dict) for source in sources.values()):
        yield f"step {step}: has no sources"
        return
    tokens = tokens_before(mixture, end)
    if mixture.stages[0].start == 0 and values.get("tokens") != tokens:  # an older version's cannot be counted here
        yield f"step {step}: tokens is {values.get('tokens')}, the stream has {tokens}"
    if launch.recipe and values.get("lr") != (rate := launch.rate(step - 1)):
        yield f"step {step}: lr is {values.get('lr')}, the schedule has {rate}"
    stage = mixture.stages[stage_at(mixture.stages, end - 1)]
    yield from (f"step {step}: {problem}" for problem in _wrong_sources(reading, stage, values))
    loss = values.get("loss")
    if isinstance(loss, float) and values.get("perplexity") not in (None, perplexity(loss)):
        yield f"step {step}: perplexity is {values['perplexity']}, that of loss {loss} is {perplexity(loss)}"
    same_windows, reading.length = reading.length in (0, stage.sequence_length), stage.sequence_length
    if not whole or reading.before is None:
        return
    skipped = bisect_right(reading.skipped, step) - bisect_right(reading.skipped, reading.last_step)
    if values.get("skipped") != skipped:
        yield f"step {step}: {values.get('skipped')} updates were left out, by the events {skipped}"
    if not skipped and not values.get("overflows") and same_windows:
        yield from (f"step {step}: {problem}" for problem in _wrong_loss(reading, values))


def _wrong_sources(reading: Reading, stage: Stage, values: Mapping[str, Any]) -> Iterator[str]:
    mixture, sources = reading.history.mixture, values["sources"]
    known = len(stage.names)
    earlier = np.zeros(known, np.int64)  # taken by an older version, before what can be drawn here
    first = mixture.stages[0]
    earlier[: len(first.taken)] = first.taken
    since = (reading.counted.windows[:known] + earlier - stage.taken).tolist()
    total = max(sum(since), 1)
    if stage.start not in reading.start_ordinals:
        reading.start_ordinals[stage.start] = np.array(ordinals_at(mixture.seed, stage, stage.start))
    ordinals = (reading.start_ordinals[stage.start] + since).tolist()
    for name, quota, taken, ordinal, windows in zip(stage.names, stage.quotas, since, ordinals, stage.windows):
        if name not in sources:
            if quota:
                yield f'source "{name}" is left out'
            continue
        expected = {"asked": quota / stage.period, "share": taken / total, "epoch": ordinal / windows}
        for key, value in expected.items():
            if sources[name].get(key) != value:
                yield f'source "{name}": {key} is {sources[name].get(key)}, the stream has {value}'
    if unknown := sources.keys() - set(mixture.names):
        yield f"has sources that the run does not have: {', '.join(sorted(unknown))}"


def _wrong_loss(reading: Reading, values: Mapping[str, Any]) -> Iterator[str]:
    """The loss is the mean of the sources' losses over the windows that were drawn since the line before."""
    assert reading.before is not None
    drawn = dict(zip(reading.history.mixture.names, (reading.counted.windows - reading.before).tolist()))
    losses = {name: _number(source.get("loss")) for name, source in values["sources"].items()}
    if any((losses.get(name) is None) != (not rows) for name, rows in drawn.items() if name in losses or rows):
        yield "has losses of other sources than those drawn since the line before"
        return
    total = sum((losses[name] or 0.0) * rows for name, rows in drawn.items() if rows) / max(sum(drawn.values()), 1)
    if not isinstance(values.get("loss"), float) or not math.isclose(values["loss"], total, rel_tol=CLOSE):
        yield f"loss is {values.get('loss')}, the sources' losses and windows make {total}"


def _number(value: object) -> float | None:
    return value if isinstance(value, float) else None


def _missing_validations(history: History, there: set[int]) -> Iterator[str]:
    """Those that came between the steps of a launch, and those that a checkpoint remembers."""
    due = set()
    for launch in history.launches:
        if launch.recipe and (every := launch.recipe["valid"]["every"]) and there:
            last = history.steps if launch.last_step is None else launch.last_step
            due |= set(range((launch.step // every + 1) * every, last, every))  # at the last one it may have stopped
    first = history.launches[0].step if history.launches else 0
    due |= {step for saved in history.saved if (step := saved.state.get("evaluated_step") or 0) > first}
    yield from (f"{METRICS}: the validation of step {step} is missing" for step in sorted(due - there))


def _validations(history: History, lines: list[tuple[int, dict[str, Any]]]) -> Iterator[str]:
    """What is wrong with the validation lines: their places, their weights and their sums."""
    first = history.mixture.stages[0]
    shares = {name: quota / first.period for name, quota in zip(first.names, first.quotas)}
    last = -1
    for line, values in lines:
        place, step = f"{METRICS}:{line}: step {values['step']}", values["step"]
        launch = history.launch_of(line)
        every = launch.recipe["valid"]["every"] if launch and launch.recipe else None
        if step <= last:
            yield f"{place}: is doubled or out of order"
        elif launch and every and step % every and step != launch.total_steps:
            yield f"{place}: no validation belongs here, one comes every {every} steps"
        last = max(last, step)
        weights, losses = values.get("weights"), values.get("sources")
        if not isinstance(weights, dict) or not isinstance(losses, dict):
            yield f"{place}: has no weights or no sources"
            continue
        if any(weights.get(name) != shares.get(name, 0.0) for name in losses):
            yield f"{place}: weights are not the shares that the run began with"
            continue
        total = sum(weights.values())
        mean = sum(weights[name] * (_number(loss) or 0.0) for name, loss in losses.items()) / (total or math.nan)
        if isinstance(loss := values.get("loss"), float) and not math.isclose(loss, mean, rel_tol=CLOSE):
            yield f"{place}: loss is {loss}, the sources' losses make {mean}"
        if isinstance(loss, float) and values.get("perplexity") not in (None, perplexity(loss)):
            yield f"{place}: perplexity is {values['perplexity']}, that of loss {loss} is {perplexity(loss)}"
    yield from _missing_validations(history, {values["step"] for _, values in lines})
