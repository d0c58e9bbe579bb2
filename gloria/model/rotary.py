"""Rotary positions (RoFormer, arXiv 2104.09864): queries and keys are turned by angles that grow with the position.

As transformers has them: element i of a head is paired with i + head_dim / 2, and weights are stored for that order.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from gloria.model.config import TransformerConfig


def frequencies(shape: TransformerConfig, device: torch.device) -> Tensor:
    """The angle a position turns each pair by, in radians, (head_dim / 2,) fp32."""
    places = torch.arange(0, shape.head_dim, 2, dtype=torch.float32, device=device)
    plain = 1.0 / shape.rope_theta ** (places / shape.head_dim)
    scaling = shape.rope_scaling
    if scaling is None:
        return plain
    slow = plain / scaling.factor
    if scaling.kind == "linear":
        return slow
    # Llama 3.1: short waves as they were, long ones slower, and in between a mixture (arXiv 2407.21783, section 3.4).
    turns = scaling.original_max_positions * plain / (2 * math.pi)  # of a wave over the length of the first training
    kept = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    return torch.lerp(slow, plain, kept.clamp(0.0, 1.0))


def rotations(shape: TransformerConfig, positions: Tensor, dtype: torch.dtype) -> Tensor:
    """Cosines and sines for tokens at `positions` (..., seq), made once a forward: (2, ..., seq, 1, head_dim)."""
    angles = positions.unsqueeze(-1).float() * frequencies(shape, positions.device)
    angles = torch.cat((angles, angles), dim=-1).unsqueeze(-2)  # over all heads alike
    return torch.stack((angles.cos(), angles.sin())).to(dtype)


def rotate(x: Tensor, turned_by: Tensor) -> Tensor:
    """Queries or keys (batch, seq, heads, head_dim), turned by the `rotations` of their positions."""
    cosines, sines = turned_by
    first, second = x.chunk(2, dim=-1)
    return x * cosines + torch.cat((-second, first), dim=-1) * sines
