"""Compare two models on the same examples: what `python -m gloria.evaluate --compare A B` does."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path

from gloria.errors import UserError
from gloria.files import read_json_object
from gloria.tasks.metrics import compare
from gloria.tasks.report import RESULTS
from gloria.tasks.submissions import PREDICTIONS, read_predictions
from gloria.tasks.task import Task


@dataclass(frozen=True)
class PredictionSet:
    """A file of predictions, and its entry in results.json; "" and None where no results.json lists it."""

    path: Path
    split: str = ""
    rule: str = ""
    data: Path | None = None


def compare_models(
    task: Task, a: Path, b: Path, data: Path | None, split: str | None, rules: Collection[str], seed: int
) -> Iterator[str]:
    """Lines of a table for each split and rule that both have: A less B, its interval, and a paired test.

    `a` and `b` are folders of a fine-tuning or of gloria.evaluate, or files of predictions. `data`, `split` and
    `rules` are what the user gave; what is not given is read from results.json.
    """
    sides = [_by_split_and_rule(task, path, data, split, rules) for path in (a, b)]
    both = [key for key in sides[0] if key in sides[1]]
    if not both:
        found = [", ".join(" ".join(filter(None, key)) for key in side) for side in sides]
        raise UserError(f"--compare: {a} has {found[0]}, {b} has {found[1]}; give two with the same split and rule")
    for key in both:
        sets = [side[key] for side in sides]
        folder, *others = {data} if data else {one.data for one in sets}
        if others or folder is None:
            known = " and ".join(f"{one.path} is of {one.data or 'unknown files'}" for one in sets)
            raise UserError(f"--data: {known}; give the folder of the files that both were made from")
        examples = task.read(folder, key[0])
        predictions = [read_predictions(task, one.path, examples) for one in sets]
        yield " ".join(filter(None, (task.name, *key))) + f" of {folder}"
        yield from (f"{name}  {one.path}" for name, one in zip("AB", sets))
        yield "{:<34}{:>9}  {:<20}{:>9}  {}".format("metric", "A - B", "95 % interval", "p", "test")
        for name, apart in compare(task, examples, *predictions, rule=key[1], seed=seed).items():
            if apart.value is None:
                yield f"{name:<34}{'-':>9}  {apart.test}"
                continue
            interval = "" if apart.low is None else f"{apart.low:.4f} to {apart.high:.4f}"
            p = "" if apart.p is None else f"{apart.p:.4f}"
            yield f"{name:<34}{apart.value:>9.4f}  {interval:<20}{p:>9}  {apart.test}, n = {apart.n}"


def _by_split_and_rule(
    task: Task, path: Path, data: Path | None, split: str | None, rules: Collection[str]
) -> dict[tuple[str, str], PredictionSet]:
    """The sets of a folder or file that the user's split and rules leave."""
    found: dict[tuple[str, str], PredictionSet] = {}
    for one in find_predictions(task, path):
        if not one.split:  # not in a results.json: the flags describe it
            folder = data or one.data
            if folder is None:
                raise UserError(f"--data: {one.path} is in no {RESULTS}; give the folder of the files it was made from")
            ruled = any(":" in metric for metric in task.metrics)
            if ruled and len(rules) != 1:
                raise UserError(f"--rule: {one.path} is in no {RESULTS}; give the rule it was made by")
            one = PredictionSet(one.path, split or task.reported_split(folder), "".join(rules) if ruled else "", folder)
        if split in (None, one.split) and (not rules or not one.rule or one.rule in rules):
            found[one.split, one.rule] = one
    if not found:
        raise UserError(f"--compare: {path} has no predictions of --split and --rule; leave them out")
    return found


def find_predictions(task: Task, path: Path) -> list[PredictionSet]:
    """The predictions of a task in a folder with results.json, or those at a file or in its folder.

    Raises `UserError` where there are none.
    """
    if (path / RESULTS).is_file():
        found = [one for one in _listed(path, task.name) if one.path.is_file()]
        if not found:
            raise UserError(f"{path / RESULTS}: lists no predictions of {task.name}; name a folder that has them")
        return found
    if not (path / PREDICTIONS).is_file() and (path / "guesses.jsonl").is_file():
        raise UserError(f"{path}: has guesses.jsonl of an older version; rename it to {PREDICTIONS}, and give --data")
    file = path / PREDICTIONS if path.is_dir() else path
    if not file.is_file():
        raise UserError(
            f"{file}: no such file; give a folder of gloria.finetune or gloria.evaluate, or its {PREDICTIONS}"
        )
    for folder in file.absolute().parents[1:3]:  # FOLDER/predictions/SET/predictions.jsonl
        if (folder / RESULTS).is_file():
            for one in _listed(folder, task.name):
                if one.path == file.absolute():
                    return [PredictionSet(file, one.split, one.rule, one.data)]
    return [PredictionSet(file)]


def _listed(folder: Path, task: str) -> list[PredictionSet]:
    """What results.json lists of a task."""
    path = folder / RESULTS
    try:
        return [
            PredictionSet(
                folder / record["predictions"] / PREDICTIONS,
                record["split"],
                record.get("rule", ""),
                Path(record["data"]),
            )
            for record in read_json_object(path, "get the file again")["results"]
            if record["task"] == task and "predictions" in record
        ]
    except (KeyError, TypeError, AttributeError):
        raise UserError(f"{path}: is not what gloria.evaluate writes; move it away, and give --data") from None
