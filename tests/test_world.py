"""Bug prevented: a failing or hanging rank that the test helper takes for a success, or waits for forever."""

from __future__ import annotations

import os
import time

import pytest
import torch
import torch.distributed as dist

from tests.world import WorldError, run_world


def sum_of_ranks(rank: int, world: int, start: int) -> tuple[int, torch.Tensor]:
    total = torch.tensor(float(start + rank))
    dist.all_reduce(total)
    print(f"rank {rank} of {world} was here")
    return rank, total


def fail_on_last(rank: int, world: int) -> None:
    if rank == world - 1:
        raise ValueError("planted")
    dist.barrier()


def die_on_first(rank: int, world: int) -> None:
    if rank == 0:
        os._exit(3)
    dist.barrier()


def sleep(rank: int, world: int) -> None:
    time.sleep(10_000)


def test_results_come_in_rank_order_and_prints_come_out(capsys):
    results = run_world(sum_of_ranks, 3, 10)
    assert [rank for rank, _ in results] == [0, 1, 2]
    assert all(total.item() == 33.0 for _, total in results)
    assert capsys.readouterr().out.splitlines() == [f"rank {rank} of 3 was here" for rank in range(3)]


def test_the_traceback_of_a_failing_rank_is_reported():
    with pytest.raises(WorldError, match=r"(?s)rank 1 of 2: Traceback.*ValueError: planted"):
        run_world(fail_on_last, 2)


def test_a_rank_that_dies_is_reported():
    with pytest.raises(WorldError, match="rank 0 of 2: died"):
        run_world(die_on_first, 2)


def test_a_hanging_world_is_killed_and_says_where_it_hung():
    with pytest.raises(WorldError, match=r"(?s)rank \d of 2: died .* busy for 0.5 s.*in sleep"):
        run_world(sleep, 2, timeout=0.5)
