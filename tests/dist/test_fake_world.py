"""Prevents: a model that builds on two ranks and not on a thousand (parameters with fewer rows than ranks, a plan whose
shards are not those that are made). torch's fake process group lets one process be a rank of any world."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore

from gloria.dist.process import Process
from gloria.dist.sharding import build_mesh
from gloria.dist.state import model_state_dict
from gloria.model.config import PRESETS, TransformerConfig, parameter_shapes
from gloria.model.memory import memory_per_rank
from gloria.optim.optimizers import OptimConfig, build_optimizer
from gloria.train.pretraining import shard_model
from tests.world import run_world

WORLD = 1024


def build_as(_rank: int, _world: int, rank: int, replicas: int, shape: TransformerConfig) -> dict[str, tuple]:
    """This rank's (rows, first row, whole shape) of every parameter of the sharded model, by name."""
    dist.destroy_process_group()  # the real one, of this process alone
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=WORLD)
    meta = torch.device("meta")
    model = shard_model(
        shape,
        build_mesh(Process(rank, WORLD, torch.device("cpu")), replicas),
        meta,
        precision="bf16",
        activation_checkpointing="full",
        compile_blocks=False,
    )
    optimizer = build_optimizer(OptimConfig(), model.named_parameters())
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len(list(model.parameters()))
    found = {
        name.removeprefix("model."): (shard.tensor.shape[0], shard.offset, tuple(shard.shape))
        for name, shard in model_state_dict(model).items()
    }
    dist.destroy_process_group()
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)  # for the good-bye of run_world
    return found


@pytest.mark.parametrize(("rank", "replicas"), [(0, 1), (1023, 1), (700, 8)])
def test_the_largest_model_is_sharded_over_1024_ranks_as_planned(rank: int, replicas: int) -> None:
    shape = PRESETS["gloria-2.7b"]
    shards = WORLD // replicas
    (found,) = run_world(build_as, 1, rank, replicas, shape)
    assert {name: whole for name, (_, _, whole) in found.items()} == parameter_shapes(shape)
    elements = 0
    for name, (rows, first, whole) in found.items():
        size = -(-whole[0] // shards)
        assert first == min(size * (rank % shards), whole[0]), name
        assert rows == max(0, min(size, whole[0] - first)), name
        elements += rows * (whole[1] if len(whole) > 1 else 1)
    planned = memory_per_rank(
        shape,
        sequence_length=512,
        micro_batch=1,
        accumulation=1,
        shards=shards,
        element_bytes=2,
        activation_checkpointing="full",
    )
    if rank == 0:
        assert planned.weights == 4 * elements
    else:
        assert 4 * elements <= planned.weights
    assert planned.optimizer == 2 * planned.weights
