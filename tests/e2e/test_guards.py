"""Prevents: one bad batch, one sleeping or dead rank or too large a batch that ruins a run, hangs it for ever, or ends
it without a word of what and where."""

from __future__ import annotations

import gzip
import json
import math
import os
import signal
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

import gloria.pretrain
import gloria.train.loop
import gloria.train.windows
from gloria.dist import step_sums
from gloria.dist.checkpoint_read import find_checkpoint, read_full_tensors
from gloria.dist.manifest import saved_steps
from gloria.dist.run_lock import read_status
from gloria.pretrain import main
from tests import launch
from tests.launch import SMALL, flags, losses, metrics
from tests.world import PATIENCE

CONSTANT = {"schedule.kind": "constant", "schedule.min_ratio": 0.0, "schedule.warmup_steps": 0}


@pytest.fixture
def recipe(sample_corpus: Path, repository: Path, tmp_path: Path) -> dict[str, Any]:
    """The demo's recipe, small, on the sample corpus."""
    config = repository / "launch/demo.toml"
    return {"config": config, "data.corpus": sample_corpus, **SMALL, "run.dir": tmp_path / "run"}


def assert_same_tensors(found: Path, expected: Path) -> None:
    one, other = (dict(read_full_tensors(find_checkpoint(run))) for run in (found, expected))
    assert one.keys() == other.keys()
    assert [name for name in one if not torch.equal(one[name], other[name])] == []


def events(run_dir: Path, name: str) -> list[dict[str, Any]]:
    return [line for line in metrics(run_dir, "event") if line["event"] == name]


# --- updates left out


def plant_in_a_gradient_of_rank_1(value: float) -> None:
    """At the sixth step, in one place."""
    honest = gloria.train.loop.forward_backward

    def forward_backward(run: Any, batch: Any) -> torch.Tensor:
        losses = honest(run, batch)
        if run.step == 5 and run.process.rank == 1:
            next(run.model.parameters()).grad.to_local()[0, 0] = value
        return losses

    gloria.train.loop.forward_backward = forward_backward


def test_a_nan_in_one_gradient_of_one_rank_is_as_if_the_batch_had_not_been(recipe, tmp_path):
    recipe |= CONSTANT
    launch.run(flags(recipe), 2, tmp_path, prepare=partial(plant_in_a_gradient_of_rank_1, math.nan))
    (event,) = events(tmp_path / "run", "skipped")
    assert (event["step"], event["why"], event["samples"], event["in_a_row"]) == (6, "not finite", "60:72", 1)
    launch.run(flags(recipe, train__steps=11, data__skip_samples="60:72", run__dir=tmp_path / "without"), 2, tmp_path)
    assert_same_tensors(tmp_path / "run", tmp_path / "without")
    found, without = losses(tmp_path / "run"), losses(tmp_path / "without")
    assert [found[step] for step in (*range(1, 6), *range(7, 13))] == list(without.values())
    assert [line["skipped"] for line in metrics(tmp_path / "run", "train")] == [0] * 5 + [1] + [0] * 6


def test_a_spike_is_left_out_and_judged_alike_after_a_resume(recipe, tmp_path, monkeypatch):
    monkeypatch.setattr(step_sums, "SPIKE_WINDOW", 4)
    honest = gloria.train.windows.window_losses

    def window_losses(run: Any, tokens: torch.Tensor, labels: torch.Tensor) -> Any:
        loss, rows = honest(run, tokens, labels)
        return (20.0 * loss, 20.0 * rows) if run.step == 8 else (loss, rows)

    recipe |= CONSTANT | {"train.skip_spikes": 30.0}
    monkeypatch.setattr(gloria.train.windows, "window_losses", window_losses)
    assert main(flags(recipe)) == 0
    (event,) = events(tmp_path / "run", "skipped")
    assert (event["step"], event["why"], event["samples"]) == (9, "spike", "96:108")
    for steps in (7, 12):  # what is usual comes from before the resume
        assert main(flags(recipe, train__steps=steps, run__dir=tmp_path / "resumed")) == 0
    assert_same_tensors(tmp_path / "resumed", tmp_path / "run")
    assert events(tmp_path / "resumed", "skipped")[0]["step"] == 9
    monkeypatch.setattr(gloria.train.windows, "window_losses", honest)
    assert main(flags(recipe, train__steps=11, data__skip_samples="96:108", run__dir=tmp_path / "without")) == 0
    assert_same_tensors(tmp_path / "run", tmp_path / "without")


# --- ranks that hang or die


def test_a_sleeping_rank_is_named_and_ends_when_it_wakes(recipe, tmp_path):
    folder = tmp_path / "run"
    options = flags(recipe, train__steps=100000, checkpoint__every=100000, dist__step_timeout_minutes=0.1)
    under_way = launch.start(options, 2, tmp_path)
    launch.wait_for_step(folder, 5, under_way)
    under_way.signal(signal.SIGSTOP, rank=1)
    under_way.processes[0].join(PATIENCE)
    assert under_way.processes[0].exitcode == 1, under_way.text()
    status = read_status(folder)
    assert (status.status, status.alive) == ("failed", False)
    assert "rank 1 gives no sign (stopped or dead)" in status.reason
    log = (folder / "logs" / "rank-00000.log").read_text()
    (place,) = [json.loads(line[7:]) for line in log.splitlines() if line.startswith("where: ")]
    assert (place["rank"], place["step"], place["what"]) == (0, status.step, "no progress")
    assert place["phase"] in ("forward and backward", "update", "sums")
    assert "most recent call first" in log
    flight = json.loads((folder / "logs" / "rank-00000.flight.json").read_text())
    assert flight["entries"][-1]["state"] != "completed"
    under_way.signal(signal.SIGCONT, rank=1)
    assert under_way.wait()[1] == 1, under_way.text()
    assert (folder / "logs" / "rank-00001.log").exists()


def test_a_rank_that_is_killed_ends_the_others_and_the_run_continues_from_its_checkpoint(recipe, tmp_path):
    options = flags(recipe, train__steps=5000)
    under_way = launch.start(options, 2, tmp_path)
    launch.wait_for_step(tmp_path / "run", 9, under_way)
    launch.wait_for_step(tmp_path / "run", 8, under_way, event="checkpoint")
    os.kill(under_way.processes[1].pid, signal.SIGKILL)
    assert under_way.wait() == [1, -signal.SIGKILL], under_way.text()
    status = read_status(tmp_path / "run")
    assert status.status == "failed"
    assert status.reason.endswith("rank 1 gives no sign (stopped or dead)")
    saved = saved_steps(tmp_path / "run")[-1]
    assert 8 <= saved <= status.step
    launch.run(flags(recipe, train__steps=saved + 1), 2, tmp_path)
    assert events(tmp_path / "run", "resume")[-1]["step"] == saved


def rank_1_has_a_defect() -> None:
    honest = gloria.train.loop.forward_backward

    def forward_backward(run: Any, batch: Any) -> torch.Tensor:
        if run.step == 3 and run.process.rank == 1:
            raise ValueError("a defect")
        return honest(run, batch)

    gloria.train.loop.forward_backward = forward_backward


def test_a_defect_on_another_rank_is_what_the_status_says(recipe, tmp_path):
    under_way = launch.start(flags(recipe), 2, tmp_path, prepare=rank_1_has_a_defect)
    assert under_way.wait() == [1, 1]
    assert 'raise ValueError("a defect")' in under_way.text()
    status = read_status(tmp_path / "run")
    assert status.status == "failed"
    assert status.reason.endswith("rank 1 failed (ValueError: a defect)")


# --- a launch that may not go on


def test_out_of_memory_is_one_line_with_what_to_do(recipe, tmp_path, monkeypatch, capsys):
    def window_losses(run: Any, tokens: torch.Tensor, labels: torch.Tensor) -> Any:
        return torch.empty(1 << 60, dtype=torch.uint8)

    monkeypatch.setattr(gloria.train.windows, "window_losses", window_losses)
    assert main(flags(recipe, train__micro_batch=12)) == 1
    line = (
        "out of memory on rank 0 in step 0, forward and backward, with train.micro_batch 12 x 32 tokens; "
        "set train.micro_batch to 6, train.activation_checkpointing to full, or take more ranks"
    )
    assert capsys.readouterr().err.splitlines()[-1] == f"error: {line}"
    status = read_status(tmp_path / "run")
    assert (status.status, status.reason, status.alive) == ("failed", line, False)


@pytest.mark.parametrize("in_validation", [False, True])
def test_a_launch_whose_run_was_taken_over_stops_and_writes_nothing(
    recipe, tmp_path, monkeypatch, capsys, in_validation
):
    honest = gloria.train.windows.window_losses

    def window_losses(run: Any, tokens: torch.Tensor, labels: torch.Tensor) -> Any:
        if run.step == 6 and torch.is_grad_enabled() != in_validation:
            run.run_lock.lost = True
        return honest(run, tokens, labels)

    monkeypatch.setattr(gloria.train.windows, "window_losses", window_losses)
    # In the background, the save of step 4 may not be whole by step 6: an unfinished one is given up.
    assert main(flags(recipe, valid__every=6 if in_validation else 0, checkpoint__asynchronous="false")) == 1
    assert capsys.readouterr().err.splitlines()[-1] == (
        f"error: {tmp_path / 'run'}: another launch has taken the run over; the newest checkpoint is of step 4"
    )
    assert saved_steps(tmp_path / "run") == [4]
    assert read_status(tmp_path / "run").status == "running"
    assert not events(tmp_path / "run", "failed")


def test_of_two_launches_at_once_one_wins_and_a_third_is_refused(recipe, tmp_path):
    options = flags(recipe, train__steps=100000, checkpoint__every=100000)
    both = [launch.start(options, 1, tmp_path / str(number)) for number in range(2)]
    launch.wait_for_step(tmp_path / "run", 1, launch.Launch([], both[0].output))
    while all(one.processes[0].exitcode is None for one in both):
        both[0].processes[0].join(0.05)
    (loser,) = (one for one in both if one.processes[0].exitcode is not None)
    (winner,) = (one for one in both if one is not loser)
    third = launch.start(options, 1, tmp_path)
    assert (loser.wait(), third.wait()) == ([2], [2])
    for refused in (loser, third):
        assert f"error: {tmp_path / 'run'}: launch " in refused.text()
    winner.kill()
    # Nothing but the lock is left of it, and that is stale.
    launch.run(flags(recipe, train__steps=2), 1, tmp_path)
    assert read_status(tmp_path / "run").status == "done"


def test_a_trace_of_some_steps(recipe, tmp_path):
    assert main(flags(recipe, train__steps=4, train__profile_steps="1:3")) == 0
    path = tmp_path / "run" / "profile" / "steps-1-3-rank-00000.json.gz"
    names = [event.get("name", "") for event in json.loads(gzip.decompress(path.read_bytes()))["traceEvents"]]
    assert sum("Optimizer.step" in name for name in names) == 2
    assert events(tmp_path / "run", "profile")[0]["path"] == str(path)


@pytest.mark.parametrize(("key", "value"), [("train.profile_steps", "3"), ("data.skip_samples", "90:60")])
def test_a_range_that_is_none_is_refused(recipe, key, value, capsys):
    from gloria.errors import run_command

    assert run_command(main, flags(recipe | {key: value})) == 2
    assert capsys.readouterr().err.splitlines() == [
        f'error: --{key}: "{value}" is no range; give A:B with A before B, such as 96:120'
    ]
