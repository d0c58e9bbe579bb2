"""What a task did with its documents: counts, histograms and examples as plain values that add up over tasks.

Everything here but `seconds` is a pure function of the documents, so the report is the same for any number of workers.
"""

from __future__ import annotations

import heapq
import json
import time
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import xxhash

from gloria.files import write_whole

EXAMPLES = 5  # documents shown of what each rule dropped
SHOWN = 300  # characters of such a document


def _part() -> dict[str, Any]:
    return {"documents": 0, "characters": 0, "changed": 0, "dropped": {}}


class Record:
    """The counts of one task, or of several added up."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()  # read, malformed, kept, kept_characters
        self.malformed: list[list[Any]] = []  # [number of the piece, documents, [line, problem], ...]
        self.steps: dict[str, dict[str, Any]] = {}
        self.histograms: dict[str, Counter[str]] = defaultdict(Counter)  # length, language, variety, cluster
        self.seconds: dict[str, float] = defaultdict(float)  # of processor time, by step

    def step(self, name: str) -> dict[str, Any]:
        return self.steps.setdefault(name, _part())

    @contextmanager
    def timed(self, name: str) -> Iterator[None]:
        start = time.process_time()
        yield
        self.seconds[name] += time.process_time() - start

    def drop(self, step: str, rule: str, id: str, text: str) -> None:
        """Count a document that `rule` drops, and keep it as an example if it is among the five of the least hash."""
        found = self.step(step)["dropped"].setdefault(rule, {"documents": 0, "characters": 0, "examples": []})
        found["documents"] += 1
        found["characters"] += len(text)
        draw = xxhash.xxh3_64_intdigest(f"{rule} {id}".encode())
        if len(found["examples"]) < EXAMPLES or draw < found["examples"][-1][0]:
            found["examples"] = sorted([*found["examples"], [draw, id, text[:SHOWN]]])[:EXAMPLES]

    def add(self, other: Record) -> None:
        self.counts += other.counts
        self.malformed += other.malformed
        for name, seconds in other.seconds.items():
            self.seconds[name] += seconds
        for name, histogram in other.histograms.items():
            self.histograms[name] += histogram
        for name, theirs in other.steps.items():
            ours = self.step(name)
            for key in ("documents", "characters", "changed"):
                ours[key] += theirs[key]
            for rule, dropped in theirs["dropped"].items():
                found = ours["dropped"].setdefault(rule, {"documents": 0, "characters": 0, "examples": []})
                found["documents"] += dropped["documents"]
                found["characters"] += dropped["characters"]
                merged = heapq.merge(found["examples"], dropped["examples"])
                found["examples"] = list(merged)[:EXAMPLES]

    def write(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, json.dumps(self.__dict__, ensure_ascii=False).encode("utf-8", "replace"), durable=False)


def read_record(path: Path) -> Record:
    """What `Record.write` wrote; an empty record where the task's step wrote none."""
    record = Record()
    values = json.loads(path.read_bytes())
    record.counts, record.seconds = Counter(values["counts"]), defaultdict(float, values["seconds"])
    record.malformed, record.steps = values["malformed"], values["steps"]
    record.histograms = defaultdict(Counter, {name: Counter(found) for name, found in values["histograms"].items()})
    return record


def total(records: Iterable[Record]) -> Record:
    """All of them added up."""
    whole = Record()
    for record in records:
        whole.add(record)
    return whole


def length_class(characters: int) -> str:
    """The class of a document's length in the histogram: powers of two, characters."""
    return str(1 << max(characters - 1, 0).bit_length())
