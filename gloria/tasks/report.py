"""`results.json` and the table that is printed: every score with n, interval, rule, model, data and versions."""

from __future__ import annotations

import itertools
import json
import math
import os
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import gloria
from gloria.errors import UserError, warn
from gloria.files import read_json_object, write_whole
from gloria.tasks.examples import Example, Prediction
from gloria.tasks.metrics import missing_count, score
from gloria.tasks.task import Task

RESULTS = "results.json"
_LIBRARIES = ("torch", "transformers", "scikit-learn", "scipy", "numpy")


def score_record(
    task: Task,
    split: str,
    examples: Sequence[Example],
    predictions: Mapping[str, Prediction],
    *,
    rule: str = "",
    data: Path,
    method: str,
    counts: Mapping[str, Any],
) -> dict[str, Any]:
    """A task's scores on a split as plain JSON; a split without labels is "not scored".

    `data` is the folder of the files, `method` how the predictions were made; `counts` are kept beside the scores.
    """
    record: dict[str, Any] = {"task": task.name, "split": split, "data": str(data.absolute()), "method": method}
    record["n"] = len(examples)
    if rule:
        record["rule"] = rule
    record["counts"] = dict(counts)
    if any(task.labelled(example) for example in examples):
        scores = score(task, examples, predictions, rule=rule)
        record["scores"] = {name: asdict(value) for name, value in scores.items()}
        if missing := missing_count(task, [example for example in examples if task.labelled(example)], predictions):
            warn(f"{task.name} {split}: {missing} of {len(examples)} predictions are missing or not finite, and wrong")
    else:
        record["not_scored"] = "the split has no labels"
    return record


def default_folder(model: str, tasks: str) -> Path:
    """runs/evaluate/MODEL/TASKS, MODEL being its path below here without `runs` or `models`, or its last two parts."""
    path, here = Path(os.path.abspath(model)), Path.cwd()
    parts = path.relative_to(here).parts if path.is_relative_to(here) else path.parts[-2:]
    parts = parts[1:] if parts[0] in ("runs", "models") and len(parts) > 1 else parts
    return Path(
        "runs/evaluate", "-".join(parts).replace("/", ""), "+".join(Path(task).stem for task in tasks.split(","))
    )


def free_number(folder: Path, request: Mapping[str, Any]) -> int:
    """The first n for which FOLDER-n (1: FOLDER itself) has no results, or results of the same request."""
    return next(n for n in itertools.count(1) if request_of(numbered(folder, n)) in (None, request))


def numbered(folder: Path, number: int) -> Path:
    """FOLDER itself, or FOLDER-number from 2 on."""
    return folder if number == 1 else folder.with_name(f"{folder.name}-{number}")


def request_of(folder: Path) -> dict[str, Any] | None:
    """What the results in a folder are of, {} where they do not say; None where there are none."""
    path = folder / RESULTS
    return read_json_object(path, "move it away").get("request", {}) if path.exists() else None


def write_results(path: Path, about: Mapping[str, Any], records: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Write and return the results: `about` the model, and the records."""
    versions = {"gloria": gloria.__version__, **{name: version(name) for name in _LIBRARIES}}
    results = {"format": 1, **about, "versions": versions, "results": list(records)}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, json.dumps(results, ensure_ascii=False, indent=1, default=str).encode() + b"\n")
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror}); choose another folder") from None
    return results


def table(results: Mapping[str, Any]) -> str:
    """The scores for people: a line for each metric."""
    width = max([5, *(len(record["split"]) for record in results["results"])]) + 2  # a split may be a source's name
    start = f"{{:<18}}{{:<{width}}}{{:<34}}"  # task, split, metric
    lines = [f"{start}{{:>9}}  {{:<20}}{{:>6}}".format("task", "split", "metric", "score", "95 % interval", "n")]
    for record in results["results"]:
        task, split = record["task"], record["split"]
        if "not_scored" in record:
            lines.append(start.format(task, split, f"not scored: {record['not_scored']}").rstrip())
        for name, value in record.get("scores", {}).items():
            if value["value"] is None:
                lines.append(f"{start.format(task, split, name)}{'-':>9}  {value['reason']}")
                continue
            known = value.get("low") is not None
            interval = f"{_number(value['low'])} to {_number(value['high'])}" if known else ""
            if "deviation" in value:
                interval = f"deviation {value['deviation']:.4f}"
            lines.append(
                f"{start.format(task, split, name)}{_number(value['value']):>9}  {interval:<20}{value['n']:>6}"
            )
    return "\n".join(lines)


def _number(value: float) -> str:
    """Four decimals; of a large one (a perplexity) four figures."""
    return f"{value:.4f}" if abs(value) < 10_000 else f"{value:.3e}"


def mean_over_seeds(found: Mapping[int, Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The records with the mean and the standard deviation (n - 1) of each score over the seeds."""
    first = next(iter(found.values()))
    records = []
    for number, record in enumerate(first["results"]):
        scores = {}
        for name, value in record.get("scores", {}).items():
            values = [results["results"][number]["scores"][name]["value"] for results in found.values()]
            if None in values:
                scores[name] = {"value": None, "n": value["n"], "reason": "one seed has none"}
                continue
            deviation = statistics.stdev(values)
            assert math.isfinite(deviation)
            scores[name] = {
                "value": statistics.fmean(values),
                "deviation": deviation,
                "by_seed": values,
                "n": value["n"],
            }
        kept = {key: record[key] for key in ("task", "split", "method", "n", "not_scored") if key in record}
        records.append(kept | ({"scores": scores} if scores else {}))
    return records
