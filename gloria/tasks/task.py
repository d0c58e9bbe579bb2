"""A task: its files, examples, metrics and prompts. catalog.py lists the tasks."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import xxhash

from gloria.errors import UserError
from gloria.tasks.examples import Example, Pair
from gloria.tasks.formats.files import Loaded, find_file

Family = Literal["pair", "span", "last_word", "choice"]


@dataclass(frozen=True)
class Template:
    """A pair's prompt: `text` with {first} and {second}, and what is written after it for each label or score."""

    text: str
    words: Mapping[str, str]


@dataclass(frozen=True)
class Task:
    """All about a task. Splits are "train", "dev" and "test", or those of them that it has.

    `family` says how a model answers: "pair" by heads or by words for labels and scores, "span" by a head, "last_word"
    by continuing a text, "choice" by log-likelihoods of answers.
    """

    name: str
    family: Family
    reader: Callable[[Path, Task], Loaded]
    metrics: Mapping[str, Callable[[Any], Any]]  # name -> a function of metrics.py; "NAME:RULE" where rules differ
    selection: str  # the metric by which a checkpoint is chosen; higher is better
    files: Mapping[str, tuple[str, ...]] = field(default_factory=dict)  # split -> names its file may have in the folder
    parts: tuple[tuple[Task, str], ...] = ()  # or: tasks read one after the other, and their ids' prefix
    labels: tuple[str, ...] = ()
    range: tuple[float, float] | None = None  # of the score
    targets: tuple[str, ...] = ()  # a pair's heads: "entailment" (any classification), "similarity" (any score)
    columns: Mapping[str, tuple[str, ...]] = field(default_factory=dict)  # of a table: field -> the names it may have
    templates: Mapping[str, Template] = field(default_factory=dict)  # target -> its prompt
    ask: Callable[[Task, Any, str], Any] | None = None  # (task, example, target) -> a Prompt; None: it has no prompt
    submission: str = ""  # the file of predictions; its ending stands for the official format
    source: str = ""  # the file that says so of a task of the user's own; its folder holds the task's files
    hold_out: bool = False  # the dev set is what is reported, so a tenth of train chooses the checkpoint

    @property
    def gold_column(self) -> str:
        return "label" if self.labels else "score"

    @property
    def splits(self) -> tuple[str, ...]:
        return tuple(self.files) or self.parts[0][0].splits

    def has(self, folder: Path, split: str) -> bool:
        """Whether the folder has the files of a split."""
        parts = [part for part, _ in self.parts] or [self]
        return all(any((folder / name).is_file() for name in part.files.get(split, ())) for part in parts)

    def reported_split(self, folder: Path) -> str:
        """The split that is reported: GLUE hides the labels of its tests, so there it is the dev set."""
        order = [split for split in (("dev", "test") if self.hold_out else ("test", "dev")) if split in self.splits]
        return next((split for split in order if self.has(folder, split)), order[0])

    def read(self, folder: Path | str, split: str) -> list[Example]:
        """The examples of a split, in the file's order. Raises `UserError` for a missing file or malformed rows."""
        return self.load(folder, split).examples

    def load(self, folder: Path | str, split: str) -> Loaded:
        """`read`, and counts of what the file is like: examples, labels missing, answers not at their offset..."""
        if split not in self.splits:
            raise UserError(f'{self.name}: has no split "{split}"; it has {", ".join(self.splits)}')
        if self.parts:
            examples: list[Example] = []
            counts: Counter[str] = Counter()
            for part, prefix in self.parts:
                loaded = part.load(folder, split)
                examples += [replace(example, id=f"{prefix}-{example.id}") for example in loaded.examples]
                counts.update(loaded.counts)
            return Loaded(examples, dict(counts))
        path = find_file(Path(folder), self.files[split], f"the {split} split of {self.name}")
        loaded = self.reader(path, self)
        if split != "test" and not any(self.labelled(example) for example in loaded.examples):
            why = f" ({loaded.unlabelled})" if loaded.unlabelled else ""
            raise UserError(f"{path}: no example is labelled{why}; only a test split may be without labels")
        return loaded

    def labelled(self, example: Example) -> bool:
        """Whether the file has the right answer."""
        return example.labelled(self.targets)

    def training(self, folder: Path | str) -> tuple[list[Example], list[Example]]:
        """The examples to train on and those that choose the checkpoint: the dev set, or a tenth of train by hash.

        The tenth is of contexts (or first sentences), so that none is on both sides. Never the test set; but the other
        splits are read, so that a malformed file is reported now and not when it is scored.
        """
        train = self.read(folder, "train")
        bare = sum(not self.labelled(example) for example in train)
        if bare:
            raise UserError(f"{folder}: {bare} of {len(train)} training examples are not labelled; take them out")
        others = {split: self.read(folder, split) for split in ("dev", "test") if self.has(Path(folder), split)}
        if not self.hold_out:
            return train, others.get("dev") or self.read(folder, "dev")
        held = [xxhash.xxh3_64_intdigest(f"held out {_text(example)}".encode()) % 10 == 0 for example in train]
        kept = [example for example, out in zip(train, held) if not out]
        chosen = [example for example, out in zip(train, held) if out]
        if not kept or not chosen:
            raise UserError(
                f"{folder}: {len(train)} training examples are too few for a tenth to be held out; get more"
            )
        return kept, chosen


def _text(example: Example) -> str:
    return example.first if isinstance(example, Pair) else getattr(example, "context", "")
