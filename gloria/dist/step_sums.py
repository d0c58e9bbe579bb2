"""The one all-reduce of a step: what every rank contributes, packed into one small tensor.

Everything that all ranks must decide alike travels here (is the update applied, does a rank request a stop, is the
background save done), so no decision needs a collective of its own.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from gloria.dist.loss_scale import LEAST

# Squared gradient norm, the flags summed over ranks, the verdict and the loss scale (`decide_update`); then loss and
# rows by group, and the objective's own sums.
_FLAGS, _VERDICT, _SCALE, _FIXED = slice(1, 5), 5, 6, 7
_NOT_FINITE, _SPIKE, _OVERFLOW = 1.0, 2.0, 3.0  # verdicts; 0: applied

# Steps that the running gradient norm looks back, and that must be seen before a step can be a spike.
SPIKE_WINDOW = 100


class Flags(NamedTuple):
    """What a rank reports to the others besides its numbers."""

    stop: bool = False  # a stop is requested
    save_done: bool = False  # its part of the background save is durable
    save_failed: bool = False
    lock_lost: bool = False  # another launch has taken the run over


@dataclass(frozen=True)
class StepSums:
    """A step's sums over all ranks, on the host."""

    grad_norm: float
    finite: bool  # gradient and loss are
    spike: bool  # finite, and left out for its gradient norm
    overflow: bool  # in fp16: the loss is finite and its gradient was not, under this loss scale
    loss_scale: float  # that the gradient was computed under; 0 where none is used
    group_loss: np.ndarray  # (groups,) sum of the rows' losses
    group_rows: np.ndarray  # (groups,)
    stop_requests: int  # ranks that request a stop
    saves_done: int  # ranks whose part of the background save is durable
    saves_failed: int
    locks_lost: int
    metrics: Mapping[str, float] = field(default_factory=dict)  # the objective's own sums, by name

    @property
    def applied(self) -> bool:
        """Whether the weights were updated."""
        return self.finite and not self.spike


def pack_sums(
    grad_square: Tensor,
    row_losses: Tensor,  # (rows,)
    row_groups: Tensor,  # (rows,) int64
    num_groups: int,
    flags: Flags,
    metrics: Iterable[Tensor] = (),
) -> Tensor:
    """This rank's part, float64 on the device: exact for every count and for sums over any number of ranks.

    `metrics` are more scalars to add up over the ranks: the same number of them, in the same order, on all.
    """
    sums = torch.zeros(_FIXED + 2 * num_groups, dtype=torch.float64, device=grad_square.device)
    sums[0] = grad_square
    for place, flag in enumerate(flags, start=_FLAGS.start):
        if flag:  # rare; a fill is a kernel, where a copy of the flags from the host would wait for the device
            sums[place].fill_(1.0)
    sums[_FIXED : _FIXED + num_groups].index_add_(0, row_groups, row_losses.to(torch.float64))
    sums[_FIXED + num_groups :].index_add_(0, row_groups, torch.ones_like(row_losses, dtype=torch.float64))
    own = [value.to(torch.float64).reshape(1) for value in metrics]
    return torch.cat([sums, *own]) if own else sums


def new_running_norm(device: torch.device) -> Tensor:
    """What `decide_update` remembers of the gradient norms applied so far: (count, mean, variance), float64."""
    return torch.zeros(3, dtype=torch.float64, device=device)


def decide_update(
    sums: Tensor,
    num_groups: int,
    running: Tensor | None = None,
    deviations: float = 0.0,
    loss_scale: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The global gradient norm, and whether the update is applied: device scalars, the same on all ranks.

    It is where norm and loss are finite and, with `running` (which is brought up to date), the norm is at most
    `deviations` standard deviations above its running mean. What is left out does not count in the mean. The verdict
    goes into the reduced `sums`, for the host to read later: nothing here waits for the device.

    `loss_scale` is that of `gloria.dist.loss_scale` where gradients are scaled; the norm is the unscaled one. Under a
    scale that can still be halved, a gradient that is not finite beside a loss that is counts as an overflow of the
    scale, and not against the batch.
    """
    if loss_scale is not None:
        sums[_SCALE] = loss_scale[0]
        sums[0] /= sums[_SCALE].square()
    grad_norm = sums[0].sqrt()
    loss = sums[_FIXED : _FIXED + num_groups].sum()
    good = torch.isfinite(grad_norm + loss)
    sums[_VERDICT] = _NOT_FINITE * ~good
    if loss_scale is not None:
        overflow = ~good & torch.isfinite(loss) & (loss_scale[0] > LEAST)
        sums[_VERDICT] += (_OVERFLOW - _NOT_FINITE) * overflow
    if running is None:
        return grad_norm, good
    count, mean, variance = running
    spike = good & (count >= SPIKE_WINDOW) & (grad_norm > mean + deviations * variance.sqrt())
    sums[_VERDICT] += _SPIKE * spike
    good = good & ~spike
    # A plain mean at first, then an exponential one.
    weight = (1 / (count + 1)).clamp(min=1 / SPIKE_WINDOW)
    delta = grad_norm - mean
    after = torch.stack([count + 1, mean + weight * delta, (1 - weight) * (variance + weight * delta.square())])
    running.copy_(torch.where(good, after, running))
    return grad_norm, good


def overflowed(sums: Tensor) -> Tensor:
    """Whether the step is an overflow of the loss scale: a device scalar, the same on all ranks."""
    return sums[_VERDICT] == _OVERFLOW


def unpack_sums(values: np.ndarray, num_groups: int, metrics: Sequence[str] = ()) -> StepSums:
    """Read the reduced sums, after `decide_update`, on the host; `metrics` are the names of the objective's sums."""
    stop_requests, saves_done, saves_failed, locks_lost = (int(count) for count in values[_FLAGS])
    rows = _FIXED + num_groups
    return StepSums(
        grad_norm=float(np.sqrt(values[0])),
        finite=values[_VERDICT] not in (_NOT_FINITE, _OVERFLOW),
        spike=values[_VERDICT] == _SPIKE,
        overflow=values[_VERDICT] == _OVERFLOW,
        loss_scale=float(values[_SCALE]),
        group_loss=values[_FIXED:rows],
        group_rows=values[rows : rows + num_groups].astype(np.int64),
        stop_requests=stop_requests,
        saves_done=saves_done,
        saves_failed=saves_failed,
        locks_lost=locks_lost,
        metrics=dict(zip(metrics, values[rows + num_groups :].tolist())),
    )
