"""Finding, checking and reading checkpoints, on any number of ranks whatever number saved them.

A file is trusted for nothing: names come from a fixed pattern, links are not followed, headers are bounded
and checked, and no content is ever executed. Files in the folder that the manifest does not name are never
opened; `unknown_files` lists them.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gloria.dist.manifest import (
    FORMAT,
    MANIFEST,
    TRAINER,
    Manifest,
    checkpoint_path,
    checkpoints_folder,
    rank_file,
    read_manifest,
    saved_steps,
)
from gloria.dist.state import first_non_finite
from gloria.dist.tensor_file import Piece, byte_view, read_tensor_file
from gloria.errors import UserError, warn
from gloria.files import CHUNK_BYTES, hash_file, open_plain, parse_json_object, read_bounded

_PREADV_BYTES = 1 << 30  # Linux reads just under 2 GB a call at most


@dataclass(frozen=True)
class Listed:
    """One checkpoint folder of a run. `problems` is empty for a valid one; `saved_at` None without a manifest."""

    step: int
    path: Path
    bytes: int
    saved_at: int | None
    problems: tuple[str, ...]


@dataclass(frozen=True)
class Reader:
    """An open checkpoint: where every row of every tensor lies."""

    path: Path
    step: int
    world: int  # ranks that saved it
    tensors: dict[str, tuple[Piece, ...]]  # in row order
    rng: tuple[dict[str, Piece], ...]  # by rank

    def read_into(self, name: str, tensor: Tensor, offset: int, shape: tuple[int, ...]) -> None:
        """Fill `tensor`, the rows from `offset` of the tensor `name` of global `shape`, from the pieces it overlaps.

        Host memory is filled in place; any other device by way of a small buffer. UserError names both values
        where the checkpoint's tensor has another shape or dtype, or does not exist.
        """
        if name not in self.tensors:
            raise UserError(f"{self.path}: has no tensor {name}; was it saved from another model?")
        pieces = self.tensors[name]
        if pieces[0].shape != tuple(shape) or pieces[0].dtype != tensor.dtype:
            raise UserError(
                f"{self.path}: {name} is {pieces[0].dtype} {list(pieces[0].shape)} there "
                f"and {tensor.dtype} {list(shape)} here; was it saved from another model?"
            )
        rows = tensor if tensor.dim() else tensor.reshape(1)
        for piece in pieces:
            first = max(piece.first, offset)
            last = min(piece.first + piece.rows, offset + len(rows))
            if first < last and rows.numel():
                row_bytes = piece.bytes // piece.rows
                position = piece.position + (first - piece.first) * row_bytes
                _read_rows(piece.file, position, rows[first - offset : last - offset])

    def read_rng(self, rank: int) -> dict[str, Tensor] | None:
        """The raw generator states that `rank` saved, or None where it was not among the ranks."""
        if rank >= self.world:
            return None
        states = {}
        for key, piece in self.rng[rank].items():
            states[key] = torch.empty(piece.shape, dtype=piece.dtype)
            _read_rows(piece.file, piece.position, states[key])
        return states


def open_reader(path: Path) -> Reader:
    """Read the manifest and the headers, and check that every tensor is covered once, without gap or overlap.

    Hashes are not checked here (`verify`, which `find_checkpoint` calls). Raises UserError naming the file.
    """
    manifest = read_manifest(path)
    gathered: dict[str, list[Piece]] = {}
    rng: list[dict[str, Piece]] = []
    for rank in range(manifest.world):
        file = path / rank_file(rank)
        header = read_tensor_file(file)
        if (header.step, header.rank, header.world) != (manifest.step, rank, manifest.world):
            raise UserError(
                f"{file}: is of step {header.step}, rank {header.rank} of {header.world}; "
                f"step {manifest.step}, rank {rank} of {manifest.world} belongs here"
            )
        rng.append({})
        for name, piece in header.pieces.items():
            if name.startswith("rng."):  # each rank has its own, whole
                (rng[rank][name.removeprefix("rng.")],) = _in_order(file, name, [piece])
            else:
                gathered.setdefault(name, []).append(piece)
    tensors = {name: _in_order(path, name, pieces) for name, pieces in gathered.items()}
    return Reader(path, manifest.step, manifest.world, tensors, tuple(rng))


def read_trainer(path: Path) -> dict[str, Any]:
    """What the loop gave to remember (`trainer` of `begin_save`), of the checkpoint folder `path`."""
    file = path / TRAINER
    manifest = read_manifest(path)
    content = parse_json_object(read_bounded(file), file)
    if content.get("format") != FORMAT or not isinstance(content.get("state"), dict):
        raise UserError(f"{file}: is not the trainer state of a checkpoint of format {FORMAT}")
    if content.get("step") != manifest.step:
        raise UserError(f"{file}: is of step {content.get('step')}; step {manifest.step} belongs here")
    return content["state"]


def verify(path: Path, hashes: bool = True) -> list[str]:
    """Everything wrong with a checkpoint folder, a line `FILE: what` each; empty for a valid one.

    Sizes and structure always, contents with `hashes`: all files are read, several at a time, and every tensor must be
    finite.
    """
    try:
        manifest = read_manifest(path)
    except UserError as error:
        return list(error.problems)
    with ThreadPoolExecutor(max_workers=min(8, os.cpu_count() or 1)) as pool:
        checked = pool.map(lambda entry: _check_file(path / entry.name, entry.size, entry.hash, hashes), manifest.files)
        problems = [problem for found in checked for problem in found]
    if problems:
        return problems
    try:
        reader = open_reader(path)
        read_trainer(path)
        bad = _first_non_finite(reader) if hashes else None
    except UserError as error:
        return list(error.problems)
    return [f"{path}: {bad} has a NaN or an infinity"] if bad else []


def _first_non_finite(reader: Reader) -> str | None:
    def check(name: str) -> str | None:
        for piece in reader.tensors[name]:  # a rank's part at a time, so as to hold no tensor whole
            part = torch.empty((piece.rows, *piece.shape[1:]), dtype=piece.dtype)
            _read_rows(piece.file, piece.position, part)
            if bad := first_non_finite({name: part}):
                return bad
        return None

    with ThreadPoolExecutor(max_workers=min(8, os.cpu_count() or 1)) as pool:
        return next(filter(None, pool.map(check, reader.tensors)), None)


def unknown_files(path: Path) -> list[str]:
    """Names in a checkpoint folder that its manifest does not name. They are left alone and never opened."""
    known = {MANIFEST, *(entry.name for entry in read_manifest(path).files)}
    return sorted(set(os.listdir(path)) - known)


def list_checkpoints(run_dir: Path, hashes: bool = False) -> list[Listed]:
    """All checkpoint folders of a run by step, each with what is wrong with it (contents only with `hashes`)."""
    found = []
    for step in saved_steps(run_dir):
        path = checkpoint_path(run_dir, step)
        found.append(Listed(step, path, _folder_bytes(path), _saved_at(path), tuple(verify(path, hashes))))
    return found


def find_checkpoint(run_dir: Path, step: int | None = None) -> Path:
    """The newest checkpoint that verifies, contents included, or the one of `step`.

    What does not verify is named by a `warning:` line for each file and passed over. UserError where none is
    left, or where the `step` asked for is not there or not whole.
    """
    folder = checkpoints_folder(run_dir)
    steps = saved_steps(run_dir)
    if not steps:
        raise UserError(f"{folder}: holds no checkpoint")
    if step is not None:
        if step not in steps:
            there = ", ".join(str(number) for number in steps)
            raise UserError(f"{folder}: holds no checkpoint of step {step}; there are steps {there}")
        problems = verify(checkpoint_path(run_dir, step))
        if problems:
            raise UserError(*problems)
        return checkpoint_path(run_dir, step)
    for candidate in reversed(steps):
        path = checkpoint_path(run_dir, candidate)
        problems = verify(path)
        if not problems:
            return path
        for problem in problems:
            warn(f"{problem}; the checkpoint of step {candidate} is passed over")
    if saved_steps(run_dir)[-1:] > steps[-1:]:
        return find_checkpoint(run_dir)  # beside a run that saves and prunes: those listed are gone, there are newer
    raise UserError(
        f"{folder}: none of the {len(steps)} checkpoints is whole (see the warnings); "
        "mend one, or move the folder away to start afresh"
    )


def read_full_tensors(path: Path, prefix: str = "") -> Iterator[tuple[str, Tensor]]:
    """Every tensor whose name starts with `prefix`, whole, on the host, one at a time, the prefix taken off.

    Reads beside a run that goes on. UserError, at the latest after the last tensor, where the run has deleted the
    checkpoint or put another in its place meanwhile.
    """
    manifest = read_manifest(path)
    try:
        reader = open_reader(path)
        for name in sorted(reader.tensors):
            if name.startswith(prefix):
                piece = reader.tensors[name][0]
                tensor = torch.empty(piece.shape, dtype=piece.dtype)
                reader.read_into(name, tensor, 0, piece.shape)
                yield name.removeprefix(prefix), tensor
    except UserError:
        _require_unchanged(path, manifest)
        raise
    _require_unchanged(path, manifest)


def _require_unchanged(path: Path, manifest: Manifest) -> None:
    """The manifest goes first when a checkpoint is deleted, and tells one save of a step from another."""
    try:
        unchanged = read_manifest(path) == manifest
    except UserError:
        unchanged = False
    if not unchanged:
        raise UserError(f"{path}: its run has deleted or replaced it while it was read; read a newer one")


def _in_order(path: Path, name: str, pieces: list[Piece]) -> tuple[Piece, ...]:
    """The pieces by row, empty ones last, once they are known to make one whole tensor."""
    shape, dtype = pieces[0].shape, pieces[0].dtype
    filled = sorted((piece for piece in pieces if piece.rows), key=lambda piece: piece.first)
    row = 0
    for piece in filled:
        if piece.first != row or piece.shape != shape or piece.dtype != dtype:
            raise UserError(f"{piece.file}: rows of {name[:99]!r} do not fit those of the other ranks")
        row += piece.rows
    if row != (shape[0] if shape else 1):
        raise UserError(f"{path}: {name[:99]!r} has {row} rows of the {(*shape, 1)[0]} it should have")
    return tuple(filled) or (pieces[0],)


def _check_file(path: Path, size: int, digest: str, hashes: bool) -> list[str]:
    try:
        descriptor = open_plain(path)
        there = os.fstat(descriptor).st_size
        os.close(descriptor)
        if there != size:
            return [f"{path}: has {there} bytes, {size} were written"]
        if hashes and hash_file(open_plain(path)) != digest:
            return [f"{path}: its content is not what was written (hash differs)"]
    except UserError as error:
        return list(error.problems)
    except OSError as error:
        return [f"{path}: cannot be read ({error.strerror})"]
    return []


def _read_rows(file: Path, position: int, rows: Tensor) -> None:
    """Fill `rows` (n, ...) from consecutive bytes of a file."""
    descriptor = open_plain(file)
    try:
        if rows.device.type == "cpu" and rows.is_contiguous():
            _read_exactly(descriptor, byte_view(rows), position, file)
            return
        row_bytes = math.prod(rows.shape[1:]) * rows.element_size()
        step = max(1, CHUNK_BYTES // row_bytes)
        for start in range(0, len(rows), step):
            part = rows[start : start + step]
            buffer = torch.empty(part.shape, dtype=part.dtype)
            _read_exactly(descriptor, byte_view(buffer), position + start * row_bytes, file)
            part.copy_(buffer)
    finally:
        os.close(descriptor)


def _read_exactly(descriptor: int, view: memoryview, position: int, file: Path) -> None:
    while view:
        try:
            count = os.preadv(descriptor, [view[:_PREADV_BYTES]], position)
        except OSError as error:
            raise UserError(f"{file}: cannot be read ({error.strerror})") from None
        if not count:
            raise UserError(f"{file}: ends before byte {position + len(view)}")
        view = view[count:]
        position += count


def _saved_at(path: Path) -> int | None:
    try:
        return read_manifest(path).saved_at
    except UserError:  # what is wrong is among the problems of the same listing
        return None


def _folder_bytes(path: Path) -> int:
    if not path.is_dir() or path.is_symlink():
        return 0
    return sum(entry.stat(follow_symlinks=False).st_size for entry in os.scandir(path))
