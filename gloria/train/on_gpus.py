"""The forecast of a run on the GPUs that it has."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from gloria.dist.environment import read_environment
from gloria.dist.gpus import card_of_cuda_name, usable_memory
from gloria.dist.process import Process, on_any_rank
from gloria.train.config import PretrainConfig, RunPlan
from gloria.train.forecast import Gathered, Network, advice, keep_gathered


def gathered_on(config: PretrainConfig, plan: RunPlan, process: Process, precision: str) -> Gathered:
    """What `dist.reshard` means here; the same on all ranks, for a gather is a collective."""
    usable = _usable_memory(process)
    found = keep_gathered(config, plan.shape, plan.world, precision=precision, usable=usable)
    return Gathered(not on_any_rank(not found.keep), found.why)


def _usable_memory(process: Process) -> float | None:
    if process.device.type != "cuda":
        return None
    return usable_memory(torch.cuda.get_device_properties(process.device).total_memory)


def advice_on(
    config: PretrainConfig, plan: RunPlan, process: Process, precision: str, gathered: Gathered
) -> Iterator[str]:
    """On GPUs, what would make the steps of this run faster."""
    if (usable := _usable_memory(process)) is not None:
        card = card_of_cuda_name(torch.cuda.get_device_name(process.device))
        network = Network(card.link if card else None, node=read_environment().local_world)
        yield from advice(config, plan.shape, plan.world, card, network, precision, kept=gathered.keep, usable=usable)
