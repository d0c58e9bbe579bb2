"""A model small enough for seconds, and digests of a whole state that do not depend on who holds which
rows."""

from __future__ import annotations

import hashlib
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from gloria.dist.checkpoint import Save, begin_save, publish
from gloria.dist.checkpoint_read import read_full_tensors
from gloria.dist.manifest import checkpoint_path
from gloria.dist.sharding import local_gradients, update
from gloria.dist.state import (
    Shard,
    model_state_dict,
    optimizer_state_dict,
    rng_state_dict,
    shard_rows,
)
from gloria.optim.optimizers import OptimConfig, build_optimizer

WIDTH = 8


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.up = nn.Linear(WIDTH, 3)  # 3 and, below, 1 rows: some of 4 ranks hold none of them
        self.down = nn.Linear(3, WIDTH)
        self.gate = nn.Linear(WIDTH, 1, bias=False)

    def forward(self, hidden: Tensor) -> Tensor:  # (batch, seq, width)
        inner = self.norm(hidden)
        return hidden + F.dropout(self.down(F.gelu(self.up(inner))), 0.1, self.training) * self.gate(inner)


class Toy(nn.Module):
    """Embedding, blocks, a head tied to the embedding, and a buffer that every forward changes."""

    def __init__(self, vocab: int) -> None:
        super().__init__()
        self.wte = nn.Embedding(vocab, WIDTH)
        self.h = nn.ModuleList(Block() for _ in range(2))
        self.register_buffer("forwards", torch.zeros((), dtype=torch.int64))

    def forward(self, ids: Tensor) -> Tensor:  # (batch, seq) -> sum of losses
        self.forwards += 1
        hidden = self.wte(ids)
        for block in self.h:
            hidden = block(hidden)
        logits = F.linear(hidden[:, :-1], self.wte.weight)
        return F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="sum")


def build(vocab: int, optimizer: str = "adamw", replicas: int = 1, seed: int = 0) -> tuple[Toy, torch.optim.Optimizer]:
    """The toy on the current process group (FSDP2 or HSDP), or plain without one."""
    torch.manual_seed(seed)
    model = Toy(vocab)
    if dist.is_initialized():
        world = dist.get_world_size()
        mesh = init_device_mesh("cpu", (world,))
        if replicas > 1:
            names = ("replicate", "shard")
            mesh = init_device_mesh("cpu", (replicas, world // replicas), mesh_dim_names=names)
        for module in (*model.h, model):
            fully_shard(module, mesh=mesh)
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)
    config = OptimConfig(optimizer, lr=1e-2, weight_decay=0.1, betas=(0.9, 0.999))
    return model, build_optimizer(config, model.named_parameters())


def train_step(model: Toy, optimizer: torch.optim.Optimizer, step: int, *, batch: int = 12) -> float:
    """One step on the global batch of `step`, cut by rank; the global mean loss. Dropout only in train
    mode."""
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    ids = torch.randint(0, 101, (batch, 6), generator=torch.Generator().manual_seed(step))[rank::world]
    torch.manual_seed(1000 * step + rank)
    loss = model(ids) / (batch * 5)
    loss.backward()
    update(optimizer, local_gradients(model), torch.tensor(1.0), torch.tensor(True))
    total = loss.detach().clone()
    if dist.is_initialized():
        dist.all_reduce(total)
    return total.item()


def full_state(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Shard]:
    return {**model_state_dict(model), **optimizer_state_dict(model, optimizer)}


def whole_tensors(shards: dict[str, Shard]) -> dict[str, Tensor]:
    """The tensors put together from the owners' pieces of all ranks; every row must come exactly once."""
    everyone = [shards]
    if dist.is_initialized():
        everyone = [None] * dist.get_world_size()
        dist.all_gather_object(everyone, {name: shard for name, shard in shards.items() if shard.owner})
    whole = {}
    for name, shard in shards.items():
        pieces = [held[name] for held in everyone if name in held]
        pieces.sort(key=lambda piece: (piece.offset, len(piece.tensor) if piece.shape else 0))
        if not shard.shape:
            (whole[name],) = [piece.tensor for piece in pieces]
            continue
        rows = 0
        for piece in pieces:
            assert piece.offset == rows, f"{name}: rows from {rows} are missing or there twice"
            rows += len(piece.tensor)
        whole[name] = torch.cat([piece.tensor for piece in pieces])
        assert tuple(whole[name].shape) == shard.shape, name
    return whole


def digest_tensors(tensors: dict[str, Tensor]) -> str:
    """Of names, dtypes, shapes and every bit."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def state_digest(shards: dict[str, Shard]) -> str:
    """The same for any number of ranks that hold the same state; a collective."""
    return digest_tensors(whole_tensors(shards))


def checkpoint_digest(path: Path) -> str:
    """The same as `state_digest` of the state that was saved at `path`."""
    return digest_tensors(dict(read_full_tensors(path)))


def cut(whole: dict[str, torch.Tensor], rank: int, world: int) -> dict[str, Shard]:
    """The shards of one of `world` ranks, without any process."""
    shards = {}
    for name, tensor in whole.items():
        if tensor.dim() == 0:
            shards[name] = Shard(tensor, (), 0, owner=rank == 0)
        else:
            first, rows = shard_rows(len(tensor), world, rank)
            shards[name] = Shard(tensor[first : first + rows], tuple(tensor.shape), first, owner=True)
    return shards


def begin(run_dir: Path, step: int, whole: dict, rank: int = 0, world: int = 1, **options) -> Save:
    options = {"asynchronous": False, "launch": "first", "trainer": {"step": step}, **options}
    trainer = options.pop("trainer")
    return begin_save(
        run_dir, step, cut(whole, rank, world), rng_state_dict(), trainer, rank=rank, world=world, **options
    )


def save_whole(run_dir: Path, step: int, whole: dict, world: int = 1, launch: str = "first") -> Path:
    """A published checkpoint, its ranks played one after the other."""
    saves = [begin(run_dir, step, whole, rank, world, launch=launch) for rank in range(world)]
    assert publish(saves[0]), saves[0].error
    return checkpoint_path(run_dir, step)


# What a checkpoint holds that is saved for its own sake.
WHOLE = {"model.a": torch.arange(21.0).reshape(7, 3), "optim.step.a": torch.tensor(4.0)}
