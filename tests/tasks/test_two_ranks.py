"""Bugs prevented: ranks that see other batches or leave rows out, gradients that depend on how a batch is dealt out,
and answers that depend on the number of ranks."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import gloria.finetune as finetune
import gloria.train.group
from gloria.dist.process import Process, start_process_group, stop_process_group
from tests.tasks.models.test_padding import examples_of, make_finetuned, outputs
from tests.tasks.test_finetune import command, results
from tests.tasks.tiny import make_folder, write_assin, write_squad
from tests.world import run_world

KINDS = [("gpt_neo", "assin2"), ("gpt_neo", "faquad"), ("bert", "assin2"), ("bert", "faquad")]
# Batches of 5 of 16: the ranks have unequal shares, the last micro-batch is smaller, the last batch has one row.
FLAGS = {"train__steps": 7, "train__global_batch": 5, "train__micro_batch": 2, "eval__every": 7}


def on_a_rank(rank: int, world: int, arguments: list[str], folders: list[Path], data: Path) -> list[np.ndarray]:
    """Fine-tune, then let the models of `folders` answer."""
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world), HF_HUB_OFFLINE="1")
    process = Process(rank, world, torch.device("cpu"))
    gloria.train.group.start_process_group = lambda *_: process
    gloria.train.group.stop_process_group = lambda: None
    assert finetune.main(arguments) == 0
    return [outputs(folder, examples_of(folder, data), 3, process)[0] for folder in folders]


@pytest.fixture(scope="module")
def worlds(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, list[np.ndarray]]]:
    """The run and the answers of one rank, and of two."""
    root = tmp_path_factory.mktemp("ranks")
    data = write_squad(write_assin(root / "data", {"train": 16, "dev": 11, "test": 6}), {"dev": 7}, impossible=True)
    folders = [make_finetuned(family, task, root / f"{family}-{task}") for family, task in KINDS]
    neo = make_folder("gpt_neo", root / "neo")
    arguments = {name: command("assin2", neo, data, root / name, **FLAGS) for name in ("one", "two")}
    two, other = run_world(on_a_rank, 2, arguments["two"], folders, data)
    for first, second in zip(two, other, strict=True):
        assert np.array_equal(first, second)
    assert finetune.main(arguments["one"]) == 0
    alone = start_process_group("cpu", 5)
    one = [outputs(folder, examples_of(folder, data), 3, alone)[0] for folder in folders]
    stop_process_group()
    return {"one": (root / "one", one), "two": (root / "two", two)}


def test_two_ranks_learn_what_one_does(worlds):
    (first, _), (second, _) = worlds["one"], worlds["two"]
    one, two = (load_file(run / "model" / "model.safetensors") for run in (first, second))
    for name in one:
        torch.testing.assert_close(one[name], two[name], atol=2e-5, rtol=1e-4)
    for split, scores in results(first).items():
        assert results(second)[split] == pytest.approx(scores, abs=1e-4)


def test_two_ranks_answer_to_the_bit_what_one_does(worlds):
    for kind, one, two in zip(KINDS, worlds["one"][1], worlds["two"][1], strict=True):
        assert np.array_equal(one, two), kind
