"""The recipe's [optim] section, which parameters decay, and the optimizers, over plain and FSDP2-sharded parameters.

Of a sharded parameter an optimizer sees this rank's rows as an ordinary tensor on the same memory: the same update,
without the dispatch of DTensor, which for the 316 parameters of 1.3B takes longer than the kernels do.

An optimizer is an entry of OPTIMIZERS and nothing else. Imports torch only to build one: recipes are checked without.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from gloria.config.cli import option

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn


@dataclass(frozen=True)
class Entry:
    """An optimizer: how it is built from groups of parameters, and what it keeps of a parameter before its first step.

    `first_state(parameter, group)` has the names, shapes and values that the optimizer's own first step would make.
    """

    build: Callable[[list[dict[str, Any]], OptimConfig], torch.optim.Optimizer]
    first_state: Callable[[Tensor, dict[str, Any]], dict[str, Tensor]]
    has_hidden: bool = False  # matrices of the layers are a group of their own, marked `hidden`


def _adamw(groups: list[dict[str, Any]], config: OptimConfig) -> torch.optim.Optimizer:
    from torch.optim import AdamW

    return AdamW(groups, lr=config.lr, betas=config.betas, eps=config.eps, fused=True)


def _radam(groups: list[dict[str, Any]], config: OptimConfig) -> torch.optim.Optimizer:
    from torch.optim import RAdam

    return RAdam(groups, lr=config.lr, betas=config.betas, eps=config.eps, decoupled_weight_decay=True)


def _muon(groups: list[dict[str, Any]], config: OptimConfig) -> torch.optim.Optimizer:
    from gloria.optim.muon import Muon

    return Muon(groups, lr=config.lr, betas=config.betas, eps=config.eps)


def adam_state(parameter: Tensor, group: dict[str, Any]) -> dict[str, Tensor]:
    """The step, on the device where the optimizer is fused, and the averages of gradient and squared gradient."""
    import torch

    device = parameter.device if group.get("fused") else "cpu"
    averages = {name: torch.zeros_like(parameter).detach() for name in ("exp_avg", "exp_avg_sq")}
    return {"step": torch.zeros((), dtype=torch.float32, device=device), **averages}


def _muon_state(parameter: Tensor, group: dict[str, Any]) -> dict[str, Tensor]:
    import torch

    if group.get("hidden"):
        return {"momentum_buffer": torch.zeros_like(parameter).detach()}
    return adam_state(parameter, group)


OPTIMIZERS = {
    "adamw": Entry(_adamw, adam_state),
    "radam": Entry(_radam, adam_state),
    "muon": Entry(_muon, _muon_state, has_hidden=True),
}


@dataclass(frozen=True)
class OptimConfig:
    """How gradients become updates."""

    name: str = option(
        "adamw",
        "AdamW; RAdam (arXiv 1908.03265), which needs no warm-up; or Muon (arXiv 2502.16982) for the layers' matrices "
        "and AdamW for the rest, with AdamW's lr and half of its state; all with decoupled weight decay",
        choices=tuple(OPTIMIZERS),
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


def parameter_groups(
    named_parameters: Iterable[tuple[str, nn.Parameter]], weight_decay: float, *, hidden_apart: bool = False
) -> list[dict[str, Any]]:
    """Trainable parameters in two groups: matrices with `weight_decay`; biases, norms and embeddings with 0.

    Decay pulls towards 0, which is no sensible place for a norm's gain, nor for the vector of a rare token
    that has a gradient once in a thousand steps. With `hidden_apart` the layers' matrices are a first group, marked
    `hidden`, with `weight_decay`. An empty group is left out.
    """
    hidden: list[torch.nn.Parameter] = []
    decayed: list[torch.nn.Parameter] = []
    plain: list[torch.nn.Parameter] = []
    for name, parameter in named_parameters:
        if parameter.requires_grad:
            matrix = parameter.ndim >= 2 and not _is_embedding(name)
            apart = hidden_apart and is_hidden_matrix(name, parameter.ndim)
            (hidden if apart else decayed if matrix else plain).append(parameter)
    groups: list[dict[str, Any]] = [
        {"params": hidden, "weight_decay": weight_decay, "hidden": True},
        {"params": decayed, "weight_decay": weight_decay},
        {"params": plain, "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def is_hidden_matrix(name: str, dimensions: int) -> bool:
    """Whether a parameter is a matrix of a numbered layer (`h.0`, `layers.0`): no embedding, head or classifier."""
    return dimensions == 2 and not _is_embedding(name) and any(part.isdecimal() for part in name.split("."))


def averages_kept(optimizer: str, name: str, dimensions: int) -> int:
    """How many tensors of its own size an optimizer keeps of a parameter."""
    return 1 if OPTIMIZERS[optimizer].has_hidden and is_hidden_matrix(name, dimensions) else 2


def build_optimizer(config: OptimConfig, named_parameters: Iterable[tuple[str, nn.Parameter]]) -> torch.optim.Optimizer:
    """The optimizer that a recipe requests, its rate at the peak, its state as before the first step.

    So a checkpoint's names never depend on how far the run is. AdamW is torch's fused one, on CPU too: set its
    attribute `found_inf` to a float tensor without dimensions (with one it fails), and a step for which it is 1
    leaves weights and state as they are, without the host having to look. Muon does the same, and its
    `defaults["fused"]` says so. RAdam reads no such attribute: the caller must look, and skip `step()`.

    A group's "params" are ordinary tensors, its "model_params" the model's own in the same order, from which the
    gradients must be taken before `step()` (`gloria.dist.sharding.update`). The model must have its memory by now.
    """
    entry = OPTIMIZERS[config.name]
    groups = parameter_groups(named_parameters, config.weight_decay, hidden_apart=entry.has_hidden)
    for group in groups:
        group["model_params"] = group["params"]
        group["params"] = [_local_rows(parameter) for parameter in group["params"]]
    optimizer = entry.build(groups, config)
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            optimizer.state[parameter] = entry.first_state(parameter, group)
    return optimizer


def _local_rows(parameter: Tensor) -> Tensor:
    """This rank's rows of a sharded parameter, an ordinary tensor on its memory; any other parameter as it is."""
    import torch
    from torch.distributed.tensor import DTensor

    with torch.no_grad():  # else autograd would take part, at several times the cost
        return parameter.to_local().detach() if isinstance(parameter, DTensor) else parameter


def _is_embedding(name: str) -> bool:
    # GPT-2 and GPT-Neo say wte and wpe; other families have "embed" in the name of each.
    return any(part in ("wte", "wpe") or "embed" in part for part in name.split("."))
