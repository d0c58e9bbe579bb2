"""The recipe's [dist] and [checkpoint] sections."""

from __future__ import annotations

from dataclasses import dataclass

from gloria.config.cli import option


@dataclass(frozen=True)
class DistConfig:
    """How the ranks share the work."""

    replicas: int = option(
        1,
        "copies of the model, each sharded over ranks / replicas (HSDP); more than 1 where links between "
        "nodes are slow: only gradients cross them",
        minimum=1,
    )
    reshard: str = option(
        "auto",
        "whether the ranks give whole weights back behind each block: always takes the least memory; never gathers "
        "them once a step and keeps them through all its passes; auto does that in pre-training on a GPU whose memory, "
        "as planned, has room for it",
        choices=("auto", "always", "never"),
    )
    timeout_minutes: float = option(
        30.0,
        "minutes that start-up, the first step or a checkpoint may take before the run ends as hung; enough for the "
        "slowest rank and disk",
        above=0,
    )
    step_timeout_minutes: float = option(
        10.0,
        "minutes without progress in training before the run ends as hung and says which rank was slow",
        above=0,
    )


@dataclass(frozen=True)
class CheckpointConfig:
    """When a checkpoint is saved and how many stay. The end of a run is always saved."""

    every: int = option(1000, "steps from one checkpoint to the next: what a crash costs at most", minimum=1)
    keep: int = option(
        3,
        "newest checkpoints kept; at least 2, so that a damaged one is not the end of the run",
        minimum=2,
    )
    keep_every: int = option(
        0,
        "steps; checkpoints at multiples of it are kept for good (0: none), to look back at a run",
        minimum=0,
    )
    asynchronous: bool = option(
        True,
        "write in the background while training goes on, for a second copy of a rank's weights and optimizer "
        "state in host memory (12 bytes a parameter, over ranks / replicas); false waits for the disk, without it",
    )

    def most_at_once(self, total_steps: int) -> int:
        """Checkpoints that are there together at most in a run of `total_steps`, the one being written among them."""
        saved = -(-total_steps // self.every)
        for_good = total_steps // self.keep_every if self.keep_every else 0
        # The newest may be among those kept for good.
        newest = {min((saved - back) * self.every, total_steps) for back in range(min(self.keep, saved))}
        extra = sum(1 for step in newest if not self.keep_every or step % self.keep_every)
        return min(for_good + extra + 1, saved)
