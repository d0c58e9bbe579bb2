"""The weighted mixture: which window of which source is the g-th sample of a run.

Everything is a pure function of (seed, stages, g) and is the same for any number of ranks, micro-batches and any
read-ahead. A sample is a window of `sequence_length + 1` tokens, so weights are shares of training tokens. A run is a
list of stages (gloria/data/stages.py): other weights or sources begin a stage at any sample, leave the past as it
was, and each source continues where it stopped. Rank d of D reads the rows d, d + D, ... of a step.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from gloria.config.cli import option, to_mapping
from gloria.data.changes import redefined_sources, report_shares, report_windows
from gloria.data.mixture_state import (
    ALGORITHM,
    VERSION,
    BatchSize,
    Fingerprints,
    MixtureState,
    number_left_out,
    read_state,
)
from gloria.data.stages import LARGEST_PERIOD, Samples, Stage, count_sources, ordinals_at, plan_samples, stage_at
from gloria.data.weights import Source, next_stage
from gloria.errors import UserError


@dataclass(frozen=True)
class MixtureConfig:
    """Which sources are read, in what shares, and what may change when a run continues."""

    corpus: str = option("data/corpus", "folder that gloria.prepare made")
    weights: dict[str, float] = option(
        {}, "share of training tokens of a source, in place of the corpus's; 0 leaves it out", minimum=0
    )
    period: int = option(
        65536,
        "samples in which each share is met exactly; very small weights need a larger one",
        minimum=1000,
        maximum=LARGEST_PERIOD,
    )
    skip_samples: str = option(
        "",
        "A:B leaves out the samples from A to before B, numbered as in the run without this gap; with run.resume = "
        "STEP a run skips bad data",
    )
    max_epochs: float | None = option(
        None,
        "most passes over any source; a run that would need more is refused before its first step",
        above=0,
    )
    mask_documents: bool = option(
        False, "keeps attention within a document; without it a window's documents see each other"
    )
    prefetch: int = option(128, "steps a thread may read ahead, so that the loop does not wait for the disk", minimum=1)
    new_epoch: bool = option(
        False, "lets a run continue with another train.sequence_length; the next epoch of each source begins"
    )
    allow_change: bool = option(
        False,
        "lets a run continue with other shards or tokenizer; the next epoch of the sources concerned begins",
    )


@dataclass
class Mixture:
    """The order of a run's samples, and its progress; `new_mixture` and `mixture_from_state` make one.

    The next step takes [next_sample, next_sample + global batch); only the consumer of samples moves `next_sample`.
    The tuples `stages` and `batches` are replaced, never changed: a thread that reads ahead keeps those it began with,
    and a comparison by identity finds a change of plan.
    """

    seed: int
    tokenizer: str  # fingerprint
    sources: dict[str, Source]  # of the corpus; empty in a mixture that is only inspected
    stages: tuple[Stage, ...]
    batches: tuple[BatchSize, ...]
    next_sample: int = 0
    fingerprints: dict[str, str] = field(default_factory=dict)  # of every source ever used

    @property
    def names(self) -> tuple[str, ...]:
        """All sources ever used, in order of first use: what `Samples.source` counts in."""
        return self.stages[-1].names

    @property
    def sequence_length(self) -> int:
        """Targets in a window, in the newest stage."""
        return self.stages[-1].sequence_length

    @property
    def global_batch(self) -> int:
        """Samples in a step, by the newest batch size."""
        return self.batches[-1].batch

    @property
    def shares(self) -> dict[str, float]:
        """The share of the samples that each source has in the newest stage; 0 where it is left out."""
        stage = self.stages[-1]
        return {name: quota / stage.period for name, quota in zip(stage.names, stage.quotas)}

    def stage(self, sample: int) -> Stage:
        """The stage that `sample` lies in."""
        number = stage_at(self.stages, sample)
        if number < 0:
            first = self.stages[0].start
            raise UserError(f"sample {sample}: is of an older version's order; name one from {first} on")
        return self.stages[number]

    def plan(self, first: int, count: int) -> Samples:
        """Source, epoch and window of the samples [first, first + count)."""
        self.stage(first)
        return plan_samples(self.seed, self.stages, first, count)

    def count_before(self, sample: int) -> dict[str, int]:
        """How many of the samples before `sample` each source has, in closed form."""
        stage = self.stage(sample)
        counts = count_sources(self.seed, stage, sample).tolist()
        return {name: taken + count for name, taken, count in zip(stage.names, stage.taken, counts)}

    def epochs_at(self, sample: int) -> dict[str, float]:
        """How many passes over each source are made before `sample`: 1.25 is a quarter into the second."""
        stage = self.stage(sample)
        ordinals = ordinals_at(self.seed, stage, sample)
        return {name: ordinal / size for name, ordinal, size in zip(stage.names, ordinals, stage.windows)}

    def samples_of_step(self, step: int) -> range:
        """The samples that a step takes, counted from step 0; a future step as things stand now."""
        size = self.batches[bisect_right(self.batches, step, key=lambda size: size.step) - 1]
        first = size.sample + (step - size.step) * size.batch
        return range(first, first + size.batch)

    def step_of_sample(self, sample: int) -> int:
        """The step that takes `sample`."""
        size = self.batches[bisect_right(self.batches, sample, key=lambda size: size.sample) - 1]
        return size.step + (sample - size.sample) // size.batch

    def begin_stage(self, start: int, weights: Mapping[str, float]) -> None:
        """Mix by `weights` from sample `start` on; a source that is not named, or has weight 0, is left out.

        Raises `UserError` for weights that cannot be, and the mixture is as it was.
        """
        last = self.stages[-1]
        assert start >= last.start, "a stage cannot begin before the one it follows"
        earlier, before, redefined = _followed(self, start)
        stage = next_stage(
            self.seed, start, last.sequence_length, self.sources, weights, last.period, before, redefined
        )
        _set_stages(self, (*earlier, stage))

    def leave_out(self, samples: range) -> list[str]:
        """Leave `samples` out: `samples.start` is then what `samples.stop` was, and the others keep their order.

        Samples are numbered as in this run. A gap that begins at `samples.start` already is made as long as `samples`,
        so that a repeated command gives the same run. Returns a line for what changes, or for a gap that was longer.
        Raises `UserError` where the run is beyond it, or has a later gap or other weights.
        """
        start, last = samples.start, self.stages[-1]
        key = f"data.skip_samples: {start}:{samples.stop}"
        present = next((gap for gap in self.left_out if gap.start == start), range(start, start))
        if len(present) >= len(samples):
            return [] if present == samples else [f"{key}: {start}:{present.stop} are left out already, and stay so"]
        if start < self.next_sample:
            raise UserError(
                f"{key}: the run continues at sample {self.next_sample}; go back with run.resume to a checkpoint of "
                f"step {self.step_of_sample(start)} or before"
            )
        if start < last.start:
            raise UserError(f"{key}: samples are left out, or weights change, at {last.start}; begin there or later")
        drawn = last.draw_of(start) + len(samples) - len(present)
        if start == last.start:
            self.stages = (*self.stages[:-1], replace(last, drawn=drawn))
        else:
            order = last.start if last.order is None else last.order
            taken = tuple(self.count_before(start).values())
            stage = replace(last, start=start, taken=taken, order=order, drawn=drawn)
            self.stages = (*self.stages, stage)
        step = self.step_of_sample(start)
        return [f"{key}: left out from step {step} on; sample {start} is the former sample {samples.stop}"]

    @property
    def left_out(self) -> tuple[range, ...]:
        """The samples that were left out, as they were numbered before they were."""
        gaps = ((stage.start, number_left_out(last, stage)) for last, stage in zip((None, *self.stages), self.stages))
        return tuple(range(start, start + count) for start, count in gaps if count)

    def change_batch(self, step: int, sample: int, batch: int) -> None:
        """From `step`, which begins at `sample`, a step takes `batch` samples."""
        assert step >= self.batches[-1].step, "a batch size cannot change before the last change"
        assert sample == self.samples_of_step(step).start, "a batch size changes between two steps"
        kept = self.batches if step > self.batches[-1].step else self.batches[:-1]
        self.batches = (*kept, BatchSize(step, sample, batch))

    def state_dict(self) -> dict[str, Any]:
        """All that determines past and future samples, as plain JSON."""
        fingerprints = Fingerprints(ALGORITHM, self.tokenizer, self.sequence_length, self.fingerprints)
        return to_mapping(MixtureState(VERSION, self.seed, self.next_sample, self.stages, self.batches, fingerprints))

    def load_state_dict(
        self,
        state: Mapping[str, Any],
        *,
        step: int | None = None,
        allow_change: bool = False,
        new_epoch: bool = False,
    ) -> list[str]:
        """Continue a run where `state` left it, with this mixture's weights, period and global batch from there.

        Where those differ from the run's, a stage or a batch size begins at `next_sample`. Other data than the
        run has read are an error unless permitted: by `new_epoch` another sequence length, by `allow_change` other
        shards, tokenizer or order; the next epoch of each source concerned begins. Returns a line for each change,
        for the user to see. Raises `UserError`, without any change, for a damaged state, one that is not of `step`
        (None: any step), or what is not permitted.
        """
        past = read_state(state, step=step)
        redefined = redefined_sources(
            past,
            self.seed,
            self.tokenizer,
            self.sequence_length,
            self.sources,
            allow_change=allow_change,
            new_epoch=new_epoch,
        )
        run = _as_it_was(past, self.sources)
        lines = _change_stage(run, self.stages[-1], redefined) + _change_batch(run, self.global_batch)
        # The samples of another version can be counted, by its own figures, but not drawn again.
        self.stages = run.stages if past.fingerprints.algorithm == ALGORITHM else run.stages[-1:]
        self.batches, self.next_sample, self.fingerprints = run.batches, run.next_sample, run.fingerprints
        return lines


def new_mixture(
    seed: int,
    sequence_length: int,
    sources: Mapping[str, Source],
    weights: Mapping[str, float],
    *,
    global_batch: int,
    period: int = 65536,
    tokenizer: str = "",
) -> Mixture:
    """The mixture of a run that begins, of those `sources` of the corpus that have a positive weight.

    `tokenizer` is a fingerprint. Raises `UserError` with a line for each weight that cannot be: one of an unknown
    source, one of a source without a window, one too small for a place in `period`.
    """
    stage = next_stage(seed, 0, sequence_length, sources, weights, period)
    fingerprints = {name: sources[name].fingerprint for name in stage.names}
    return Mixture(seed, tokenizer, dict(sources), (stage,), (BatchSize(0, 0, global_batch),), 0, fingerprints)


def mixture_from_state(state: Mapping[str, Any], where: str = "mixture state", step: int | None = None) -> Mixture:
    """The mixture that a state (as of `step`) describes, without its corpus: for looking at any step of the run."""
    return _as_it_was(read_state(state, where, step), {})


def _as_it_was(past: MixtureState, sources: dict[str, Source]) -> Mixture:
    prints = past.fingerprints
    return Mixture(
        past.seed, prints.tokenizer, sources, past.stages, past.batches, past.next_sample, dict(prints.sources)
    )


def _followed(run: Mixture, start: int) -> tuple[tuple[Stage, ...], Stage | None, Collection[str]]:
    """The stages before one that begins at `start`, the one it follows, and the sources redefined at `start` so far.

    A newest stage that begins at `start` too is replaced; only the sources that it redefined are kept. The first
    stage follows none, unless it stands for the samples of another version of this program.
    """
    newest = run.stages[-1]
    earlier = tuple(stage for stage in run.stages if stage.start < start)
    before = earlier[-1] if earlier else newest if start else None
    return earlier, before, newest.redefined if newest.start == start else ()


def _set_stages(run: Mixture, stages: tuple[Stage, ...]) -> None:
    run.stages = stages
    now = {name: source.fingerprint for name, source in run.sources.items()}
    run.fingerprints = {name: now.get(name) or run.fingerprints[name] for name in run.names}


def _change_stage(run: Mixture, target: Stage, redefined: Collection[str]) -> list[str]:
    """Continue `run` with the weights, period and sequence length of `target`; a line for each change."""
    newest = run.stages[-1]
    start = max(run.next_sample, newest.start)
    earlier, before, inherited = _followed(run, start)
    length, weights = target.sequence_length, dict(zip(target.names, target.weights))
    all_redefined = {*redefined, *inherited}
    new = next_stage(run.seed, start, length, run.sources, weights, target.period, before, all_redefined)
    if not redefined and _same(new, newest):
        return []
    if newest.start == start and newest.drawn:
        raise UserError(
            f"data.weights: samples are left out at sample {start}, where the run continues; change weights after its "
            "next step"
        )
    if before in earlier and not all_redefined and _same(new, before):
        _set_stages(run, earlier)  # a change that was taken back before a sample of it was drawn
        return []
    _set_stages(run, (*earlier, new))
    if before is None:  # nothing was read yet, so nothing changes
        return []
    place = f"from sample {start} (step {run.step_of_sample(start)}) on"
    return report_shares(run.seed, before, new, place) + report_windows(run.seed, before, new, place)


def _same(one: Stage, other: Stage) -> bool:
    keys = ("names", "quotas", "windows", "sequence_length")
    return all(getattr(one, key) == getattr(other, key) for key in keys)


def _change_batch(run: Mixture, batch: int) -> list[str]:
    before = run.global_batch
    if batch == before:
        return []
    step = run.step_of_sample(run.next_sample)
    run.change_batch(step, run.next_sample, batch)
    return [f"train.global_batch: from step {step} on: {batch} ({before} before)"]
