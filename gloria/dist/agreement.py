"""Do all ranks mean the same run? Asked before the first collective that would hang, or mix two runs, otherwise."""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist

import gloria
from gloria.dist.process import Process
from gloria.errors import UserError

Made = TypeVar("Made")
SHARED_SECONDS = 60.0  # a file server may show a new file that late to a node that has looked before


def gather(own: dict[str, Any]) -> list[dict[str, Any]]:
    """What every rank says, by rank; as JSON, for nothing that comes over a wire is unpickled here."""
    data = torch.frombuffer(bytearray(json.dumps(own).encode()), dtype=torch.uint8)
    sizes = [torch.zeros(1, dtype=torch.int64) for _ in range(dist.get_world_size())]
    dist.all_gather(sizes, torch.tensor([len(data)]))
    longest = int(max(sizes))
    all_data = [torch.zeros(longest, dtype=torch.uint8) for _ in sizes]
    dist.all_gather(all_data, torch.nn.functional.pad(data, (0, longest - len(data))))
    return [json.loads(bytes(text[: int(size)].tolist())) for text, size in zip(all_data, sizes)]


def require_same(process: Process, own: Mapping[str, Any]) -> None:
    """End every rank where one has another value than rank 0 under a key; a line a key, from rank 0 alone.

    `own` is what must be alike besides the versions (a flat recipe, fingerprints); values are compared as text.
    """
    own = {"gloria": gloria.__version__, "torch": torch.__version__, **own}
    said = gather({"node": socket.gethostname(), "own": {key: str(value) for key, value in own.items()}})
    first = said[0]
    problems = []
    for key in sorted({key for fact in said for key in fact["own"]}):
        values = [fact["own"].get(key, "nothing") for fact in said]
        other = next((rank for rank, value in enumerate(values) if value != values[0]), None)
        if other is not None:
            problems.append(
                f"{key}: {values[0]} on {first['node']} (rank 0) and {values[other]} on {said[other]['node']} "
                f"(rank {other}); start all ranks with the same recipe, flags, corpus and environment"
            )
    _end_all(process, problems)


def on_all_ranks(process: Process, make: Callable[[], Made]) -> Made:
    """What `make` gives on this rank; where it is a UserError on any, every rank ends, and rank 0 says why."""
    made: Made | None = None
    problems: list[str] = []
    try:
        made = make()
    except UserError as error:
        problems = list(error.problems)
    said = gather({"problems": problems})
    _end_all(process, list(dict.fromkeys(problem for fact in said for problem in fact["problems"])))
    return cast(Made, made)  # a rank without it has ended


def require_shared(process: Process, file: Path, text: str) -> None:
    """End every rank where one does not see `text` in `file`, which rank 0 has written; a line, from rank 0 alone.

    Without it a checkpoint in parts on several disks would only be found to be none when it is to be published.
    """
    deadline = time.monotonic() + SHARED_SECONDS
    while not (sees := _holds(file, text)) and time.monotonic() < deadline:
        time.sleep(0.2)
    said = gather({"node": socket.gethostname(), "sees": sees})
    blind = list(dict.fromkeys(fact["node"] for fact in said if not fact["sees"]))
    problems = [
        f"run.dir: {file.parent}: what {said[0]['node']} writes there is not seen on {', '.join(blind)}; "
        "choose a folder on a file system that all nodes share"
    ]
    _end_all(process, problems if blind else [])


def _holds(file: Path, text: str) -> bool:
    try:
        return text in file.read_text()
    except OSError:
        return False


def _end_all(process: Process, problems: list[str]) -> None:
    if problems and process.is_main:
        raise UserError(*problems)
    if problems:
        raise SystemExit(2)  # rank 0 tells them
