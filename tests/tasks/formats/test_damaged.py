"""Bug prevented: a damaged file that ends in a traceback, or is read as if nothing were wrong with its ids.

Every value of a good file is replaced in turn; what comes out must be examples that are whole, or a `UserError`.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from gloria.errors import UserError
from gloria.tasks.catalog import TASKS, Task
from gloria.tasks.examples import Choice, LastWord, Pair, Span

PAIR = {"idx": 3, "sentence1": "a", "sentence2": "b", "label": 1}
QUESTION = {"id": "1", "question": "Onde?", "answers": [{"text": "rio", "answer_start": 2}], "is_impossible": False}
NESTED = {"data": [{"title": "Rios", "paragraphs": [{"context": "O rio.", "qas": [QUESTION]}]}]}
FLAT = QUESTION | {"context": "O rio.", "answers": {"text": ["rio"], "answer_start": [2]}}
OPTIONS = ["a", "[[placeholder]]"]
ENEM = {
    "id": "1",
    "question": "Qual?",
    "context": "Texto.",
    "alternatives": OPTIONS,
    "label": "A",
    "description": ["b"],
}
EXAM = {"id": "1", "question": {"stem": "Qual?", "choices": [{"text": "a", "label": "A"}]}, "answerKey": "A"}
SCHEMA = {"question_id": 0, "correct_sentence": "A caiu.", "incorrect_sentence": "B caiu.", "translated": True}
SCHEMA |= {"manually_fixed_correct_sentence": "A caiu.", "manually_fixed_incorrect_sentence": "B caiu."}

GOOD = [
    ("rte", "test.jsonl", PAIR),
    ("stsb", "test.jsonl", PAIR),
    ("squad2", "dev-v2.0.json", NESTED),
    ("squad2", "dev.jsonl", FLAT),
    ("calame", "test.jsonl", {"id": 0, "sentence": "Era uma", "last_word": "vez"}),
    ("lambada", "test.jsonl", {"text": "Era uma vez"}),
    ("enem-2024", "2024.jsonl", ENEM),
    ("enem-2022", "2022.json", [ENEM]),
    ("exams", "dev_pt.jsonl", EXAM),
    ("wsc", "portuguese_wsc.json", [SCHEMA, SCHEMA | {"question_id": 1}]),
]


def damaged(value: Any) -> Iterator[Any]:
    """`value` with each of its parts replaced by each wrong value, or gone."""
    yield from (None, 3, 2.5, True, "", " ", "x", [], {}, [None], {"a": 1})
    for key in list(value) if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ():
        for part in damaged(value[key]):
            changed = copy.deepcopy(value)
            changed[key] = part
            yield changed
        changed = copy.deepcopy(value)
        del changed[key]
        yield changed


@pytest.mark.parametrize(("name", "file", "value"), GOOD)
def test_a_damaged_file_gives_whole_examples_or_a_line_for_its_user(
    tmp_path: Path, name: str, file: str, value: Any
) -> None:
    task, path = TASKS[name], tmp_path / file
    split = next(split for split, names in task.files.items() if file in names)
    path.write_text(json.dumps(value))
    assert len(task.read(tmp_path, split)) == (len(value) if isinstance(value, list) else 1)
    refused = 0
    for broken in damaged(value):
        path.write_text(json.dumps(broken))
        examples, problems = read(task, tmp_path, split)
        refused += bool(problems)
        assert [problem for problem in problems if not problem.startswith(f"{path}") or "; " not in problem] == []
        assert bool(problems) != bool(examples)
        assert len({example.id for example in examples}) == len(examples)
        for example in examples:
            check(example)
    assert refused > 10


def read(task: Task, folder: Path, split: str) -> tuple[list[Any], tuple[str, ...]]:
    try:
        return task.read(folder, split), ()
    except UserError as error:
        return [], error.problems


def check(example: Any) -> None:
    assert isinstance(example.id, str)
    if isinstance(example, Pair):
        assert example.first.strip()
        assert isinstance(example.label, str | None)
        assert isinstance(example.score, float | None)
    elif isinstance(example, Span):
        assert all(isinstance(text, str) and type(start) is int for text, start in example.answers)
        assert not (example.impossible and example.answers)
    elif isinstance(example, LastWord):
        assert example.context.strip()
    else:
        assert isinstance(example, Choice)
        assert all(isinstance(choice, str) and choice.strip() for choice in example.choices)
        assert example.answer is None or example.choices[example.answer]
