"""Float8 matrix products in the blocks, by torchao: one scale a tensor, found anew in each product (`train.fp8`).

Weights, their names and their gradients stay what they are; only what the products read is cast. The head is left out:
its products are the largest, and the loss feels them most.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn

from gloria.errors import UserError
from gloria.model.config import TransformerConfig

FIRST, DIVISOR = (8, 9), 16  # the first cards with float8 (L4, RTX 4090, H100); sides of a matrix divide by it


def check_float8(shape: TransformerConfig, device: torch.device, precision: str) -> None:
    """A `UserError` where the device, the shape or what is installed does not allow it."""
    if device.type != "cuda":
        raise UserError("train.fp8: float8 is for GPUs, and this run is on CPU; leave it out")
    capability = torch.cuda.get_device_capability(device)
    if capability < FIRST:
        card = f"{torch.cuda.get_device_name(device)} (sm_{capability[0]}{capability[1]})"
        raise UserError(f"train.fp8: {card} has no float8, which begins with sm_89 (L4, RTX 4090, H100); leave it out")
    if precision != "bf16":
        raise UserError(f"train.fp8: goes with train.precision bf16, not {precision}; set that, or leave it out")
    if odd := [size for size in (shape.hidden_size, shape.intermediate_size, shape.kv_width) if size % DIVISOR]:
        raise UserError(f"train.fp8: sizes must be multiples of {DIVISOR}, and the model has {odd[0]}; leave it out")
    try:
        import torchao.float8  # noqa: F401
    except ImportError as error:
        raise UserError(f'train.fp8: needs torchao ({error}); pip install "gloria[fp8]", or leave it out') from None


def to_float8(blocks: Iterable[nn.Module]) -> None:
    """Have the blocks' linear layers multiply in float8, in place; before they are compiled and sharded."""
    from torchao.float8 import Float8LinearConfig, convert_to_float8_training

    config = Float8LinearConfig.from_recipe_name("tensorwise")
    for block in blocks:
        convert_to_float8_training(block, config=config)
