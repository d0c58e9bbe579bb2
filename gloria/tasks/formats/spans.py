"""Answers that are spans of a context: SQuAD 1.1 and 2.0 and FaQuAD, nested as published or as flat rows."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import xxhash

from gloria.errors import UserError
from gloria.tasks.examples import NOT_FOUND, Span
from gloria.tasks.formats.files import Loaded, Problems, check_unique, json_rows, read_json
from gloria.tasks.task import Task


def read_squad(path: Path, task: Task) -> Loaded:
    """SQuAD's JSON (data, paragraphs, qas), or rows {id, question, context, answers {text [], answer_start []}}.

    Machine translation moves answers: one whose text is not at its offset keeps its text, which scoring needs, and
    has no place (`NOT_FOUND`). It is never searched for: the same words elsewhere may not be the answer.
    """
    problems = Problems(path)
    counts: Counter[str] = Counter()
    spans: list[Span] = []
    places: list[int | str] = []
    for place, context, question in _questions(path, problems):
        span = _span(context, question, counts)
        if isinstance(span, str):
            problems.add(place, span)
            continue
        spans.append(span)
        places.append(place)
    if not spans and not problems.lines:
        raise UserError(f"{path}: has no question; SQuAD's JSON or rows of questions are expected")
    check_unique(spans, places, problems)
    problems.report()
    names = ("answers not at their offset", "answers without text", "impossible", "impossible without plausible")
    shown = {"questions": len(spans), "contexts": len({span.group for span in spans})}
    shown |= {"without an answer and not marked impossible": sum(not span.labelled() for span in spans)}
    return Loaded(list(spans), shown | {"answers": counts["answers"]} | {name: counts[name] for name in names})


def _span(context: Any, row: dict[str, Any], counts: Counter[str]) -> Span | str:
    """The question in a row, or what is wrong with the row."""
    answers = row.get("answers")
    if isinstance(answers, dict):
        texts, starts = answers.get("text"), answers.get("answer_start")
        if not isinstance(texts, list) or not isinstance(starts, list) or len(texts) != len(starts):
            return "answers has not as many texts as offsets; text and answer_start, two lists, are expected"
        answers = [{"text": text, "answer_start": start} for text, start in zip(texts, starts)]
    if not all(isinstance(text, str) and text.strip() for text in (row.get("id"), row.get("question"), context)):
        return "a part is missing or no text; id, question and context are expected"
    found: list[tuple[str, int]] = []
    if not isinstance(answers, list | None):
        return "answers is no list; a list of text and answer_start is expected"
    for answer in answers or []:
        text, start = (answer.get(key) if isinstance(answer, dict) else None for key in ("text", "answer_start"))
        if not isinstance(text, str) or type(start) is not int:
            return "an answer is not whole; text and a whole answer_start are expected"
        here = start >= 0 and context[start : start + len(text)] == text
        found.append((text, start if here else NOT_FOUND))
        counts["answers"] += 1
        counts["answers not at their offset"] += not here and text != ""
        counts["answers without text"] += not text.strip()
    # A file of flat rows says it by an empty list, which in a nested file of SQuAD 1.1 is a hidden answer.
    impossible = bool(row.get("is_impossible", isinstance(row.get("answers"), dict) and not found))
    if impossible and found:
        return "is_impossible, and yet it has answers; take out one of them"
    counts["impossible"] += impossible
    counts["impossible without plausible"] += impossible and not row.get("plausible_answers")
    return Span(
        row["id"], row["question"], context, tuple(found), impossible, xxhash.xxh3_64_hexdigest(context.encode())
    )


def _questions(path: Path, problems: Problems) -> Iterator[tuple[int | str, Any, dict[str, Any]]]:
    """(place, context, question) of each question, in the file's order."""
    if path.suffix == ".jsonl":
        for line, row in json_rows(path, problems):
            yield line, row.get("context"), row
        return
    try:
        for article in read_json(path)["data"]:
            for paragraph in article["paragraphs"]:
                for number, question in enumerate(paragraph["qas"]):
                    place = f'question "{question.get("id", number)}" of "{article.get("title", "an article")}"'
                    yield place, paragraph["context"], question
    except (KeyError, TypeError, AttributeError) as error:
        what = f"no {error}" if isinstance(error, KeyError) else "a list or an object is something else"
        raise UserError(f"{path}: is not SQuAD's JSON ({what}); data, paragraphs, context, qas are expected") from None
