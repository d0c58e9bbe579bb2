"""Score the checkpoints of a pre-training run as they appear: what `python -m gloria.evaluate --watch RUN` does.

    RUN/scores.jsonl       a line a record: the checkpoint (step, launch, saved_at), and what gloria.evaluate found
    RUN/tensorboard/eval/  the scores as eval/TASK/METRIC; TensorBoard follows one file a folder only, and the training
                           writes in the folder above

A watch that is started again reads scores.jsonl and continues after it. The records of a checkpoint and a task are
appended in one write, each with its part (2/5), so that an incomplete write can be found.
"""

from __future__ import annotations

import json
import math
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Any, TypeVar

from gloria.dist.agreement import gather
from gloria.dist.checkpoint_read import read_trainer
from gloria.dist.manifest import checkpoint_path, read_manifest, saved_steps
from gloria.dist.process import Process, on_any_rank, rank0_decides
from gloria.dist.run_lock import STATUS, RunStatus, read_status
from gloria.dist.signals import stop_reason
from gloria.errors import UserError, warn
from gloria.files import json_line, write_all
from gloria.tasks.models.finetuned import MODEL, is_finetuned
from gloria.tasks.report import table

SCORES = "scores.jsonl"
Model = TypeVar("Model")

WAIT, DONE, FAILED, FIRST = range(4)  # what rank 0 decides; FIRST + step: score that one

Checkpoint = tuple[int, str, int]  # step, launch, saved_at: a step that is taken again is another checkpoint


@dataclass
class Watcher:
    """Rank 0's view of the run."""

    run: Path
    tasks: Mapping[str, Any]  # name -> the data and settings that its records have
    scored: dict[Checkpoint, set[str]] = field(default_factory=dict)  # tasks
    passed: set[Checkpoint] = field(default_factory=set)
    newly_scored: int = 0  # by this watch
    reported: str = ""  # the last state that was printed
    ended: str = ""  # the state at the last look, if it was an end

    def look(self) -> int:
        """What comes next: WAIT, DONE, FAILED, or FIRST + the step of the oldest checkpoint that lacks a score."""
        status = self._status()  # before the checkpoints: a run that is done has saved its last one
        for step in saved_steps(self.run):
            if self._missing(step):
                return FIRST + step
        ended = status.status if status and status.status in ("done", "failed") and not status.alive else ""
        # An end counts at the second look: files may appear late, and a job may start again after a failure.
        before, self.ended = self.ended, ended
        if ended and before == ended:
            return DONE if ended == "done" else FAILED
        if not ended:
            self._report_state(status)
        return WAIT

    def missing(self, step: int) -> int:
        """The tasks that a checkpoint has no score of, as bits."""
        wanted = self._missing(step)
        return sum(1 << number for number, task in enumerate(self.tasks) if task in wanted)

    def _missing(self, step: int) -> set[str]:
        try:
            checkpoint = identity(self.run, step)
        except UserError as error:
            nameless = (step, "", 0)
            if nameless not in self.passed and checkpoint_path(self.run, step).exists():
                warn(f"{error.problems[0]}; the checkpoint of step {step} is passed over")
                self.passed.add(nameless)
            return set()
        if checkpoint in self.passed:
            return set()
        return set(self.tasks) - self.scored.get(checkpoint, set())

    def _status(self) -> RunStatus | None:
        if (self.run / "config.json").exists() or (self.run.exists() and not self.run.is_dir()):
            raise UserError(f"--watch: {self.run} is no run; name the folder of a pre-training run (its run.dir)")
        if is_finetuned(self.run / MODEL) or any(self.run.glob(f"seed-*/{STATUS}")):
            raise _is_finetuning(self.run)
        return read_status(self.run) if (self.run / STATUS).exists() else None

    def _report_state(self, status: RunStatus | None) -> None:
        if status is None:
            state = "no run yet; waiting for it to begin"
        elif status.alive:
            state = "running; waiting for its next checkpoint"
        else:
            word = "dead" if status.status == "running" else status.status
            state = f"{word} at step {status.step}; waiting for it to continue"
        if state != self.reported:
            print(f"{self.run}: {state}", flush=True)
            self.reported = state


def watch(
    run: Path,
    tasks: Mapping[str, Any],
    poll: float,
    process: Process,
    load: Callable[[Path], Model],
    score: Callable[[Model, list[str]], Iterator[dict[str, Any]]],
) -> int:
    """Score each whole checkpoint of `run` once, in the order of the steps, until the run has ended; the exit status.

    0 when the run is done or a stop was requested, 1 when the run failed. It waits for a run that is stopped or dead.
    Rank 0 looks every `poll` seconds; all ranks score. `load` raises UserError for a checkpoint that is incomplete.
    """
    watcher = Watcher(run, tasks)
    rank0_decides(process, lambda: _remember(watcher))
    while not on_any_rank(bool(stop_reason())):
        decided = rank0_decides(process, watcher.look)
        if decided == WAIT:
            _wait(poll)
        elif decided in (DONE, FAILED):
            return _end(watcher, process, failed=decided == FAILED)
        else:
            step = decided - FIRST
            bits = rank0_decides(process, partial(watcher.missing, step))
            missing = [task for number, task in enumerate(tasks) if bits >> number & 1]
            _score_one(watcher, step, missing, process, load, score)
    if process.is_main:
        print(f"{run}: the watch stops as requested; the same command continues it", flush=True)
    return 0


def identity(run: Path, step: int) -> Checkpoint:
    """A checkpoint's step, launch and time: another run can save the same step again. UserError where there is none."""
    manifest = read_manifest(checkpoint_path(run, step))
    return manifest.step, manifest.launch, manifest.saved_at


def _score_one(
    watcher: Watcher,
    step: int,
    missing: list[str],
    process: Process,
    load: Callable[[Path], Model],
    score: Callable[[Model, list[str]], Iterator[dict[str, Any]]],
) -> None:
    """Load a checkpoint and write its scores; on a stop, or where it is incomplete, nothing."""
    path, started = checkpoint_path(watcher.run, step), time.perf_counter()
    checkpoint, model, problem = (step, "", 0), None, ""
    try:
        checkpoint = identity(watcher.run, step)
        if "task" in read_trainer(path):
            raise _is_finetuning(watcher.run)
        model = load(path)
        if identity(watcher.run, step) != checkpoint:
            raise UserError(f"{path}: its run has replaced it while it was read")
    except _FinetuningError:
        raise
    except UserError as error:
        problem = error.problems[0] if path.exists() else f"{path}: its run has deleted it while it was read"
    # Where one rank cannot read it, no rank scores it.
    problems = [fact["problem"] for fact in gather({"problem": problem})]
    if any(problems):
        if process.is_main:
            watcher.passed.add(checkpoint)
            warn(f"{next(filter(None, problems))}; the checkpoint of step {step} is passed over")
        return
    assert model is not None
    records = []
    for record in score(model, missing):
        records.append(record)
        if on_any_rank(bool(stop_reason())):
            return
    rank0_decides(process, lambda: _write(watcher, checkpoint, records))
    if process.is_main:
        print(f"step {step}: scored in {time.perf_counter() - started:.1f} s", table({"results": records}), sep="\n")
        sys.stdout.flush()


def _wait(seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline and not stop_reason():
        time.sleep(min(0.2, seconds))


def _end(watcher: Watcher, process: Process, *, failed: bool) -> int:
    if process.is_main:
        counts = f"{len(watcher.scored)} checkpoints are scored, {watcher.newly_scored} by this watch"
        if failed:
            print(f"error: {watcher.run}: {read_status(watcher.run).reason}; {counts}", file=sys.stderr, flush=True)
        else:
            print(f"{watcher.run}: done; {counts}: {watcher.run / SCORES}", flush=True)
    return int(failed)


def _write(watcher: Watcher, checkpoint: Checkpoint, records: list[dict[str, Any]]) -> int:
    """TensorBoard first: a point drawn twice after a crash does less harm than a missing one."""
    step, launch, saved_at = checkpoint
    _draw(watcher.run, step, records)
    lines = b""
    for _, group in groupby(records, key=lambda record: record["task"]):
        found = list(group)
        for number, record in enumerate(found, start=1):
            about = {"step": step, "launch": launch, "saved_at": saved_at, "part": f"{number}/{len(found)}"}
            lines += json_line(about | record)
    path = watcher.run / SCORES
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            write_all(descriptor, lines)
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror}); fix that, and start the watch again") from None
    watcher.scored.setdefault(checkpoint, set()).update(record["task"] for record in records)
    watcher.newly_scored += 1
    return 0


def _draw(run: Path, step: int, records: list[dict[str, Any]]) -> None:
    from torch.utils.tensorboard import SummaryWriter

    with SummaryWriter(str(run / "tensorboard" / "eval")) as board:
        for record in records:
            # Metrics of last words have their rule in their names; of a corpus each source is a split.
            place = f"{record['task']}/{record['split']}" if record["task"] == "perplexity" else record["task"]
            for name, value in record.get("scores", {}).items():
                if value["value"] is not None and math.isfinite(value["value"]):
                    board.add_scalar(f"eval/{place}/{name}", value["value"], step)


def _remember(watcher: Watcher) -> int:
    """Read scores.jsonl, and cut off the lines after the last complete write: a killed watch left them."""
    path = watcher.run / SCORES
    if not path.exists():
        return 0
    lines = path.read_bytes().splitlines(keepends=True)
    whole = 0  # lines up to the end of the last write
    for number, line in enumerate(lines, start=1):
        try:
            record = json.loads(line)
            part, parts = map(int, record["part"].split("/"))
            checkpoint = (record["step"], record["launch"], record["saved_at"])
            task = record["task"]
        except (ValueError, TypeError, KeyError, AttributeError):
            if number < len(lines):
                raise UserError(f"{path}:{number}: is not a score; delete the line, or move the file away") from None
            continue
        now, found = watcher.tasks.get(task), {key: record.get(key) for key in ("data", "settings")}
        if now and found["data"] and now != found:
            raise UserError(
                f"{path}:{number}: {task} was scored with {_shown(found)}, and now runs with {_shown(now)}; "
                "give the same flags, or move the file away"
            )
        if part == parts and line.endswith(b"\n"):
            watcher.scored.setdefault(checkpoint, set()).add(task)
            whole = number
    if torn := len(lines) - whole:
        warn(f"{path}: {torn} lines at its end are an incomplete write; they are deleted, and scored again")
        with path.open("r+b") as file:
            file.truncate(sum(map(len, lines[:whole])))
            os.fsync(file.fileno())
    if watcher.scored:
        print(f"{path}: {len(watcher.scored)} checkpoints are scored already", flush=True)
    return 0


def _shown(about: Mapping[str, Any]) -> str:
    """Data and settings as the flags of them."""
    return " ".join(f"--{flag} {value}" for flag, value in {"data": about["data"], **(about["settings"] or {})}.items())


class _FinetuningError(UserError):
    """A run that cannot be watched; other UserErrors are about one checkpoint, which is passed over."""


def _is_finetuning(run: Path) -> UserError:
    return _FinetuningError(
        f"--watch: {run} is a fine-tuning, which scores itself on its dev set; name a pre-training run"
    )
