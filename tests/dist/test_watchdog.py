"""Prevents: a hang that is never ended, because what ends it stumbles over a rank's log."""

from __future__ import annotations

import json
import os
import threading
from pathlib import Path

import pytest

from gloria.dist import watchdog
from gloria.dist.rank_log import APPEND, Tee
from gloria.dist.watchdog import MARK, Watchdog, failed_ranks, slow_ranks, start_watch, stop_watch, write_place
from gloria.files import open_plain


@pytest.fixture
def watch(tmp_path: Path) -> Watchdog:
    return Watchdog(tmp_path / "logs", rank=0, world=2, patience=60, limit=60, launch="here")


def write(watch: Watchdog, rank: int, data: bytes) -> None:
    watch.folder.mkdir(exist_ok=True)
    with open(open_plain(watch.folder / f"rank-{rank:05d}.log", APPEND), "ab") as file:
        file.write(data)


GOOD = {"launch": "here", "rank": 1, "step": 3, "phase": "data", "what": "ValueError: bad", "seconds": 1.0}


@pytest.mark.parametrize(
    "line",
    [
        b"{",
        b"[]",
        b"\xff\xfe",
        b"[" * 100_000,
        b'{"launch": "here"}',
        json.dumps(GOOD | {"rank": "1"}).encode(),
        json.dumps(GOOD | {"rank": 7}).encode(),
        json.dumps(GOOD | {"phase": "no such phase"}).encode(),
        json.dumps(GOOD | {"step": 10**99}).encode() + b"}",
    ],
)
def test_a_damaged_line_in_a_log_is_passed_over(watch: Watchdog, line: bytes):
    write(watch, 1, MARK.encode() + json.dumps(GOOD).encode() + b"\n" + MARK.encode() + line + b"\n")
    assert failed_ranks(watch) == "rank 1 failed (ValueError: bad)"
    write_place(watch, "no progress")
    assert slow_ranks(watch, 0) == "rank 0 is behind, in step 0, start-up"


@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir, lambda path: path.symlink_to("/etc/passwd")])
def test_a_log_that_is_no_file_is_a_rank_without_a_sign(watch: Watchdog, make, capsys):
    watch.folder.mkdir()
    make(watch.folder / "rank-00000.log")
    write_place(watch, "no progress")
    assert capsys.readouterr().err.startswith(f"warning: {watch.folder / 'rank-00000.log'}: cannot be written (")
    assert slow_ranks(watch, 0) == "rank 0, 1 gives no sign (stopped or dead)"


def test_a_hang_ends_the_process_whatever_is_wrong_with_the_logs(watch: Watchdog, monkeypatch, capsys):
    ended = threading.Event()
    monkeypatch.setattr(watchdog, "write_place", lambda *_: 1 / 0)
    monkeypatch.setattr(watchdog, "leave", lambda *_: ended.set())
    watch.patience = 0.01
    start_watch(watch)
    assert ended.wait(30)
    stop_watch(watch)
    assert not watch.thread.is_alive()
    line = capsys.readouterr().err
    assert "in step 0, start-up: who was slow is not known (ZeroDivisionError('division by zero'))" in line


def test_a_full_disk_does_not_raise_from_a_print(capsys):
    full = Path("/dev/full")
    with open(full, "wb", buffering=0) as log:
        tee = Tee(None, log, full)
        print("one", file=tee)
        print("two", file=tee, flush=True)


def test_the_console_continues_where_the_log_cannot(capfd):
    """The `error:` line of a full disk was lost with the log."""
    full = Path("/dev/full")
    with open(full, "wb", buffering=0) as log, open(os.dup(1), "w") as console:
        print("error: the disk is full", file=Tee(console, log, full), flush=True)
    assert capfd.readouterr().out == "error: the disk is full\n"
