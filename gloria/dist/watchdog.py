"""Where a rank is, and the end of the run once it has been there for too long.

Each rank that notices that something is wrong writes where it was to RUN/logs/rank-00000.log (a line `where: {...}`,
then the stacks of its threads) and, where torch records collectives, what it recorded to
RUN/logs/rank-00000.flight.json. The ranks read each other's lines to say who was slow.
"""

from __future__ import annotations

import contextlib
import faulthandler
import json
import os
import sys
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

import torch

from gloria.dist.rank_log import APPEND
from gloria.dist.run_lock import RunLock, record_end
from gloria.errors import UserError, warn
from gloria.files import brief, open_plain, parse_json_object, write_file

# In the order in which a step goes through them, so that the slowest rank is the one furthest back.
PHASES = ("start-up", "data", "forward and backward", "update", "sums", "validation", "checkpoint", "end")
HUNG, PEER_GONE = "no progress", "another rank is gone"
MARK = "where: "  # begins the line in a log in which a rank may have said anything
GRACE_SECONDS = 5.0  # in which the other ranks notice, too


@dataclass
class Watchdog:
    """Where this rank is, and a thread that ends the process once it has been there for too long.

    The thread works for every backend alike: it needs no collective, and not the main thread, which hangs.
    """

    folder: Path  # RUN/logs
    rank: int
    world: int
    patience: float  # seconds, for start-up, the first step and checkpoints
    limit: float  # seconds, for all else
    launch: str = ""
    run_lock: RunLock | None = None  # rank 0's
    step: int = 0
    phase: str = PHASES[0]
    since: float = 0.0
    allowed: float = 0.0
    thread: threading.Thread | None = None
    ended: threading.Event = field(default_factory=threading.Event)
    ending: threading.Lock = field(default_factory=threading.Lock)  # taken, for good, by whoever ends the process

    @property
    def place(self) -> str:
        """Step and phase, for a person."""
        return f"step {self.step}, {self.phase}"

    def beat(self, step: int, phase: str, *, slow: bool = False) -> None:
        """This rank has got to `phase` of `step`; called at each turn of the loop, so it must cost nothing."""
        self.step, self.phase, self.since = step, phase, time.monotonic()
        self.allowed = self.patience if slow else self.limit


def start_watch(watch: Watchdog) -> None:
    """Begin to watch, in start-up; `stop_watch` ends it."""
    watch.beat(0, PHASES[0], slow=True)
    watch.thread = threading.Thread(target=_watch, args=(watch,), name="watchdog", daemon=True)
    watch.thread.start()


def stop_watch(watch: Watchdog) -> None:
    """End the watch, and wait for its thread."""
    watch.ended.set()
    if watch.thread and watch.thread is not threading.current_thread():
        watch.thread.join()


def write_place(watch: Watchdog, what: str) -> None:
    """Write to this rank's log where it is, and what is the matter; a full disk must not keep a run from ending."""
    seconds = round(time.monotonic() - watch.since, 1)
    place = {"launch": watch.launch, "rank": watch.rank, "step": watch.step, "phase": watch.phase}
    try:
        watch.folder.mkdir(parents=True, exist_ok=True)
        with open(open_plain(_log(watch, watch.rank), APPEND), "ab", buffering=0) as file:
            line = json.dumps({**place, "seconds": seconds, "what": what, "time": time.time()})
            file.write(f"\n{MARK}{line}\n".encode())
            faulthandler.dump_traceback(file, all_threads=True)
        if flight := _flight_record():
            write_file(watch.folder / f"rank-{watch.rank:05d}.flight.json", flight, durable=False)
    except (OSError, UserError) as error:
        warn(f"{_log(watch, watch.rank)}: cannot be written ({error}); rank {watch.rank}: {what} in {watch.place}")


def failed_ranks(watch: Watchdog) -> str:
    """The ranks that have written of a mistake of their own, and what it was; or an empty string."""
    failed = [record for record in _read_places(watch, 0).values() if record["what"] not in (HUNG, PEER_GONE)]
    return "; ".join(f"rank {record['rank']} failed ({record['what']})" for record in failed)


def slow_ranks(watch: Watchdog, seconds: float) -> str:
    """Which rank the others wait for: one that gives no sign for `seconds`, or is furthest behind."""
    records = _read_places(watch, seconds)
    silent = [rank for rank in range(watch.world) if rank not in records]
    if silent:
        return f"rank {_listed(silent)} gives no sign (stopped or dead)"
    places = {rank: (record["step"], PHASES.index(record["phase"])) for rank, record in records.items()}
    slowest = [rank for rank, place in places.items() if place == min(places.values())]
    if len(slowest) == watch.world:
        return "all ranks are there"
    step, phase = places[slowest[0]]
    return f"rank {_listed(slowest)} is behind, in step {step}, {PHASES[phase]}"


def leave(watch: Watchdog, status: str, step: int, reason: str, code: int) -> NoReturn:
    """End this process at once: what is left of the process group would wait for ranks that will not come."""
    if watch.run_lock:
        record_end(watch.run_lock, status, step, reason)
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError):  # nothing is left that could be said
            stream.flush()
    os._exit(code)


def _watch(watch: Watchdog) -> None:
    while not watch.ended.wait(min(1.0, watch.allowed / 4)):
        waited = time.monotonic() - watch.since
        if waited > watch.allowed and watch.ending.acquire(blocking=False):
            place = watch.place
            try:
                write_place(watch, HUNG)
                culprits = failed_ranks(watch) or slow_ranks(watch, GRACE_SECONDS)
            except Exception as error:  # whatever is wrong with the logs, the process must end
                culprits = f"who was slow is not known ({brief(error)})"
            reason = f"{HUNG} for {waited:.0f} s in {place}: {culprits}"
            print(f"error: rank {watch.rank}: {reason}; see {watch.folder}", file=sys.stderr, flush=True)
            leave(watch, "failed", watch.step, reason, 1)


def _flight_record() -> bytes:
    """What torch recorded of its collectives, as JSON; empty where this torch keeps no record for the backend."""
    module = torch._C._distributed_c10d
    for name in ("_dump_nccl_trace_json", "_dump_fr_trace_json"):
        record = getattr(module, name)() if hasattr(module, name) else b""
        if record and json.loads(record).get("entries"):
            return record if isinstance(record, bytes) else record.encode()
    return b""


def _read_places(watch: Watchdog, seconds: float) -> dict[int, Mapping[str, Any]]:
    """The newest line of each rank of this launch that has one, after at most `seconds` of waiting for all."""
    deadline = time.monotonic() + seconds
    while True:
        found = {}
        for rank in range(watch.world):
            records = (_parse_place(line, rank) for line in _last_lines(_log(watch, rank)) if line.startswith(MARK))
            own = [record for record in records if record and record["launch"] == watch.launch]
            if own:
                found[rank] = own[-1]
        if len(found) == watch.world or time.monotonic() >= deadline:
            return found
        time.sleep(0.05)


def _last_lines(path: Path) -> list[str]:
    """The whole lines in the last megabyte of a log; none where there is no log that can be read."""
    try:
        with open(open_plain(path), "rb") as file:
            file.seek(max(0, os.fstat(file.fileno()).st_size - (1 << 20)))
            return file.read().decode(errors="replace").split("\n")[:-1]
    except (OSError, UserError):  # the rank gives no sign, which is what will be reported
        return []


def _parse_place(line: str, rank: int) -> Mapping[str, Any] | None:
    """The record of `write_place` in a line; None where it is damaged, or a rank has printed something like it."""
    try:
        record = parse_json_object(line.removeprefix(MARK).encode(), "log")
    except UserError:
        return None
    kinds = {"launch": str, "rank": int, "step": int, "phase": str, "what": str}
    whole = all(type(record.get(key)) is kind for key, kind in kinds.items())
    return record if whole and record["rank"] == rank and record["phase"] in PHASES else None


def _listed(ranks: list[int]) -> str:
    return ", ".join(map(str, ranks))


def _log(watch: Watchdog, rank: int) -> Path:
    return watch.folder / f"rank-{rank:05d}.log"
