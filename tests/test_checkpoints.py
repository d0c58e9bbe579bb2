"""Bug prevented: a tool that calls a damaged checkpoint valid, deletes the wrong one, or gives a job script
to give up on a run that only has to be started again."""

from __future__ import annotations

import os
import re
import shutil
import time
from pathlib import Path

import pytest
import torch

from gloria.checkpoints import describe_status, duration, main
from gloria.dist.checkpoint import begin_save, publish
from gloria.dist.manifest import checkpoint_path, saved_steps
from gloria.dist.run_lock import RunStatus, lock_run, release_run, write_status
from gloria.dist.state import Shard
from gloria.errors import run_command

AGE = re.compile(r"\b\d s\b")


def save(run_dir: Path, step: int, launch: str = "x", published: bool = True) -> None:
    shards = {"model.a": Shard(torch.zeros(100, 10), (100, 10), 0, True)}
    saved = begin_save(run_dir, step, shards, {}, {}, rank=0, world=1, launch=launch, asynchronous=False)
    assert not published or publish(saved)


def run(capsys, *argv: str) -> tuple[int, list[str]]:
    status = run_command(main, [str(word) for word in argv])
    seen = capsys.readouterr()
    return status, (seen.out + seen.err).splitlines()


def test_the_list_shows_step_size_age_and_validity(tmp_path: Path, capsys):
    for step in (5, 10, 20):
        save(tmp_path, step)
    save(tmp_path, 30, launch="dead", published=False)
    folder = tmp_path / "checkpoints"
    for step in (5, 10):
        file = checkpoint_path(tmp_path, step) / "rank-00000.safetensors"
        data = file.read_bytes()
        file.write_bytes(data[:-1] if step == 5 else data[:-1] + b"\x01")
    (checkpoint_path(tmp_path, 20) / "notes.txt").write_text("mine")
    status, lines = run(capsys, "--run", tmp_path)
    size = len(data)
    damaged = f"{folder}/step-00000005/rank-00000.safetensors: has {size - 1} bytes, {size} were written"
    assert status == 1
    assert [AGE.sub("AGE", " ".join(line.split())) for line in lines] == [
        f"step 5 4.64 kB AGE NOT VALID: {damaged}",
        "step 10 4.64 kB AGE valid",
        "step 20 4.65 kB AGE valid",
        "also there, never read: notes.txt",
        f"{folder}/step-00000030.tmp-dead: no checkpoint (half-written, or set aside)",
    ]
    status, lines = run(capsys, "--run", tmp_path, "--verify")
    assert status == 1
    assert lines[1].endswith(
        f"NOT VALID: {folder}/step-00000010/rank-00000.safetensors: its content is not what was written (hash differs)"
    )


def test_every_problem_of_a_checkpoint_has_a_line_and_a_missing_manifest_no_age(tmp_path: Path, capsys):
    for step in (5, 10, 20):
        save(tmp_path, step)
    folder = tmp_path / "checkpoints"
    for name in ("rank-00000.safetensors", "trainer.json"):
        (folder / "step-00000005" / name).unlink()
    (folder / "step-00000010" / "manifest.json").unlink()
    shutil.rmtree(folder / "step-00000020")
    (folder / "step-00000020").symlink_to(folder / "step-00000005")
    status, lines = run(capsys, "--run", tmp_path)
    assert status == 1
    assert [AGE.sub("AGE", re.sub(r"[\d.]+ k?B", "SIZE", " ".join(line.split()))) for line in lines] == [
        f"step 5 SIZE AGE NOT VALID: {folder}/step-00000005/rank-00000.safetensors: is missing",
        f"{folder}/step-00000005/trainer.json: is missing",
        f"step 10 SIZE - NOT VALID: {folder}/step-00000010/manifest.json: is missing",
        f"step 20 SIZE - NOT VALID: {folder}/step-00000020: is not a folder (symbolic links are not followed here)",
    ]


def test_a_run_of_whole_checkpoints_verifies(tmp_path: Path, capsys):
    save(tmp_path, 10)
    status, lines = run(capsys, "--run", tmp_path, "--verify")
    assert status == 0
    assert [line.split()[-1] for line in lines] == ["valid"]


def test_a_run_without_checkpoints_is_reported(tmp_path: Path, capsys):
    assert run(capsys, "--run", tmp_path) == (0, [f"{tmp_path}/checkpoints: no checkpoint"])


def test_prune_leaves_the_newest_and_the_milestones(tmp_path: Path, capsys):
    for step in (10, 15, 20, 30, 40):
        save(tmp_path, step)
    save(tmp_path, 50, launch="dead", published=False)
    status, lines = run(capsys, "--run", tmp_path, "--prune", "--keep", "2", "--keep-every", "20")
    assert status == 0
    assert lines[:3] == [
        f"{tmp_path}/checkpoints/step-00000050.tmp-dead: removed; a launch ended while it was being written or deleted",
        "step 10: deleted",
        "step 15: deleted",
    ]
    assert saved_steps(tmp_path) == [20, 30, 40]
    assert not (tmp_path / "lock").exists()


def test_prune_keeps_off_a_live_run(tmp_path: Path, capsys):
    for step in (10, 20, 30, 40):
        save(tmp_path, step)
    run_lock = lock_run(tmp_path, "live")
    status, lines = run(capsys, "--run", tmp_path, "--prune")
    release_run(run_lock)
    assert status == 2
    assert lines == [
        f"error: {tmp_path}: launch live is running there (process {os.getpid()}, {os.uname().nodename}); "
        "wait for its end, or give this run another run.dir"
    ]
    assert saved_steps(tmp_path) == [10, 20, 30, 40]


@pytest.mark.parametrize(("state", "exit_status"), [("done", 0), ("stopped", 75), ("running", 75), ("failed", 1)])
def test_status_exits_as_a_job_script_needs_it(tmp_path: Path, capsys, state: str, exit_status: int):
    run_lock = lock_run(tmp_path, "night")
    write_status(run_lock, state, 120, "SIGUSR1" if state == "stopped" else "")
    release_run(run_lock)
    status, lines = run(capsys, "--run", tmp_path, "--status")
    shown = "dead (it was running, its launch is gone)" if state == "running" else state
    reason = ", SIGUSR1" if state == "stopped" else ""
    lines = [AGE.sub("AGE", line) for line in lines]
    assert (status, lines) == (exit_status, [f"{shown}, step 120{reason}; launch night, heartbeat AGE ago"])


def test_a_fine_tuning_with_seeds_is_done_when_all_are(tmp_path: Path, capsys):
    for seed, state in ((0, "done"), (1, "stopped")):
        run_lock = lock_run(tmp_path / f"seed-{seed}", "night")
        write_status(run_lock, state, 9 + seed, "SIGUSR1" if state == "stopped" else "")
        release_run(run_lock)
    status, (line,) = run(capsys, "--run", tmp_path, "--status")
    assert (status, AGE.sub("AGE", line)) == (75, "stopped, step 10, SIGUSR1; launch night, heartbeat AGE ago")
    run_lock = lock_run(tmp_path / "seed-1", "day")
    write_status(run_lock, "done", 12)
    release_run(run_lock)
    status, (line,) = run(capsys, "--run", tmp_path, "--status")
    assert (status, AGE.sub("AGE", line)) == (
        75,
        "stopped, step 12, other seeds are still to run; launch day, heartbeat AGE ago",
    )
    (tmp_path / "results.json").touch()
    status, (line,) = run(capsys, "--run", tmp_path, "--status")
    assert (status, AGE.sub("AGE", line)) == (0, "done, step 12; launch day, heartbeat AGE ago")


def test_a_live_run_is_called_running():
    status = RunStatus("running", 7, "", "night", heartbeat=1000.0, alive=True)
    assert describe_status(status, 1090.0) == "running, step 7; launch night, heartbeat 1 min ago"


@pytest.mark.parametrize(
    ("seconds", "text"), [(-3, "0 s"), (59.9, "59 s"), (60, "1 min"), (7200, "2 h"), (3 * 86400 + 5, "3 d")]
)
def test_spans_of_time_are_reported_by_their_largest_unit(seconds: float, text: str):
    assert duration(seconds) == text


@pytest.mark.parametrize(
    ("argv", "line"),
    [
        (["--run", "{tmp}/none"], "error: --run: {tmp}/none is not a folder; name a run's folder (runs/NAME)"),
        (["--run", "{tmp}", "--status"], "error: {tmp}: holds no run (no status.json)"),
        (["--run", "{tmp}", "--prune", "--keep", "1"], "error: --keep: 1 is too small; give at least 2"),
        (["--run", "{tmp}", "--prunes"], "error: --prunes: unknown flag; did you mean --prune?"),
        ([], "error: --run: missing; give it (the run's folder)"),
    ],
)
def test_mistakes_are_one_line(tmp_path: Path, capsys, argv: list[str], line: str):
    status, lines = run(capsys, *(word.format(tmp=tmp_path) for word in argv))
    assert (status, lines) == (2, [line.format(tmp=tmp_path)])


def test_ages_come_from_the_manifest_and_not_from_the_files_dates(tmp_path: Path, capsys):
    save(tmp_path, 10)
    path = checkpoint_path(tmp_path, 10)
    for file in path.iterdir():
        os.utime(file, (time.time() - 5 * 86400,) * 2)
    _, lines = run(capsys, "--run", tmp_path)
    assert AGE.search(lines[0])
