"""Where a rank is, and the end of the run once it has been there for too long.

Each rank that notices that something is wrong writes where it was to RUN/logs/rank-00000.log (a line `where: {...}`,
then the stacks of its threads) and, where torch records collectives, what it recorded to
RUN/logs/rank-00000.flight.json. The ranks read each other's lines to say who was slow.
"""

from __future__ import annotations

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

from gloria.dist.run_lock import RunLock, release_run, write_status
from gloria.errors import warn

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
    claim: RunLock | None = None  # rank 0's
    step: int = 0
    phase: str = PHASES[0]
    since: float = 0.0
    allowed: float = 0.0
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
    """Begin to watch, in start-up; setting `watch.ended` ends it."""
    watch.beat(0, PHASES[0], slow=True)
    threading.Thread(target=_watch, args=(watch,), name="watch", daemon=True).start()


def write_place(watch: Watchdog, what: str) -> None:
    """Write to this rank's log where it is, and what is the matter; a full disk must not keep a run from ending."""
    seconds = round(time.monotonic() - watch.since, 1)
    place = {"launch": watch.launch, "rank": watch.rank, "step": watch.step, "phase": watch.phase}
    try:
        watch.folder.mkdir(parents=True, exist_ok=True)
        with _log(watch, watch.rank).open("a") as file:
            file.write(f"\n{MARK}{json.dumps({**place, 'seconds': seconds, 'what': what, 'time': time.time()})}\n")
            file.flush()
            faulthandler.dump_traceback(file, all_threads=True)
        if flight := _flight_record():
            (watch.folder / f"rank-{watch.rank:05d}.flight.json").write_bytes(flight)
    except OSError as error:
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
    if watch.claim:
        write_status(watch.claim, status, step, reason)
        release_run(watch.claim)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _watch(watch: Watchdog) -> None:
    while not watch.ended.wait(min(1.0, watch.allowed / 4)):
        waited = time.monotonic() - watch.since
        if waited > watch.allowed and watch.ending.acquire(blocking=False):
            place = watch.place
            write_place(watch, HUNG)
            culprits = failed_ranks(watch) or slow_ranks(watch, GRACE_SECONDS)
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
            path = _log(watch, rank)
            lines = path.read_text(errors="replace").split("\n")[:-1] if path.exists() else []
            marked = [line.removeprefix(MARK) for line in lines if line.startswith(MARK)]
            if marked and (record := json.loads(marked[-1]))["launch"] == watch.launch:
                found[rank] = record
        if len(found) == watch.world or time.monotonic() >= deadline:
            return found
        time.sleep(0.05)


def _listed(ranks: list[int]) -> str:
    return ", ".join(map(str, ranks))


def _log(watch: Watchdog, rank: int) -> Path:
    return watch.folder / f"rank-{rank:05d}.log"
