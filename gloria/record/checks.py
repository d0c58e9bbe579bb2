"""The checks of an audit on the corpus, the checkpoints, the counts and the run's status."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from gloria.data.corpus import SPLITS, Corpus, SplitEntry, open_corpus
from gloria.data.mixture import Mixture
from gloria.data.shards import map_tokens, read_index
from gloria.data.tokenizer import tokenizer_fingerprint
from gloria.dist.checkpoint_read import verify
from gloria.dist.run_lock import STATUS, read_status
from gloria.errors import UserError
from gloria.files import size_text
from gloria.optim.schedules import learning_rate
from gloria.record.findings import Finding, conclude
from gloria.record.history import History, Saved, read_history, schedule_of
from gloria.record.ledger import Counted, epoch_sums, ledger, tokens_before
from gloria.train.branch import START

_ENDS = ("done", "stopped", "failed")  # a launch's last event


def check_corpus(folder: Path, history: History) -> Iterator[Finding]:
    """Every byte of the corpus by its manifest, and the manifest by what the run says it has read."""
    try:
        corpus = open_corpus(folder, verify=True)
    except UserError as error:
        yield from conclude("corpus", error.problems, "")
        return
    problems = [problem for source in corpus.names for problem in _miscounted(corpus, source)]
    size = sum(shard.bin_size for entry in corpus.manifest.sources for shard in entry.train.shards + entry.valid.shards)
    yield from conclude("corpus", problems, f"{folder}: {size_text(size)} of tokens are as the manifest has them")
    yield from conclude(
        "sources", _other_corpus(corpus, history), "shards and tokenizer are those that the run recorded"
    )


def _miscounted(corpus: Corpus, name: str) -> Iterator[str]:
    for split in SPLITS:
        entry: SplitEntry = getattr(corpus.source(name), split)
        for shard in entry.shards:
            try:
                index, tokens = read_index(corpus.folder / shard.path), map_tokens(corpus.folder / shard.path)
            except UserError as error:
                yield from error.problems
                continue
            found = (index.documents, tokens.size)
            if found != (shard.documents, shard.tokens):
                listed = f"{shard.documents:,} and {shard.tokens:,}"
                yield f"{shard.path}: holds {found[0]:,} documents and {found[1]:,} tokens, the manifest says {listed}"
            elif (tokens[index.document_offsets()[1:] - 1] != corpus.manifest.tokenizer.eos_id).any():
                yield f"{shard.path}: a document does not end with EOS"


def _other_corpus(corpus: Corpus, history: History) -> list[str]:
    mixture, problems = history.mixture, []
    stage = mixture.stages[-1]
    for name, windows in zip(stage.names, stage.windows):
        if name not in corpus.names:
            problems.append(f'{corpus.folder}: has no source "{name}", which the run has read')
            continue
        if not corpus.source(name).train.tokens:
            problems.append(f'{corpus.folder}: source "{name}" has no tokens, and the run has read it')
            continue
        stream = corpus.stream(name)
        if stream.fingerprint != mixture.fingerprints[name]:
            problems.append(f'source "{name}": its shards are {stream.fingerprint}, not {mixture.fingerprints[name]}')
        elif stream.num_windows(stage.sequence_length) != windows and stage.quotas[stage.names.index(name)]:
            problems.append(
                f'source "{name}": has {stream.num_windows(stage.sequence_length):,} windows, not {windows:,}'
            )
    for place in (corpus.tokenizer_folder, history.folder / "tokenizer"):
        try:
            found = tokenizer_fingerprint(place)
        except UserError as error:
            problems += error.problems
            continue
        if found != mixture.tokenizer:
            problems.append(f"{place}: the tokenizer is {found}, the run's was {mixture.tokenizer}")
    return problems


def check_checkpoints(history: History) -> Iterator[Finding]:
    """Every byte of every checkpoint, and that they are steps of this one run."""
    problems = list(history.problems)
    known = {launch.name: launch for launch in history.launches}
    for saved in history.saved:
        problems += verify(saved.path)
        problems += [f"{saved.path}: {problem}" for problem in _strange(saved, known, history)]
    steps = [entry.step for entry in history.saved]
    found = f"of steps {steps[0]:,} to {steps[-1]:,}" if len(steps) > 1 else f"of step {steps[0]:,}" if steps else ""
    holds = f"{len(steps)} {found}: whole, and of one run" if steps else "there are none yet"
    yield from conclude("checkpoints", problems, holds)


def _strange(saved: Saved, known: Mapping[str, Any], history: History) -> Iterator[str]:
    """In what a checkpoint does not belong to its run."""
    state, mixture = saved.state, saved.mixture
    launch = known.get(saved.launch)
    if launch is None:
        yield f"launch {saved.launch} saved it, of which the log knows nothing"
    elif launch.about.get("recipe") not in (None, state["recipe"]):
        yield f"its recipe is not that of launch {saved.launch}"
    if state.get("seed") != history.state.get("seed", state.get("seed")) or mixture.seed != history.mixture.seed:
        yield f"its seed is {mixture.seed}, the run's {history.mixture.seed}"
    if state.get("model") != history.saved[-1].state.get("model"):
        yield "its model has another shape than the newest checkpoint's"
    if state.get("world") != saved.world:
        yield f"says it was saved by {state.get('world')} ranks; its files are of {saved.world}"
    if problem := other_past(mixture, history.mixture):
        yield f"mixture state: {problem}"
    expected = tokens_before(mixture, mixture.next_sample)
    if mixture.stages[0].start == 0 and state.get("tokens") != expected:
        yield f"counts {state.get('tokens')} tokens; {saved.step} steps of its mixture are {expected}"
    schedule = state.get("schedule", {})
    recipe, total = state["recipe"], schedule.get("total_steps", saved.step)
    rate = learning_rate(schedule_of(recipe), recipe["optim"]["lr"], saved.step, total)
    if (schedule.get("step"), schedule.get("lr")) != (saved.step, rate):
        said = f"{schedule.get('lr')} at step {schedule.get('step')}"
        yield f"its rate is {said}; the schedule has {rate} at {saved.step}"


def other_past(before: Mixture, now: Mixture) -> str:
    """Where an older mixture state's samples are not those that a newer one says were drawn, or ""."""
    end = before.next_sample
    if end > now.next_sample:
        return f"{end:,} samples were drawn, and the newest state has {now.next_sample:,}"
    for key in ("stages", "batches"):
        start = "start" if key == "stages" else "sample"
        pasts = [
            [vars(item) for item in getattr(mixture, key) if getattr(item, start) < max(end, 1)]
            for mixture in (before, now)
        ]
        if pasts[0] != pasts[1]:
            return f"its {key} are not those of the newest state"
    return ""


def check_counts(history: History, end: int, counted: Counted) -> Iterator[Finding]:
    """Tokens and epochs of each source: the closed form against all draws."""
    mixture, problems = history.mixture, []
    reads = ledger(mixture, end)
    for read, windows, found, expected in zip(reads, counted.windows, counted.epochs, epoch_sums(mixture, end)):
        if windows != read.windows:
            problems.append(f'source "{read.name}": {windows:,} windows were drawn, in closed form {read.windows:,}')
        if found != expected:
            problems.append(f'source "{read.name}": the draws are of other epochs than the closed form has')
    if problems:
        yield from conclude("draws", problems, "")
        return
    for read in reads:
        yield Finding(
            "draws",
            True,
            f"{read.name}: {read.windows:,} windows, {read.tokens:,} tokens, {read.epochs:.4f} epochs; share "
            f"{read.share:.5f}, asked {read.asked:.5f}",
        )


def check_status(history: History) -> Iterator[Finding]:
    """status.json against the last launch, its last event and the newest checkpoint; mixture.json against both."""
    problems = [f"{START}: {other}"] if (other := other_past(history.begun, history.mixture)) else []
    try:
        status = read_status(history.folder)
    except UserError as error:
        yield from conclude("status", [*problems, *error.problems], "")
        return
    said = f"{STATUS} says {status.status} at step {status.step} of launch {status.launch}"
    last = history.launches[-1] if history.launches else None
    ends = [event for line, event in history.events if last and line > last.line and event.get("event") in _ENDS]
    if last is None or status.launch != last.name:
        # A launch that is stopped or killed while it loads has no line in the log yet.
        if status.status not in ("running", "stopped") or status.step != history.steps:
            problems.append(f"{said}; the log's last launch is {last.name if last else 'none'}")
    elif ends and (ends[-1]["event"], ends[-1]["step"]) != (status.status, status.step):
        problems.append(f"{said}; the log says {ends[-1]['event']} at step {ends[-1]['step']}")
    elif not ends and status.status in ("done", "stopped"):
        problems.append(f"{said}; the log has no such event")
    if status.status in ("done", "stopped") and status.step != history.steps:
        problems.append(f"{said}; the newest checkpoint is of step {history.steps}")
    if status.status == "done" and last and last.total_steps not in (None, status.step):
        problems.append(f"{said}, of {last.total_steps} steps")
    yield from conclude("status", problems, f"{status.status} at step {status.step:,}, as log and checkpoints have it")


def check_ancestors(history: History) -> Iterator[Finding]:
    """The runs that a branch comes from have drawn the samples that it says they have, as far as they are here."""
    for folder, step in history.ancestors:
        if not folder.is_dir():
            yield Finding("ancestor", True, f"{folder} at step {step:,}: is not here any more, and is not proved")
            continue
        try:
            trunk = read_history(folder)
        except UserError as error:
            yield from conclude("ancestor", error.problems, "")
            continue
        sample = history.mixture.samples_of_step(step).start
        other = other_past(replace(trunk.mixture, next_sample=sample), history.mixture)
        problems = [*trunk.problems, *([f"{folder}: {other}"] if other else [])]
        yield from conclude("ancestor", problems, f"{folder} has drawn the same samples before step {step:,}")
