"""Bug prevented: a save that fails on one rank, of which the others know nothing, and that takes the run or an older
checkpoint with it."""

from __future__ import annotations

import os
import resource
import subprocess
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from gloria.dist import checkpoint
from gloria.dist.checkpoint import (
    SaveState,
    abandon,
    finish,
    publish,
    wait,
)
from gloria.dist.checkpoint_read import (
    find_checkpoint,
    verify,
)
from gloria.dist.manifest import checkpoint_path, saved_steps
from tests.dist.toys import (
    WHOLE,
    begin,
    save_whole,
)
from tests.world import run_world


def loop_with_failure(rank: int, world: int, run_dir: Path) -> list[str]:
    """Saves at steps 2, 5 and 8 as the training loop makes them; rank 1 cannot write at step 5."""
    reported = []
    save = None
    whole = {"model.a": torch.arange(600_000.0)}
    for step in range(12):
        done = save is not None and save.state() == SaveState.DONE
        failed = save is not None and save.state() == SaveState.FAILED
        flags = torch.tensor([float(done), float(failed)])
        dist.all_reduce(flags)
        if save is not None and flags[1]:
            reported.append(f"failed at {step}")
            abandon(save)
            save = None
        elif save is not None and flags[0] == world:
            if rank == 0:
                assert publish(save), save.error
            save = None
        if step in (2, 5, 8):
            harmed = step == 5 and rank == 1
            if harmed:
                resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, resource.RLIM_INFINITY))
            save = begin(run_dir, step, whole, rank, world, launch="x", asynchronous=True)
            wait(save)  # so that it is sure to be over before the next all-reduce
            if harmed:
                assert save.error.startswith("rank 1: "), save.error
                resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
                reported.append(save.error.split(":")[1].strip())
    return reported


def test_a_rank_that_cannot_write_is_known_to_all_at_the_same_step(tmp_path: Path):
    assert run_world(loop_with_failure, 2, tmp_path) == [["failed at 6"], ["OSError", "failed at 6"]]
    assert saved_steps(tmp_path) == [2, 8]
    assert [verify(checkpoint_path(tmp_path, step)) for step in (2, 8)] == [[], []]
    assert sorted(os.listdir(tmp_path / "checkpoints")) == ["latest", "step-00000002", "step-00000008"]


def finish_with_failure(rank: int, world: int, run_dir: Path) -> tuple[bool, str]:
    if rank == 1:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, resource.RLIM_INFINITY))
    save = begin(run_dir, 4, WHOLE, rank, world)
    answer = finish(save)
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    return answer, save.error


def test_a_last_save_that_fails_on_one_rank_fails_on_all(tmp_path: Path):
    (first, _), (second, error) = run_world(finish_with_failure, 2, tmp_path)
    assert (first, second) == (False, False)
    assert error.startswith("rank 1: OSError: [Errno 27] File too large")
    assert os.listdir(tmp_path / "checkpoints") == []


def test_a_full_disk_is_a_failed_save_and_leaves_the_older_whole(tmp_path: Path):
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=3m", "none", str(disk)], capture_output=True)
    if mounted.returncode:
        pytest.skip(f"cannot mount a small tmpfs: {mounted.stderr.decode().strip()}")
    try:
        whole = {"model.a": torch.arange(500_000.0)}  # 2 MB
        save_whole(disk, 1, whole)
        save = begin(disk, 2, whole)
        assert save.state() == SaveState.FAILED
        assert save.error.startswith("rank 0: OSError: [Errno 28] No space left on device")
        abandon(save)
        assert find_checkpoint(disk) == checkpoint_path(disk, 1)
        assert saved_steps(disk) == [1]
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_a_folder_that_cannot_be_made_is_a_failed_save(tmp_path: Path):
    (tmp_path / "checkpoints").write_text("a file where the folder should be")
    save = begin(tmp_path, 1, WHOLE)
    assert save.state() == SaveState.FAILED
    assert "Not a directory" in save.error or "File exists" in save.error
    abandon(save)


def test_no_host_memory_for_the_copy_is_a_failed_save_that_is_reported(tmp_path: Path, monkeypatch, capsys):
    def refuse(*_: object, **__: object) -> None:
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 84 bytes\nBacktrace: ...")

    monkeypatch.setattr(checkpoint.torch, "empty", refuse)
    save = begin(tmp_path, 1, WHOLE, asynchronous=True)
    assert save.state() == SaveState.FAILED
    abandon(save)
    assert capsys.readouterr().err == (
        f"warning: {checkpoint_path(tmp_path, 1)}: not saved; rank 0: no host memory for the copy "
        "(DefaultCPUAllocator: can't allocate memory: you tried to allocate 84 bytes)\n"
    )


def test_only_the_rank_that_failed_says_why(tmp_path: Path, capsys):
    save = begin(tmp_path, 1, WHOLE)
    abandon(save)
    assert save.error == "on another rank"
    assert capsys.readouterr().err == ""


def test_publishing_without_a_ranks_part_fails_and_leaves_nothing(tmp_path: Path, capsys):
    save = begin(tmp_path, 1, WHOLE, rank=0, world=2)
    note = save.folder / "rank-00001.json"
    assert not publish(save)
    assert save.state() == SaveState.FAILED
    assert save.error == (f"rank 0: {note}: is missing; is the run folder on a file system that all nodes share?")
    assert capsys.readouterr().err == f"warning: {checkpoint_path(tmp_path, 1)}: not saved; {save.error}\n"
    assert os.listdir(tmp_path / "checkpoints") == []


def test_an_abandoned_save_can_be_tried_again_at_the_same_step(tmp_path: Path):
    saves = [begin(tmp_path, 1, WHOLE, rank, 2) for rank in range(2)]
    for save in saves:
        abandon(save)
    assert os.listdir(tmp_path / "checkpoints") == []
    assert verify(save_whole(tmp_path, 1, WHOLE, world=2)) == []


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("asynchronous", [False, True])
def test_a_tensor_that_is_not_finite_is_never_saved(tmp_path: Path, capsys, bad: float, asynchronous: bool):
    moments = torch.zeros(5, 4)
    moments[3, 1] = bad
    save = begin(tmp_path, 1, WHOLE | {"optim.exp_avg.a": moments}, asynchronous=asynchronous)
    assert not finish(save)
    assert capsys.readouterr().err == (
        f"warning: {checkpoint_path(tmp_path, 1)}: not saved; rank 0: NotFinite: optim.exp_avg.a has a NaN or an "
        "infinity; go back to an older checkpoint with run.resume\n"
    )
    assert saved_steps(tmp_path) == []


def test_a_checkpoint_that_is_not_finite_is_found_and_passed_over(tmp_path: Path, capsys, monkeypatch):
    good = save_whole(tmp_path, 1, WHOLE, world=2)
    monkeypatch.setattr(checkpoint, "first_non_finite", lambda tensors: None)  # as older versions saved it
    a = WHOLE["model.a"].clone()
    a[-1, 0] = float("nan")
    path = save_whole(tmp_path, 2, WHOLE | {"model.a": a}, world=2)
    problem = f"{path}: model.a has a NaN or an infinity"
    assert verify(path) == [problem]
    assert find_checkpoint(tmp_path) == good
    assert capsys.readouterr().err == f"warning: {problem}; the checkpoint of step 2 is passed over\n"


def test_a_latest_that_cannot_be_written_leaves_a_whole_checkpoint(tmp_path: Path, capsys):
    (tmp_path / "checkpoints" / "latest").mkdir(parents=True)
    path = save_whole(tmp_path, 1, WHOLE)
    assert verify(path) == []
    assert capsys.readouterr().err == (
        f"warning: {path.parent / 'latest'}: cannot be written ([Errno 21] Is a directory: "
        f"'{path.parent}/.latest.{os.uname().nodename}-{os.getpid()}' -> '{path.parent}/latest'); "
        "the checkpoint of step 1 is whole\n"
    )
