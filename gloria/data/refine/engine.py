"""datatrove's executors with marks that hold a key: a task is skipped if it is complete and unchanged."""

from __future__ import annotations

import contextlib
import errno
import importlib.util
import os
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Iterable, Sequence
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

from datatrove.executor import LocalPipelineExecutor, RayPipelineExecutor, SlurmPipelineExecutor
from loguru import logger

from gloria.config.toml import PACKAGE
from gloria.data.prepare.recipe import Recipe
from gloria.data.prepare.workers import Workers
from gloria.data.refine.config import ExecutorConfig
from gloria.data.refine.plan import Shard
from gloria.data.refine.stages import WORK, Stage, forget
from gloria.errors import UserError

POLL_SECONDS = 2.0
SHARED_DISK_SECONDS = 5.0  # until a file that another node has written is seen here


class Marked:
    """Adds to an executor of datatrove: `keys`, one for each task, are part of the name of its completion mark."""

    keys: Sequence[str]
    logging_dir: Any

    def mark(self, rank: int) -> str:
        return f"completions/{rank:05d}-{self.keys[rank]}"

    def is_rank_completed(self, rank: int) -> bool:
        return self.logging_dir.isfile(self.mark(rank))

    def mark_rank_as_completed(self, rank: int) -> None:
        self.logging_dir.open(self.mark(rank), "w").close()

    def get_incomplete_ranks(self, ranks: Iterable[int] | None = None, skip_completed: bool | None = None) -> list[int]:
        return [
            rank for rank in (range(len(self.keys)) if ranks is None else ranks) if not self.is_rank_completed(rank)
        ]

    def _run_for_rank(self, rank: int, local_rank: int = 0, node_rank: int = -1) -> Any:
        # The engine logs to stderr and to logs/task_RANK.log; on a terminal a person reads our lines.
        log = Path(self.logging_dir.resolve_paths("logs"), f"task_{rank:05d}.err")
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("w") as file, contextlib.redirect_stderr(file):
            try:
                return super()._run_for_rank(rank, local_rank, node_rank)  # type: ignore[misc]  # of the executor that this is mixed with
            finally:
                logger.remove()


class LocalExecutor(Marked, LocalPipelineExecutor):
    """Runs tasks in prepare's pool, whose processes end with their parent and whose death is noticed; datatrove's own
    pool waits for ever for a worker that the system has killed.
    """

    def __init__(self, pipeline: list[Any], keys: Sequence[str], folder: str) -> None:
        super().__init__(pipeline, tasks=len(keys), workers=1, logging_dir=folder)
        self.keys = keys

    def run_in(self, pool: Workers, label: str) -> None:
        """Run what is not complete."""
        try:
            for _ in pool.map(self._run_for_rank, self.get_incomplete_ranks(), label):
                pass
        except BrokenProcessPool:
            raise UserError(
                "a worker was killed, or ran out of memory; use fewer --workers, or give it more memory; the same "
                "command goes on where it stopped"
            ) from None
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            place = self.logging_dir.path
            raise UserError(f"{place}: the disk got full; free some, and the same command goes on") from None


class SlurmExecutor(Marked, SlurmPipelineExecutor):
    """Runs tasks as one array of Slurm jobs and waits for it. Everything lies on a disk that all nodes see."""

    def __init__(self, pipeline: list[Any], keys: Sequence[str], folder: str, config: ExecutorConfig) -> None:
        # Jobs find this Python, this package and the paths of the recipe as they are here.
        lines = [f"cd {shlex.quote(os.getcwd())}", f"export PATH={shlex.quote(str(Path(sys.executable).parent))}:$PATH"]
        lines.append(f"export PYTHONPATH={shlex.quote(str(PACKAGE.parent))}")
        super().__init__(
            pipeline,
            tasks=len(keys),
            time=config.time,
            partition=config.partition,  # left out below where there is none
            mem_per_cpu_gb=config.memory_gb,
            workers=config.workers or -1,
            job_name="gloria-refine",
            qos="",
            env_command="\n".join(lines),
            sbatch_args=dict(config.sbatch),
            logging_dir=folder,
        )
        self.keys = keys

    def get_sbatch_args(self, max_array: int = 1) -> dict[str, Any]:
        return {key: value for key, value in super().get_sbatch_args(max_array).items() if value is not None}

    def launch_merge_stats(self) -> None:
        """Nothing: the report adds the tasks' records up."""

    def run_in(self, pool: Workers, label: str) -> None:
        """Submit what is not complete and wait until it is; `UserError` with what a task said where one failed."""
        ranks = self.get_incomplete_ranks()
        try:
            self.run()
        except (FileNotFoundError, subprocess.CalledProcessError) as error:
            raise UserError(f"executor: sbatch failed ({error}); run it where jobs are submitted") from None
        print(f"{label}: {len(ranks)} tasks, Slurm job {self.job_id}", flush=True)
        while left := self.get_incomplete_ranks():
            if not _is_queued(str(self.job_id)):
                time.sleep(SHARED_DISK_SECONDS)
                if left := self.get_incomplete_ranks():
                    break
            time.sleep(POLL_SECONDS)
        if left:
            logs = Path(self.slurm_logs_folder)
            said = [
                line for path in sorted(logs.glob("*.out")) for line in path.read_text("utf-8", "replace").splitlines()
            ]
            mistakes = dict.fromkeys(line.partition("UserError: ")[2] for line in said if "errors.UserError: " in line)
            raise UserError(*mistakes or [f"{label}: {len(left)} tasks failed; {logs} holds what they said"])


def _is_queued(job: str) -> bool:
    """Whether Slurm has a task of the job waiting or running; yes, too, while it does not answer."""
    done = subprocess.run(["squeue", "-h", "-j", job], capture_output=True, text=True)
    return bool(done.stdout.strip()) or (done.returncode != 0 and "Invalid job id" not in done.stderr)


class RayExecutor(Marked, RayPipelineExecutor):
    """Runs tasks on the Ray cluster that `RAY_ADDRESS` names, or on one of this machine."""

    def __init__(self, pipeline: list[Any], keys: Sequence[str], folder: str, config: ExecutorConfig) -> None:
        super().__init__(
            pipeline,
            tasks=len(keys),
            workers=config.workers or -1,
            logging_dir=folder,
            mem_per_cpu_gb=config.memory_gb,
        )
        self.keys = keys

    def run_in(self, pool: Workers, label: str) -> None:
        """Run what is not complete."""
        import ray

        if not ray.is_initialized():
            ray.init(log_to_driver=False, runtime_env={"env_vars": {"PYTHONPATH": str(PACKAGE.parent)}})
        self.run()
        if left := self.get_incomplete_ranks():
            raise UserError(f"{label}: {len(left)} tasks failed; {self.logging_dir.path} holds what they said")


def quiet() -> None:
    """Leave the terminal to our own lines: datatrove logs each of its steps there."""
    logger.remove()


def run_all(
    stages: Sequence[Stage], shards: Sequence[Shard], recipe: Recipe, workers: int, *, again: bool = False
) -> int:
    """Run the tasks of all stages that are not complete, or all of them `again`; how many those were."""
    assert recipe.refine is not None
    config = recipe.executor or ExecutorConfig()
    folder = Path(recipe.refine.out, WORK, "stages").absolute()
    if again and folder.exists():
        shutil.rmtree(folder)
    with Workers(workers if config.kind == "local" else 1) as pool:
        count = 0
        for stage in stages:
            executor = _executor(config, stage, str(folder / stage.name))
            if ranks := executor.get_incomplete_ranks():
                count += len(ranks)
                forget(stage, ranks, shards, recipe)
                executor.run_in(pool, stage.name)
    return count


def _executor(config: ExecutorConfig, stage: Stage, folder: str) -> LocalExecutor | SlurmExecutor | RayExecutor:
    if config.kind == "ray" and importlib.util.find_spec("ray") is None:
        raise UserError('executor.kind: "ray" needs the package ray; pip install ray')
    if config.kind == "local":
        return LocalExecutor(stage.pipeline, stage.keys, folder)
    kind = SlurmExecutor if config.kind == "slurm" else RayExecutor
    return kind(stage.pipeline, stage.keys, folder, config)
