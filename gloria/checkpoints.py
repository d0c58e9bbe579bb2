"""python -m gloria.checkpoints --run DIR: the checkpoints of a run, whether they are whole, and the run's state.

Modules that import torch are imported where they are needed: --status must answer a job script at once.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from gloria.config.cli import option, parse
from gloria.dist.config import CheckpointConfig
from gloria.dist.manifest import checkpoints_folder, step_of
from gloria.dist.run_lock import STATUS, RunStatus, lock_run, read_status, release_run
from gloria.errors import UserError, run_command
from gloria.files import parse_json_object, read_bounded, size_text
from gloria.train.branch import START, describe_ancestors, read_ancestors

if TYPE_CHECKING:
    from gloria.dist.checkpoint_read import Listed

# Exit statuses of --status; 75 is EX_TEMPFAIL, which a job script turns into a requeue.
EXIT_STATUS = {"done": 0, "stopped": 75, "running": 75, "failed": 1}


@dataclass(frozen=True)
class CheckpointsOptions:
    """Which run, and what to do with its checkpoints."""

    run: Path = option(help="the run's folder")
    verify: bool = option(False, "read every byte and compare it with its hash")
    prune: bool = option(False, "delete all but the newest, and what dead launches left")
    keep: int = option(
        CheckpointConfig.keep, "newest checkpoints --prune leaves; with one, damage to it would end the run", minimum=2
    )
    keep_every: int = option(0, "steps whose multiples --prune leaves (0: none)", minimum=0)
    status: bool = option(False, "print the state of the run; exit 0 done, 75 to be continued, 1 failed")


def main(argv: list[str] | None = None) -> int:
    """List a run's checkpoints, or do what one flag says. Exit status 1: something is not valid (or the run
    failed)."""
    arguments = parse(
        CheckpointsOptions,
        argv,
        prog="python -m gloria.checkpoints",
        description="List the checkpoints of a run, or print its state.",
        recipe=False,
    ).config
    run_dir = arguments.run
    if not run_dir.is_dir():
        raise UserError(f"--run: {run_dir} is not a folder; name a run's folder (runs/NAME)")
    if arguments.status:
        status = status_of(run_dir)
        print(describe_status(status, time.time()))
        return EXIT_STATUS[status.status]
    if arguments.prune:
        prune_run(run_dir, arguments.keep, arguments.keep_every)
    from gloria.dist.checkpoint_read import list_checkpoints

    if (run_dir / START).exists():
        state = parse_json_object(read_bounded(run_dir / START), run_dir / START)
        if ancestors := read_ancestors(state, run_dir / START):
            print(f"branch {describe_ancestors(ancestors)}")
    listed = list_checkpoints(run_dir, hashes=arguments.verify)
    print_list(run_dir, listed)
    return 1 if any(entry.problems for entry in listed) else 0


def status_of(run_dir: Path) -> RunStatus:
    """The state of a run; of a fine-tuning with several seeds that of the last active one, done when all are."""
    seeds = [read_status(path.parent) for path in run_dir.glob(f"seed-*/{STATUS}")]
    if not seeds or (run_dir / STATUS).exists():
        return read_status(run_dir)
    last = max(seeds, key=lambda status: status.heartbeat)
    if last.status == "done" and not (run_dir / "results.json").is_file():
        return replace(last, status="stopped", reason="other seeds are still to run")
    return last


def describe_status(status: RunStatus, now: float) -> str:
    """One line: state, step, reason, launch and last sign of life."""
    state = status.status
    if state == "running" and not status.alive:
        state = "dead (it was running, its launch is gone)"
    reason = f", {status.reason}" if status.reason else ""
    age = duration(now - status.heartbeat)
    return f"{state}, step {status.step}{reason}; launch {status.launch}, heartbeat {age} ago"


def prune_run(run_dir: Path, keep: int, keep_every: int) -> None:
    """Prune while holding the run's lock, so that no launch is writing or reading there."""
    from gloria.dist.retention import prune, remove_incomplete

    run_lock = lock_run(run_dir, f"prune-{int(time.time())}")
    try:
        for line in remove_incomplete(run_dir):
            print(line)
        for step in prune(run_dir, keep, keep_every):
            print(f"step {step}: deleted")
    finally:
        release_run(run_lock)


def print_list(run_dir: Path, listed: list[Listed]) -> None:
    """A line a checkpoint (step, size, age, valid or why not), then what else lies in the folder."""
    from gloria.dist.checkpoint_read import unknown_files

    folder = checkpoints_folder(run_dir)
    if not listed:
        print(f"{folder}: no checkpoint")
    now = time.time()
    for entry in listed:
        age = "-" if entry.saved_at is None else duration(now - entry.saved_at)
        line = f"step {entry.step:>10}  {size_text(entry.bytes):>10}  {age:>8}  "
        print(line + ("valid" if not entry.problems else f"NOT VALID: {entry.problems[0]}"))
        for problem in entry.problems[1:]:
            print(" " * len(line) + problem)
        if not entry.problems:
            for name in unknown_files(entry.path):
                print(" " * len(line) + f"also there, never read: {name}")
    for path in sorted(folder.glob("step-*")) if folder.is_dir() else []:
        if step_of(path) is None:
            print(f"{path}: no checkpoint (half-written, or set aside)")


def duration(seconds: float) -> str:
    """A span of time for people: its largest unit."""
    for unit, length in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= length:
            return f"{int(seconds // length)} {unit}"
    return f"{max(0, int(seconds))} s"


if __name__ == "__main__":
    raise SystemExit(run_command(main))
