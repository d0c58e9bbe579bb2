"""`results.json` and the table that is printed: every score with n, interval, rule, model and versions."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import gloria
from gloria.files import write_whole
from gloria.tasks.examples import Example, Prediction
from gloria.tasks.metrics import score
from gloria.tasks.task import Task

RESULTS = "results.json"
GUESSES_FILE = "guesses.jsonl"  # what gloria.evaluate --compare reads
_LIBRARIES = ("torch", "transformers", "scikit-learn", "scipy", "numpy")


def score_record(
    task: Task,
    split: str,
    examples: Sequence[Example],
    guesses: Mapping[str, Prediction],
    *,
    rule: str = "",
    method: str,
    counts: Mapping[str, Any],
) -> dict[str, Any]:
    """A task's scores on a split as plain JSON; a split without labels is "not scored".

    `method` says how the answers were come by; `counts` go along.
    """
    record: dict[str, Any] = {"task": task.name, "split": split, "method": method, "n": len(examples)}
    if rule:
        record["rule"] = rule
    record["counts"] = dict(counts)
    if any(task.labelled(example) for example in examples):
        scores = score(task, examples, guesses, rule=rule)
        record["scores"] = {name: asdict(value) for name, value in scores.items()}
    else:
        record["not_scored"] = "the split has no labels"
    return record


def write_results(path: Path, about: Mapping[str, Any], records: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Write and return the results: `about` the model, and the records."""
    versions = {"gloria": gloria.__version__, **{name: version(name) for name in _LIBRARIES}}
    results = {"format": 1, **about, "versions": versions, "results": list(records)}
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, json.dumps(results, ensure_ascii=False, indent=1, default=str).encode() + b"\n")
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
