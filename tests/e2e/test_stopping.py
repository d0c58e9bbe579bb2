"""Prevents: a stop that loses steps, is not acted on for minutes, leaves ranks behind, or makes the next launch start
from something else."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch

import gloria.dist.checkpoint
import gloria.pretrain
import gloria.train.loop
import gloria.train.windows
from gloria.dist.checkpoint_read import find_checkpoint, open_reader, read_full_tensors
from gloria.dist.run_lock import read_status
from tests import launch
from tests.launch import SMALL, flags, losses, metrics
from tests.world import PATIENCE

RANK_1, RANK_0 = "1", "0"


@pytest.fixture
def recipe(sample_corpus: Path, repository: Path) -> dict[str, Any]:
    """The demo's recipe, small, on the sample corpus."""
    return {"config": repository / "launch/demo.toml", "data.corpus": sample_corpus, **SMALL}


def send(number: signal.Signals, rank: str) -> None:
    """Let a rank get a signal here and now."""
    if os.environ["RANK"] == rank:
        os.kill(os.getpid(), number)


def in_start_up() -> None:
    send(signal.SIGTERM, RANK_1)


def in_the_second_validation() -> None:
    """Between two batches of the validation after some steps."""
    honest, calls = gloria.train.windows.window_losses, []

    def window_losses(run: Any, tokens: torch.Tensor, labels: torch.Tensor) -> Any:
        if run.step and not torch.is_grad_enabled():
            calls.append(run.step)
            if len(calls) == 2:
                send(signal.SIGINT, RANK_0)
        return honest(run, tokens, labels)

    gloria.train.windows.window_losses = window_losses


def while_a_background_save_is_written() -> None:
    """The steps behind it wait for the signal, however late the saving thread gets a core."""
    honest, honest_step, sent = gloria.dist.checkpoint.write_tensor_file, gloria.train.loop.forward_backward, []

    def write_tensor_file(*args: Any, **kwargs: Any) -> Any:
        if threading.current_thread() is not threading.main_thread():
            send(signal.SIGUSR2, RANK_1)
            sent.append(1)
            time.sleep(0.1)
        return honest(*args, **kwargs)

    def forward_backward(run: Any, batch: Any) -> torch.Tensor:
        if run.step == 9:
            launch.wait_until(lambda: sent)
        return honest_step(run, batch)

    gloria.dist.checkpoint.write_tensor_file = write_tensor_file
    gloria.train.loop.forward_backward = forward_backward


def in_a_step() -> None:
    honest = gloria.train.loop.forward_backward

    def forward_backward(run: Any, batch: Any) -> torch.Tensor:
        if run.step == run.first_step + 1:
            send(signal.SIGUSR1, RANK_0)
        return honest(run, batch)

    gloria.train.loop.forward_backward = forward_backward


def test_stopped_by_every_signal_in_every_phase_and_continued_with_it_is_the_same_run(recipe, tmp_path):
    recipe |= {"train.steps": 24, "valid.every": 6, "valid.windows": 12}
    launch.run(flags(recipe, run__dir=tmp_path / "whole"), 2, tmp_path)
    folder = tmp_path / "stopped"
    options, at = flags(recipe, run__dir=folder), []
    moments = (
        in_start_up,
        in_the_second_validation,
        while_a_background_save_is_written,
        in_start_up,
        in_a_step,
    )
    for moment in moments:
        launch.run(options, 2, tmp_path, prepare=moment)
        status = read_status(folder)
        assert (status.status, status.alive) == ("stopped", False), moment
        at.append(status.step)
        if status.step:
            assert open_reader(find_checkpoint(folder)).step == status.step
    assert at[:2] == [0, 6]  # nothing done yet; in the midst of the validation
    assert 8 < at[2] < 12  # begun behind step 8, acted on before the next validation
    assert at[3:] == [at[2], at[2] + 2]
    launch.run(options, 2, tmp_path)
    assert read_status(folder).status == "done"
    assert losses(folder) == losses(tmp_path / "whole")
    valid = [(line["step"], line["loss"]) for line in metrics(folder, "valid")]
    assert valid == [(line["step"], line["loss"]) for line in metrics(tmp_path / "whole", "valid")]
    one, other = (dict(read_full_tensors(find_checkpoint(run))) for run in (folder, tmp_path / "whole"))
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_the_time_of_a_launch_is_over(recipe, tmp_path):
    """Behind so little time that start-up takes all of it: stopped at once, and no step lost to the next launch."""
    folder = tmp_path / "run"
    launch.run(flags(recipe, run__dir=folder, run__max_minutes=0.00001), 2, tmp_path)
    status = read_status(folder)
    assert (status.status, status.step, status.reason) == ("stopped", 0, "run.max_minutes are over")
    launch.run(flags(recipe, run__dir=folder, run__max_minutes=60), 2, tmp_path)
    assert read_status(folder).status == "done"


def test_a_second_ctrl_c_ends_at_once(recipe, tmp_path):
    options = flags(recipe, train__steps=5000, checkpoint__every=5000, run__dir=tmp_path / "run")
    under_way = launch.start(options, 1, tmp_path, prepare=_endless_step)
    launch.wait_until(lambda: "in the endless step" in under_way.text(), under_way)
    under_way.signal(signal.SIGINT, rank=0)
    launch.wait_until(lambda: "SIGINT: the run saves and stops after this step" in under_way.text(), under_way)
    under_way.signal(signal.SIGINT, rank=0)
    assert under_way.wait() == [-signal.SIGINT]
    assert not (tmp_path / "run" / "checkpoints" / "latest").exists()


def _endless_step() -> None:
    honest = gloria.train.loop.forward_backward

    def forward_backward(run: Any, batch: Any) -> torch.Tensor:
        if run.step == 3:
            print("in the endless step", flush=True)
            time.sleep(10_000)
        return honest(run, batch)

    gloria.train.loop.forward_backward = forward_backward


def test_a_rank_that_dies_after_sigterm_ends_the_others_at_once_without_a_save(recipe, tmp_path):
    """As torchrun and Slurm do it: SIGTERM to all, and one that is slow is killed."""
    options = flags(recipe, train__steps=5000, checkpoint__every=10, run__dir=tmp_path / "run")
    under_way = launch.start(options, 2, tmp_path, prepare=_rank_1_dies_of_sigterm)
    launch.wait_for_step(tmp_path / "run", 12, under_way)
    launch.wait_for_step(tmp_path / "run", 10, under_way, event="checkpoint")
    under_way.signal(signal.SIGTERM, rank=0)
    under_way.signal(signal.SIGTERM, rank=1)
    assert under_way.wait() == [0, -signal.SIGTERM], under_way.text()
    status = read_status(tmp_path / "run")
    assert status.status == "stopped"
    assert status.step % 10 == 0
    assert open_reader(find_checkpoint(tmp_path / "run")).step == status.step
    assert "rank 1 gives no sign (stopped or dead); nothing saved" in status.reason


def _rank_1_dies_of_sigterm() -> None:
    if os.environ["RANK"] == RANK_1:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


def test_torchrun_hands_its_signal_on(recipe, tmp_path, repository):
    folder = tmp_path / "run"
    options = flags(recipe, train__steps=5000, checkpoint__every=5000, run__dir=folder)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    with (tmp_path / "output").open("wb") as output:
        process = subprocess.Popen(
            [*command, "-m", "gloria.pretrain", *options], cwd=repository, stdout=output, stderr=output
        )
        under_way = launch.Launch([], tmp_path / "output")
        launch.wait_for_step(folder, 3, under_way)
        process.send_signal(signal.SIGTERM)
        process.wait(PATIENCE)
    status = read_status(folder)
    assert (status.status, status.reason) == ("stopped", "SIGTERM"), under_way.text()
    assert open_reader(find_checkpoint(folder)).step == status.step >= 3
