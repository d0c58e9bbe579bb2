"""What saving and reading a checkpoint costs, each figure beside its plain counterpart on the same bytes and disk.

    torchrun --nproc_per_node 2 bench/checkpoint.py [--megabytes 200] [--repeats 5] [--folder DIR]

A step waits for: a synchronous save, our save in the background, and `torch.distributed.checkpoint.async_save` of the
same tensors. Bandwidth: our writer and reader against `os.write` + fsync and `readinto` of the same bytes. Resume:
finding (which hashes everything), reading, and going to a mixture's position at step 10 and at step 3,000,000.
Figures are medians over the repeats, of the slowest rank.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import xxhash
from torch import Tensor, nn
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor import Shard as ShardPlacement

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from gloria.data.mixture import mixture_from_state, new_mixture
from gloria.data.weights import Source
from gloria.dist.checkpoint import begin_save, finish, publish, wait
from gloria.dist.checkpoint_read import find_checkpoint, open_reader, read_trainer
from gloria.dist.manifest import checkpoint_path
from gloria.dist.state import (
    Shard,
    load_training_state,
    model_state_dict,
    optimizer_state_dict,
    rng_state_dict,
)
from gloria.dist.tensor_file import byte_view, write_tensor_file
from gloria.files import write_all
from gloria.optim.optimizers import OptimConfig, build_optimizer

WIDTH = 1024


def build(megabytes: int) -> tuple[nn.Module, torch.optim.Optimizer]:
    """Square layers whose parameters and AdamW moments fill about so many megabytes over all ranks."""
    layers = max(1, round(megabytes * 1e6 / (3 * 4 * WIDTH * WIDTH)))
    model = nn.Sequential(*(nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(layers)))
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for layer in model:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model, build_optimizer(OptimConfig(), model.named_parameters())


def side_by_side(*functions: Callable[[], Any], repeats: int, before: Callable[[], Any] | None = None) -> list[float]:
    """Seconds of each call, the calls taking turns and all ranks starting together: medians of the slowest rank."""
    times: list[list[float]] = [[] for _ in functions]
    for _ in range(repeats + 1):
        for function, taken in zip(functions, times):
            if before:
                before()
            dist.barrier()
            start = time.perf_counter()
            function()
            taken.append(over_ranks(time.perf_counter() - start))
    return [statistics.median(taken[1:]) for taken in times]  # the first one warms up


def over_ranks(seconds: float) -> float:
    longest = torch.tensor(seconds, dtype=torch.float64)
    dist.all_reduce(longest, op=dist.ReduceOp.MAX)
    return longest.item()


def drop_cache(folder: Path) -> None:
    """Let the kernel forget the files' pages, so that reading them means the disk."""
    for file in folder.rglob("*"):
        if file.is_file():
            descriptor = os.open(file, os.O_RDONLY)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(descriptor)


def plain_write(path: Path, tensors: list[Tensor]) -> None:
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
    for tensor in tensors:
        write_all(descriptor, byte_view(tensor))
    os.fsync(descriptor)
    os.close(descriptor)


def plain_read(path: Path, tensors: list[Tensor]) -> None:
    with open(path, "rb", buffering=0) as file:
        for tensor in tensors:
            view = byte_view(tensor)
            while view:
                view = view[file.readinto(view) :]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=int, default=200, help="of parameters and moments, over all ranks")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--folder", type=Path, default=None, help="where to write (default: the temporary folder)")
    arguments = parser.parse_args()
    dist.init_process_group("gloo")
    torch.set_num_threads(1)
    folders = [tempfile.mkdtemp(prefix="bench-checkpoint-", dir=arguments.folder) if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(folders)
    folder = Path(folders[0])
    try:
        measure(folder, *build(arguments.megabytes), arguments.repeats)
    finally:
        dist.barrier()
        if dist.get_rank() == 0:
            shutil.rmtree(folder)
        dist.destroy_process_group()


def measure(folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer, repeats: int) -> None:
    world = dist.get_world_size()
    shards = {**model_state_dict(model), **optimizer_state_dict(model, optimizer)}
    own = [shard.tensor for shard in shards.values() if shard.owner]
    count = sum(tensor.numel() * tensor.element_size() for tensor in own)
    say(f"{count * world / 1e6:.0f} MB over {world} ranks, {len(shards)} tensors, {repeats} repeats, {folder}")

    sync, background, settled, first, copying = waits(folder, shards, repeats)
    peer, peer_settled, peer_first = waits_of_dcp(folder, shards, repeats)
    say("\na step waits for                           wait s    of a synchronous save    durable after s")
    for name, wait_seconds, durable in (
        ("synchronous save", sync, sync),
        ("background save, its first (memory made)", first, settled),
        ("background save, the following", background, settled),
        ("DCP async_save, its first", peer_first, peer_settled),
        ("DCP async_save, the following", peer, peer_settled),
    ):
        say(f"{name:42} {wait_seconds:7.4f}    {wait_seconds / sync:20.1%}    {durable:14.3f}")

    say(f"of the background save's wait the copy takes {copying:.4f} s ({count / copying / 1e9:.1f} GB/s a rank)")

    bandwidth(folder, model, optimizer, shards, count * world, repeats)
    resume(folder, repeats)


def save(folder: Path, step: int, shards: dict[str, Shard], *, asynchronous: bool, staging: dict[str, Tensor]):
    return begin_save(
        folder, step, shards, rng_state_dict(), {}, rank=dist.get_rank(), world=dist.get_world_size(),
        launch="bench", asynchronous=asynchronous, staging=staging,
    )  # fmt: skip


def waits(folder: Path, shards: dict[str, Shard], repeats: int) -> tuple[float, float, float, float, float]:
    """Seconds a step waits: sync, in the background; until durable; the first in the background; and of that in the
    background the copy to host memory (the rest is publishing).
    """
    staging: dict[str, Tensor] = {}
    sync, background, settled, copying = [], [], [], []
    for number in range(repeats + 1):
        dist.barrier()
        start = time.perf_counter()
        assert finish(save(folder, 1 + number, shards, asynchronous=False, staging={}))
        sync.append(over_ranks(time.perf_counter() - start))
        dist.barrier()
        start = time.perf_counter()
        saving = save(folder, 100 + number, shards, asynchronous=True, staging=staging)
        begun = time.perf_counter() - start
        copying.append(over_ranks(begun))
        wait(saving)
        dist.barrier()  # stands for the all-reduce of the step
        published = time.perf_counter()
        if dist.get_rank() == 0:
            assert publish(saving), saving.error
        end = time.perf_counter()
        background.append(over_ranks(begun + end - published))
        settled.append(over_ranks(end - start))
    middle = [statistics.median(times[1:]) for times in (sync, background, settled, copying)]
    return middle[0], middle[1], middle[2], background[0], middle[3]


def waits_of_dcp(folder: Path, shards: dict[str, Shard], repeats: int) -> tuple[float, float, float]:
    """The same of `torch.distributed.checkpoint.async_save`, with its staging memory kept from save to save."""
    group = dist.new_group(backend="gloo")
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    state = {
        name: DTensor.from_local(shard.tensor, mesh, [ShardPlacement(0)]) if shard.shape else shard.tensor
        for name, shard in shards.items()
    }
    begun, settled = [], []
    stager = DefaultStager(StagingOptions(False, False, False, False))  # pinned memory needs a GPU
    for number in range(repeats + 1):
        dist.barrier()
        start = time.perf_counter()
        writer = dcp.FileSystemWriter(folder / f"dcp-{number}", sync_files=True)
        future = dcp.async_save(state, storage_writer=writer, process_group=group, async_stager=stager)
        begun.append(over_ranks(time.perf_counter() - start))
        future.result()
        settled.append(over_ranks(time.perf_counter() - start))
    return statistics.median(begun[1:]), statistics.median(settled[1:]), begun[0]


def bandwidth(
    folder: Path,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    shards: dict[str, Shard],
    total: int,
    repeats: int,
) -> None:
    """Bytes a second of writing and reading, of all ranks together, beside plain calls on the same bytes."""
    rank = dist.get_rank()
    own = {name: shard for name, shard in shards.items() if shard.owner}
    tensors = [shard.tensor for shard in own.values()]
    plain = folder / f"plain-{rank}"
    cancelled = threading.Event()
    plain_file, our_file, whole_save, hashing = side_by_side(
        lambda: plain_write(plain, tensors),
        lambda: write_tensor_file(folder / f"own-{rank}", own, step=0, rank=rank, world=1, cancelled=cancelled),
        lambda: finish(save(folder, 100, shards, asynchronous=False, staging={})),
        lambda: [xxhash.xxh3_128(byte_view(tensor)) for tensor in tensors],
        repeats=repeats,
    )
    reader = open_reader(find_checkpoint(folder, 100))

    def load() -> None:
        load_training_state(model, optimizer, reader.read_into)

    reads = (lambda: plain_read(plain, tensors), load)
    warm = side_by_side(*reads, repeats=repeats)
    cold = side_by_side(*reads, repeats=repeats, before=lambda: drop_cache(folder))
    say("\n                         plain MB/s    ours MB/s    ours of plain")
    rows = (
        ("write, a rank's file", plain_file, our_file),
        ("write, the whole save", plain_file, whole_save),
        ("read, warm", *warm),
        ("read, cold", *cold),
    )
    for name, plain_seconds, our_seconds in rows:
        plain_rate, our_rate = total / plain_seconds / 1e6, total / our_seconds / 1e6
        say(f"{name:22} {plain_rate:12.0f} {our_rate:12.0f} {our_rate / plain_rate:16.2f}")
    say(f"hashing: {hashing:.4f} s, {hashing / whole_save:.1%} of a synchronous save")


def resume(folder: Path, repeats: int) -> None:
    """Seconds from a checkpoint folder to the samples of the next step, for an early and a late one (rank 0 alone)."""
    if dist.get_rank() != 0:
        return
    mixture_at = {}
    for step in (10, 3_000_000):
        sources = {f"source-{index}": Source(10_000_000 + 77_777 * index, "") for index in range(6)}
        weights = {name: 1.0 + index for index, name in enumerate(sources)}
        mixture = new_mixture(1, 512, sources, weights, global_batch=512)
        mixture.next_sample = step * 512
        mixture_at[step] = mixture.state_dict()
    path = checkpoint_path(folder, 100)
    times: dict[int, list[float]] = {step: [] for step in mixture_at}
    for _ in range(repeats):
        for step, state in mixture_at.items():
            start = time.perf_counter()
            read_trainer(path)
            mixture = mixture_from_state(state)
            mixture.plan(mixture.next_sample, 512)
            times[step].append(time.perf_counter() - start)
    start = time.perf_counter()
    find_checkpoint(folder, 100)
    verified = time.perf_counter() - start
    say(f"\nresume: finding and verifying {verified:.3f} s (all bytes hashed by one process)")
    for step, seconds in times.items():
        say(f"resume: trainer state and mixture at step {step}: {statistics.median(seconds) * 1e3:.1f} ms")


def say(line: str) -> None:
    if dist.get_rank() == 0:
        print(line, flush=True)


if __name__ == "__main__":
    main()
