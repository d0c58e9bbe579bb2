"""Predictions on disk: in the format each task's own script or server takes, and as JSON lines for comparisons."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from xml.etree import ElementTree

from gloria.errors import UserError
from gloria.tasks.examples import ChoicePrediction, Example, PairPrediction, Prediction, SpanPrediction, WordPrediction
from gloria.tasks.formats.files import Problems, json_rows
from gloria.tasks.task import Task

KINDS = {
    "label": str,
    "score": float,
    "text": str,
    "no_answer": float,
    "log_likelihood": float,
    "greedy": bool,
    "choice": int,
}
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

    An example without prediction is left out, as the scripts expect, except that GLUE's server wants every row.
    """
    folder.mkdir(parents=True, exist_ok=True)
    prefixes = [f"{prefix}-" for _, prefix in task.parts] or [""]
    written = []
    for prefix in prefixes:
        chosen = [example for example in examples if example.id.startswith(prefix)]
        path = folder / f"{prefix}{task.submission}"
        found = [(example, predictions[example.id]) for example in chosen if example.id in predictions]
        if path.suffix == ".tsv" and len(found) < len(chosen):
            raise UserError(f"{path}: {len(chosen) - len(found)} examples have no prediction; GLUE wants every row")
        path.write_bytes(_FORMATS[path.suffix](found, prefix))
        written.append(path)
    return written


def write_predictions(path: Path, predictions: Mapping[str, Prediction]) -> None:
    """{"id": ..., fields of the prediction} a line, what is at its default left out."""
    path.write_text("".join(_line({"id": id} | _fields(value)) for id, value in predictions.items()), encoding="utf-8")


def read_predictions(task: Task, path: Path, examples: Sequence[Example]) -> dict[str, Prediction]:
    """Predictions as `write_predictions` wrote them. Raises `UserError` for rows of another task or other examples."""
    problems, kind = Problems(path), CLASSES[task.family]
    known_ids = {example.id for example in examples}
    known = [field.name for field in dataclasses.fields(kind)]
    predictions: dict[str, Prediction] = {}
    if not path.is_file():
        raise UserError(f"{path}: no such file; give predictions that gloria.evaluate wrote")
    for line, row in json_rows(path, problems):
        id = row.pop("id", None)
        right = all(name in known and (value is None or type(value) is KINDS[name]) for name, value in row.items())
        if not isinstance(id, str) or id in predictions or not right:
            problems.add(line, f"is no prediction of {task.name}; id, once each, and {', '.join(known)} are expected")
            continue
        if id not in known_ids:
            problems.add(
                line, f'"{id}" is not among the {len(known_ids)} examples; give --data and --split of this file'
            )
        predictions[id] = kind(**row)
    problems.tell()
    return predictions


def _line(row: dict[str, object]) -> str:
    return json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n"


def _fields(prediction: Prediction) -> dict[str, object]:
    """Fields that say something. JSON has no NaN, which is no prediction, and no infinity, which is a large number."""
    row = {}
    for field in dataclasses.fields(prediction):
        value = getattr(prediction, field.name)
        if value == field.default or value != value:
            continue
        row[field.name] = max(-1e308, min(value, 1e308)) if isinstance(value, float) else value
    return row


def _xml(predictions: Sequence[tuple[Example, Prediction]], prefix: str) -> bytes:
    root = ElementTree.Element("entailment-corpus")
    for pair, said in predictions:
        row = {"id": pair.id.removeprefix(prefix)}
        row |= {"entailment": said.label} if said.label is not None else {}
        row |= {"similarity": f"{said.score:.4f}"} if said.score is not None else {}
        element = ElementTree.SubElement(root, "pair", row)
        for tag, text in (("t", pair.first), ("h", pair.second)):
            ElementTree.SubElement(element, tag).text = text
    ElementTree.indent(root)
    return ElementTree.tostring(root, encoding="utf-8", xml_declaration=True) + b"\n"


def _tsv(predictions: Sequence[tuple[Example, Prediction]], prefix: str) -> bytes:
    rows = [f"{e.id}\t{said.label if said.score is None else f'{said.score:.4f}'}\n" for e, said in predictions]
    return "".join(["index\tprediction\n", *rows]).encode()


def _json(predictions: Sequence[tuple[Example, Prediction]], prefix: str) -> bytes:
    return json.dumps({example.id: said.said for example, said in predictions}, ensure_ascii=False, indent=1).encode()


def _jsonl(predictions: Sequence[tuple[Example, Prediction]], prefix: str) -> bytes:
    return "".join(_line({"id": e.id.removeprefix(prefix)} | _fields(said)) for e, said in predictions).encode()


_FORMATS = {".xml": _xml, ".tsv": _tsv, ".json": _json, ".jsonl": _jsonl}
