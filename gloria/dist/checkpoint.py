"""Saving a checkpoint: every rank writes its shards in a thread, rank 0 makes the whole of it appear at once.

    RUN/checkpoints/step-00001000/
        rank-00000.safetensors ...   one file a rank: parameters, optimizer state, raw RNG
        trainer.json                 step, and what the loop wants to remember
        manifest.json                name, size and hash of each file; written last
    RUN/checkpoints/latest           the name of the newest, for people and scripts

    begin_save (copy to host) -> thread: write, hash, sync, note -> all ranks done    -> publish on rank 0
                                                                 -> a rank has failed -> abandon on all ranks

Until `publish` renames it everything lies in `step-00001000.tmp-LAUNCH`. The threads use no collective:
whether a rank is done or failed is `Save.state()`, which the loop sends along in the all-reduce it makes
anyway. A second copy of a rank's shards in host memory is the price of saving in the background; none when
saving synchronously.
"""

from __future__ import annotations

import contextlib
import math
import os
import re
import shutil
import threading
import time
from dataclasses import dataclass, field, replace
from enum import IntEnum
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import xxhash
from torch import Tensor

from gloria.dist.manifest import (
    FORMAT,
    LATEST,
    MANIFEST,
    TRAINER,
    FileEntry,
    Manifest,
    checkpoint_path,
    manifest_bytes,
    rank_file,
)
from gloria.dist.retention import remove_checkpoint
from gloria.dist.state import Shard, first_non_finite
from gloria.dist.tensor_file import write_tensor_file
from gloria.dist.transfer import host_buffer, side_by_side
from gloria.errors import UserError, warn
from gloria.files import (
    MAX_JSON_BYTES,
    parse_json_object,
    read_bounded,
    sync_folder,
    to_json,
    write_file,
    write_whole,
)


class NotFinite(Exception):
    """A tensor that is to be saved is not finite: a checkpoint of it would be no place to go back to."""


class SaveState(IntEnum):
    """How far this rank's part of a save is."""

    PENDING = 0
    DONE = 1
    FAILED = 2


@dataclass
class Save:
    """One rank's part of a save under way."""

    step: int
    folder: Path  # step-N.tmp-LAUNCH, later renamed to `target`
    target: Path
    rank: int
    world: int
    launch: str
    trainer: bytes
    error: str = ""
    written: bool = False
    bytes: int = 0  # of this rank's file
    seconds: float = 0.0  # from the copy's end until the file was durable
    thread: threading.Thread | None = None
    cancelled: threading.Event = field(default_factory=threading.Event)

    def state(self) -> SaveState:
        """PENDING until this rank's file and note are durable, then DONE; FAILED (with `error`) instead."""
        if self.error:
            return SaveState.FAILED
        return SaveState.DONE if self.written else SaveState.PENDING


def checkpoint_bytes(shards: dict[str, Shard]) -> int:
    """Bytes the whole checkpoint will take, over all ranks (from global shapes: each rank knows it alone)."""
    return sum(math.prod(shard.shape) * shard.tensor.element_size() for shard in shards.values())


def begin_save(
    run_dir: Path,
    step: int,
    shards: dict[str, Shard],
    rng: dict[str, Tensor],
    trainer: dict[str, Any],
    *,
    rank: int,
    world: int,
    launch: str,
    asynchronous: bool,
    staging: dict[str, Tensor] | None = None,
) -> Save:
    """Start this rank's part of the checkpoint of `step`; every rank calls it at the same step.

    With `asynchronous` the shards are copied to host memory before this returns, so the next step may change
    them at once. `staging` (an empty dict at first, the same one at every save) keeps that memory from save
    to save, so no other save may be under way. Without it everything is written, and durable, when this
    returns. `trainer` is plain JSON, equal on all ranks. A failure never raises: it is the FAILED state, so
    that all ranks can be told.
    """
    assert re.fullmatch(r"[A-Za-z0-9._-]{1,80}", launch), f"launch id {launch!r} cannot be part of a file name"
    document = to_json({"format": FORMAT, "step": step, "launch": launch, "state": trainer})
    assert len(document) <= MAX_JSON_BYTES, f"trainer state of {len(document)} bytes could not be read back"
    target = checkpoint_path(run_dir, step)
    folder = target.with_name(f"{target.name}.tmp-{launch}")
    save = Save(step, folder, target, rank, world, launch, document)
    own = {name: shard for name, shard in shards.items() if shard.owner}
    own |= {f"rng.{key}": Shard(state, tuple(state.shape), 0, True) for key, state in rng.items()}
    if not asynchronous:
        _write_part(save, own)
        return save
    try:
        own = _copy_to_host(own, {} if staging is None else staging)
    except (MemoryError, RuntimeError) as error:  # torch tells of missing host memory with a RuntimeError
        save.error = f"rank {rank}: no host memory for the copy ({str(error).splitlines()[0]})"
        return save
    save.thread = threading.Thread(target=_write_part, args=(save, own), name=f"save-{step}", daemon=True)
    save.thread.start()
    return save


def wait(save: Save) -> None:
    """Wait until this rank's part is done or has failed."""
    if save.thread is not None:
        save.thread.join()


def publish(save: Save) -> bool:
    """Make the checkpoint appear; rank 0 calls it once all ranks are done. True: it is whole and durable.

    False: `save.error` tells why, and what had not appeared is removed.
    """
    try:
        _publish(save)
    except (OSError, UserError) as error:
        save.error = f"rank {save.rank}: {error}"
        warn(f"{save.target}: not saved; {save.error}")
        shutil.rmtree(save.folder, ignore_errors=True)
        return False
    return True


def abandon(save: Save) -> None:
    """Stop this rank's part and remove it; every rank calls it once one has failed. The last one out removes
    the folder.

    Waits for the thread, which stops within a chunk (or the disk's sync), so `staging` is free afterwards. The rank
    that failed says why in a `warning:` line: only it knows.
    """
    error = save.error
    if error:
        warn(f"{save.target}: not saved; {error}")
    save.cancelled.set()
    wait(save)
    save.error = error or "on another rank"  # and not that this one's part was cancelled
    with contextlib.suppress(OSError):  # others have files there yet, or it never came to be
        for name in (rank_file(save.rank), _note_name(save.rank), *([TRAINER] if save.rank == 0 else [])):
            (save.folder / name).unlink(missing_ok=True)
        save.folder.rmdir()


def finish(save: Save) -> bool:
    """Wait for all ranks and publish: for synchronous saves and the last one of a run. A collective.

    Every rank gets the same answer; False means that nothing appeared, and the rank where it went wrong has said why.
    """
    wait(save)
    if _worst(save) == SaveState.FAILED:
        abandon(save)
        return False
    if save.rank == 0:
        publish(save)
    return _worst(save) == SaveState.DONE


def _worst(save: Save) -> int:
    state = torch.tensor(int(save.state()))
    if dist.is_initialized():
        dist.all_reduce(state, op=dist.ReduceOp.MAX)
    return int(state)


def _copy_to_host(shards: dict[str, Shard], staging: dict[str, Tensor]) -> dict[str, Shard]:
    """Copies of the shards in `staging`'s memory (page-locked for CUDA), taken by this call and not later."""
    on_gpu = any(shard.tensor.is_cuda for shard in shards.values())
    wanted = {name: (shard.tensor.shape, shard.tensor.dtype) for name, shard in shards.items()}
    if wanted != {name: (kept.shape, kept.dtype) for name, kept in staging.items()}:
        staging.clear()
        staging.update(_make_staging(shards, page_locked=on_gpu))
    for name, shard in shards.items():
        staging[name].copy_(shard.tensor, non_blocking=True)
    if on_gpu:
        torch.cuda.synchronize()
    return {name: replace(shard, tensor=staging[name]) for name, shard in shards.items()}


def _make_staging(shards: dict[str, Shard], *, page_locked: bool) -> dict[str, Tensor]:
    """Room for all shards in one piece of memory."""
    places, size = side_by_side({name: shard.tensor.nbytes for name, shard in shards.items()})
    memory = host_buffer(size, page_locked=page_locked)
    tensors = {name: shard.tensor for name, shard in shards.items()}
    return {name: memory[places[name]].view(tensor.dtype).view(tensor.shape) for name, tensor in tensors.items()}


def _write_part(save: Save, shards: dict[str, Shard]) -> None:
    """A rank's file, then its note. Any exception becomes the FAILED state: raised in a thread it would be lost."""
    start = time.perf_counter()
    try:
        if bad := first_non_finite({name: shard.tensor for name, shard in shards.items()}):
            raise NotFinite(f"{bad} has a NaN or an infinity; go back to an older checkpoint with run.resume")
        save.folder.mkdir(parents=True, exist_ok=True)
        name = rank_file(save.rank)
        save.bytes, digest = write_tensor_file(
            save.folder / name,
            shards,
            step=save.step,
            rank=save.rank,
            world=save.world,
            cancelled=save.cancelled,
        )
        note = {"name": name, "size": save.bytes, "hash": digest, "step": save.step, "world": save.world}
        if save.rank == 0:
            write_file(save.folder / TRAINER, save.trainer)
        # Only tells rank 0 that the file is durable, so it need not be so itself.
        write_whole(save.folder / _note_name(save.rank), to_json(note), durable=False)
        save.seconds = time.perf_counter() - start
        save.written = True
    except Exception as error:
        save.error = f"rank {save.rank}: {type(error).__name__}: {error}"


def _note_name(rank: int) -> str:
    return f"rank-{rank:05d}.json"


def _publish(save: Save) -> None:
    folder, parent = save.folder, save.target.parent
    files = [_read_note(save, rank) for rank in range(save.world)]
    files.append(FileEntry(TRAINER, len(save.trainer), xxhash.xxh3_128_hexdigest(save.trainer)))
    manifest = Manifest(save.step, save.world, save.launch, int(time.time()), tuple(files))
    write_file(folder / MANIFEST, manifest_bytes(manifest))
    for rank in range(save.world):
        (folder / _note_name(rank)).unlink()
    sync_folder(folder)
    # A step is saved again after its damaged checkpoint was passed over. At no moment is there neither the
    # old nor the new: `remove_incomplete` puts back what was moved aside if a crash came between the two renames.
    aside = save.target.with_name(f"{save.target.name}.replaced-{save.launch}")
    if os.path.lexists(save.target):
        os.rename(save.target, aside)
    os.rename(folder, save.target)
    sync_folder(parent)
    if os.path.lexists(aside):
        remove_checkpoint(aside)
    try:
        write_whole(parent / LATEST, f"{save.target.name}\n".encode())
    except OSError as error:  # it is for people and scripts; the checkpoint is whole without it
        warn(f"{parent / LATEST}: cannot be written ({error}); the checkpoint of step {save.step} is whole")


def _read_note(save: Save, rank: int) -> FileEntry:
    path = save.folder / _note_name(rank)
    if not path.exists():
        raise UserError(f"{path}: is missing; is the run folder on a file system that all nodes share?")
    note = parse_json_object(read_bounded(path), path)
    assert (note["step"], note["world"], note["name"]) == (save.step, save.world, rank_file(rank)), note
    return FileEntry(note["name"], note["size"], note["hash"])
