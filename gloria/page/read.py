"""What a folder holds of a run: its log, scores, samples, recipe and corpus. Takes no lock and writes nothing.

It reads a run that is going on, one that died, a fine-tuning and an evaluation alike. A line that is half-written, and
whatever else can't be read, is left out and named in `Record.notes`.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gloria.data.corpus import Manifest, read_manifest
from gloria.dist.run_lock import STATUS, read_status
from gloria.errors import UserError
from gloria.files import open_plain, parse_json_object, read_bounded
from gloria.page.thin import Key, Table
from gloria.train.branch import START
from gloria.train.metrics import METRICS as LOG
from gloria.train.metrics import SAMPLES

SCORES, RESULTS = "scores.jsonl", "results.json"
ROWS = 1000  # most buckets of a log: two rows each, about as many as a wide screen has columns
VALUES = 120_000  # most of all buckets and columns of a page: 7 bytes each, twice, with means beside some
_NAMES = {"sources": "loss", "source_bits_per_byte": "bits_per_byte"}  # of the valid lines, each value of a source
MOST_EVENTS = 2000  # of one kind; a page of 3 MB holds a few kinds of them
_UNSAID = {"kind", "step", "time", "event", "recipe", "versions", "hardware", "ancestors"}  # in the text of an event


@dataclass
class Event:
    """Something that happened after `step` steps."""

    step: int
    kind: str
    text: str
    time: float | None


@dataclass
class Record:
    """All that the page says of one run."""

    name: str
    folder: Path
    status: str = ""
    train: Table = field(default_factory=Table)
    valid: Table = field(default_factory=Table)
    dev: Table = field(default_factory=Table)  # scores of a fine-tuning while it trains
    scores: dict[tuple[str, str], dict[str, list[tuple[int, Mapping[str, Any]]]]] = field(default_factory=dict)
    rules: dict[str, Mapping[str, Any]] = field(default_factory=dict)  # the last score record of each task
    events: list[Event] = field(default_factory=list)
    samples: list[dict[str, Any]] = field(default_factory=list)
    results: dict[str, Any] = field(default_factory=dict)
    last: dict[str, Any] = field(default_factory=dict)  # the last train line
    launch: dict[str, Any] = field(default_factory=dict)  # the last start or resume event
    recipe: dict[str, Any] = field(default_factory=dict)
    manifest: Manifest | None = None
    lines: int = 0
    seconds: float = 0.0  # from each launch's first line to its last, added up
    launches: int = 0
    skips: int = 0
    notes: list[str] = field(default_factory=list)


def read_folders(folders: list[Path]) -> list[Record]:
    """A record for each folder, and for each seed of a fine-tuning with several. UserError where one holds nothing."""
    found: list[Record] = []
    problems: list[str] = []
    for folder in folders:
        seeds = sorted(path.parent for path in folder.glob(f"seed-*/{LOG}"))
        for place in [*([folder] if not seeds or (folder / LOG).exists() else []), *seeds]:
            try:
                found.append(read_folder(place, runs=len(folders)))
            except UserError as error:
                problems += error.problems
    if problems:
        raise UserError(*problems)
    names = [record.folder.name for record in found]
    for record in found:
        again = names.count(record.folder.name) > 1 or record.folder.name.startswith("seed-")
        record.name = "/".join(record.folder.absolute().parts[-2:]) if again else record.folder.absolute().name
    return found


def read_folder(folder: Path, runs: int = 1) -> Record:
    """The record of one run, or of an evaluation; with more `runs` on its page, its log is thinned the more."""
    record = Record(folder.name, folder)
    if not folder.is_dir():
        raise UserError(f"{folder}: is not a folder; name a run (runs/NAME), a fine-tuning or an evaluation")
    if not any((folder / name).exists() for name in (LOG, RESULTS)):
        raise UserError(f"{folder}: holds neither {LOG} nor {RESULTS}; name a run, a fine-tuning or an evaluation")
    if (folder / LOG).exists():
        _read_log(record, runs)
    for name, read in ((SCORES, _read_score), (SAMPLES, _read_sample)):
        if (folder / name).exists():
            for line in _objects(folder / name, record.notes):
                read(record, line)
    if (folder / RESULTS).exists():
        record.results = parse_json_object(read_bounded(folder / RESULTS), folder / RESULTS)
    record.recipe = record.launch.get("recipe") or record.results.get("recipe") or _recipe_of_start(record) or {}
    record.status = _status(record)
    _read_corpus(record)
    return record


def _read_log(record: Record, runs: int) -> None:
    path = record.folder / LOG
    columns = next((len(_numbers(line)) for line in _objects(path, []) if line.get("kind") == "train"), 1)
    rows = max(50, min(ROWS, VALUES // columns // runs))
    with open(open_plain(path), "rb") as file:
        lines = sum(block.count(b"\n") for block in iter(lambda: file.read(1 << 20), b""))
    record.train.width = max(1, -(-lines // rows)) if lines > 2 * rows else 1
    record.valid.width = record.train.width
    ranks, began, before = None, None, None
    for line in _objects(path, record.notes):
        kind, step, now = line.get("kind"), line.get("step"), line.get("time")
        if not isinstance(step, int):
            continue
        record.lines += 1
        if kind == "train":
            record.train.add(step, _numbers(line))
            record.last = line
        elif kind == "valid":
            record.valid.add(step, _numbers(line))
        elif line.get("event") == "dev":
            record.dev.add(step, {(k, ""): v for (k, _), v in _numbers(line).items() if k != "best"})
        elif kind == "event":
            name = str(line.get("event"))
            if name in ("start", "resume"):
                record.launches += 1
                if began is not None and before is not None:
                    record.seconds += before - began
                began = now
                name = _kind_of_launch(name, line, ranks)
                ranks, record.launch = line.get("ranks"), line
            record.skips += name == "skipped"
            record.events.append(Event(step, _kind_of_change(name, line), _text(line), now))
        before = now if isinstance(now, int | float) else before
    if isinstance(began, int | float) and before is not None:
        record.seconds += before - began
    for table in (record.train, record.valid, record.dev):
        table.close()
        if table.out_of_order:
            record.notes.append(f"{LOG}: {table.out_of_order:,} lines go back to an earlier step, and are left out")
    _thin_events(record)


def _numbers(line: Mapping[str, Any]) -> dict[Key, float]:
    """The numbers of a line by (name, source). `sources` has a loss (valid) or several values (train) of each.

    Values of the texts that are no source, `texts`, get the names text_loss and so on.
    """
    found: dict[Key, float] = {}
    for key, value in line.items():
        if key not in ("step", "time") and _is_number(value):
            found[key, ""] = value
        elif isinstance(value, Mapping) and key not in ("weights", "note"):
            for source, item in value.items():
                inner = item if isinstance(item, Mapping) else {_NAMES.get(key, key): item}
                prefix = "text_" if key == "texts" else ""
                found.update({(prefix + name, source): v for name, v in inner.items() if _is_number(v)})
    if seconds := found.get(("step_s", "")):
        found["data_share", ""] = 100 * found.get(("data_s", ""), 0.0) / seconds
    return found


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and abs(value) < 1e300  # no NaN, nor an integer that is no float


def _kind_of_launch(name: str, line: Mapping[str, Any], ranks: object) -> str:
    if line.get("ancestors") and name == "start":
        return "branch"
    return "resume, other ranks" if ranks is not None and line.get("ranks") != ranks else name


def _kind_of_change(name: str, line: Mapping[str, Any]) -> str:
    what = str(line.get("what", "")) if name == "changed" else ""
    kinds = {"data.weights": "re-weighted", "data.skip_samples": "samples left out"}
    return kinds.get(what.partition(":")[0], name)


def _text(line: Mapping[str, Any]) -> str:
    said = ", ".join(f"{key} {value}" for key, value in line.items() if key not in _UNSAID)
    if trunk := line.get("ancestors"):
        said += f", branch of {trunk[0].get('run')} at step {trunk[0].get('step')}"
    return said[:300]


def _thin_events(record: Record) -> None:
    """At most MOST_EVENTS of a kind, evenly over the run: a note says of how many."""
    kinds: dict[str, list[Event]] = {}
    for event in record.events:
        kinds.setdefault(event.kind, []).append(event)
    for kind, events in kinds.items():
        if len(events) > MOST_EVENTS:
            kept = {id(events[number * len(events) // MOST_EVENTS]) for number in range(MOST_EVENTS)}
            record.events = [event for event in record.events if event.kind != kind or id(event) in kept]
            record.notes.append(f"{LOG}: {MOST_EVENTS:,} of {len(events):,} events '{kind}' are shown, evenly spaced")


def _read_score(record: Record, line: Mapping[str, Any]) -> None:
    task, split, step = str(line.get("task")), str(line.get("split")), line.get("step")
    if not isinstance(step, int):
        return
    record.rules[task] = line
    for metric, value in line.get("scores", {}).items():
        if isinstance(value, Mapping) and isinstance(value.get("value"), int | float):
            # A checkpoint that was taken again replaces the one before.
            points = record.scores.setdefault((task, metric), {}).setdefault(split, [])
            points[:] = sorted([p for p in points if p[0] != step] + [(step, value)], key=lambda point: point[0])


def _read_sample(record: Record, line: dict[str, Any]) -> None:
    if isinstance(line.get("step"), int):
        record.samples.append(line)


def _objects(path: Path, notes: list[str]) -> Iterator[dict[str, Any]]:
    """The JSON objects of a file of lines, as far as it is written by now; what is none is counted in a note."""
    damaged = 0
    with open(open_plain(path), "rb") as file:
        left = os.fstat(file.fileno()).st_size  # a run that goes on writes more meanwhile
        for line in file:
            left -= len(line)
            if left < 0 or not line.endswith(b"\n"):
                notes.append(f"{path.name}: the last line is half-written, and is left out")
                break
            try:
                found = json.loads(line)  # not parse_json_object, which takes three times as long for a million lines
            except (ValueError, RecursionError):
                found = None
            if isinstance(found, dict):
                yield found
            else:
                damaged += 1
            if not left:
                break
    if damaged:
        notes.append(f"{path.name}: {damaged:,} lines are no JSON objects, and are left out")


def _recipe_of_start(record: Record) -> dict[str, Any] | None:
    path = record.folder / START
    return parse_json_object(read_bounded(path), path).get("recipe") if path.exists() else None


def _status(record: Record) -> str:
    if not (record.folder / STATUS).exists():
        return "evaluation" if not record.lines else "no status"
    status = read_status(record.folder)
    state = status.status
    if state == "running" and not status.alive:
        ago = time.time() - status.heartbeat
        state = f"died (its launch is gone; last sign of life {ago / 3600:.1f} h ago)"
    return f"{state}, {status.reason}" if status.reason else state


def _read_corpus(record: Record) -> None:
    corpus = record.recipe.get("data", {}).get("corpus") if isinstance(record.recipe.get("data"), Mapping) else None
    if not corpus:
        return
    try:
        record.manifest = read_manifest(corpus)
    except UserError:
        record.notes.append(f"{corpus}: the corpus can't be read from here, so its table is missing")
