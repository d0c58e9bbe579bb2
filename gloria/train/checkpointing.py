"""Checkpoints that a run writes while it goes on: begun by its loop, finished by what the ranks say in a step."""

from __future__ import annotations

from typing import Any

from gloria.dist.checkpoint import abandon, begin_save, finish, publish
from gloria.dist.retention import prune
from gloria.dist.state import Shard, rng_state_dict
from gloria.dist.step_sums import StepSums
from gloria.errors import warn
from gloria.train.run import MAX_FAILED_SAVES, Run


def begin(run: Run, tensors: dict[str, Shard], trainer: dict[str, Any], *, asynchronous: bool) -> None:
    """Start the checkpoint of this step, of all that the run has to remember. One still under way is waited for."""
    run.watch.beat(run.step, "checkpoint", slow=True)
    if run.save:
        if run.log:
            run.log.event(run.step, "checkpoint_wait", for_step=run.save.step)
        finish_save(run, whole=finish(run.save))
    run.save = begin_save(
        run.folder,
        run.step,
        tensors,
        rng_state_dict(),
        trainer,
        rank=run.process.rank,
        world=run.process.world,
        launch=run.launch,
        asynchronous=asynchronous,
        staging=run.staging,
    )
    if not asynchronous:
        finish_save(run, whole=finish(run.save))


def poll(run: Run, sums: StepSums) -> None:
    """Publish the save under way once every rank has written its part, or abandon it where one has failed."""
    if not run.save or not (sums.saves_failed or sums.saves_done == run.process.world):
        return
    if sums.saves_failed:
        abandon(run.save)
        finish_save(run, whole=False)
    else:
        finish_save(run, whole=not run.process.is_main or publish(run.save))


def wait(run: Run) -> None:
    """Let the save under way come to its end, at the end of a run."""
    if run.save:
        finish_save(run, whole=finish(run.save))


def finish_save(run: Run, *, whole: bool) -> None:
    """A save is over: report how it went, and delete older checkpoints."""
    save, run.save = run.save, None
    assert save is not None
    run.failed_saves = 0 if whole else run.failed_saves + 1
    if whole:
        run.saved_step = save.step
    if not run.log:
        return
    if whole:
        keep = run.config.checkpoint
        gone = prune(run.folder, keep.keep, keep.keep_every, newest=save.step)
        run.log.event(save.step, "checkpoint", bytes=save.bytes, seconds=round(save.seconds, 3), pruned=gone)
    else:
        run.log.event(save.step, "checkpoint_failed", error=save.error or "on another rank", newest=run.saved_step)
        if run.failed_saves == MAX_FAILED_SAVES:
            warn(f"{run.folder}: {MAX_FAILED_SAVES} checkpoints in a row failed; the run tries once more and stops")
