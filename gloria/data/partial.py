"""A folder that appears whole or not at all: made beside its place under another name, then renamed."""

from __future__ import annotations

import fcntl
import glob
import os
import shutil
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from gloria.errors import UserError
from gloria.files import sync_folder


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
    for folder, _, names in os.walk(made):
        for name in names:
            with open(Path(folder, name), "rb") as file:
                os.fsync(file.fileno())
        sync_folder(folder)
    if replace and out.exists():
        out.rename(made.parent / "replaced")
    made.rename(out)
    sync_folder(out.absolute().parent)
