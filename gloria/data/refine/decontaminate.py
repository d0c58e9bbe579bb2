"""Documents that hold evaluation data: runs of 12 words as in datatrove's decontamination, shorter examples whole.

datatrove's own filter has one length of run and an index that needs lighteval; here an example of 8 to 11 words is
looked for as a whole, so that last-word tasks are found, too. Words are compared without case, accents and
punctuation, and all numbers are equal.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path

import numpy as np
from datatrove.data import Document
from datatrove.utils.hashing import HashConfig, create_hash_func
from datatrove.utils.text import ngrams, simplify_text

from gloria.data.refine.config import DecontaminateConfig
from gloria.data.refine.records import Record

hash_run = create_hash_func(HashConfig())


def words_of(text: str) -> list[str]:
    return simplify_text(text).split()


def runs_of(words: list[str], length: int) -> Iterator[int]:
    """The hash of each run of so many words."""
    return (hash_run(" ".join(run)) for run in ngrams(words, length))


def make_index(texts: Mapping[str, Iterable[str]], config: DecontaminateConfig, path: Path) -> dict[str, Counter[str]]:
    """Write the hashes to look for, of each task's texts; counts by task: texts, and those too short to look for.

    `path` holds an array (length of the run, task's number) -> hashes. A run that two tasks have counts for the first.
    """
    found: dict[int, tuple[int, int]] = {}
    counts = {}
    for number, (task, examples) in enumerate(texts.items()):
        count = counts[task] = Counter(texts=0, short=0)
        for example in examples:
            words = words_of(example)
            length = min(len(words), config.n_grams)
            count["texts"] += 1
            if length < config.least:
                count["short"] += 1
                continue
            for run in runs_of(words, length):
                found.setdefault(run, (length, number))
    hashes = np.array(sorted(found), np.uint64)
    about = np.array([found[int(value)] for value in hashes], np.int32).reshape(-1, 2)
    with path.open("wb") as file:
        np.savez(file, hashes=hashes, about=about, tasks=np.array(list(texts), str))
    return counts


def contamination_filter(path: Path, config: DecontaminateConfig, record: Record) -> Callable[[Document], str]:
    """Drops documents that hold a run of the index; the reason is the task."""
    with np.load(path) as index:
        tasks = [str(task) for task in index["tasks"]]
        about = zip(index["hashes"].tolist(), index["about"].tolist())
    by_length: dict[int, dict[int, int]] = {}
    for value, (length, task) in about:
        by_length.setdefault(length, {})[value] = task

    def apply(document: Document) -> str:
        words = words_of(document.text)
        hits = {known[run] for length, known in by_length.items() for run in runs_of(words, length) if run in known}
        for task in sorted(hits):
            record.histograms["contaminated"][tasks[task]] += 1
        return f"holds {tasks[min(hits)]}" if hits else ""

    return apply
