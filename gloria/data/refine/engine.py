"""datatrove's executors with marks that hold a key: a task is skipped if it is complete and unchanged."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterable, Sequence
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

from datatrove.executor import LocalPipelineExecutor
from loguru import logger

from gloria.data.prepare.recipe import Recipe
from gloria.data.prepare.workers import Workers
from gloria.data.refine.plan import Shard
from gloria.data.refine.stages import WORK, Stage, forget
from gloria.errors import UserError


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
                return super()._run_for_rank(rank, local_rank, node_rank)  # type: ignore[misc]
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


def quiet() -> None:
    """Leave the terminal to our own lines: datatrove logs each of its steps there."""
    logger.remove()
    os.environ["DATATROVE_COLORIZE_LOGS"] = "0"


def run_all(
    stages: Sequence[Stage], shards: Sequence[Shard], recipe: Recipe, workers: int, *, again: bool = False
) -> int:
    """Run the tasks of all stages that are not complete, or all of them `again`; how many those were."""
    assert recipe.refine is not None
    folder = Path(recipe.refine.out, WORK, "stages")
    if again and folder.exists():
        shutil.rmtree(folder)
    with Workers(workers) as pool:
        count = 0
        for stage in stages:
            executor = LocalExecutor(stage.pipeline, stage.keys, str(folder / stage.name))
            if ranks := executor.get_incomplete_ranks():
                count += len(ranks)
                forget(stage, ranks, shards, recipe)
                executor.run_in(pool, stage.name)
    return count
