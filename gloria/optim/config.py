"""The recipe's [optim] section."""

from __future__ import annotations

from dataclasses import dataclass

from gloria.config.cli import option


@dataclass(frozen=True)
class OptimConfig:
    """How gradients become updates."""

    name: str = option(
        "adamw",
        "AdamW, or RAdam (arXiv 1908.03265), which needs no warm-up; both with decoupled weight decay",
        choices=("adamw", "radam"),
    )
    lr: float = option(
        1e-4, "peak learning rate; use less for larger models", above=0.0, other_names=("learning_rate",)
    )
    weight_decay: float = option(
        0.01, "share of lr by which weights shrink a step; biases, norms and embeddings never do", minimum=0.0
    )
    betas: tuple[float, float] = option(
        (0.9, 0.95),
        "decay a step of the averages of gradient and squared gradient; 0.95 forgets a loss spike sooner",
        minimum=0.0,
        maximum=0.999999,
    )
    eps: float = option(1e-8, "added to the root of the squared gradient's average, against dividing by 0", above=0.0)
