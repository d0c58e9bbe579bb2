"""Bug prevented: a fine-tuning without data of one's own that stops at a file that is not in the wheel, that trains on
what it is scored on, or whose held-out tenth has one label only, so that no checkpoint can be chosen.
"""

from __future__ import annotations

import tomllib
import unicodedata
from collections import Counter
from dataclasses import replace
from itertools import combinations
from pathlib import Path

import pytest

from gloria.errors import UserError
from gloria.tasks import samples
from gloria.tasks.catalog import TASKS, Task
from gloria.tasks.examples import NOT_FOUND, Choice, Example, LastWord, Pair, Span
from gloria.tasks.samples import SAMPLES, sample_folder

TRAINED = [task for task in TASKS.values() if task.family in ("pair", "span")]
ASSIN = [task for task in TASKS.values() if len(task.targets) == 2]
trained = pytest.mark.parametrize("task", TRAINED, ids=[task.name for task in TRAINED])


def texts(example: Example) -> tuple[str, ...]:
    """Everything that a model reads, or that is compared with what it writes."""
    if isinstance(example, Pair):
        return (example.first, example.second)
    if isinstance(example, Span):
        return (example.context, example.question, *(text for text, _ in example.answers))
    if isinstance(example, LastWord):
        return (example.context, example.word or "")
    return (example.prompt, *example.choices)


def source(example: Example) -> str:
    """What two splits must not share: a pair's first sentence, a context, a question, a schema."""
    text = texts(example)[0] or " ".join(texts(example))
    return " ".join(text.casefold().split())


def gold(example: Example) -> object:
    """What a classifier is to say."""
    if isinstance(example, Pair):
        return example.score if example.label is None else example.label
    return example.impossible if isinstance(example, Span) else example.answer


def read(task: Task) -> dict[str, list[Example]]:
    return {split: task.read(sample_folder(task), split) for split in task.splits}


@pytest.mark.parametrize("task", TASKS.values(), ids=list(TASKS))
def test_every_task_has_a_sample_that_is_large_enough_and_clean(task: Task) -> None:
    splits = read(task)
    whole = [example for examples in splits.values() for example in examples]
    assert len(splits["train"] if task in TRAINED else whole) >= (30 if not task.name.startswith("enem-") else 10)
    assert all(len(examples) >= 8 for examples in splits.values())
    for split, examples in splits.items():
        bare = [example for example in examples if not task.labelled(example)]
        # GLUE's published test sets are without labels, and of ENEM's questions some are annulled.
        assert len(bare) == len(examples) if task.hold_out and split == "test" else len(bare) <= len(examples) // 10
    for example in whole:
        for text in texts(example):
            assert unicodedata.is_normalized("NFC", text), text
            assert "\ufeff" not in text
            assert "\ufffd" not in text
            assert "  " not in text, text
    assert sum(not text.isascii() for example in whole for text in texts(example)) > len(whole) / 4


@pytest.mark.parametrize("task", TASKS.values(), ids=list(TASKS))
def test_no_example_is_in_two_splits_or_twice_in_one(task: Task) -> None:
    splits = read(task)
    for one, other in combinations(splits.values(), 2):
        assert not {source(example) for example in one} & {source(example) for example in other}
    for examples in splits.values():
        assert max(Counter(texts(example) for example in examples).values()) == 1


@trained
def test_all_labels_are_there_and_none_is_rare(task: Task) -> None:
    for split, examples in read(task).items():
        found = Counter(gold(example) for example in examples if task.labelled(example))
        if task.labels and found:
            assert set(found) == set(task.labels), split
            assert min(found.values()) * 2 >= max(found.values()), split
        scores = sorted(example.score for example in examples if isinstance(example, Pair) and example.score)
        if task.range and scores:
            assert task.range[0] <= scores[0] < scores[-1] <= task.range[1]
            width = (task.range[1] - task.range[0]) / 4
            quarters = {min(3, int((score - task.range[0]) / width)) for score in scores}
            assert quarters == {0, 1, 2, 3}, split


@pytest.mark.parametrize("task", ASSIN, ids=[task.name for task in ASSIN])
def test_scores_go_with_the_labels(task: Task) -> None:
    """Who is followed by the other is similar to it; who says the same is more so."""
    for examples in read(task).values():
        by_label = {label: [e.score for e in examples if e.label == label] for label in task.labels}
        assert max(by_label["None"]) < 4
        assert min(by_label["Entailment"]) >= 3.5
        assert min(by_label.get("Paraphrase", [5])) >= 4.25


@trained
def test_a_checkpoint_can_be_chosen(task: Task) -> None:
    kept, chosen = task.training(sample_folder(task))
    assert len(kept) >= 20
    if task.family == "pair":
        assert len(chosen) >= 3
        assert len({gold(example) for example in chosen}) >= 2


@pytest.mark.parametrize("name", [task.name for task in TRAINED if task.family == "span"])
def test_answers_are_at_their_offset(name: str) -> None:
    for examples in read(TASKS[name]).values():
        assert all(start != NOT_FOUND for example in examples for _, start in example.answers)
        impossible = sum(example.impossible for example in examples)
        assert len(examples) // 4 <= impossible <= len(examples) * 3 // 4 if name == "squad2" else impossible == 0


@pytest.mark.parametrize("name", [task.name for task in TASKS.values() if task.family == "choice"])
def test_no_choice_is_always_the_right_one(name: str) -> None:
    for examples in read(TASKS[name]).values():
        answered = [example for example in examples if isinstance(example, Choice) and example.answer is not None]
        assert {example.answer for example in answered} == set(range(len(answered[0].choices)))
        assert max(Counter(example.answer for example in answered).values()) <= len(answered) * 0.7


def test_files_of_another_task_are_no_sample(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """GLUE's files have the same names in every task: a new one must not read another's."""
    with pytest.raises(UserError) as error:
        sample_folder(replace(TASKS["rte"], name="qnli"))
    assert str(error.value) == "qnli: no sample of it comes with gloria; give --data the folder of its files"
    (tmp_path / "rte").mkdir()
    for name in ("train.tsv", "dev.tsv"):
        (tmp_path / "rte" / name).write_text("")
    monkeypatch.setattr(samples, "SAMPLES", tmp_path)
    with pytest.raises(UserError, match="rte: no sample of it"):
        sample_folder(TASKS["rte"])
    (tmp_path / "rte" / "test.tsv").write_text("")
    assert sample_folder(TASKS["rte"]) == tmp_path / "rte"


def test_a_wheel_has_every_file(repository: Path) -> None:
    settings = tomllib.loads((repository / "pyproject.toml").read_text())["tool"]["setuptools"]
    packed = {path for pattern in settings["package-data"]["gloria"] for path in (repository / "gloria").glob(pattern)}
    files = {path for path in SAMPLES.rglob("*") if path.is_file()}
    assert files <= packed
    assert sum(path.stat().st_size for path in files) < 250_000
    # What no task reads has no place there.
    used = {sample_folder(task) / name for task in TASKS.values() for names in task.files.values() for name in names}
    assert files - used == {SAMPLES / "README.md"}
