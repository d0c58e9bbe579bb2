"""Files written whole or not at all, and read as if a stranger had left them; content in one number, sizes for people.

A run's files are read by `open_plain` and `read_bounded`, which never follow a symbolic link at the file itself, never
wait on a pipe, never take in more than a limit and never run anything: JSON and raw bytes are all there is.
"""

from __future__ import annotations

import fcntl
import glob
import json
import math
import os
import shutil
import socket
import stat
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import xxhash

from gloria.errors import UserError

# A checkpoint of a 2.7B model has headers of under 1 MB; 16 MB of hostile JSON still fits in memory when parsed.
MAX_JSON_BYTES = 16 << 20
CHUNK_BYTES = 16 << 20
_HASHED_BYTES = 4 << 20  # at a time


def hash_file(file: str | os.PathLike[str] | int) -> str:
    """xxh3-128 of all bytes of a file, in hexadecimal: finds damage, not forgery.

    `file` is a path, or an open descriptor at its start, which is closed.
    """
    hasher = xxhash.xxh3_128()
    buffer = memoryview(bytearray(_HASHED_BYTES))
    with open(file, "rb", buffering=0) as opened:
        while count := opened.readinto(buffer):
            hasher.update(buffer[:count])
    return hasher.hexdigest()


def sync_folder(folder: str | os.PathLike[str]) -> None:
    """Make the names in a folder durable: a file's own fsync does not reach its name, nor a rename."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def size_text(count: int) -> str:
    """Bytes for people: `12.3 GB` (1 GB is 10^9 bytes)."""
    for unit, size in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= size:
            return f"{count / size:.3g} {unit}"
    return f"{count} B"


def open_plain(path: Path) -> int:
    """A read-only descriptor of a regular file; the caller closes it. UserError names what it is instead."""
    try:
        # NONBLOCK: opening a pipe that has no writer would wait for ever.
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except FileNotFoundError:
        raise UserError(f"{path}: is missing") from None
    except OSError as error:
        if path.is_symlink():
            raise UserError(f"{path}: is a symbolic link, which is never followed here") from None
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise UserError(f"{path}: is not a plain file")
    return descriptor


def read_bounded(path: Path, limit: int = MAX_JSON_BYTES) -> bytes:
    """All bytes of a plain file of at most `limit` bytes."""
    descriptor = open_plain(path)
    try:
        size = os.fstat(descriptor).st_size
        if size > limit:
            raise UserError(f"{path}: {size} bytes, more than the {limit} such a file may have")
        with os.fdopen(descriptor, "rb", closefd=False) as file:
            return file.read(limit)
    finally:
        os.close(descriptor)


def parse_json_object(data: bytes, place: object) -> dict[str, Any]:
    """A JSON object from bytes; anything else, a key given twice and endless nesting are a UserError at `place`."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) != len(pairs):
            raise ValueError("a key is given twice")
        return found

    try:
        value = json.loads(data.decode("utf-8"), object_pairs_hook=unique)
    except (ValueError, RecursionError) as error:  # bad UTF-8 and bad JSON are ValueErrors
        raise UserError(f"{place}: is not the JSON that was written ({brief(error)})") from None
    if not isinstance(value, dict):
        raise UserError(f"{place}: holds a JSON {type(value).__name__}, not an object")
    return value


def read_json_object(path: Path, remedy: str) -> dict[str, Any]:
    """The JSON object in a file that the user has named; a UserError that ends with `remedy` where it holds none.

    Symbolic links are followed, as in the hub's cache; pipes, endless files and endless nesting are refused.
    """
    if path.exists() and not path.is_file():
        raise UserError(f"{path}: is no plain file; {remedy}")
    try:
        with path.open("rb") as file:
            data = file.read(MAX_JSON_BYTES + 1)
        if len(data) > MAX_JSON_BYTES:
            raise UserError(f"{path}: has more than the {MAX_JSON_BYTES} bytes such a file may have; {remedy}")
        values = json.loads(data.decode())
    except (ValueError, RecursionError) as error:  # bad UTF-8, bad JSON and giant integers are ValueErrors
        raise UserError(f"{path}: is no JSON ({error}); {remedy}") from None
    if not isinstance(values, dict):
        raise UserError(f"{path}: is no JSON object; {remedy}")
    return values


def brief(error: Exception) -> str:
    """An exception in one short line, also where its message quotes what somebody else wrote."""
    text = repr(error)
    return text if len(text) <= 200 else f"{text[:200]}..."


def to_json(value: dict[str, Any]) -> bytes:
    """The one way an object is written, so that what was read can be compared byte for byte."""
    return json.dumps(value, indent=1, sort_keys=True, allow_nan=False, ensure_ascii=False).encode() + b"\n"


def write_all(descriptor: int, data: bytes | memoryview) -> None:
    """Write every byte: one `os.write` may take fewer (2 GB at most, or up to a full disk)."""
    view = memoryview(data)
    while view:
        view = view[os.write(descriptor, view) :]


def write_file(path: Path, data: bytes, *, durable: bool = True) -> None:
    """Write a file where nobody looks yet, and have it on the disk when this returns if `durable`."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
    try:
        write_all(descriptor, data)
        if durable:
            os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_whole(path: Path, data: bytes, *, durable: bool = True) -> None:
    """Put `data` at `path`, whole or not at all and, if `durable`, on the disk when this returns."""
    beside = path.with_name(f".{path.name}.{socket.gethostname()}-{os.getpid()}")
    try:
        write_file(beside, data, durable=durable)
        os.replace(beside, path)
    except OSError:
        beside.unlink(missing_ok=True)
        raise
    if durable:
        sync_folder(path.parent)


@contextmanager
def replacement(folder: Path) -> Iterator[Path]:
    """Where to make a folder that, durable, takes the place of `folder` once the block has ended well.

    Killed in the midst of it, what is at `folder` is the old one, the new one, or what `put_back` puts there.
    """
    put_back(folder)
    work, old = _beside(folder, "new"), _beside(folder, "old")
    shutil.rmtree(work, ignore_errors=True)
    try:
        yield work
        _finish_files(work)
        if folder.exists():
            os.rename(folder, old)
        os.rename(work, folder)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    sync_folder(folder.parent)
    shutil.rmtree(old, ignore_errors=True)


def put_back(folder: Path) -> None:
    """Undo what a launch that was killed between the two renames of `replacement` has left."""
    old = _beside(folder, "old")
    if old.exists() and not folder.exists():
        os.rename(old, folder)
    shutil.rmtree(old, ignore_errors=True)


def _beside(folder: Path, what: str) -> Path:
    return folder.with_name(f".{folder.name}-{what}")


def json_line(values: Mapping[str, Any]) -> bytes:
    """A JSON object and a newline. JSON has no NaN: such a number is null, and `note` names it."""
    notes: list[str] = []
    clean = _finite(values, "", notes)
    if notes:
        clean["note"] = "; ".join(notes)
    return json.dumps(clean, ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode() + b"\n"


def _finite(value: Any, place: str, notes: list[str]) -> Any:
    if isinstance(value, Mapping):
        return {key: _finite(item, f"{place}.{key}".strip("."), notes) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item, f"{place}[{number}]", notes) for number, item in enumerate(value)]
    if isinstance(value, float) and not math.isfinite(value):
        notes.append(f"{place} is {value}")
        return None
    return value


@contextmanager
def partial_folder(out: Path) -> Iterator[Path]:
    """A work folder `OUT.partial-LAUNCH` for making `out`, gone when the block ends, however it ends.

    It is locked as long as this process lives, so those that dead launches left (killed, power lost) are
    told from that of a living one: the first are removed with a line, the second is a `UserError`.
    """
    out = Path(os.path.abspath(out))
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        for other in sorted(glob.glob(f"{glob.escape(str(out))}.partial-*")):
            _remove_stale(Path(other), out)
        folder = out.with_name(f"{out.name}.partial-{socket.gethostname()}-{os.getpid()}")
        folder.mkdir()
    except OSError as error:
        raise UserError(f"{out}: can't be made there ({error.strerror}); give another --out") from None
    try:
        with open(folder / "lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            yield folder
    finally:
        shutil.rmtree(folder)


def _remove_stale(folder: Path, out: Path) -> None:
    try:
        with open(folder / "lock", "a") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except FileNotFoundError:
        pass  # died before it had locked anything
    except BlockingIOError:
        raise UserError(
            f"{out}: another launch is making it ({folder.name}); wait for it or give another --out"
        ) from None
    shutil.rmtree(folder)
    print(f"{folder}: left by a launch that died, removed", flush=True)


def publish(made: Path, out: Path, *, replace: bool = False) -> None:
    """Rename the finished folder `made` to `out`, durably; with `replace` a folder there goes into `made`'s parent."""
    _finish_files(made)
    if replace and out.exists():
        out.rename(made.parent / "replaced")
    made.rename(out)
    sync_folder(out.absolute().parent)


def _finish_files(made: Path) -> None:
    """Make all files of a folder durable, and readable as any new file is: safetensors gives its own mode 0600."""
    mask = os.umask(0o022)
    os.umask(mask)
    for folder, _, names in os.walk(made):
        for name in names:
            with open(Path(folder, name), "rb") as file:
                os.fchmod(file.fileno(), 0o666 & ~mask)
                os.fsync(file.fileno())
        sync_folder(folder)
