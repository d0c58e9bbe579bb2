"""Multiple choice: ENEM (two formats), EXAMS, and Winograd schemas as a choice between two sentences."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, TypeGuard

from gloria.errors import UserError
from gloria.tasks.examples import Choice
from gloria.tasks.formats.files import Loaded, Problems, check_unique, json_rows, read_json
from gloria.tasks.task import Task

PLACEHOLDER = "[[placeholder]]"
LETTERS = "ABCDE"


def read_enem(path: Path, task: Task) -> Loaded:
    """The exam of 2022 (context, question, options) and of 2024 (question, alternatives, description).

    A picture of 2024 is replaced by its description, which is what a blind candidate is read. An annulled question
    and one whose options are pictures without description cannot be answered: they have no answer and are not scored.
    """
    problems, examples, places = Problems(path), [], []
    annulled = described = 0
    for place, row in _rows(path, problems):
        options, descriptions = row.get("options", row.get("alternatives")), row.get("description") or []
        text = "\n".join(part for part in (row.get("context"), row.get("question")) if isinstance(part, str) and part)
        if not text.strip() or not _are_texts(options) or not _are_texts(descriptions):
            problems.add(place, "a part is missing or no text; question, and options or alternatives, are expected")
            continue
        letter = str(row.get("label", "")).strip().upper()
        if letter not in ("ANULADO", "", *LETTERS):
            problems.add(place, f'unknown label "{letter}"; a letter from A to E or Anulado is expected')
        filled, used = _describe([text, *options], descriptions)
        described += used > 0
        annulled += letter == "ANULADO"
        answer = LETTERS.index(letter) if letter in LETTERS[: len(options)] and letter else None
        examples.append(Choice(str(row.get("id", place)), filled[0].strip(), tuple(filled[1:]), answer))
        places.append(place)
    counts = {"annulled": annulled, "pictures described": described}
    return _loaded(path, examples, places, counts, problems)


def read_exams(path: Path, task: Task) -> Loaded:
    """EXAMS: {question: {stem, choices: [{text, label}]}, answerKey}."""
    problems, examples, places = Problems(path), [], []
    for line, row in json_rows(path, problems):
        try:
            choices = [choice["text"] for choice in row["question"]["choices"]]
            labels = [choice["label"] for choice in row["question"]["choices"]]
            key, stem = row.get("answerKey"), row["question"]["stem"]
        except (KeyError, TypeError):
            choices, labels, key, stem = [], [], None, ""
        if not choices or not _are_texts([stem, *choices]):
            problems.add(line, "a part is missing or no text; question with stem and choices is expected")
            continue
        if key is not None and key not in labels:
            problems.add(line, f'unknown answerKey "{key}"; the choices are {", ".join(map(str, labels))}')
            continue
        answer = None if key is None else labels.index(key)
        stripped = tuple(choice.strip() for choice in choices)
        examples.append(Choice(str(row.get("id", line)), stem.strip(), stripped, answer))
        places.append(line)
    return _loaded(path, examples, places, {}, problems)


def read_wsc(path: Path, task: Task) -> Loaded:
    """Winograd schemas: the right and the wrong sentence whole, mended by hand where the file has that, in order of
    the alphabet (a model that finds both equal must not win by choosing the first).

    The file does not say which schemas are twins: neighbours that share half their words are, and are drawn together.
    """
    problems, places = Problems(path), []
    examples: list[Choice] = []
    mended = foreign = 0
    before: list[str] = []
    for place, row in _rows(path, problems):
        plain = [row.get(f"{kind}_sentence") for kind in ("correct", "incorrect")]
        fixed = [
            row.get(f"manually_fixed_{kind}_sentence") or text for kind, text in zip(("correct", "incorrect"), plain)
        ]
        if not _are_texts(fixed) or fixed[0] == fixed[1]:
            problems.add(place, "a sentence is missing or both are alike; two are expected")
            continue
        mended += fixed != plain
        foreign += row.get("translated") is False
        words = fixed[0].split()
        same = bool(examples) and difflib.SequenceMatcher(None, before, words, autojunk=False).ratio() >= 0.5
        number = str(row.get("question_id", len(examples)))
        group, before = (examples[-1].group if same else number), words
        examples.append(Choice(number, "", tuple(sorted(fixed)), sorted(fixed).index(fixed[0]), group))
        places.append(place)
    counts = {"schemas": len({e.group for e in examples}), "mended by hand": mended, "not translated": foreign}
    return _loaded(path, examples, places, counts, problems)


def _are_texts(values: Any) -> TypeGuard[list[str]]:
    return isinstance(values, list) and all(isinstance(value, str) and value.strip() for value in values)


def _describe(texts: list[str], descriptions: list[str]) -> tuple[list[str], int]:
    """The texts with each placeholder replaced by the description of its picture, in order, and how many were."""
    rest = list(descriptions)
    if sum(text.count(PLACEHOLDER) for text in texts) != len(rest):
        return texts, 0
    filled = []
    for text in texts:
        head, *tails = text.split(PLACEHOLDER)
        filled.append(head + "".join(rest.pop(0).strip() + tail for tail in tails))
    return filled, len(descriptions)


def _rows(path: Path, problems: Problems) -> Iterator[tuple[int | str, dict[str, Any]]]:
    """(place, object) of a file that is a list of objects (.json) or has one a line (.jsonl)."""
    if path.suffix == ".jsonl":
        yield from json_rows(path, problems)
        return
    rows = read_json(path)
    if not isinstance(rows, list):
        raise UserError(f"{path}: is no list of questions; get the file again")
    for number, row in enumerate(rows):
        if isinstance(row, dict):
            yield f"question {number}", row
        else:
            problems.add(f"question {number}", "is no JSON object; a list of objects is expected")


def _loaded(
    path: Path, examples: list[Choice], places: Sequence[int | str], counts: dict[str, int], problems: Problems
) -> Loaded:
    check_unique(examples, places, problems)
    problems.report()
    if not examples:
        raise UserError(f"{path}: has no questions; get the file again")
    shown = {"questions": len(examples), "without an answer": sum(e.answer is None for e in examples)}
    return Loaded(list(examples), shown | {"without choices": sum(not e.choices for e in examples)} | counts)
