"""Bugs prevented: a new task, metric or kind of example that needs changes in many files; a task without its default
recipe; weights that are not finite scored as if nothing were wrong."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import gloria.evaluate as evaluate
import gloria.finetune as finetune
from gloria.tasks.catalog import TASKS
from gloria.tasks.formats.files import Loaded, Problems, json_rows
from gloria.tasks.metrics import Answered, acc
from gloria.tasks.prompts import Prompt
from gloria.tasks.statistics import Measure
from gloria.tasks.task import Task
from gloria.train.finetune_config import read_finetune_config
from tests.tasks.tiny import make_folder, write_lines


@pytest.fixture(scope="module")
def neo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_folder("gpt_neo", tmp_path_factory.mktemp("neo") / "neo")


def share_of_yes(a: Answered) -> Measure:
    """A metric of one's own: a function, and its name in the task."""
    return a.share([p is not None and p.label == "0" for p in a.predictions])


def test_a_task_of_a_known_family_is_one_value(neo, tmp_path, monkeypatch):
    columns = {"id": ("n",), "first": ("texto",), "label": ("classe",)}
    task = replace(
        TASKS["sst2"], name="emoções", columns=columns, metrics=TASKS["sst2"].metrics | {"yes": share_of_yes}
    )
    monkeypatch.setitem(TASKS, task.name, task)
    for split, count in (("train", 40), ("dev", 6)):
        rows = [{"n": str(n), "texto": f"o gato {n} dorme", "classe": n % 2} for n in range(count)]
        write_lines(tmp_path / "data" / f"{split}.jsonl", rows)
    given = [f"--task={task.name}", f"--data={tmp_path / 'data'}"]
    assert evaluate.main([*given, f"--model={neo}", f"--out={tmp_path / 'out'}", "--device=cpu"]) == 0
    flags = ["--train.steps=2", f"--run.dir={tmp_path / 'run'}", "--run.device=cpu", "--log.tensorboard=false"]
    assert finetune.main([*given, f"--model={neo}", *flags]) == 0
    for folder in ("out", "run"):
        (record,) = json.loads((tmp_path / folder / "results.json").read_text())["results"]
        assert record["scores"].keys() == {"accuracy", "yes"}


@dataclass(frozen=True)
class Order:
    """Another kind of example: which of two events comes first."""

    id: str
    events: tuple[str, str]
    answer: int

    def labelled(self, targets: Sequence[str] = ()) -> bool:
        return True


def read_order(path: Path, task: Task) -> Loaded:
    rows = json_rows(path, Problems(path))
    return Loaded([Order(str(line), tuple(row["events"]), row["first"]) for line, row in rows], {})


def ask_order(task: Task, example: Order, target: str) -> Prompt:
    answers = tuple(f" {event}" for event in example.events)
    return Prompt("O que vem antes?", answers, (0, 1), answers[example.answer])


def test_another_kind_of_example_is_a_dataclass_a_reader_a_question_and_one_value(neo, tmp_path, monkeypatch):
    files = {"test": ("order.jsonl",)}
    task = Task("order", "choice", read_order, {"acc": acc}, "acc", files, ask=ask_order, submission="order.jsonl")
    monkeypatch.setitem(TASKS, "order", task)
    write_lines(tmp_path / "order.jsonl", [{"events": ["o gato dorme", "uma casa"], "first": n % 2} for n in range(6)])
    given = ["--task=order", f"--model={neo}", f"--data={tmp_path}", f"--out={tmp_path / 'out'}", "--device=cpu"]
    assert evaluate.main(given) == 0
    (record,) = json.loads((tmp_path / "out/results.json").read_text())["results"]
    assert record["scores"]["acc"]["value"] == 0.5


def test_every_task_with_a_head_has_a_default_recipe():
    for task in TASKS.values():
        if task.family in ("pair", "span"):
            config = read_finetune_config([f"--task={task.name}", "--run.dir=x", "--run.seeds=1"])
            assert config.train.epochs == (1 if task.name.startswith("squad") else 5)
            assert config.optim.name == ("adamw" if task.family == "pair" else "radam")
            assert config.run.seeds == [1]


@pytest.mark.parametrize("task", ["exams", "rte"])
def test_weights_that_are_not_finite_predict_nothing_with_a_warning(task, neo, tmp_path, capsys):
    bad = tmp_path / "bad"
    bad.mkdir()
    for file in neo.iterdir():
        (bad / file.name).write_bytes(file.read_bytes())
    state = load_file(bad / "model.safetensors")
    name = next(name for name in state if name.endswith("ln_f.weight"))
    save_file(state | {name: torch.full_like(state[name], np.nan)}, bad / "model.safetensors", {"format": "pt"})
    assert evaluate.main([f"--task={task}", f"--model={bad}", f"--out={tmp_path / 'out'}", "--device=cpu"]) == 0
    (record,) = json.loads((tmp_path / "out/results.json").read_text())["results"]
    n = record["n"]
    line = f"warning: {task} {record['split']}: {n} of {n} predictions are missing or not finite, and wrong\n"
    assert line in capsys.readouterr().err
    assert next(iter(record["scores"].values()))["value"] == 0
