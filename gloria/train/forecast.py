"""What a recipe will be like on some GPUs: whether whole weights can be kept, and which link a step waits for.

Imports no torch: a plan needs none.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass

from gloria.dist.gpus import ELEMENT_BYTES, GPU
from gloria.model.config import TransformerConfig, flops_per_token
from gloria.model.memory import Traffic, newton_schulz_flops, traffic_per_step
from gloria.train.config import PretrainConfig, peak_of_step

SPARE = 0.1  # of a GPU's usable memory that keeping whole weights must leave: a forecast is none of the allocator
PASS_TOKENS = 8192  # of a rank: the host needs about 45 ms to queue a pass of 1.3B, in which an H100 does as many
MFU, NETWORK, NODE = 0.4, 25.0, 8  # share of the dense peak; GB/s from a GPU to other nodes; GPUs linked without it


@dataclass(frozen=True)
class Gathered:
    """Whether a step gathers whole weights once and keeps them, and why, in words."""

    keep: bool
    why: str

    def describe(self) -> str:
        """In a line."""
        how = "gathered once a step and kept" if self.keep else "gathered for forward and for backward of each pass"
        return f"{how}: {self.why}"


def keep_gathered(
    config: PretrainConfig, shape: TransformerConfig, world: int, *, precision: str, usable: float | None
) -> Gathered:
    """What `dist.reshard` means on GPUs of `usable` bytes; None: on CPU, where a gather is a copy in memory."""
    asked = config.dist.reshard
    if asked != "auto":
        return Gathered(asked == "never", f"dist.reshard is {asked}")
    if usable is None:
        return Gathered(False, "the ranks share the memory of a CPU")
    peak = peak_of_step(config, shape, world, precision=precision, on_gpu=True, keep_gathered=True).total
    fits = peak <= usable * (1 - SPARE)
    sizes = f"with them a step takes {peak / 2**30:.1f} of {usable / 2**30:.1f} GiB"
    return Gathered(fits, sizes if fits else f"{sizes}, too close to the limit")


@dataclass(frozen=True)
class Network:
    """The links between GPUs."""

    link: float | None  # GB/s that a GPU sends within its node
    between: float = NETWORK  # GB/s that it sends to other nodes
    node: int = NODE  # GPUs of a node

    def speed(self, gpus: int) -> float:
        """GB/s that one of `gpus` neighbours sends."""
        return self.link if self.link and gpus <= self.node else self.between

    def seconds(self, traffic: Traffic, gpus: int, replicas: int) -> float:
        """Of a step's traffic: a copy of the model lies on neighbours, so with HSDP only sums cross the nodes."""
        within, across = traffic.shards / self.speed(gpus // replicas), traffic.replicas / self.speed(gpus)
        return (within + across) / 1e9


def step_traffic(
    config: PretrainConfig, shape: TransformerConfig, gpus: int, *, replicas: int, precision: str, kept: bool
) -> Traffic:
    """What a GPU sends in a step of the recipe."""
    return traffic_per_step(
        shape,
        passes=config.train.global_batch // (config.train.filled_micro_batch * gpus),
        ranks=gpus,
        replicas=replicas,
        element_bytes=ELEMENT_BYTES[precision],
        keep_gathered=kept,
        optimizer=config.optim.name,
    )


def compute_seconds(
    config: PretrainConfig, shape: TransformerConfig, gpus: int, card: GPU | None, precision: str, mfu: float = MFU
) -> float | None:
    """Of a step, by the peak of the card; None where it is not known."""
    peak = card.peak(precision) if card else None
    train = config.train
    flops = flops_per_token(shape, train.sequence_length) * train.global_batch * train.sequence_length
    if config.optim.name == "muon":  # each replica's ranks share it among themselves
        flops += newton_schulz_flops(shape) * config.dist.replicas
    return flops / (gpus * peak * mfu) if peak else None


def advice(
    config: PretrainConfig,
    shape: TransformerConfig,
    gpus: int,
    card: GPU | None,
    network: Network,
    precision: str,
    *,
    kept: bool,
    usable: float | None,
    mfu: float = MFU,
) -> Iterator[str]:
    """Lines on what would make a step on these GPUs faster; `kept` as `Gathered` has it, `usable` bytes of a GPU."""
    train = config.train
    tokens = (train.micro_batch or 1) * train.sequence_length
    if tokens < PASS_TOKENS:
        yield (
            f"train.micro_batch: a pass has {tokens:,} tokens a GPU, and below about {PASS_TOKENS:,} a fast one waits "
            "for the host; raise it, and train.global_batch with it where a rank's share is used up"
        )
    nodes = gpus // network.node
    if config.dist.replicas > 1 or nodes < 2 or gpus % network.node:
        return
    compute = compute_seconds(config, shape, gpus, card, precision, mfu) or 0.0

    def seconds(replicas: int, kept: bool) -> float:
        sent = step_traffic(config, shape, gpus, replicas=replicas, precision=precision, kept=kept)
        return max(network.seconds(sent, gpus, replicas), compute)

    now, then = seconds(1, kept), seconds(nodes, kept=False)
    other = dataclasses.replace(config, dist=dataclasses.replace(config.dist, replicas=nodes))
    memory = peak_of_step(other, shape, gpus, precision=precision, on_gpu=True).total
    if then <= 0.95 * now and (usable is None or memory <= usable):
        yield (
            f"dist.replicas: a step waits for the network between {nodes} nodes, {now:.3g} s at {network.between:g} "
            f"GB/s a GPU; set it to {nodes}, one copy of the model a node, for {then:.3g} s and "
            f"{memory / 2**30:.1f} GiB a GPU"
        )
