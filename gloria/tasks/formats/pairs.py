"""Pairs of sentences: ASSIN's XML, and GLUE's tables as PLUE (tsv) and GLUE-PTPT (jsonl) have them."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any
from xml.parsers import expat

from gloria.errors import UserError
from gloria.tasks.examples import Pair
from gloria.tasks.formats.files import Loaded, Problems, check_unique, json_rows, read_bytes, read_lines, tab_rows
from gloria.tasks.task import Task


def read_assin(path: Path, task: Task) -> Loaded:
    """`<pair id entailment similarity><t/><h/></pair>`; a blind test set has no entailment and similarity.

    A file with a document type is refused: it could name entities, which this format has no use for.
    """
    data = read_bytes(path)
    problems = Problems(path)
    pairs: list[Pair] = []
    lines: list[int] = []
    for line, attributes, texts in _pair_elements(path, data):
        label, score = _gold(attributes, task, line, problems)
        missing = [name for name in ("t", "h") if not texts.get(name, "").strip()]
        if missing:
            problems.add(line, f"the pair has no text in <{missing[0]}>; both sentences are needed")
        if not attributes.get("id"):
            problems.add(line, "the pair has no id; predictions are kept by id")
        first, second = texts.get("t", "").strip(), texts.get("h", "").strip()
        pairs.append(Pair(attributes.get("id", f"line {line}"), first, second, label, score))
        lines.append(line)
    if not pairs:
        raise UserError(f"{path}: has no <pair>; an ASSIN file is expected")
    check_unique(pairs, lines, problems)
    problems.report()
    return Loaded(list(pairs), {**_counts(pairs), "lines that end in CRLF": data.count(b"\r\n")})


def read_table(path: Path, task: Task) -> Loaded:
    """GLUE's table, tsv or jsonl; columns by the task's names. In jsonl a whole number is the index of a label."""
    problems = Problems(path)
    read = tab_rows if path.suffix == ".tsv" else json_rows
    rows = list(read(path, problems))
    if not rows and not problems.lines:
        raise UserError(f"{path}: has no rows; get the file again")
    names = list(rows[0][1]) if rows else []
    column = {key: next((name for name in allowed if name in names), "") for key, allowed in task.columns.items()}
    for key in ("first", "second"):
        if rows and key in column and not column[key]:
            problems.add(1, f"has no column {' or '.join(task.columns[key])}; it has {', '.join(names)}")
    problems.report()
    pairs = []
    for number, (line, row) in enumerate(rows):
        texts = [row.get(column[key], "") if key in column else "" for key in ("first", "second")]
        gold = row.get(column[task.gold_column]) if column[task.gold_column] else None
        if type(gold) is int and task.labels:
            gold = task.labels[gold] if 0 <= gold < len(task.labels) else gold
        label, score = _gold({"entailment" if task.labels else "similarity": gold}, task, line, problems)
        if not all(isinstance(text, str) and text.strip() for text in texts[: 1 + ("second" in column)]):
            problems.add(line, "a sentence is empty or no text; every row needs its sentences")
        pairs.append(Pair(str(row.get(column["id"], number)), str(texts[0]), str(texts[1]), label, score))
    check_unique(pairs, [line for line, _ in rows], problems)
    problems.report()
    counts = _counts(pairs)
    if path.suffix == ".tsv":
        counts["rows with an unpaired quotation mark"] = sum(line.count('"') % 2 for line in read_lines(path)[1:])
    gold = f"it has no column {' or '.join(task.columns[task.gold_column])}, but {', '.join(names)}"
    return Loaded(list(pairs), counts, "" if column[task.gold_column] else gold)


def _counts(pairs: list[Pair]) -> dict[str, int]:
    return {"pairs": len(pairs), "without a label": sum(pair.label is None and pair.score is None for pair in pairs)}


def _gold(row: dict[str, Any], task: Task, line: int, problems: Problems) -> tuple[str | None, float | None]:
    """Label and score; None where there is none, which GLUE's hidden test sets write as -1."""
    label, score = (
        None if value in (None, "", -1, "-1") else value for value in (row.get("entailment"), row.get("similarity"))
    )
    if label is not None:
        found = next((known for known in task.labels if known.lower() == str(label).strip().lower()), None)
        if found is None:
            problems.add(line, f'unknown label "{label}"; {task.name} has {", ".join(task.labels)}')
        label = found
    if score is not None:
        low, high = task.range or (-math.inf, math.inf)
        try:
            score = math.nan if isinstance(score, bool) else float(score)
        except (TypeError, ValueError):
            score = math.nan
        if not low <= score <= high:
            shown = row["similarity"]
            problems.add(line, f'wrong score "{shown}"; {task.name} has numbers from {low:g} to {high:g}')
    return label, score


def _pair_elements(path: Path, data: bytes) -> list[tuple[int, dict[str, str], dict[str, str]]]:
    """(line, attributes, text by tag) of each <pair>."""
    found: list[tuple[int, dict[str, str], dict[str, str]]] = []
    tags: list[str] = []
    parser = expat.ParserCreate()

    def start(tag: str, attributes: dict[str, str]) -> None:
        tags.append(tag)
        if tag == "pair":
            found.append((parser.CurrentLineNumber, attributes, {}))

    def text(characters: str) -> None:
        if tags[-1] in ("t", "h") and "pair" in tags:
            texts = found[-1][2]
            texts[tags[-1]] = texts.get(tags[-1], "") + characters

    def doctype(*_: Any) -> None:
        raise UserError(f"{path}:{parser.CurrentLineNumber}: has a document type; remove it, ASSIN files have none")

    parser.StartElementHandler, parser.CharacterDataHandler = start, text
    parser.EndElementHandler = lambda tag: tags.pop()
    parser.StartDoctypeDeclHandler = doctype
    try:
        parser.Parse(data, True)
    except expat.ExpatError as error:
        what = expat.ErrorString(error.code)
        raise UserError(f"{path}:{error.lineno}: is not XML ({what}); get the file again") from None
    return found
