"""Whole steps on 2 to 8 GPUs: sharded over all, and one replica a half, with the all-reduce's bandwidth beside them.

    torchrun --standalone --nproc_per_node 8 bench/multi_gpu.py [--model gpt-neo-1.3b] [--length 2048] [--micro-batch 8]

Runs the loop of `gloria.pretrain`, as bench/gpu.py does on one GPU; rank 0 prints a table and the share of one GPU's
speed that each keeps (give it as --alone, tokens a second from bench/gpu.py). Without CUDA it runs a tiny model over
gloo, to see that it works: those figures mean nothing.
"""

from __future__ import annotations

import argparse
import math
import os
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from bench.gpu import table
from bench.gpu_parts import CUDA, DEVICE, PASSES, STEPS, Row, both_mfu, opened, timed_steps


def bus_bandwidth() -> float:
    """GB/s of an all-reduce of 256 MiB, 2 (n - 1) / n bytes each way (NCCL's bus bandwidth)."""
    tensor = torch.ones(2**26 if CUDA else 2**16, device=torch.cuda.current_device() if CUDA else DEVICE)
    for number in range(7):
        if number == 2:
            if CUDA:
                torch.cuda.synchronize()
            start = time.perf_counter()
        dist.all_reduce(tensor)
    if CUDA:
        torch.cuda.synchronize()
    seconds = (time.perf_counter() - start) / 5
    world = dist.get_world_size()
    return 2 * (world - 1) / world * tensor.numel() * 4 / seconds / 1e9


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="gpt-neo-1.3b", choices=sorted({name for name, *_ in STEPS}))
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--micro-batch", type=int, default=8)
    parser.add_argument("--corpus", default="data/sample")
    parser.add_argument("--alone", type=float, default=math.nan, help="tokens/s of one GPU")
    options = parser.parse_args()
    world, main_rank = int(os.environ["WORLD_SIZE"]), os.environ["RANK"] == "0"
    length, micro_batch = (options.length, options.micro_batch) if CUDA else (32, 2)
    rows: list[Row] = []
    for replicas in (1, 2) if world % 2 == 0 and world > 2 else (1,):
        recipe = next(recipe for name, recipe, _ in STEPS if name == options.model)
        recipe = recipe | {"dist.replicas": replicas, "train.global_batch": micro_batch * PASSES * world}
        with opened(recipe, length, micro_batch, options.corpus) as run:
            seconds = timed_steps(run, 8 if CUDA else 2)
            bandwidth = bus_bandwidth()
            parameters = sum(parameter.numel() for parameter in run.model.parameters())
            each = micro_batch * PASSES * length / seconds
            rows.append(
                {
                    "GPUs": world,
                    "replicas": replicas,
                    "ms": 1000 * seconds,
                    "tokens/s a GPU": each,
                    **both_mfu(run.objective.plan.shape, parameters, length, each),
                    "of one GPU": each / options.alone,
                    "peak GiB": torch.cuda.max_memory_allocated() / 2**30 if CUDA else math.nan,
                    "all-reduce GB/s": bandwidth,
                }
            )
    if main_rank:
        if not CUDA:
            print("no CUDA here: a tiny model over gloo, to see that the script works; THE FIGURES MEAN NOTHING")
        table(f"{options.model}, T = {length}, micro-batch {micro_batch}", rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
