"""Whole runs of `gloria.pretrain` in real processes, as torchrun would start them but without its seconds.

Ranks are forked from the fork server of tests/world.py, which has torch loaded; they find each other by the
environment variables that torchrun sets.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import socket
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from tests.world import PATIENCE, PRELOADED

# A model and a batch small enough for a step in some milliseconds; 12 rows divide by 1, 2, 3 and 4 ranks.
SMALL = {
    "train.steps": 12,
    "train.global_batch": 12,
    "train.micro_batch": 3,
    "train.sequence_length": 32,
    "model.num_layers": 2,
    "model.hidden_size": 32,
    "model.num_heads": 2,
    "model.window_size": 16,
    "schedule.warmup_steps": 2,
    "valid.every": 0,
    "checkpoint.every": 4,
    "log.every": 1,
    "log.tensorboard": "false",
}
# What makes a llama of it: a head of its own, and keys that two heads share; None: no such key.
LLAMA = {"model.preset": "llama-160m", "model.num_kv_heads": 1, "model.window_size": None}


def flags(recipe: dict[str, Any], **changes: Any) -> list[str]:
    """A recipe as flags, without those that are None; `changes` are keys with `__` for the dot."""
    both = recipe | {key.replace("__", "."): value for key, value in changes.items()}
    return [f"--{key}={value}" for key, value in both.items() if value is not None]


@dataclass
class Launch:
    """Ranks under way, and where their output goes."""

    processes: list[BaseProcess]
    output: Path

    def wait(self, timeout: float = PATIENCE) -> list[int]:
        """Exit statuses by rank (negative: the signal that ended it); a rank that does not end is killed and fails."""
        deadline = time.monotonic() + timeout
        for process in self.processes:
            process.join(max(0.0, deadline - time.monotonic()))
        late = [rank for rank, process in enumerate(self.processes) if process.exitcode is None]
        self.kill()
        assert not late, f"ranks {late} did not end within {timeout:g} s:\n{self.text()}"
        return [process.exitcode for process in self.processes]

    def kill(self) -> None:
        """End every rank at once, as a power cut would."""
        for process in self.processes:
            if process.exitcode is None:
                process.kill()
        for process in self.processes:
            process.join()

    def signal(self, number: signal.Signals, rank: int) -> None:
        os.kill(self.processes[rank].pid, number)

    def text(self) -> str:
        return self.output.read_text(errors="replace")


def start(arguments: Sequence[str], world: int, folder: Path, prepare: Callable[[], None] | None = None) -> Launch:
    """Start `gloria.pretrain` with `arguments` on `world` ranks; `prepare` (module-level) runs in each rank first."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    folder.mkdir(parents=True, exist_ok=True)
    output = folder / f"output-{time.monotonic_ns()}.txt"
    output.touch()
    port = _free_port()
    processes = []
    for rank in range(world):
        process = context.Process(target=_rank_main, args=(list(arguments), rank, world, port, str(output), prepare))
        process.start()
        processes.append(process)
    return Launch(processes, output)


def wait_until(condition: Callable[[], object], launch: Launch | None = None) -> None:
    """Look until something has happened, as long as it may take on a busy machine."""
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline, f"it never came\n{launch.text() if launch else ''}"
        time.sleep(0.01)


def run(arguments: Sequence[str], world: int, folder: Path, prepare: Callable[[], None] | None = None) -> Launch:
    """Start, wait, and require that every rank ends with status 0."""
    launch = start(arguments, world, folder, prepare)
    statuses = launch.wait()
    assert statuses == [0] * world, f"{statuses}\n{launch.text()}"
    return launch


def wait_for_step(run_dir: Path, step: int, launch: Launch, timeout: float = PATIENCE, event: str = "") -> None:
    """Wait until the run's metrics have `step`, or of an event (its checkpoint) at that step or later."""
    kind = "event" if event else "train"
    deadline = time.monotonic() + timeout
    while not any(line["step"] >= step and line.get("event", "") == event for line in metrics(run_dir, kind)):
        assert time.monotonic() < deadline, f"step {step} never came:\n{launch.text()}"
        assert all(process.exitcode is None for process in launch.processes), launch.text()
        time.sleep(0.01)


def metrics(run_dir: Path, kind: str) -> list[dict[str, Any]]:
    """The lines of a kind in metrics.jsonl; a last line still being written is left out."""
    path = run_dir / "metrics.jsonl"
    lines = path.read_text().split("\n")[:-1] if path.exists() else []
    return [values for values in map(json.loads, lines) if values["kind"] == kind]


def losses(run_dir: Path) -> dict[int, float]:
    """The training loss by step; each step at most once."""
    lines = metrics(run_dir, "train")
    found = {line["step"]: line["loss"] for line in lines}
    assert len(found) == len(lines), "a step stands twice in metrics.jsonl"
    return found


def _rank_main(
    arguments: list[str], rank: int, world: int, port: int, output: str, prepare: Callable[[], None] | None
) -> None:
    descriptor = os.open(output, os.O_WRONLY | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    os.environ.update(
        RANK=str(rank),
        WORLD_SIZE=str(world),
        LOCAL_RANK=str(rank),
        LOCAL_WORLD_SIZE=str(world),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
    )
    import torch

    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))  # as tests/world.py does
    from gloria.dist.signals import install_stop_handlers
    from gloria.errors import run_command
    from gloria.pretrain import main

    install_stop_handlers()
    if prepare:
        prepare()
    sys.exit(run_command(main, arguments))


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
