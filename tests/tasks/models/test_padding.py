"""Bug prevented: answers that depend on how many rows are scored at once; a forged task.json that is believed."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from gloria.dist.process import Process, start_process_group, stop_process_group
from gloria.errors import UserError
from gloria.tasks.catalog import find_task
from gloria.tasks.examples import Example
from gloria.tasks.metrics import score
from gloria.tasks.models.backbones import load_model
from gloria.tasks.models.finetuned import (
    FinetunedModel,
    Inputs,
    encode,
    load_finetuned,
    row_outputs,
    save_finetuned,
    task_heads,
    to_predictions,
)
from gloria.tasks.models.heads import TaskModel, initialise_heads
from tests.tasks.tiny import FAMILIES, make_folder, write_assin, write_squad

TASKS = {"assin2": "dev", "faquad": "dev"}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pairs and questions of all lengths, and contexts of several windows."""
    folder = write_assin(tmp_path_factory.mktemp("data"), {"dev": 11})
    return write_squad(folder, {"dev": 7}, impossible=True, words=20)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], Path]:
    """A model of each family with random heads for each task."""
    root = tmp_path_factory.mktemp("tuned")
    return {
        (family, task): make_finetuned(family, task, root / f"{family}-{task}") for family in FAMILIES for task in TASKS
    }


@pytest.fixture
def alone() -> Iterator[Process]:
    yield start_process_group("cpu", 5)
    stop_process_group()


def make_finetuned(family: str, task: str, folder: Path) -> Path:
    loaded, about = load_model(str(make_folder(family, folder / "base"))), find_task(task)
    model = TaskModel(loaded.backbone, task_heads(about), 0.0)
    initialise_heads(model, 1, 3.0)
    for head in model.heads.values():
        head.weight.data.mul_(10)  # so that scores differ by more than the last places of a sum do
    inputs = Inputs(task, about.labels, task_heads(about), 40, 8, 30, no_answer=True)
    save_finetuned(FinetunedModel("", model, loaded.tokenizer, inputs), dict(model.state_dict()), folder / "model", {})
    return folder / "model"


def outputs(folder: Path, examples: list[Example], batch: int, process: Process) -> tuple[np.ndarray, dict]:
    """What the heads say, and the scores."""
    finetuned = load_finetuned(folder, process.device)
    rows = encode(finetuned, examples, training=False).rows
    found = row_outputs(finetuned, rows, batch, process)
    scores = score(finetuned.task, examples, to_predictions(finetuned, examples, rows, found), resamples=0)
    return found, {name: value.value for name, value in scores.items()}


def examples_of(folder: Path, data: Path) -> list[Example]:
    task = folder.parent.name.rpartition("-")[2]
    return find_task(task).read(data, TASKS[task])


def test_the_batch_size_changes_no_score(folders, data, alone):
    for (family, task), folder in folders.items():
        examples = examples_of(folder, data)
        one, scores = outputs(folder, examples, 1, alone)
        many, scores_of_many = outputs(folder, examples, 64, alone)
        np.testing.assert_allclose(many, one, atol=1e-4, err_msg=f"{family} {task}")
        assert scores_of_many == pytest.approx(scores, abs=1e-4)


@pytest.mark.parametrize("wrong", [{"labels": 5}, {"heads": {"span": 3}}, {"max_length": "40"}, {"task": "rte"}])
def test_a_task_file_that_does_not_fit_is_refused(wrong, folders, tmp_path):
    folder = shutil.copytree(folders["gpt2", "faquad"], tmp_path / "model")
    content = json.loads((folder / "task.json").read_text())
    (folder / "task.json").write_text(json.dumps(content | wrong))
    with pytest.raises(UserError, match=r"must be a list, not 5|must be a whole number, not|does not fit the task"):
        load_finetuned(folder, torch.device("cpu"))
