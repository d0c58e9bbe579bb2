"""Jobs of launch/*.sbatch, what they leave, and the undisturbed runs to compare it with."""

from __future__ import annotations

import functools
import json
import os
import runpy
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from gloria.dist.checkpoint_read import find_checkpoint, read_full_tensors
from tests import launch
from tests.launch import flags, losses, metrics
from tests.slurm.cluster import Cluster

REPOSITORY = Path(__file__).resolve().parents[2]
HOOKS = Path(__file__).with_name("hooks")
PATIENCE = 300  # seconds for anything that takes a few; a busy machine is slow


@dataclass
class Job:
    """A job and where its run, its log and the record of its samples are."""

    cluster: Cluster
    id: str
    folder: Path
    log: Path

    @property
    def run(self) -> Path:
        return self.folder / "run"

    def state(self) -> str:
        return self.cluster.job(self.id)["JobState"]

    def restarts(self) -> int:
        """How often Slurm has requeued it."""
        return int(self.cluster.job(self.id)["Restarts"])

    def wait_for_step(self, step: int, run: str = "run") -> None:
        def reached() -> bool:
            assert self.state() in ("PENDING", "CONFIGURING", "RUNNING", "COMPLETING"), self.log.read_text()
            return any(line["step"] >= step for line in metrics(self.folder / run, "train"))

        self.cluster.wait_for(f"step {step}", reached, PATIENCE, self.log)

    def wait_for_state(self, *states: str, patience: float = PATIENCE) -> None:
        ends = {"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", *states}
        self.cluster.wait_for(f"{states}", lambda: self.state() in ends, patience, self.log)
        assert self.state() in states, f"{self.state()}\n{self.log.read_text()}"

    def ranks_on(self, node: str) -> list[int]:
        """Process ids of the job's ranks on a node."""
        found = []
        for pid in self.cluster.members(node):
            words = Path(f"/proc/{pid}/cmdline").read_text().split("\0")
            if "gloria.pretrain" in words and "torch.distributed.run" not in words and words[0] != "srun":
                found.append(pid)
        return found


def submit(
    cluster: Cluster,
    folder: Path,
    recipe: dict[str, Any],
    *options: str,
    pause: float = 0.1,
    nodes: str = "2",
    **about: Any,
) -> Job:
    """`sbatch launch/pretrain.sbatch` with a recipe; `pause` seconds before each step leave time to disturb it."""
    (folder / "samples").mkdir(parents=True, exist_ok=True)
    pauses = {"TEST_SAMPLES": str(folder / "samples"), "TEST_STEP_SECONDS": str(pause)}
    arguments = flags(recipe, run__dir=folder / "run")
    return submit_script(cluster, folder, "pretrain", arguments, f"--nodes={nodes}", *options, more=pauses, **about)


def submit_script(
    cluster: Cluster,
    folder: Path,
    script: str,
    arguments: Sequence[str],
    *options: str,
    launcher: str = "srun",
    ranks_per_node: int = 1,
    interface: str = "lo",
    more: Mapping[str, str] | None = None,
) -> Job:
    """`sbatch OPTIONS launch/SCRIPT.sbatch ARGUMENTS`, with `more` in its environment."""
    environment = {
        "GLORIA_VENV": sys.prefix,
        "GLORIA_LAUNCHER": launcher,
        "GLORIA_INTERFACE": interface,
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": f"{HOOKS}:{REPOSITORY}",
        "HF_HUB_OFFLINE": "1",
        **(more or {}),
    }
    log = folder / ("log.txt" if script == "pretrain" else f"{script}.txt")
    size = [f"--gpus-per-node={ranks_per_node}", "--time=30"]
    size += [] if script == "pretrain" else ["--cpus-per-gpu=1"]
    command = ["sbatch", "--parsable", f"--output={log}", *size, *options, f"launch/{script}.sbatch"]
    job = cluster.call(*command, *arguments, environment=environment, cwd=REPOSITORY).strip()
    return Job(cluster, job, folder, log)


@dataclass
class References:
    """Undisturbed runs outside Slurm, each made when first asked for."""

    folder: Path
    made: dict[str, Path] = field(default_factory=dict)

    def get(self, recipe: dict[str, Any], world: int) -> Path:
        """The folder with `run` and `samples` of the recipe on `world` ranks."""
        key = json.dumps([world, recipe], default=str, sort_keys=True)
        if key not in self.made:
            folder = self.folder / str(len(self.made))
            (folder / "samples").mkdir(parents=True)
            record = functools.partial(_record, str(folder / "samples"))
            launch.run(flags(recipe, run__dir=folder / "run"), world, folder, prepare=record)
            self.made[key] = folder
        return self.made[key]


def _record(samples: str) -> None:
    os.environ["TEST_SAMPLES"] = samples
    runpy.run_path(str(HOOKS / "sitecustomize.py"))


def assert_same_run(found: Path, expected: Path) -> None:
    """Two folders with `run` and `samples`: the same samples, losses and, to the bit, parameters and optimizer."""
    assert samples_of(found / "samples") == samples_of(expected / "samples")
    assert losses(found / "run") == losses(expected / "run")
    one, other = (dict(read_full_tensors(find_checkpoint(folder / "run"))) for folder in (found, expected))
    assert one.keys() == other.keys()
    for name in one:
        assert torch.equal(one[name], other[name]), name


def samples_of(folder: Path) -> dict[tuple[int, int], tuple[int, ...]]:
    """(step, row) -> (source, epoch, window); what was taken again after a failure must be the same again."""
    found: dict[tuple[int, int], tuple[int, ...]] = {}
    for file in folder.iterdir():
        for line in file.read_text().split("\n")[:-1]:
            step, row, *sample = map(int, line.split())
            assert found.setdefault((step, row), tuple(sample)) == tuple(sample), (step, row)
    return found
