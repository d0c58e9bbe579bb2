"""Prevents: a run that is another one after a kill, a stop or on another number of ranks; steps that are trained but
not logged, or logged twice; an end that is neither saved nor reported."""

from __future__ import annotations

import json
import random
import signal
from pathlib import Path
from typing import Any

import pytest
import torch

from gloria.dist.checkpoint_read import find_checkpoint, open_reader, read_full_tensors
from gloria.dist.run_lock import read_status
from tests import launch
from tests.launch import SMALL, flags, losses, metrics


@pytest.fixture
def recipe(sample_corpus: Path, repository: Path) -> dict[str, Any]:
    """The demo's recipe, small, on the sample corpus."""
    return {"config": repository / "launch/demo.toml", "data.corpus": sample_corpus, **SMALL}


def tensors(run_dir: Path) -> dict[str, torch.Tensor]:
    """Model and optimizer of the newest checkpoint, whole."""
    return dict(read_full_tensors(find_checkpoint(run_dir)))


def assert_same_bits(found: Path, expected: Path) -> None:
    one, other = tensors(found), tensors(expected)
    assert one.keys() == other.keys()
    for name in one:
        assert torch.equal(one[name], other[name]), name
    assert losses(found) == losses(expected)
    assert sorted(losses(found)) == list(range(1, len(losses(found)) + 1))


def test_killed_and_started_again_gives_the_same_bits(recipe, tmp_path):
    """Two ranks, dropout and activation checkpointing on; killed three times at random moments."""
    recipe |= {"model.dropout": 0.1, "train.activation_checkpointing": "full", "train.steps": 24}
    launch.run(flags(recipe, run__dir=tmp_path / "whole"), 2, tmp_path)
    broken = flags(recipe, run__dir=tmp_path / "broken")
    chance = random.Random(5)
    for step in (2, 9, 17):
        killed = launch.start(broken, 2, tmp_path)
        launch.wait_for_step(tmp_path / "broken", step + chance.randrange(3), killed)
        killed.kill()
    launch.run(broken, 2, tmp_path)
    assert_same_bits(tmp_path / "broken", tmp_path / "whole")
    assert len([line for line in metrics(tmp_path / "broken", "event") if line["event"] == "resume"]) == 3
    status = read_status(tmp_path / "broken")
    assert (status.status, status.step, status.alive) == ("done", 24, False)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_to_one_rank_stops_all_after_a_save(recipe, tmp_path, number):
    options = flags(recipe, train__steps=200, checkpoint__every=150, run__dir=tmp_path / "run")
    stopped = launch.start(options, 2, tmp_path)
    launch.wait_for_step(tmp_path / "run", 3, stopped)
    stopped.signal(number, rank=1)
    assert stopped.wait() == [0, 0], stopped.text()
    status = read_status(tmp_path / "run")
    assert status.status == "stopped"
    assert 3 <= status.step < 200
    assert open_reader(find_checkpoint(tmp_path / "run")).step == status.step
    assert max(losses(tmp_path / "run")) == status.step


def test_any_number_of_ranks_gives_the_same_run(recipe, tmp_path):
    for world in (1, 2, 4):
        options = flags(recipe, train__micro_batch=3 if world < 3 else 1, run__dir=tmp_path / str(world))
        launch.run(options, world, tmp_path)
    expected = losses(tmp_path / "1")
    assert sorted(expected) == list(range(1, 13))
    for world in (2, 4):
        found = losses(tmp_path / str(world))
        assert found.keys() == expected.keys()
        for step, loss in found.items():
            assert loss == pytest.approx(expected[step], rel=1e-5), (world, step)
        for mine, theirs in zip(metrics(tmp_path / str(world), "train"), metrics(tmp_path / "1", "train")):
            assert mine["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-4)
            for name, source in theirs["sources"].items():
                assert mine["sources"][name]["share"] == source["share"]
                assert mine["sources"][name]["epoch"] == source["epoch"]


def test_a_run_continues_with_other_ranks(recipe, tmp_path):
    """Begun on two ranks, gone on on one, four and three: the losses of a run that stayed on two."""
    launch.run(flags(recipe, run__dir=tmp_path / "whole"), 2, tmp_path)
    folder = tmp_path / "moved"
    for world, step, micro_batch in ((2, 2, 3), (1, 5, 4), (4, 9, 3), (3, None, 2)):
        options = flags(recipe, train__micro_batch=micro_batch, run__dir=folder, checkpoint__every=1)
        if step is None:
            launch.run(options, world, tmp_path)
            break
        under_way = launch.start(options, world, tmp_path)
        launch.wait_for_step(folder, step, under_way)
        under_way.signal(signal.SIGTERM, rank=0)
        assert under_way.wait() == [0] * world, under_way.text()
    expected, found = losses(tmp_path / "whole"), losses(folder)
    assert found.keys() == expected.keys()
    for step, loss in found.items():
        assert loss == pytest.approx(expected[step], rel=1e-5), step


def test_epochs_validation_and_metrics_as_outside_scripts_read_them(recipe, sample_corpus, tmp_path):
    del recipe["train.steps"]
    recipe |= {"train.epochs": 0.25, "valid.every": 10, "valid.windows": 8, "log.every": 5, "log.tensorboard": "true"}
    launch.run(flags(recipe, run__dir=tmp_path / "run"), 1, tmp_path)
    manifest = json.loads((sample_corpus / "manifest.json").read_text())
    windows = sum((source["train"]["tokens"] - 1) // 32 for source in manifest["sources"])
    steps = -(-windows // (4 * 12))  # a quarter of an epoch
    train = metrics(tmp_path / "run", "train")
    assert [line["step"] for line in train] == list(range(5, steps + 1, 5))
    assert train[0]["tokens"] == 5 * 12 * 32
    assert {"loss", "lr", "grad_norm", "tokens_per_s"} <= train[0].keys()
    assert {name: source["asked"] for name, source in train[0]["sources"].items()} == pytest.approx(
        {"enciclopedia": 0.3, "parlamento": 0.25, "dialogos": 0.25, "cartas": 0.2}, abs=1e-4
    )
    assert sum(source["share"] for source in train[0]["sources"].values()) == pytest.approx(1)
    valid = metrics(tmp_path / "run", "valid")
    assert [line["step"] for line in valid] == [*range(0, steps, 10), steps]
    for name, loss in valid[-1]["sources"].items():
        assert loss < valid[0]["sources"][name], name
    saved = [line["step"] for line in metrics(tmp_path / "run", "event") if line["event"] == "checkpoint"]
    assert saved == sorted({*range(4, steps, 4), steps})
    assert list((tmp_path / "run" / "tensorboard").iterdir())
