"""Prevents: a disk that refuses one rank ending the run, or nobody hearing of it; a run called done whose last steps
are nowhere; a job script that is misled; an export that mixes two checkpoints."""

from __future__ import annotations

import resource
import signal
import threading
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import gloria.dist.checkpoint
import gloria.export
import gloria.train.checkpointing
from gloria.checkpoints import main as checkpoints
from gloria.dist.checkpoint_read import find_checkpoint, read_full_tensors, verify
from gloria.dist.manifest import checkpoint_path, saved_steps
from gloria.dist.retention import remove_checkpoint
from gloria.dist.run_lock import read_status
from gloria.errors import run_command
from gloria.pretrain import main
from tests import launch
from tests.launch import SMALL, flags, losses, metrics


@pytest.fixture
def recipe(sample_corpus: Path, repository: Path, tmp_path: Path) -> dict[str, Any]:
    """The demo's recipe, small, saving in the background every 4 of 12 steps."""
    config = repository / "launch/demo.toml"
    return {"config": config, "data.corpus": sample_corpus, **SMALL, "checkpoint.keep": 9, "run.dir": tmp_path / "run"}


def events(run_dir: Path, *kinds: str) -> list[tuple[int, str]]:
    return [(line["step"], line["event"]) for line in metrics(run_dir, "event") if line["event"] in kinds]


def status_of(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> tuple[int, str]:
    """What `gloria.checkpoints --status` exits with, and its line without launch and age."""
    capsys.readouterr()
    status = run_command(checkpoints, ["--run", str(run_dir), "--status"])
    return status, capsys.readouterr().out.partition(";")[0]


def refuse_writes(steps: set[int], only_rank: int) -> None:
    """From here on this process cannot write a rank's file at these steps, if it is that rank."""
    begin_save = gloria.train.checkpointing.begin_save

    def begin(run_dir: Path, step: int, *arguments: Any, rank: int, **options: Any) -> Any:
        refused = step in steps and rank == only_rank
        limit = 50_000 if refused else resource.RLIM_INFINITY  # bytes of a file; a rank's has some hundred thousand
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
        return begin_save(run_dir, step, *arguments, rank=rank, **options)

    gloria.train.checkpointing.begin_save = begin


def test_a_save_that_fails_on_one_rank_is_reported_and_tried_again(recipe, tmp_path, capsys):
    run_dir = tmp_path / "run"
    ended = launch.run(flags(recipe), 2, tmp_path, partial(refuse_writes, {4}, 1))
    assert events(run_dir, "checkpoint", "checkpoint_failed") == [
        (4, "checkpoint_failed"),
        (8, "checkpoint"),
        (12, "checkpoint"),
    ]
    assert f"warning: {checkpoint_path(run_dir, 4)}: not saved; rank 1: OSError: [Errno 27] File too large" in (
        ended.text().splitlines()
    )
    assert sorted(losses(run_dir)) == list(range(1, 13))
    assert sorted(path.name for path in (run_dir / "checkpoints").iterdir()) == [
        "latest",
        "step-00000008",
        "step-00000012",
    ]
    assert run_command(checkpoints, ["--run", str(run_dir), "--verify"]) == 0
    assert status_of(run_dir, capsys) == (0, "done, step 12")


@pytest.mark.parametrize("only_rank", [0, 1])
def test_a_run_whose_end_cannot_be_saved_is_reported_and_continues_later(recipe, tmp_path, capsys, only_rank):
    run_dir = tmp_path / "run"
    failed = launch.start(flags(recipe), 2, tmp_path, partial(refuse_writes, {8, 12}, only_rank))
    assert failed.wait() == [1, 1], failed.text()
    assert failed.text().splitlines()[-1] == (
        f"error: {run_dir}: the last checkpoint could not be written; the newest checkpoint is of step 4"
    )
    assert saved_steps(run_dir) == [4]
    assert verify(checkpoint_path(run_dir, 4)) == []
    assert status_of(run_dir, capsys) == (1, "failed, step 12, the last checkpoint could not be written")
    launch.run(flags(recipe), 2, tmp_path)
    assert saved_steps(run_dir) == [4, 8, 12]
    assert status_of(run_dir, capsys) == (0, "done, step 12")


def test_a_save_still_under_way_at_the_next_interval_is_waited_for_and_reported(recipe, tmp_path, monkeypatch):
    gate = threading.Event()
    write, finish = gloria.dist.checkpoint.write_tensor_file, gloria.train.checkpointing.finish

    def slow_write(*arguments: Any, **options: Any) -> tuple[int, str]:
        assert gate.wait(60)
        return write(*arguments, **options)

    def opening(save: Any) -> bool:
        gate.set()
        return finish(save)

    monkeypatch.setattr(gloria.dist.checkpoint, "write_tensor_file", slow_write)
    monkeypatch.setattr(gloria.train.checkpointing, "finish", opening)
    assert main(flags(recipe)) == 0
    reported = events(tmp_path / "run", "checkpoint", "checkpoint_wait")
    assert reported[:2] == [(8, "checkpoint_wait"), (4, "checkpoint")]
    assert [step for step, event in reported if event == "checkpoint"] == [4, 8, 12]
    (waited, *_) = [line for line in metrics(tmp_path / "run", "event") if line["event"] == "checkpoint_wait"]
    assert waited["for_step"] == 4


@pytest.mark.parametrize("asynchronous", ["true", "false"])
def test_older_checkpoints_go_and_milestones_stay(recipe, tmp_path, asynchronous):
    recipe |= {"checkpoint.every": 2, "checkpoint.keep": 2, "checkpoint.keep_every": 6}
    assert main(flags(recipe, checkpoint__asynchronous=asynchronous)) == 0
    assert saved_steps(tmp_path / "run") == [6, 10, 12]
    assert (tmp_path / "run/checkpoints/latest").read_text() == "step-00000012\n"


def test_a_job_script_learns_the_state_of_a_run_and_a_live_one_can_be_exported(recipe, tmp_path, capsys):
    run_dir = tmp_path / "run"
    recipe |= {"train.steps": 100_000, "schedule.kind": "constant", "schedule.min_ratio": 0.0}
    under_way = launch.start(flags(recipe, checkpoint__keep_every=4), 1, tmp_path)
    launch.wait_for_step(run_dir, 10, under_way)
    assert run_command(gloria.export.main, ["--run", str(run_dir), "--out", str(tmp_path / "model")]) == 0
    reported = capsys.readouterr().out
    assert status_of(run_dir, capsys)[0] == 75
    assert read_status(run_dir).alive
    under_way.signal(signal.SIGUSR1, rank=0)
    assert under_way.wait() == [0], under_way.text()
    stopped_at = read_status(run_dir).step
    assert status_of(run_dir, capsys) == (75, f"stopped, step {stopped_at}, SIGUSR1")

    exported = load_file(tmp_path / "model" / "model.safetensors")
    source = dict(read_full_tensors(Path(reported.split(" from ")[1].strip()), "model."))
    for name, tensor in exported.items():
        if name != "lm_head.weight":  # the embedding again, where the format writes it at all
            assert torch.equal(tensor, source[name][: len(tensor)]), name

    killed = launch.start(flags(recipe), 1, tmp_path)
    launch.wait_for_step(run_dir, stopped_at + 1, killed)
    killed.kill()
    status, line = status_of(run_dir, capsys)
    assert status == 75
    assert line.startswith("dead (it was running, its launch is gone), step ")


@pytest.mark.parametrize("replaced", [False, True], ids=["deleted", "replaced"])
def test_a_checkpoint_that_goes_while_it_is_exported_gives_a_line_and_no_model(
    recipe, tmp_path, monkeypatch, capsys, replaced
):
    """Its run prunes it, or is sent back and comes by the same step again with other weights."""
    assert main(flags(recipe, train__steps=4)) == 0
    run_dir, other = tmp_path / "run", tmp_path / "other"
    path = checkpoint_path(run_dir, 4)
    if replaced:
        assert main(flags(recipe, train__steps=4, run__dir=other, optim__lr=1.0)) == 0
    read = gloria.export.read_full_tensors

    def read_meanwhile(*arguments: Any) -> Iterator[tuple[str, torch.Tensor]]:
        for number, item in enumerate(read(*arguments)):
            if number == 2:
                remove_checkpoint(path)
                if replaced:
                    checkpoint_path(other, 4).rename(path)
            yield item

    monkeypatch.setattr(gloria.export, "read_full_tensors", read_meanwhile)
    capsys.readouterr()
    assert run_command(gloria.export.main, ["--run", str(run_dir), "--out", str(tmp_path / "model")]) == 2
    assert capsys.readouterr().err.splitlines() == [
        f"error: {path}: its run has deleted or replaced it while it was read; read a newer one"
    ]
    assert sorted(entry.name for entry in tmp_path.iterdir()) == (["other", "run"] if replaced else ["run"])


def test_checkpoints_that_were_pruned_during_the_search_give_way_to_newer_ones(recipe, tmp_path, monkeypatch, capsys):
    """Verifying takes minutes for a large model; the run saves and prunes meanwhile."""
    run_dir = tmp_path / "run"
    recipe |= {"checkpoint.every": 2, "schedule.kind": "constant", "schedule.min_ratio": 0.0}
    assert main(flags(recipe, train__steps=4)) == 0
    verify_files = gloria.dist.checkpoint_read.verify
    steps: list[int] = []

    def verify_meanwhile(path: Path, *arguments: Any) -> list[str]:
        if not steps:
            steps.append(0)
            assert main(flags(recipe, train__steps=8, checkpoint__keep=2)) == 0
        return verify_files(path, *arguments)

    monkeypatch.setattr(gloria.dist.checkpoint_read, "verify", verify_meanwhile)
    assert find_checkpoint(run_dir) == checkpoint_path(run_dir, 8)
    assert f"warning: {checkpoint_path(run_dir, 4)}: cannot be read (No such file or directory); " in (
        capsys.readouterr().err
    )
