"""Files and folders written whole or not at all, and read without trust in their content; JSON, hashes, sizes as text.

A run's files are read by `open_plain` and `read_bounded`, which never follow a symbolic link at the file itself, never
wait on a pipe, never read more than a limit and never run anything: JSON and raw bytes are all there is. They are
written by `create_file` and `whole_file`, which never write through a link or into a file that stands there.
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
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

import xxhash

from gloria.errors import UserError, warn

# A checkpoint of a 2.7B model has headers of under 1 MB; 16 MB of hostile JSON still fits in memory when parsed.
MAX_JSON_BYTES = 16 << 20
CHUNK_BYTES = 16 << 20
REPLACED = "replaced"  # in a work folder: the one that `publish` has moved out of the way
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


@contextmanager
def os_errors(remedy: str) -> Iterator[None]:
    """An OSError in the block becomes a `UserError`: the file, what the system says, and `remedy`."""
    try:
        yield
    except OSError as error:
        raise UserError(f"{error.filename or 'file'}: {error.strerror or error}; {remedy}") from None


def size_text(count: int) -> str:
    """Bytes for people: `12.3 GB` (1 GB is 10^9 bytes)."""
    for unit, size in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= size:
            return f"{count / size:.3g} {unit}"
    return f"{count} B"


def open_plain(path: Path, flags: int = os.O_RDONLY, *, follow_links: bool = False) -> int:
    """A descriptor of a regular file, opened with `flags` (also O_APPEND | O_CREAT); the caller closes it.

    UserError names what is there instead. It never waits on a pipe, and follows a symbolic link at the file itself
    only with `follow_links`.
    """
    follow = 0 if follow_links else os.O_NOFOLLOW
    try:
        # NONBLOCK: opening a pipe that has no other end would wait without end.
        descriptor = os.open(path, flags | follow | os.O_NONBLOCK | os.O_CLOEXEC, 0o666)
    except FileNotFoundError:
        raise UserError(f"{path}: is missing") from None
    except OSError as error:
        if not follow_links and path.is_symlink():
            raise UserError(f"{path}: is a symbolic link, which is never followed here") from None
        verb = "written" if flags & (os.O_WRONLY | os.O_RDWR) else "read"
        raise UserError(f"{path}: cannot be {verb} ({error.strerror})") from None
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise UserError(f"{path}: is not a plain file")
    return descriptor


def read_bounded(path: Path, limit: int = MAX_JSON_BYTES, *, follow_links: bool = False) -> bytes:
    """All bytes of a plain file of at most `limit` bytes."""
    with open(open_plain(path, follow_links=follow_links), "rb") as file:
        size = os.fstat(file.fileno()).st_size
        if size > limit:
            raise UserError(f"{path}: {size} bytes, more than the {limit} such a file may have")
        try:
            return file.read(limit)
        except OSError as error:
            raise UserError(f"{path}: cannot be read ({error.strerror})") from None


def parse_json(data: bytes, place: object) -> Any:
    """The JSON value in `data`. UserError at `place` for anything else.

    That includes a key given twice, nesting that is too deep and a number of more than 100 digits.
    """

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) != len(pairs):
            raise ValueError("a key is given twice")
        return found

    def whole_number(text: str) -> int:
        if len(text) > 100:  # transformers writes 10^30 for "no limit"; more than 10^308 is not even a float
            raise ValueError(f"a number of {len(text)} digits")
        return int(text)

    try:
        return json.loads(data.decode("utf-8-sig"), object_pairs_hook=unique, parse_int=whole_number)
    except (ValueError, RecursionError) as error:  # bad UTF-8 and bad JSON are ValueErrors
        raise UserError(f"{place}: is not valid JSON ({str(error)[:200]})") from None


def parse_json_object(data: bytes, place: object) -> dict[str, Any]:
    """The JSON object in `data`; UserError at `place` where it is anything else."""
    value = parse_json(data, place)
    if not isinstance(value, dict):
        raise UserError(f"{place}: is not a JSON object")
    return value


def read_json_object(path: Path, remedy: str, limit: int = MAX_JSON_BYTES) -> dict[str, Any]:
    """The JSON object in a file that the user has named; a UserError that ends with `remedy` where it holds none.

    Symbolic links are followed, as in the hub's cache. FileNotFoundError where there is no file: callers know why.
    """
    path.stat()
    try:
        return parse_json_object(read_bounded(path, limit, follow_links=True), path)
    except UserError as error:
        raise UserError(*(f"{problem}; {remedy}" for problem in error.problems)) from None


def brief(value: object) -> str:
    """An exception, or a value that somebody else wrote, in one short line."""
    text = repr(value)
    return text if len(text) <= 200 else f"{text[:200]}..."


def to_json(value: dict[str, Any]) -> bytes:
    """The one way an object is written, so that what was read can be compared byte for byte."""
    return json.dumps(value, indent=1, sort_keys=True, allow_nan=False, ensure_ascii=False).encode() + b"\n"


def write_all(descriptor: int, data: bytes | memoryview) -> None:
    """Write every byte: one `os.write` may take fewer (2 GB at most, or up to a full disk)."""
    view = memoryview(data)
    while view:
        view = view[os.write(descriptor, view) :]


def create_file(path: Path) -> int:
    """A descriptor of a new, empty file at `path`, with the mode that the umask gives; the caller closes it.

    A file, pipe or symbolic link that stands there is removed and never opened; OSError for a folder.
    """
    while True:
        try:
            return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
        except FileExistsError:
            path.unlink(missing_ok=True)


def write_file(path: Path, data: bytes, *, durable: bool = True) -> None:
    """Write a new file where nobody looks yet, and have it on the disk when this returns if `durable`."""
    with open(create_file(path), "wb", buffering=0) as file:
        write_all(file.fileno(), data)
        if durable:
            os.fsync(file.fileno())


@contextmanager
def whole_file(path: Path, *, durable: bool = True) -> Iterator[BinaryIO]:
    """A new file to write, which takes the place of `path` when the block ends well, and is removed otherwise."""
    beside = path.with_name(f".{path.name}.{socket.gethostname()}-{os.getpid()}")
    try:
        with open(create_file(beside), "wb") as file:
            yield file
            file.flush()
            if durable:
                os.fsync(file.fileno())
        os.replace(beside, path)
    except BaseException:
        with suppress(OSError):  # what has failed is more important
            beside.unlink()
        raise
    if durable:
        sync_folder(path.parent)


def write_whole(path: Path, data: bytes, *, durable: bool = True) -> None:
    """Put `data` at `path`, whole or not at all and, if `durable`, on the disk when this returns."""
    with whole_file(path, durable=durable) as file:
        file.write(data)


def remove_folder(path: Path) -> bool:
    """Delete a folder (or file) that is no longer needed; where that fails, False and a `warning:` line."""
    try:
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
        return True
    except OSError as error:
        warn(f"{path}: cannot be removed ({error}); remove it by hand")
        return False


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
def partial_folder(out: Path, *, keep: str = "") -> Iterator[Path]:
    """A work folder `OUT.partial-LAUNCH` for making `out`, gone when the block ends, however it ends.

    Call `publish` in the block. The folder is locked as long as this process lives, so folders of
    dead launches (killed, power lost) are recognised and removed with a line; that of a living one is a `UserError`.
    With `keep` the folder is `OUT.partial-kept`: the next launch finds in it what this one has made of it, if the block
    ends by an exception and something matches the glob `keep`.
    """
    out = Path(os.path.abspath(out))
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        folder = out.with_name(f"{out.name}.partial-{'kept' if keep else f'{socket.gethostname()}-{os.getpid()}'}")
        with _one_launch_at_a_time(out):
            remove_partial(out, but=folder if keep else None)
            folder.mkdir(exist_ok=bool(keep))
            lock = create_file(folder / "lock")
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        raise UserError(f"{out}: can't be made there ({error.strerror}); choose another place") from None
    is_kept = False
    try:
        yield folder
    except BaseException:
        is_kept = bool(keep and any(folder.glob(keep)))
        if is_kept:
            print(f"{folder}: holds what is finished; the same command goes on", file=sys.stderr, flush=True)
        raise
    finally:
        if not is_kept:
            with _one_launch_at_a_time(out):
                remove_folder(folder)
        os.close(lock)


@contextmanager
def _one_launch_at_a_time(out: Path) -> Iterator[None]:
    """Wait until no other launch looks for partial folders of `out`, or makes or removes its own."""
    path = out.with_name(f".{out.name}.launch")
    while True:
        with open(os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)) as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            # The launch before has removed the file, perhaps while this one waited for it.
            if path.exists() and os.path.samestat(os.stat(path), os.fstat(lock.fileno())):
                try:
                    yield
                finally:
                    path.unlink()
                return


def remove_partial(out: Path, *, but: Path | None = None) -> None:
    """Remove what launches that died have left of making `out`, and put `out` back where one was replacing it.

    The folder `but` stays.
    """
    for folder in sorted(map(Path, glob.glob(f"{glob.escape(str(out))}.partial-*"))):
        # No lock: it died before it had locked anything, or another launch has removed it.
        if (folder / "lock").exists():
            with open(open_plain(folder / "lock", os.O_RDWR)) as lock:
                try:
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    raise UserError(
                        f"{out}: another launch is making it ({folder.name}); wait for it or choose another place"
                    ) from None
                if (folder / REPLACED).exists() and not out.exists():
                    os.rename(folder / REPLACED, out)
                    print(f"{out}: put back; a launch died while it was replacing it", flush=True)
        if folder != but and folder.exists() and remove_folder(folder):
            print(f"{folder}: left by a launch that died, removed", flush=True)


def publish(made: Path, out: Path, *, replace: bool = False) -> None:
    """Rename the finished folder `made`, in a `partial_folder`, to `out`, durably.

    With `replace` an older folder there goes; killed in the midst of it, the next launch finds the old one or the
    new one. Files get the mode that the umask gives, for some libraries write them with 0600.
    """
    mode = 0o666 & ~_umask()
    for folder, _, names in os.walk(made):
        for name in names:
            with open(open_plain(Path(folder, name)), "rb") as file:
                os.fchmod(file.fileno(), mode)
                os.fsync(file.fileno())
        sync_folder(folder)
    if replace and out.exists():
        out.rename(made.parent / REPLACED)
    made.rename(out)
    sync_folder(out.absolute().parent)


def _umask() -> int:
    """This process's umask, read and not set: os.umask would change it for the other threads meanwhile."""
    status = Path("/proc/self/status").read_text()
    return int(status.partition("Umask:")[2].split()[0], 8)
