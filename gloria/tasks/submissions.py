"""Predictions on disk: in the format each task's own script or server takes, and as JSON lines for comparisons."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from gloria.config.cli import from_mapping
from gloria.errors import UserError
from gloria.tasks.examples import (
    ChoicePrediction,
    Example,
    Pair,
    PairPrediction,
    Prediction,
    SpanPrediction,
    WordPrediction,
    all_of,
)
from gloria.tasks.formats.files import Problems, json_rows
from gloria.tasks.task import Task

CLASSES = {"pair": PairPrediction, "span": SpanPrediction, "last_word": WordPrediction, "choice": ChoicePrediction}
PREDICTIONS = "predictions.jsonl"  # what gloria.evaluate --compare reads


def save_predictions(
    task: Task, examples: Sequence[Example], predictions: Mapping[str, Prediction], folder: Path
) -> None:
    """Write the predictions of a split in both formats."""
    write_submission(task, examples, predictions, folder)
    write_predictions(folder / PREDICTIONS, predictions)


def write_submission(
    task: Task, examples: Sequence[Example], predictions: Mapping[str, Prediction], folder: Path
) -> list[Path]:
    """The predictions in the official format: ASSIN's XML (a file a variety), GLUE's tsv, SQuAD's JSON, JSON lines.

    An example without prediction is left out, as the scripts expect, but GLUE's server needs every row.
    """
    folder.mkdir(parents=True, exist_ok=True)
    prefixes = [f"{prefix}-" for _, prefix in task.parts] or [""]
    written = []
    for prefix in prefixes:
        chosen = [example for example in examples if example.id.startswith(prefix)]
        path = folder / f"{prefix}{task.submission}"
        found = [example for example in chosen if example.id in predictions]
        if path.suffix == ".tsv" and len(found) < len(chosen):
            raise UserError(f"{path}: {len(chosen) - len(found)} examples have no prediction; GLUE needs every row")
        path.write_bytes(_FORMATS[path.suffix](found, [predictions[example.id] for example in found], prefix))
        written.append(path)
    return written


def write_predictions(path: Path, predictions: Mapping[str, Prediction]) -> None:
    """{"id": ..., fields of the prediction} a line, what is at its default left out."""
    path.write_text("".join(_line({"id": id} | _fields(value)) for id, value in predictions.items()), encoding="utf-8")


def read_predictions(task: Task, path: Path, examples: Sequence[Example]) -> dict[str, Prediction]:
    """Predictions as `write_predictions` wrote them. Raises `UserError` for rows of another task or other examples."""
    problems, kind = Problems(path), CLASSES[task.family]
    known = {example.id for example in examples}
    expected = ", ".join(field.name for field in dataclasses.fields(kind))
    predictions: dict[str, Prediction] = {}
    if not path.is_file():
        raise UserError(f"{path}: no such file; give predictions that gloria.evaluate wrote")
    for line, row in json_rows(path, problems):
        id = row.pop("id", None)
        try:
            prediction: Prediction | None = from_mapping(kind, row, str(path))
        except UserError:
            prediction = None
        if not isinstance(id, str) or id in predictions or prediction is None:
            problems.add(line, f"is no prediction of {task.name}; id, once each, and {expected} are expected")
            continue
        if id not in known:
            problems.add(line, f'"{id}" is not among the {len(known)} examples; give --data and --split of this file')
        predictions[id] = prediction
    problems.report()
    return predictions


def _line(row: dict[str, object]) -> str:
    return json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n"


def _fields(prediction: Prediction) -> dict[str, object]:
    """Fields that are not at their default. NaN is left out, as no prediction; infinity, which JSON lacks, is 1e308."""
    row: dict[str, Any] = {}
    for field in dataclasses.fields(prediction):
        value = getattr(prediction, field.name)
        parts = value if isinstance(value, tuple) else (value,)
        if value == field.default or any(part != part for part in parts):
            continue
        finite = [max(-1e308, min(part, 1e308)) if isinstance(part, float) else part for part in parts]
        row[field.name] = finite if isinstance(value, tuple) else finite[0]
    return row


def _xml(examples: Sequence[Example], predictions: Sequence[Prediction], prefix: str) -> bytes:
    root = ElementTree.Element("entailment-corpus")
    for pair, predicted in zip(all_of(Pair, examples), all_of(PairPrediction, predictions)):
        row = {"id": pair.id.removeprefix(prefix)}
        row |= {"entailment": predicted.label} if predicted.label is not None else {}
        row |= {"similarity": f"{predicted.score:.4f}"} if predicted.score is not None else {}
        element = ElementTree.SubElement(root, "pair", row)
        for tag, text in (("t", pair.first), ("h", pair.second)):
            ElementTree.SubElement(element, tag).text = text
    ElementTree.indent(root)
    return ElementTree.tostring(root, encoding="utf-8", xml_declaration=True) + b"\n"


def _tsv(examples: Sequence[Example], predictions: Sequence[Prediction], prefix: str) -> bytes:
    values = [p.label if p.score is None else f"{p.score:.4f}" for p in all_of(PairPrediction, predictions)]
    rows = [f"{example.id}\t{value}\n" for example, value in zip(examples, values)]
    return "".join(["index\tprediction\n", *rows]).encode()


def _json(examples: Sequence[Example], predictions: Sequence[Prediction], prefix: str) -> bytes:
    texts = {e.id: prediction.answer for e, prediction in zip(examples, all_of(SpanPrediction, predictions))}
    return json.dumps(texts, ensure_ascii=False, indent=1).encode()


def _jsonl(examples: Sequence[Example], predictions: Sequence[Prediction], prefix: str) -> bytes:
    lines = (_line({"id": e.id.removeprefix(prefix)} | _fields(p)) for e, p in zip(examples, predictions))
    return "".join(lines).encode()


_FORMATS = {".xml": _xml, ".tsv": _tsv, ".json": _json, ".jsonl": _jsonl}
