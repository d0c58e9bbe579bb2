"""Bug prevented: the only whole checkpoint deleted, a disk that fills up half-way, and a resume from a folder that only
looks like a checkpoint."""

from __future__ import annotations

import errno
import os
import shutil
from pathlib import Path

import pytest

from gloria.dist.checkpoint_read import (
    find_checkpoint,
    verify,
)
from gloria.dist.manifest import checkpoint_path, saved_steps
from gloria.dist.retention import check_free_space, prune, remove_incomplete, set_aside_newer
from gloria.errors import UserError
from tests.dist.toys import (
    WHOLE,
    begin,
    save_whole,
)


def test_a_damaged_checkpoint_of_the_same_step_is_replaced(tmp_path: Path):
    path = save_whole(tmp_path, 1, WHOLE)
    (path / "trainer.json").unlink()
    save_whole(tmp_path, 1, WHOLE, launch="second")
    assert verify(path) == []
    assert sorted(os.listdir(tmp_path / "checkpoints")) == ["latest", "step-00000001"]


def test_the_last_few_and_every_nth_stay(tmp_path: Path):
    for step in (10, 15, 20, 30, 40):
        save_whole(tmp_path, step, WHOLE)
    assert prune(tmp_path, keep=2, keep_every=20) == [10, 15]
    assert saved_steps(tmp_path) == [20, 30, 40]
    assert prune(tmp_path, keep=2, keep_every=20) == []


def test_a_damaged_checkpoint_does_not_count_as_kept(tmp_path: Path):
    for step in (10, 20, 30):
        save_whole(tmp_path, step, WHOLE)
    (checkpoint_path(tmp_path, 30) / "manifest.json").unlink()
    assert prune(tmp_path, keep=2) == []
    save_whole(tmp_path, 40, WHOLE)
    assert prune(tmp_path, keep=2) == [10]
    assert saved_steps(tmp_path) == [20, 30, 40]


def test_deleting_takes_the_manifest_first(tmp_path: Path, monkeypatch):
    for step in (10, 20, 30):
        save_whole(tmp_path, step, WHOLE)

    def killed(path: Path) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("gloria.files.shutil.rmtree", killed)
    with pytest.raises(KeyboardInterrupt):
        prune(tmp_path, keep=2)
    path = checkpoint_path(tmp_path, 10)
    assert verify(path) == [f"{path}/manifest.json: is missing"]
    monkeypatch.undo()
    assert prune(tmp_path, keep=2) == [10]


@pytest.fixture
def undeletable(monkeypatch):
    """`undeletable(path)`: nothing in that folder can be deleted, as with `chattr +i` or on another's files."""
    folders: list[str] = []
    remove, unlink = os.rmdir, os.unlink

    def refuse(call):
        def guarded(path, *, dir_fd=None):
            place = os.path.join(os.readlink(f"/proc/self/fd/{dir_fd}"), path) if dir_fd is not None else str(path)
            if any(place.startswith(folder) for folder in folders):
                raise PermissionError(errno.EPERM, os.strerror(errno.EPERM), place)
            return call(path, dir_fd=dir_fd)

        return guarded

    monkeypatch.setattr(os, "rmdir", refuse(remove))
    monkeypatch.setattr(os, "unlink", refuse(unlink))
    return lambda path: folders.append(str(path))


def test_a_checkpoint_that_cannot_be_deleted_is_left_with_a_warning(tmp_path: Path, undeletable, capsys):
    for step in (10, 20, 30, 40):
        save_whole(tmp_path, step, WHOLE)
    undeletable(checkpoint_path(tmp_path, 10))
    assert prune(tmp_path, keep=2) == [20]
    assert saved_steps(tmp_path) == [10, 30, 40]
    err = capsys.readouterr().err
    assert err.startswith(f"warning: {checkpoint_path(tmp_path, 10)}: cannot be removed ([Errno 1] Operation not perm")
    assert err.count("\n") == 1
    save_whole(tmp_path, 50, WHOLE)
    assert prune(tmp_path, keep=2) == [30]


def test_what_a_dead_launch_left_and_cannot_be_deleted_does_not_keep_a_run_from_its_start(
    tmp_path: Path, undeletable, capsys
):
    save_whole(tmp_path, 1, WHOLE)
    left = begin(tmp_path, 2, WHOLE, launch="dead").folder
    undeletable(left)
    assert remove_incomplete(tmp_path) == []
    assert capsys.readouterr().err.startswith(f"warning: {left}: cannot be removed (")
    assert find_checkpoint(tmp_path) == checkpoint_path(tmp_path, 1)


def test_later_checkpoints_that_a_run_passed_over_do_not_push_out_its_own(tmp_path: Path):
    for step in (8, 12, 16, 10):
        save_whole(tmp_path, step, WHOLE)  # 12 and 16 are damaged inside, which no size shows
    assert prune(tmp_path, keep=2, newest=10) == []
    assert saved_steps(tmp_path) == [8, 10, 12, 16]


def test_checkpoints_that_are_damaged_inside_are_not_the_ones_that_stay(tmp_path: Path):
    for step in (8, 10, 12, 16):
        file = save_whole(tmp_path, step, WHOLE) / "rank-00000.safetensors"
        if step > 10:
            file.write_bytes(file.read_bytes()[:-1] + b"\xff")
    assert prune(tmp_path, keep=2) == []


def test_what_dead_launches_left_is_removed_with_a_line(tmp_path: Path):
    save_whole(tmp_path, 1, WHOLE)
    begin(tmp_path, 2, WHOLE, launch="dead")  # never published
    folder = tmp_path / "checkpoints"
    checkpoint_path(tmp_path, 1).rename(folder / "step-00000001.replaced-dead")
    (folder / "step-00000001.aside-old").mkdir()
    (folder / "notes.tmp-mine").mkdir()
    assert remove_incomplete(tmp_path) == [
        f"{folder}/step-00000001: put back; a launch ended while it was being replaced",
        f"{folder}/step-00000002.tmp-dead: removed; a launch ended while it was being written or deleted",
    ]
    assert sorted(os.listdir(folder)) == [
        "latest",
        "notes.tmp-mine",
        "step-00000001",
        "step-00000001.aside-old",
    ]
    assert find_checkpoint(tmp_path) == checkpoint_path(tmp_path, 1)
    assert remove_incomplete(tmp_path) == []


def test_going_back_sets_the_newer_ones_aside(tmp_path: Path):
    for step in (10, 20, 30):
        save_whole(tmp_path, step, WHOLE)
    moved = set_aside_newer(tmp_path, 10, "back")
    assert [path.name for path in moved] == ["step-00000020.aside-back", "step-00000030.aside-back"]
    assert find_checkpoint(tmp_path) == checkpoint_path(tmp_path, 10)


def test_too_little_space_is_an_error_before_the_first_save(tmp_path: Path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr("gloria.dist.retention.shutil.disk_usage", lambda _: usage._replace(free=25_000_000_000))
    check_free_space(tmp_path, 8_000_000_000, keep=2)
    with pytest.raises(UserError) as error:
        check_free_space(tmp_path, 12_000_000_000, keep=2)
    assert str(error.value) == (
        f"{tmp_path}/checkpoints: 25 GB free, and 3 checkpoints of 12 GB are to come (checkpoint.keep = 2, and one "
        "being written); free some space or choose another run.dir"
    )
    save_whole(tmp_path, 1, WHOLE)
    check_free_space(tmp_path, 12_000_000_000, keep=2)


def test_the_newest_whole_one_is_found_and_a_named_one(tmp_path: Path):
    for step in (10, 20):
        save_whole(tmp_path, step, WHOLE)
    assert find_checkpoint(tmp_path) == checkpoint_path(tmp_path, 20)
    assert find_checkpoint(tmp_path, 10) == checkpoint_path(tmp_path, 10)
    folder = tmp_path / "checkpoints"
    with pytest.raises(UserError) as error:
        find_checkpoint(tmp_path, 15)
    assert str(error.value) == f"{folder}: holds no checkpoint of step 15; there are steps 10, 20"
    (folder / "step-00000010" / "trainer.json").unlink()
    with pytest.raises(UserError) as error:
        find_checkpoint(tmp_path, 10)
    assert str(error.value) == f"{folder}/step-00000010/trainer.json: is missing"
    with pytest.raises(UserError) as error:
        find_checkpoint(tmp_path / "elsewhere")
    assert str(error.value) == f"{tmp_path}/elsewhere/checkpoints: holds no checkpoint"


def test_folders_that_only_look_like_checkpoints_are_none(tmp_path: Path):
    save_whole(tmp_path, 1, WHOLE)
    for name in ("step-5", "step-000000010", "step-00000020.tmp-x", "tmp-step-00000030", "step-0000004x"):
        (tmp_path / "checkpoints" / name).mkdir()
    assert saved_steps(tmp_path) == [1]
