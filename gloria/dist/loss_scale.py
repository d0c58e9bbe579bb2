"""Loss scaling for fp16, whose smallest numbers are far above small gradients (Micikevicius et al., arXiv 1710.03740).

The loss is multiplied by a scale before backward and the gradients are divided by it before they are used. The scale
is found by trying: it is doubled after many good steps, and halved when a gradient overflows, whose step is left out.
Start, factors and interval are those of torch's GradScaler, which cannot tell an overflow from a bad batch and asks
the host in every step.
"""

from __future__ import annotations

import torch
from torch import Tensor

START, LEAST, FACTOR = 2.0**16, 1.0, 2.0
PATIENCE = 2000  # good steps in a row before the scale grows


def new_loss_scale(device: torch.device) -> Tensor:
    """(scale, steps since the last overflow or growth), float32 on the device."""
    return torch.tensor([START, 0.0], dtype=torch.float32, device=device)


def loss_scale_for(precision: str, device: torch.device) -> Tensor | None:
    """A new loss scale where gradients are computed in fp16; None elsewhere, where they need none."""
    if precision != "fp16":
        return None
    # Partial sums of a product would be kept in fp16, where they can overflow; bf16 has the range for it.
    torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction = False
    return new_loss_scale(device)


def restore(loss_scale: Tensor | None, saved: list[float] | None) -> list[str]:
    """Set the scale to what a checkpoint has `saved` of it, in place; a line to say where it has nothing."""
    if loss_scale is None:
        return []
    if not saved:
        return [f"loss scale: begins at {loss_scale[0]:g}, for the checkpoint has none"]
    loss_scale.copy_(torch.tensor(saved, dtype=torch.float32))
    return []


@torch.no_grad()
def adjust(loss_scale: Tensor, finite: Tensor) -> None:
    """Bring the scale up to date behind a step, in place, from a device scalar that is equal on all ranks.

    Halved, but not under 1, where `finite` is false; doubled after 2000 finite steps in a row. All factors are powers
    of two, so scaling rounds nothing that fp16 can hold. Nothing here waits for the device.
    """
    scale, steps = loss_scale
    grows = finite & (steps + 1 >= PATIENCE)
    factor = torch.where(finite, 1 + grows * (FACTOR - 1), 1 / FACTOR)
    after = torch.stack([(scale * factor).clamp(min=LEAST), (steps + 1) * (finite & ~grows)])
    loss_scale.copy_(after)
