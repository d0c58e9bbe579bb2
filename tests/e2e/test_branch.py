"""Prevents: a branch that takes other samples or steps than its trunk would have, loses the trunk's past, goes back to
the trunk once it has a checkpoint of its own, or begins from something else than its recipe names."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from gloria import checkpoints, show
from gloria.dist.checkpoint_read import find_checkpoint, read_full_tensors, read_trainer
from gloria.errors import run_command
from gloria.pretrain import main
from tests import launch
from tests.conftest import REPOSITORY
from tests.launch import SMALL, flags, losses, metrics

WSD = {"schedule.kind": "wsd", "schedule.decay_steps": 4, "schedule.min_ratio": 0.0}


@pytest.fixture(scope="module")
def recipe(sample_corpus: Path) -> dict[str, Any]:
    """The demo's recipe, small: constant for 8 steps, then a decay of 4."""
    config = REPOSITORY / "launch/demo.toml"
    return {"config": config, "data.corpus": sample_corpus, **SMALL, **WSD, "checkpoint.keep": 9}


@pytest.fixture(scope="module")
def trunk(recipe: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of 12 steps, which saved after 4, 8 and 12."""
    folder = tmp_path_factory.mktemp("trunk") / "trunk"
    assert main(flags(recipe, run__dir=folder)) == 0
    return folder


@pytest.fixture
def branch(recipe: dict[str, Any], trunk: Path, tmp_path: Path) -> Callable[..., Path]:
    """`branch(name, step)`: a branch of the trunk, run to its end; gives its folder."""

    def branch(name: str, step: int, **changes: Any) -> Path:
        source = {"run.branch": f"{trunk}@{step}", "run.dir": tmp_path / name}
        assert main(flags(recipe | source, **changes)) == 0
        return tmp_path / name

    return branch


def samples(run: Path, steps: int) -> list[tuple[str, int, int]]:
    """What `gloria.show` says of the samples of the first steps."""
    mixture, _ = show.read_run(run)
    rows = (row for step in range(steps) for row in show.samples_of(mixture, step, world=1))
    return [(row["source"], row["epoch"], row["window"]) for row in rows]


def assert_same_end(one: Path, other: Path) -> None:
    """The newest checkpoints are equal: every tensor, the place in the mixture, and what was counted."""
    ends = [find_checkpoint(run) for run in (one, other)]
    tensors = [dict(read_full_tensors(end)) for end in ends]
    assert tensors[0].keys() == tensors[1].keys()
    assert all(torch.equal(tensor, tensors[1][name]) for name, tensor in tensors[0].items())
    states = [read_trainer(end) for end in ends]
    for key in ("mixture", "tokens", "skips", "running_norm", "schedule", "rng"):
        assert states[0][key] == states[1][key], key


def test_without_a_change_it_is_the_trunk_to_the_last_bit(branch, trunk, capsys):
    capsys.readouterr()
    end = branch("end", 8)
    printed = capsys.readouterr().out
    assert f"\nbranch      of {trunk} at step 8\n" in printed
    assert losses(end) == {step: loss for step, loss in losses(trunk).items() if step > 8}
    assert samples(end, 14) == samples(trunk, 14)  # what the trunk took before the branch, too
    start = metrics(end, "event")[0]
    assert (start["event"], start["step"]) == ("start", 8)
    assert start["ancestors"] == [{"run": str(trunk), "step": 8}]
    assert_same_end(end, trunk)


def test_killed_and_without_its_trunk_it_goes_on_by_itself(recipe, trunk, tmp_path):
    """On two ranks: by its own checkpoints, of which the first is made before its first step."""
    source, folder = tmp_path / "source", tmp_path / "run"
    shutil.copytree(trunk, source)
    arguments = flags(recipe, run__branch=f"{source}@4", run__dir=folder)
    killed = launch.start(arguments, 2, tmp_path)
    launch.wait_for_step(folder, 4, killed, event="checkpoint")
    killed.kill()
    shutil.rmtree(source)
    launch.run(arguments, 2, tmp_path)
    assert losses(folder) == pytest.approx({s: loss for s, loss in losses(trunk).items() if s > 4}, rel=1e-5)
    assert samples(folder, 14) == samples(trunk, 14)
    assert read_trainer(find_checkpoint(folder))["ancestors"] == [{"run": str(source), "step": 4}]


def test_another_mixture_batch_and_length_from_the_branch_on(branch, trunk, recipe, tmp_path, capsys):
    folder = branch("other", 4, train__global_batch=24, train__steps=10, data__weights__cartas=0, valid__every=2)
    state = read_trainer(find_checkpoint(folder))
    assert state["tokens"] == (4 * 12 + 6 * 24) * 32
    assert [stage["start"] for stage in state["mixture"]["stages"]] == [0, 4 * 12]
    assert [size["sample"] for size in state["mixture"]["batches"]] == [0, 4 * 12]
    taken = samples(folder, 10)
    assert taken[: 4 * 12] == samples(trunk, 4)
    assert len(set(taken)) == 4 * 12 + 6 * 24  # goes on in each source where the trunk stopped
    assert {name for name, _, _ in taken[4 * 12 :]} == {"enciclopedia", "parlamento", "dialogos"}
    assert [line["step"] for line in metrics(folder, "valid")] == [4, 6, 8, 10]

    second = {"run.branch": folder, "run.dir": tmp_path / "second"}  # its newest: a branch of a branch
    assert main(flags(recipe | second, train__global_batch=24, train__steps=12)) == 0
    line = f"of {folder} at step 10, a branch of {trunk} at step 4"
    capsys.readouterr()
    assert show.main(["--run", str(tmp_path / "second"), "--step", "2"]) == 0
    assert capsys.readouterr().err == f"branch: {line}\n"
    assert checkpoints.main(["--run", str(tmp_path / "second")]) == 0
    assert capsys.readouterr().out.splitlines()[0] == f"branch {line}"


@pytest.mark.parametrize(
    ("changes", "error"),
    [
        ({"run.branch": "nowhere"}, "run.branch: nowhere is not a folder; name a run's folder, RUN or RUN@STEP"),
        ({"run.branch": "{trunk}@5"}, "run.branch: {trunk} holds no checkpoint of step 5; there are steps 4, 8, 12"),
        ({"run.branch": "{tmp}"}, "run.branch: {tmp}/checkpoints holds no checkpoint; name a run that has one"),
        ({"run.dir": "{trunk}"}, "run.branch: {trunk} is this run itself; give the branch another run.dir"),
        (
            {"run.resume": 4},
            "run.resume: 4 goes back in a run, and run.branch begins one; leave one of them out",
        ),
        ({"model.window_size": 8}, "model.window_size: the run's is 16, not 8; set 16, or begin another run"),
        ({"model.vocab_size": 4096}, "model.vocab_size: the run's is 2048, not 4096; set 2048, or begin another run"),
        (
            {"train.steps": 8},
            "train.steps: 8 in all, and the branch begins after step 8 of {trunk}, which counts; set more than 8",
        ),
        ({"run.seed": 5}, "run.seed: the run began with 1, not 5; set 1, or begin another run"),
        ({"run.dir": "{other}"}, "run.branch: {other} holds a run that is no branch; choose another run.dir"),
    ],
)
def test_what_cannot_be_is_one_line(recipe, trunk, tmp_path, capsys, changes, error):
    names = {"trunk": trunk, "tmp": tmp_path, "other": tmp_path / "other"}
    if changes.get("run.dir") == "{other}":
        shutil.copytree(trunk, tmp_path / "other")
    asked = {"run.branch": f"{trunk}@8", "run.dir": tmp_path / "branch", **changes}
    asked = {key: value.format(**names) if isinstance(value, str) else value for key, value in asked.items()}
    capsys.readouterr()
    assert run_command(main, flags(recipe | asked)) == 2
    assert capsys.readouterr().err.splitlines()[-1] == f"error: --{error.format(**names)}"


def test_weights_come_from_the_trunk_and_from_nowhere_else(branch, trunk, recipe, tmp_path, capsys):
    """A folder named beside it is refused; where the trunk began from it, it only says what the shape is."""
    from gloria.export import main as export

    assert export(["--run", str(trunk), "--out", str(tmp_path / "model")]) in (0, None)
    plain = {key: value for key, value in recipe.items() if not key.startswith("model.")}
    started = plain | {"model.from": tmp_path / "model", "train.steps": 6, "schedule.warmup_steps": 0}
    capsys.readouterr()
    wrong = started | {"run.branch": f"{trunk}@4", "run.dir": tmp_path / "wrong"}
    assert run_command(main, flags(wrong)) == 2
    assert capsys.readouterr().err.splitlines()[-1] == (
        f"error: --model.from: the weights are those of {trunk}@4; leave model.from or run.branch out"
    )
    assert main(flags(started, run__dir=tmp_path / "began")) == 0
    again = started | {"run.branch": f"{tmp_path}/began@4", "run.dir": tmp_path / "again"}
    assert main(flags(again)) == 0
    assert_same_end(tmp_path / "again", tmp_path / "began")


def test_a_run_stays_the_branch_that_it_is(branch, trunk, recipe, tmp_path, capsys):
    folder = branch("one", 8)
    capsys.readouterr()
    assert run_command(main, flags(recipe, run__branch=f"{trunk}@4", run__dir=folder)) == 2
    assert capsys.readouterr().err.splitlines()[-1] == (
        f"error: --run.branch: {folder} is a branch of {trunk} at step 8, not of {trunk}@4; choose another run.dir, or "
        "leave run.branch out to continue"
    )
    assert main(flags(recipe, run__dir=folder, train__steps=14)) == 0  # without run.branch it is an ordinary run
    assert read_trainer(find_checkpoint(folder))["ancestors"] == [{"run": str(trunk), "step": 8}]
