"""Bug prevented: two launches writing into one run folder, a dead run's lock that nobody can pass, and a
requeue script that is misled."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

import pytest

from gloria.dist import run_lock as status
from gloria.dist.run_lock import RunLock, lock_run, read_status, release_run, write_status
from gloria.errors import UserError
from tests.launch import wait_until
from tests.world import WorldError, run_world


@pytest.fixture
def run_locks():
    """Locks taken in a test, released at its end."""
    made: list[RunLock] = []
    yield made
    for run_lock in made:
        release_run(run_lock)


def forge_lock(run_dir: Path, *, age: float = 0.0, **values) -> Path:
    """A lock as another process or machine would have left it."""
    lock = run_dir / "lock"
    holder = json.loads(status._lock_bytes("other"))
    lock.write_text(json.dumps({**holder, **values}))
    os.utime(lock, (time.time() - age, time.time() - age))
    return lock


def test_a_run_reports_its_state_and_lets_go_of_the_lock(tmp_path: Path):
    run_lock = lock_run(tmp_path / "run", "first")
    before = time.time()
    write_status(run_lock, "running", 7)
    seen = read_status(tmp_path / "run")
    assert (seen.status, seen.step, seen.launch, seen.alive) == ("running", 7, "first", True)
    assert before <= seen.heartbeat <= time.time()
    write_status(run_lock, "stopped", 9, "SIGUSR1")
    release_run(run_lock)
    assert os.listdir(tmp_path / "run") == ["status.json"]
    seen = read_status(tmp_path / "run")
    assert (seen.status, seen.step, seen.reason, seen.alive) == ("stopped", 9, "SIGUSR1", False)


def test_a_second_launch_on_a_live_run_is_refused_in_one_line(tmp_path: Path, run_locks):
    run_locks.append(lock_run(tmp_path, "first"))
    with pytest.raises(UserError) as error:
        lock_run(tmp_path, "second")
    assert str(error.value) == (
        f"{tmp_path}: launch first is running there (process {os.getpid()}, {os.uname().nodename}); "
        "wait for its end, or give this run another run.dir"
    )


def die_holding(rank: int, world: int, run_dir: Path) -> None:
    run_lock = lock_run(run_dir, "dead")
    write_status(run_lock, "running", 3)
    os._exit(9)


def test_a_launch_that_died_on_this_machine_is_taken_over_at_once(tmp_path: Path, run_locks, capsys):
    with pytest.raises(WorldError):
        run_world(die_holding, 1, tmp_path)
    assert read_status(tmp_path).status == "running"
    assert not read_status(tmp_path).alive
    capsys.readouterr()
    run_locks.append(lock_run(tmp_path, "next"))
    printed = capsys.readouterr()
    assert printed.out == "", "it does not wait for a heartbeat"
    assert printed.err == (
        f"warning: {tmp_path}: launch dead on {os.uname().nodename} died without a word; its run is taken over\n"
    )
    assert json.loads((tmp_path / "lock").read_text())["launch"] == "next"
    assert not (tmp_path / "lock.takeover").exists()


def test_a_process_id_given_to_somebody_else_is_no_life(tmp_path: Path, run_locks):
    forge_lock(tmp_path, pid=os.getpid(), started="1")
    run_locks.append(lock_run(tmp_path, "next"))


def test_another_machines_lock_without_a_heartbeat_is_taken_over(tmp_path: Path, run_locks, capsys):
    forge_lock(tmp_path, machine="node7", host="node7", age=100)
    run_locks.append(lock_run(tmp_path, "next"))
    seen = capsys.readouterr()
    assert seen.out == ""
    assert seen.err == f"warning: {tmp_path}: launch other on node7 died without a word; its run is taken over\n"


def test_another_machines_fresh_lock_is_watched_until_it_is_stale(tmp_path: Path, run_locks, monkeypatch, capsys):
    forge_lock(tmp_path, machine="node7", host="node7")
    ages = iter([0.0, 0.0, 0.05, 0.11])
    monkeypatch.setattr(status, "_age", lambda *_: next(ages))
    run_locks.append(lock_run(tmp_path, "next", stale_seconds=0.1))
    assert list(ages) == []
    assert capsys.readouterr().out == (f"{tmp_path}: held by launch other on node7; waiting for its heartbeat\n")


def test_another_machines_lock_that_beats_is_live(tmp_path: Path, run_locks, monkeypatch):
    run_locks.append(lock_run(tmp_path, "first", beat_seconds=0.1))
    monkeypatch.setattr(status, "_machine", lambda: "node8")  # as the second launch sees it
    with pytest.raises(UserError, match="launch first is running there"):
        lock_run(tmp_path, "second", stale_seconds=100)


def test_a_lock_that_cannot_be_read_is_judged_by_its_age(tmp_path: Path, run_locks):
    lock = tmp_path / "lock"
    lock.write_text("half a li")
    os.utime(lock, (1, 1))
    run_locks.append(lock_run(tmp_path, "next"))


def lock_at_once(rank: int, world: int, run_dir: Path, rounds: int) -> list[bool]:
    import torch.distributed as dist

    won = []
    for number in range(rounds):
        folder = run_dir / str(number)
        dist.barrier()
        try:
            lock_run(folder, f"launch-{rank}")
            won.append(True)
        except UserError:
            won.append(False)
        dist.barrier()
    return won


@pytest.mark.parametrize("dead", [False, True], ids=["no lock", "a dead one's lock"])
def test_of_launches_at_once_one_wins(tmp_path: Path, dead: bool):
    rounds = 8
    for number in range(rounds):
        (tmp_path / str(number)).mkdir()
        if dead:
            forge_lock(tmp_path / str(number), pid=os.getpid(), started="1")
    wins = run_world(lock_at_once, 4, tmp_path, rounds)
    assert [sum(round_) for round_ in zip(*wins)] == [1] * rounds


def test_a_launch_that_lost_its_run_knows_and_writes_nothing_more(tmp_path: Path, capsys):
    run_lock = lock_run(tmp_path, "asleep", beat_seconds=0.05)
    write_status(run_lock, "running", 1)
    forge_lock(tmp_path)
    wait_until(lambda: run_lock.lost)
    write_status(run_lock, "done", 2)
    release_run(run_lock)
    assert json.loads((tmp_path / "status.json").read_text())["status"] == "running"
    assert json.loads((tmp_path / "lock").read_text())["launch"] == "other"
    assert capsys.readouterr().err == (
        f"warning: {tmp_path}: another launch has taken the run over; launch asleep must end\n"
    )


def test_the_heartbeat_continues_while_a_step_takes_long(tmp_path: Path, run_locks):
    run_locks.append(lock_run(tmp_path, "slow", beat_seconds=0.05))
    write_status(run_locks[0], "running", 1)
    before = (tmp_path / "lock").stat().st_mtime_ns, read_status(tmp_path).heartbeat
    run_locks[0].step = 2
    wait_until(lambda: (tmp_path / "lock").stat().st_mtime_ns > before[0])
    wait_until(lambda: read_status(tmp_path).heartbeat > before[1])
    assert read_status(tmp_path).step == 2


def test_a_disk_away_for_a_while_does_not_end_the_heartbeat(tmp_path: Path, run_locks, monkeypatch, capsys):
    write = status.write_whole
    run_locks.append(lock_run(tmp_path, "first", beat_seconds=0.05))
    failed = []

    def fail(*_, **__):
        failed.append(1)
        raise OSError("server away")

    monkeypatch.setattr(status, "write_whole", fail)
    wait_until(lambda: len(failed) > 2)
    monkeypatch.setattr(status, "write_whole", write)
    wait_until((tmp_path / "status.json").exists)
    assert capsys.readouterr().err == (
        f"warning: {tmp_path}: the heartbeat cannot be written (server away); trying on\n"
    )


@pytest.mark.parametrize(
    ("content", "line"),
    [
        (None, "{run}: holds no run (no status.json)"),
        (
            b"{",
            "{file}: is not valid JSON (Expecting property name enclosed in double quotes: line 1 column 2 (char 1))",
        ),
        (b"{}", "{file}: is not a run's status (KeyError('status'))"),
        (
            b'{"status": "fine", "step": 1, "reason": "", "launch": "x", "heartbeat": 0}',
            "{file}: says 'fine', which is none of running, stopped, done, failed",
        ),
    ],
)
def test_a_status_that_is_none_is_refused(tmp_path: Path, content: bytes | None, line: str):
    if content is not None:
        (tmp_path / "status.json").write_bytes(content)
    with pytest.raises(UserError) as error:
        read_status(tmp_path)
    assert str(error.value) == line.format(run=tmp_path, file=tmp_path / "status.json")
