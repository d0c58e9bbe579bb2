"""Where a run's checkpoints lie, and the manifest that makes a folder of files a checkpoint.

A folder without a manifest, or whose files disagree with it, is no checkpoint. The manifest names every file
with its size and hash, and ends with a hash of itself, so a single changed byte in it is found too.
"""

from __future__ import annotations

import os
import re
import stat
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import xxhash

from gloria.errors import UserError
from gloria.files import brief, parse_json_object, read_bounded, to_json

FORMAT = 1
MANIFEST = "manifest.json"
TRAINER = "trainer.json"
LATEST = "latest"


@dataclass(frozen=True)
class FileEntry:
    """One file of a checkpoint: its plain name, bytes and xxh3-128 in hex."""

    name: str
    size: int
    hash: str


@dataclass(frozen=True)
class Manifest:
    """What a checkpoint consists of."""

    step: int
    world: int  # ranks that saved it
    launch: str
    saved_at: int  # seconds since 1970
    files: tuple[FileEntry, ...]  # the ranks in order, then trainer.json


def checkpoints_folder(run_dir: Path) -> Path:
    """Where a run keeps its checkpoints."""
    return run_dir / "checkpoints"


def checkpoint_path(run_dir: Path, step: int) -> Path:
    """The folder of one step's checkpoint, whether it is there or not."""
    return checkpoints_folder(run_dir) / f"step-{step:08d}"


def rank_file(rank: int) -> str:
    """The name of a rank's file in a checkpoint."""
    return f"rank-{rank:05d}.safetensors"


def step_of(path: Path) -> int | None:
    """The step a folder's name tells, or None where it is no checkpoint's (half-written, set aside, a stranger)."""
    match = re.fullmatch(r"step-(\d{8,18})", path.name)
    return int(match[1]) if match and path.name == f"step-{int(match[1]):08d}" else None


def saved_steps(run_dir: Path) -> list[int]:
    """Steps that have a checkpoint folder, whole or not, ascending."""
    folder = checkpoints_folder(run_dir)
    names = os.listdir(folder) if folder.is_dir() else []
    steps = (step_of(Path(name)) for name in names)
    return sorted(step for step in steps if step is not None)


def manifest_bytes(manifest: Manifest) -> bytes:
    """The manifest as it is written, sealed with a hash of itself."""
    content = {"format": FORMAT, **asdict(manifest)}
    return to_json({**content, "seal": xxhash.xxh3_128_hexdigest(to_json(content))})


def read_manifest(path: Path) -> Manifest:
    """The manifest of the checkpoint folder `path`. UserError names the file and what is wrong with it."""
    try:
        mode = os.lstat(path).st_mode
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
    if not stat.S_ISDIR(mode):
        raise UserError(f"{path}: is not a folder (symbolic links are not followed here)")
    file = path / MANIFEST
    data = read_bounded(file)
    content = parse_json_object(data, file)
    if content.get("format") != FORMAT:
        raise UserError(f"{file}: has format {content.get('format')!r}; this version reads format {FORMAT}")
    try:
        manifest = _from_json(content)
        whole = manifest_bytes(manifest) == data
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{file}: is not a checkpoint's manifest ({brief(error)})") from None
    if not whole:
        raise UserError(f"{file}: is not as it was written")
    if manifest.step != step_of(path):
        raise UserError(f"{file}: belongs to step {manifest.step}")
    return manifest


def _from_json(content: dict[str, Any]) -> Manifest:
    step, world, launch, saved_at = (content[key] for key in ("step", "world", "launch", "saved_at"))
    if not all(type(value) is int and value >= 0 for value in (step, world, saved_at)) or type(launch) is not str:
        raise ValueError("step, world, saved_at or launch")
    files = tuple(FileEntry(**entry) for entry in content["files"])
    # Exactly these names: so no entry can point out of the folder, and none is missing.
    names = [rank_file(rank) for rank in range(len(files) - 1)] + [TRAINER]
    if [entry.name for entry in files] != names or len(files) != world + 1:
        raise ValueError(f"names of {world} ranks' files: {[entry.name for entry in files][:4]}")
    if not all(type(entry.size) is int and type(entry.hash) is str for entry in files):
        raise ValueError("size or hash")
    return Manifest(step, world, launch, saved_at, files)


def run_and_step(path: Path) -> tuple[Path, int | None] | None:
    """The run, and of a checkpoint's own folder the step, that a path stands for; None where it is neither."""
    if checkpoints_folder(path).is_dir():
        return path, None
    if step_of(path) is not None and (path / MANIFEST).exists():
        return path.parent.parent, step_of(path)
    return None
