"""Prevents: a file written through a link that somebody has put in its place, a pipe that a run waits on for ever, and
a folder that is neither the old one nor the new one."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from gloria.errors import UserError
from gloria.files import (
    open_plain,
    parse_json,
    partial_folder,
    publish,
    read_json_object,
    remove_partial,
    whole_file,
    write_file,
    write_whole,
)

APPEND = os.O_WRONLY | os.O_APPEND | os.O_CREAT


@pytest.mark.parametrize("obstacle", ["link", "dangling link", "pipe", "file"])
def test_what_stands_in_a_new_files_place_is_removed_and_never_opened(tmp_path: Path, obstacle: str):
    other, path = tmp_path / "other", tmp_path / "new"
    if obstacle != "dangling link":
        other.write_text("mine")
    if obstacle == "pipe":
        os.mkfifo(path)
    elif obstacle == "file":
        os.link(other, path)
    else:
        path.symlink_to(other)
    write_file(path, b"ours")
    assert path.read_bytes() == b"ours"
    assert not path.is_symlink()
    assert not other.exists() if obstacle == "dangling link" else other.read_text() == "mine"


def test_new_files_have_the_mode_of_the_umask(tmp_path: Path):
    before = os.umask(0o027)
    try:
        write_whole(tmp_path / "file", b"")
        with partial_folder(tmp_path / "folder") as work:
            (work / "made").mkdir()
            os.close(os.open(work / "made" / "private", os.O_CREAT, 0o600))
            publish(work / "made", tmp_path / "folder")
    finally:
        os.umask(before)
    assert (tmp_path / "file").stat().st_mode & 0o777 == 0o640
    assert (tmp_path / "folder" / "private").stat().st_mode & 0o777 == 0o640


def test_a_file_that_is_not_finished_takes_no_place(tmp_path: Path):
    path = tmp_path / "file"
    path.write_text("old")
    with pytest.raises(ZeroDivisionError), whole_file(path) as file:
        file.write(b"%d" % (1 // 0))
    assert (os.listdir(tmp_path), path.read_text()) == (["file"], "old")


@pytest.mark.parametrize(
    ("make", "line"),
    [
        (lambda path: path.symlink_to("other"), "is a symbolic link, which is never followed here"),
        (os.mkfifo, "cannot be written (No such device or address)"),
        (os.mkdir, "cannot be written (Is a directory)"),
        (lambda path: path.symlink_to(path), "is a symbolic link, which is never followed here"),
    ],
)
def test_a_log_is_appended_to_a_plain_file_only(tmp_path: Path, make, line: str):
    path = tmp_path / "log"
    make(path)
    with pytest.raises(UserError) as error:
        open_plain(path, APPEND)
    assert str(error.value) == f"{path}: {line}"
    assert os.listdir(tmp_path) == ["log"]


@pytest.mark.parametrize(
    ("data", "line"),
    [
        (b'{"a": 1, "a": 2}', "is not valid JSON (a key is given twice)"),
        (b'{"a": ' + b"[" * 100_000, "is not valid JSON (maximum recursion depth exceeded"),
        (b'{"a": 1' + b"0" * 400 + b"}", "is not valid JSON (a number of 401 digits)"),
        (b"\xff", "is not valid JSON ('utf-8' codec can't decode byte 0xff in position 0: invalid start byte)"),
        (b"[]", "is not a JSON object"),
    ],
    ids=["twice", "deep", "giant", "bytes", "list"],
)
def test_json_that_cannot_be_meant_is_one_line(tmp_path: Path, data: bytes, line: str):
    path = tmp_path / "config.json"
    path.write_bytes(data)
    with pytest.raises(UserError) as error:
        read_json_object(path, "copy it again")
    assert str(error.value).startswith(f"{path}: {line}")
    assert str(error.value).endswith("; copy it again")
    assert "\n" not in str(error.value)


def test_json_of_a_user_may_be_a_link_and_never_a_pipe(tmp_path: Path):
    (tmp_path / "blob").write_text('{"model_max_length": 1000000000000000019884624838656}')
    (tmp_path / "link").symlink_to("blob")
    assert read_json_object(tmp_path / "link", "") == {"model_max_length": int(1e30)}
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(UserError, match="is not a plain file; copy it again"):
        read_json_object(tmp_path / "pipe", "copy it again")
    with pytest.raises(UserError, match="more than the 9 such a file may have"):
        read_json_object(tmp_path / "link", "", limit=9)
    assert parse_json(b"[1, 2.5]", "here") == [1, 2.5]


def make(out: Path, content: str) -> None:
    with partial_folder(out) as work:
        (work / "made").mkdir()
        (work / "made" / "file").write_text(content)
        publish(work / "made", out, replace=True)


@pytest.mark.parametrize("renames", [1, 2])
def test_a_kill_while_a_folder_is_replaced_leaves_the_old_or_the_new_one(tmp_path: Path, monkeypatch, renames: int):
    out = tmp_path / "out"
    make(out, "old")
    if pid := os.fork():
        assert os.waitpid(pid, 0)[1] == 9 << 8
    else:  # dies without a word
        done, rename = [], Path.rename
        Path.rename = lambda *paths: (rename(*paths), done.append(1), len(done) == renames and os._exit(9))
        make(out, "new")
    assert out.exists() == (renames == 2)
    remove_partial(out)
    assert (out / "file").read_text() == ("old" if renames == 1 else "new")
    assert os.listdir(tmp_path) == ["out"]
    make(out, "newest")
    assert (out / "file").read_text() == "newest"
