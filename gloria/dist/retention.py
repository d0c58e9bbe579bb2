"""Which checkpoints stay: room before the first, the last few kept, litter of dead launches swept.

All of it is for rank 0 alone, while it holds the run's lock.
"""

from __future__ import annotations

import itertools
import os
import shutil
from pathlib import Path

from gloria.dist.checkpoint_read import verify
from gloria.dist.manifest import MANIFEST, checkpoint_path, checkpoints_folder, saved_steps
from gloria.errors import UserError
from gloria.files import size_text, sync_folder


def check_free_space(run_dir: Path, needed: int, keep: int) -> None:
    """UserError unless the disk has room for the checkpoints of `needed` bytes that will be there at once.

    That is `keep` and the next one, less those already there, and at least one.
    """
    folder = checkpoints_folder(run_dir)
    folder.mkdir(parents=True, exist_ok=True)
    count = max(1, keep + 1 - len(saved_steps(run_dir)))
    free = shutil.disk_usage(folder).free
    if free < count * needed:
        raise UserError(
            f"{folder}: {size_text(free)} free, and {count} checkpoints of {size_text(needed)} are to come "
            f"(checkpoint.keep = {keep}, and one being written); free some space or choose another run.dir"
        )


def prune(run_dir: Path, keep: int, keep_every: int = 0) -> list[int]:
    """Delete what is older than the `keep` newest valid checkpoints, except every `keep_every`-th step (0: none).

    Gives the steps deleted. Call it after the newest is durable. What is not valid never counts as kept.
    """
    assert keep >= 2, "with fewer than two, one damaged file is the end of the run"
    steps = saved_steps(run_dir)
    valid = (step for step in reversed(steps) if not verify(checkpoint_path(run_dir, step), hashes=False))
    kept = list(itertools.islice(valid, keep))  # stops there: milestones may be many
    if len(kept) < keep:
        return []
    gone = [step for step in steps if step < kept[-1] and not (keep_every and step % keep_every == 0)]
    for step in gone:
        remove_checkpoint(checkpoint_path(run_dir, step))
    return gone


def remove_checkpoint(path: Path) -> None:
    """Delete a checkpoint, its manifest first: killed half-way, what is left cannot pass for a checkpoint."""
    if path.is_symlink() or not path.is_dir():
        path.unlink()
        return
    (path / MANIFEST).unlink(missing_ok=True)
    sync_folder(path)
    shutil.rmtree(path)


def set_aside_newer(run_dir: Path, step: int, launch: str) -> list[Path]:
    """Rename the checkpoints after `step` to `step-N.aside-LAUNCH` and give their new places.

    For a run that goes back to `step` and takes another way from there: the next resume must not find the old
    way.
    """
    moved = []
    for newer in saved_steps(run_dir):
        if newer > step:
            path = checkpoint_path(run_dir, newer)
            moved.append(path.rename(path.with_name(f"{path.name}.aside-{launch}")))
    if moved:
        sync_folder(checkpoints_folder(run_dir))
    return moved


def remove_incomplete(run_dir: Path) -> list[str]:
    """Sweep what dead launches left half-done in the checkpoints folder; a line to print for each.

    Call it once at start, with the run's lock: nobody is writing then.
    """
    folder = checkpoints_folder(run_dir)
    lines = []
    for path in sorted(folder.iterdir()) if folder.is_dir() else []:
        step, _, rest = path.name.partition(".")
        if not step.startswith("step-") or not rest.startswith(("tmp-", "replaced-")):
            continue
        if rest.startswith("replaced-") and not os.path.lexists(folder / step):
            path.rename(folder / step)
            lines.append(f"{folder / step}: put back; a launch ended while it was being replaced")
        else:
            remove_checkpoint(path)
            lines.append(f"{path}: removed; a launch ended while it was being written or deleted")
    return lines
