"""Who runs in a run folder, and how it stands: the lock, its heartbeat and `status.json`.

    RUN/lock          made by a launch, its modification time renewed by a thread while the launch lives
    RUN/status.json   {"status": running | stopped | done | failed, "step", "reason", "launch", "heartbeat",
    ...}

A second launch on a live run is refused; one on a dead run takes the lock over. Dead means: the process is
gone from this machine, or, seen from another one, no heartbeat for `STALE_SECONDS`. Times are compared on the
file system's own clock, so nodes whose clocks differ agree. For rank 0 alone.
"""

from __future__ import annotations

import contextlib
import os
import socket
import threading
import time
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path

from gloria.errors import UserError, warn
from gloria.files import brief, parse_json_object, read_bounded, remove_folder, to_json, write_all, write_whole

LOCK = "lock"
STATUS = "status.json"
STATUSES = ("running", "stopped", "done", "failed")
BEAT_SECONDS = 10.0
STALE_SECONDS = 60.0  # six beats missed: a busy file server delays some


@dataclass
class RunLock:
    """A run folder held by this launch. `step` may be set at every step: the next heartbeat writes it.

    `lost` becomes True when another launch took the run over (this one was asleep for too long): it must end
    and write nothing more.
    """

    run_dir: Path
    launch: str
    step: int = 0
    status: str = "running"
    reason: str = ""
    lost: bool = False
    thread: threading.Thread | None = None
    ended: threading.Event = field(default_factory=threading.Event)
    writing: threading.Lock = field(default_factory=threading.Lock)


@dataclass(frozen=True)
class RunStatus:
    """`status.json` and whether the launch behind it lives."""

    status: str
    step: int
    reason: str
    launch: str
    heartbeat: float  # seconds since 1970, on the clock of the node that wrote it
    alive: bool


def lock_run(
    run_dir: Path, launch: str, *, beat_seconds: float = BEAT_SECONDS, stale_seconds: float = STALE_SECONDS
) -> RunLock:
    """Take the run's lock and start its heartbeat; `release_run` ends it.

    UserError (one line) while another launch lives there. A lock whose process is gone from this machine is
    taken over at once; one of another machine is watched until it beats (refused) or is stale (taken over,
    with a `warning:` line).
    """
    if "\0" in str(run_dir):
        raise UserError(f"run.dir: {str(run_dir)!r} cannot be the name of a folder; choose another")
    run_dir.mkdir(parents=True, exist_ok=True)
    lock = run_dir / LOCK
    while not _create(lock, _lock_bytes(launch)):
        dead = _find_dead(lock, stale_seconds)
        if dead is not None and _take_over(lock, dead, launch, stale_seconds):
            warn(f"{run_dir}: launch {dead.launch} on {dead.host} died without a word; its run is taken over")
            break
        time.sleep(0.1)
    run_lock = RunLock(run_dir, launch)
    run_lock.thread = threading.Thread(target=_beat, args=(run_lock, beat_seconds), name="heartbeat", daemon=True)
    run_lock.thread.start()
    return run_lock


def write_status(run_lock: RunLock, status: str, step: int, reason: str = "") -> None:
    """Put a new state into `status.json` at once (heartbeats repeat it). A lost lock writes nothing."""
    assert status in STATUSES, status
    with run_lock.writing:
        run_lock.status, run_lock.step, run_lock.reason = status, step, reason
        if not run_lock.lost and _holds(run_lock):
            _write_status_file(run_lock)


def release_run(run_lock: RunLock) -> None:
    """End the heartbeat and give the lock back; write the last status before."""
    run_lock.ended.set()
    if run_lock.thread is not None:
        run_lock.thread.join()
    if _holds(run_lock):
        remove_folder(run_lock.run_dir / LOCK)  # where that fails, the next launch finds this process gone


def record_end(run_lock: RunLock, status: str, step: int, reason: str) -> None:
    """The last status, and the lock given back, also where the disk is full: that must not keep a run from ending."""
    try:
        write_status(run_lock, status, step, reason)
    except OSError as error:
        warn(f"{run_lock.run_dir / STATUS}: cannot be written ({error}); the run has ended as {status}: {reason}")
    release_run(run_lock)


def read_status(run_dir: Path) -> RunStatus:
    """How a run stands. UserError where no run has been there or the file is not one of ours."""
    file = run_dir / STATUS
    if not os.path.lexists(file):
        raise UserError(f"{run_dir}: holds no run (no {STATUS})")
    content = parse_json_object(read_bounded(file), file)
    try:
        status = RunStatus(
            status=content["status"],
            step=int(content["step"]),
            reason=str(content["reason"]),
            launch=str(content["launch"]),
            heartbeat=float(content["heartbeat"]),
            alive=_is_alive(run_dir / LOCK),
        )
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{file}: is not a run's status ({brief(error)})") from None
    if status.status not in STATUSES:
        raise UserError(f"{file}: says {status.status!r}, which is none of {', '.join(STATUSES)}")
    return status


@dataclass(frozen=True)
class _Holder:
    """What a lock says of the process that made it."""

    launch: str = "unknown"
    host: str = "an unknown host"
    machine: str = ""
    pid: int = 0
    started: str = ""


def _beat(run_lock: RunLock, beat_seconds: float) -> None:
    failing = False
    while not run_lock.ended.wait(beat_seconds):
        try:
            if not _holds(run_lock):
                run_lock.lost = True
                warn(f"{run_lock.run_dir}: another launch has taken the run over; launch {run_lock.launch} must end")
                return
            os.utime(run_lock.run_dir / LOCK)
            with run_lock.writing:
                _write_status_file(run_lock, durable=False)
            failing = False
        except OSError as error:  # a file server away for a while must not end a run
            if not failing:
                warn(f"{run_lock.run_dir}: the heartbeat cannot be written ({error}); trying on")
            failing = True


def _write_status_file(run_lock: RunLock, durable: bool = True) -> None:
    content = {
        "status": run_lock.status,
        "step": run_lock.step,
        "reason": run_lock.reason,
        "launch": run_lock.launch,
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "heartbeat": time.time(),
    }
    write_whole(run_lock.run_dir / STATUS, to_json(content), durable=durable)


def _holds(run_lock: RunLock) -> bool:
    try:
        return _read_lock(run_lock.run_dir / LOCK)[0].launch == run_lock.launch
    except FileNotFoundError:
        return False


def _create(path: Path, data: bytes) -> bool:
    """Make a file that was not there; False when it was. Of two at once, on whatever nodes, one wins."""
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
    except FileExistsError:
        return False
    try:
        write_all(descriptor, data)
    finally:
        os.close(descriptor)
    return True


def _lock_bytes(launch: str) -> bytes:
    pid = os.getpid()
    holder = _Holder(launch, socket.gethostname(), _machine(), pid, _process_start(pid))
    return to_json(asdict(holder))


def _read_lock(lock: Path) -> tuple[_Holder, int]:
    """Who holds the lock, and its modification time in ns. FileNotFoundError when there is none."""
    modified = os.stat(lock, follow_symlinks=False).st_mtime_ns
    try:
        holder = _Holder(**parse_json_object(read_bounded(lock, limit=4096), lock))
    except (UserError, TypeError):  # caught while being written, or not one of ours: only its age can tell
        return _Holder(), modified
    kinds = all(type(getattr(holder, field.name)) is type(field.default) for field in fields(_Holder))
    return (holder if kinds else _Holder()), modified


def _find_dead(lock: Path, stale_seconds: float) -> _Holder | None:
    """The lock's holder once it is known to be dead; None when the lock has gone. UserError while it lives."""
    try:
        holder, modified = _read_lock(lock)
        alive = UserError(
            f"{lock.parent}: launch {holder.launch} is running there (process {holder.pid}, {holder.host}); "
            "wait for its end, or give this run another run.dir"
        )
        if _is_here(holder):
            if _process_start(holder.pid) == holder.started:
                raise alive
            return holder
        if _age(lock, modified) <= stale_seconds:
            print(f"{lock.parent}: held by launch {holder.launch} on {holder.host}; waiting for its heartbeat")
        while _age(lock, modified) <= stale_seconds:
            time.sleep(min(1.0, stale_seconds / 10))
            if _read_lock(lock) != (holder, modified):
                raise alive
        return holder
    except FileNotFoundError:
        return None


def _take_over(lock: Path, dead: _Holder, launch: str, stale_seconds: float) -> bool:
    """Put our lock in the place of a dead one's; False when somebody else is at it."""
    mutex = lock.with_name(f"{LOCK}.takeover")
    if not _create(mutex, _lock_bytes(launch)):
        with contextlib.suppress(FileNotFoundError):
            if _age(mutex, os.lstat(mutex).st_mtime_ns) > stale_seconds:
                mutex.unlink()  # its maker died in the few lines below
        return False
    try:
        # Another launch may have finished taking over since the verdict.
        if _read_lock(lock)[0] != dead:
            return False
        write_whole(lock, _lock_bytes(launch))
        return True
    except FileNotFoundError:
        return False
    finally:
        mutex.unlink(missing_ok=True)


def _is_alive(lock: Path) -> bool:
    try:
        holder, modified = _read_lock(lock)
    except FileNotFoundError:
        return False
    if _is_here(holder):
        return _process_start(holder.pid) == holder.started
    return _age(lock, modified) <= STALE_SECONDS


def _age(path: Path, modified_ns: int) -> float:
    """Seconds since a modification time, on the clock of the file system that gave it."""
    probe = path.with_name(f".clock-{socket.gethostname()}-{os.getpid()}")
    try:
        probe.touch()
        now = probe.stat().st_mtime_ns
        probe.unlink()
    except OSError:  # somebody who may only look
        now = time.time_ns()
    return (now - modified_ns) / 1e9


def _machine() -> str:
    """Equal for two processes exactly when they see each other's process ids; "" where that cannot be told."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{socket.gethostname()} {boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return ""


def _is_here(holder: _Holder) -> bool:
    """Whether the holder's process id means something on this machine; where not, its age alone can tell."""
    return holder.machine != "" and holder.machine == _machine()


def _process_start(pid: int) -> str:
    """When a process of this machine started, or "" for one that is not there (or dead and not yet collected).

    A process id alone says little: it may belong to somebody else by now.
    """
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return ""
    return "" if state[0] in "ZX" else state[19]
