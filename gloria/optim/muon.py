"""Muon for the matrices of a model's layers, AdamW for the rest, over plain and FSDP2-sharded parameters.

Jordan et al. 2024 (kellerjordan.github.io/posts/muon): a matrix moves by the momentum of its gradient with all singular
values brought near 1. The update has the size of AdamW's (Liu et al., arXiv 2502.16982), so one learning rate and one
weight decay serve both. On one rank the same as torch.optim.Muon with `adjust_lr_fn="match_rms_adamw"`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

MOMENTUM = 0.95
STEPS, COEFFICIENTS = 5, (3.4445, -4.7750, 2.0315)  # of Newton-Schulz: the steepest at 0, so that few steps do
EPS = 1e-7


@dataclass(frozen=True)
class Matrix:
    """A matrix, of which this rank has rows."""

    rows: Tensor  # (rows here, columns)
    shape: tuple[int, int]  # of the whole
    pieces: tuple[int, ...]  # elements of each rank, in the order of the rows


class Muon(torch.optim.Optimizer):
    """Groups with `hidden` are updated by Muon, the others by fused AdamW; made by `build_optimizer`.

    Of a sharded matrix each rank keeps the momentum of its own rows. For the update the whole matrix is needed, so each
    has one owner among the ranks that share it: all send it their rows and get back those of the update. A round
    serves one matrix of every owner with two collectives, so that a rank holds a few matrices at a time. In HSDP each
    replica does so by itself: they compute the same from the same gradients, and nothing crosses the slower network
    between them. What travels and what is multiplied is bf16 on CUDA and fp32 on CPU.

    Reads `grad_scale` and `found_inf` as fused AdamW does, and never waits for the device.
    """

    grad_scale: Tensor | None = None  # divides the gradients
    found_inf: Tensor | None = None  # where it is 1, weights and state stay as they are

    def __init__(self, groups: list[dict[str, Any]], *, lr: float, betas: tuple[float, float], eps: float) -> None:
        super().__init__(groups, {"lr": lr, "weight_decay": 0.0, "fused": True})
        rest = [group for group in self.param_groups if not group.get("hidden")]
        self.adamw = torch.optim.AdamW(rest, lr=lr, betas=betas, eps=eps, fused=True) if rest else None
        if self.adamw:
            self.adamw.state = self.state
        hidden = [group for group in self.param_groups if group.get("hidden")]
        assert len(hidden) == 1, "Muon needs matrices of numbered layers, as `is_hidden_matrix` finds them"
        self.hidden = hidden[0]
        self.shards = _process_group(self.hidden["model_params"])
        self.rank = dist.get_rank(self.shards) if self.shards else 0
        ranks = dist.get_world_size(self.shards) if self.shards else 1
        matrices = [_matrix(*pair, ranks) for pair in zip(self.hidden["params"], self.hidden["model_params"])]
        self.rounds = _rounds(matrices, ranks)

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]  # no closure: gradients are there
        """Update all parameters that have a gradient, the same ones on every rank."""
        if self.adamw:
            scaling: Any = self.adamw
            scaling.grad_scale, scaling.found_inf = self.grad_scale, self.found_inf
            self.adamw.step()
        good = 1.0 if self.found_inf is None else 1.0 - self.found_inf
        for owned in self.rounds:
            present = [matrix if matrix and matrix.rows.grad is not None else None for matrix in owned]
            if any(present):
                self._update(present, good)

    def _update(self, owned: Sequence[Matrix | None], good: Tensor | float) -> None:
        """One round: `owned` has at most one matrix of each owner, in the order of the ranks."""
        matrices = [matrix for matrix in owned if matrix]
        own = owned[self.rank]
        sends = [matrix.pieces[self.rank] if matrix else 0 for matrix in owned]
        receives = list(own.pieces) if own else [0] * len(owned)
        like = matrices[0].rows
        buffer = like.new_empty(sum(sends), dtype=torch.bfloat16 if like.is_cuda else torch.float32)
        parts = [matrix.pieces[self.rank] for matrix in matrices]
        for matrix, part in zip(matrices, buffer.split(parts)):
            part.copy_(self._momentum(matrix, good).flatten())
        buffer = self._exchange(buffer, receives, sends)
        if own:
            buffer = newton_schulz(buffer.view(own.shape)).reshape(-1)
        buffer = self._exchange(buffer, sends, receives)
        lr, decay = self.hidden["lr"], self.hidden["weight_decay"]
        for matrix, part in zip(matrices, buffer.split(parts)):
            size = 0.2 * math.sqrt(max(matrix.shape)) * lr  # 0.2: the usual root mean square of AdamW's update
            matrix.rows.mul_(1 - good * (lr * decay))
            matrix.rows.sub_(part.view_as(matrix.rows).float().mul_(good * size))

    def _momentum(self, matrix: Matrix, good: Tensor | float) -> Tensor:
        """Bring the momentum of this rank's rows up to date; what Nesterov's rule makes of it, (rows here, columns)."""
        gradient, average = matrix.rows.grad, self.state[matrix.rows]["momentum_buffer"]
        assert gradient is not None
        if self.grad_scale is not None:
            gradient.div_(self.grad_scale)
        if self.found_inf is not None:
            gradient.masked_fill_(self.found_inf.bool(), 0.0)  # 0 times a NaN would be one
        average.lerp_(gradient, good * (1 - MOMENTUM))
        return gradient.lerp(average, MOMENTUM)

    def _exchange(self, elements: Tensor, receives: list[int], sends: list[int]) -> Tensor:
        """Send each rank its part of `elements`, and give what all of them have sent, in the order of the ranks."""
        if not self.shards:
            return elements
        received = elements.new_empty(sum(receives))
        dist.all_to_all_single(received, elements, receives, sends, group=self.shards)
        return received


def newton_schulz(matrix: Tensor) -> Tensor:
    """The matrix with its singular values brought to about 1 (0.7 to 1.2), computed in its own dtype."""
    a, b, c = COEFFICIENTS
    wide = matrix.T if matrix.shape[0] > matrix.shape[1] else matrix
    wide = wide / wide.norm().clamp(min=EPS)
    for _ in range(STEPS):
        gram = wide @ wide.T
        wide = torch.addmm(wide, torch.addmm(gram, gram, gram, beta=b, alpha=c), wide, beta=a)
    return wide.T if matrix.shape[0] > matrix.shape[1] else wide


def _process_group(parameters: list[Tensor]) -> dist.ProcessGroup | None:
    """The ranks that share the parameters, if more than one does; in HSDP those of this rank's replica."""
    meshes = {parameter.device_mesh for parameter in parameters if isinstance(parameter, DTensor)}
    if not meshes:
        return None
    (mesh,) = meshes  # the whole model lies on one
    return mesh.get_group(mesh.ndim - 1) if mesh.size(mesh.ndim - 1) > 1 else None


def _matrix(rows: Tensor, parameter: Tensor, ranks: int) -> Matrix:
    size = -(-parameter.shape[0] // ranks)  # rows of a rank, as FSDP2 cuts them: the last ones have less or none
    counts = (max(0, min(size, parameter.shape[0] - rank * size)) for rank in range(ranks))
    return Matrix(rows, (parameter.shape[0], parameter.shape[1]), tuple(rows * parameter.shape[1] for rows in counts))


def _rounds(matrices: list[Matrix], ranks: int) -> list[tuple[Matrix | None, ...]]:
    """At most one matrix of each owner a round. The costliest goes first, and each to who has least to do so far."""

    def cost(matrix: Matrix) -> int:
        short, long = sorted(matrix.shape)
        return short**2 * (2 * long + short)

    work, owned = [0] * ranks, [list[Matrix]() for _ in range(ranks)]
    for matrix in sorted(matrices, key=cost, reverse=True):
        owner = work.index(min(work))
        work[owner] += cost(matrix)
        owned[owner].append(matrix)
    return list(zip_longest(*owned))
