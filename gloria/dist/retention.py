"""Which checkpoints stay: room before the first, the last few kept, what dead launches left is removed.

All of it is for rank 0 alone, while it holds the run's lock.
"""

from __future__ import annotations

import itertools
import os
import shutil
from pathlib import Path

from gloria.dist.checkpoint_read import verify
from gloria.dist.manifest import MANIFEST, checkpoint_path, checkpoints_folder, saved_steps
from gloria.errors import UserError, warn
from gloria.files import remove_folder, size_text, sync_folder


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


def prune(run_dir: Path, keep: int, keep_every: int = 0, newest: int | None = None) -> list[int]:
    """Delete what is older than the `keep` newest valid checkpoints, except every `keep_every`-th step (0: none).

    Returns the steps deleted. A run calls it once its checkpoint of step `newest` is durable; later ones, which it
    passed over, are left alone and do not count. Without `newest` those that stay are read and checked whole. What is
    not valid never counts as kept.
    """
    assert keep >= 2, "with fewer than two, one damaged file is the end of the run"
    steps = [step for step in saved_steps(run_dir) if newest is None or step <= newest]
    valid = (s for s in reversed(steps) if not verify(checkpoint_path(run_dir, s), hashes=newest is None))
    kept = list(itertools.islice(valid, keep))  # stops there: milestones may be many
    if len(kept) < keep:
        return []
    gone = [step for step in steps if step < kept[-1] and not (keep_every and step % keep_every == 0)]
    return [step for step in gone if remove_checkpoint(checkpoint_path(run_dir, step))]


def remove_checkpoint(path: Path) -> bool:
    """Delete a checkpoint, its manifest first: killed half-way, what is left cannot pass for a checkpoint.

    False, with a `warning:` line, where that fails: the run goes on, and tries again when it prunes next.
    """
    try:
        if path.is_dir() and not path.is_symlink():
            (path / MANIFEST).unlink(missing_ok=True)
            sync_folder(path)
    except OSError as error:
        warn(f"{path}: cannot be removed ({error}); remove it by hand")
        return False
    return remove_folder(path)


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
    """Remove what dead launches left half-done in the checkpoints folder; a line to print for each.

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
        elif remove_checkpoint(path):
            lines.append(f"{path}: removed; a launch ended while it was being written or deleted")
    return lines
