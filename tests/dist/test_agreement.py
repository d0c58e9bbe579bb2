"""Prevents: ranks of different minds in one run, and an answer that is given by every rank or by none."""

from __future__ import annotations

import socket
from pathlib import Path
from typing import Any

import torch

from gloria.dist import agreement
from gloria.dist.process import Process
from gloria.errors import UserError
from tests.world import run_world

NODE = socket.gethostname()


def gather_world(rank: int, world: int) -> list[dict[str, Any]]:
    return agreement.gather({"rank": rank, "text": "é" * (5 - rank)})


def test_gather_gives_every_rank_what_every_rank_says():
    expected = [{"rank": rank, "text": "é" * (5 - rank)} for rank in range(3)]
    assert run_world(gather_world, 3) == [expected] * 3


def _answer(rank: int, world: int, ask) -> list[str] | int | None:
    """The lines of a UserError, the status of a SystemExit, or None."""
    try:
        ask(Process(rank, world, torch.device("cpu")))
    except UserError as error:
        return list(error.problems)
    except SystemExit as end:
        return end.code
    return None


def ask_all(rank: int, world: int, folder: str) -> list[Any]:
    agreement.SHARED_SECONDS = 0.2
    file = Path(folder, "lock" if rank < 2 else "elsewhere")
    if rank == 0:
        file.write_text('{"launch": "abc"}')
    Path(folder, "elsewhere").write_text('{"launch": "older"}')
    asked = [
        lambda process: agreement.require_same(process, {"a": 1, "b": (1, 2)}),
        lambda process: agreement.require_same(process, {"a": rank // 2, "b": 1} | ({"c": 3} if rank == 1 else {})),
        lambda process: agreement.require_shared(process, Path(folder, "lock"), "abc"),
        lambda process: agreement.require_shared(process, file, "abc"),
    ]
    return [_answer(rank, world, ask) for ask in asked]


def make_all(rank: int, world: int) -> list[Any]:
    def make(bad: tuple[int, ...]) -> int:
        if rank in bad:
            raise UserError(f"{rank // 2}: is wrong")
        return rank

    process = Process(rank, world, torch.device("cpu"))
    made = agreement.on_all_ranks(process, lambda: make(()))
    return [made, *(_answer(rank, world, lambda p, b=bad: agreement.on_all_ranks(p, lambda: make(b))) for bad in BAD)]


BAD = ((1,), (0, 1, 2))


def test_what_one_rank_cannot_do_ends_all_and_is_reported_once():
    """A model that only one node lacks would leave the other ranks in a collective, and end them in a traceback."""
    reported = [["0: is wrong"], ["0: is wrong", "1: is wrong"]]
    assert run_world(make_all, 3) == [[0, *reported], [1, 2, 2], [2, 2, 2]]


def test_rank_0_reports_and_all_end(tmp_path):
    first, *others = run_world(ask_all, 3, str(tmp_path))
    remedy = "start all ranks with the same recipe, flags, corpus and environment"
    assert first == [
        None,
        [
            f"a: 0 on {NODE} (rank 0) and 1 on {NODE} (rank 2); {remedy}",
            f"c: nothing on {NODE} (rank 0) and 3 on {NODE} (rank 1); {remedy}",
        ],
        None,
        [
            f"run.dir: {tmp_path}: what {NODE} writes there is not seen on {NODE}; "
            "choose a folder on a file system that all nodes share"
        ],
    ]
    assert others == [[None, 2, None, 2]] * 2
