"""Torch's operation for varlen flash attention on CPU, from its definition: what CUDA's kernel is given runs here.

Importing this registers it. The arguments are held to what the kernel for CUDA checks (ATen, flash_attn/flash_api.cpp),
but for dtypes and head sizes, which tests have smaller.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import varlen


def check_arguments(query: Tensor, key: Tensor, value: Tensor, bounds: Tensor, others: Tensor, longest: int) -> None:
    """What CUDA's kernel requires of layout, and that the bounds cover the tokens."""
    assert query.dim() == 3
    assert key.shape == value.shape
    assert (query.shape[0], query.shape[2]) == (key.shape[0], key.shape[2])
    assert query.shape[1] % key.shape[1] == 0
    assert query.dtype == key.dtype == value.dtype
    assert all(x.stride(-1) == 1 for x in (query, key, value))
    for cuts in (bounds, others):
        assert cuts.dtype == torch.int32
        assert cuts.dim() == 1
        assert cuts.is_contiguous()
        assert cuts.device == query.device
    if query.device.type == "cpu":
        assert bounds[0] == 0
        assert bounds[-1] == len(query)
        assert bounds.diff().min() >= 0
        assert bounds.diff().max() <= longest


def for_heads(keys: Tensor, query: Tensor) -> Tensor:
    """Keys or values of a group of queries' heads, repeated for each of them."""
    return keys.repeat_interleave(query.shape[1] // keys.shape[1], dim=1)


def scores(query: Tensor, key: Tensor, bounds: Tensor, scale: float | None, window: list[int]) -> Tensor:
    """Of all pairs of tokens, (heads, tokens, tokens): -inf where the first does not see the second."""
    left, right = window
    place = torch.arange(len(query))
    sequence = torch.searchsorted(bounds, place.int(), right=True)
    distance = place[:, None] - place
    allowed = (sequence[:, None] == sequence) & (distance >= -right)
    if left >= 0:
        allowed &= distance <= left
    found = torch.einsum("ihd,jhd->hij", query, for_heads(key, query)) * (
        query.shape[-1] ** -0.5 if scale is None else scale
    )
    return found.masked_fill(~allowed, float("-inf"))


@varlen._varlen_attn.register_kernel("cpu")
def _forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bounds: Tensor,
    others: Tensor,
    max_q: int,
    max_k: int,
    is_causal: bool = False,
    scale: float | None = None,
    window_size: Any = None,
    *_: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    assert max_q == max_k
    assert is_causal == (window_size == [-1, 0])
    check_arguments(query, key, value, bounds, others, max_q)
    found = scores(query, key, bounds, scale, window_size)
    output = torch.einsum("hij,jhd->ihd", found.softmax(-1), for_heads(value, query))
    return output.contiguous(), found.logsumexp(-1).float(), torch.zeros(2, dtype=torch.uint64)


@varlen._varlen_attn_backward.register_kernel("cpu")
def _backward(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    bounds: Tensor,
    others: Tensor,
    max_q: int,
    max_k: int,
    is_causal: bool,
    rng_state: Tensor,
    scale: float | None = None,
    window_size: Any = None,
) -> tuple[Tensor, Tensor, Tensor]:
    weights = scores(query, key, bounds, scale, window_size).softmax(-1)
    of_weights = torch.einsum("ihd,jhd->hij", grad, for_heads(value, query))
    of_scores = weights * (of_weights - (grad * out).sum(-1).T[:, :, None])
    of_scores *= query.shape[-1] ** -0.5 if scale is None else scale
    of_keys = (torch.einsum("hij,ihd->jhd", *pair) for pair in ((of_scores, query), (weights, grad)))
    return (
        torch.einsum("hij,jhd->ihd", of_scores, for_heads(key, query)).contiguous(),
        *(x.unflatten(1, (key.shape[1], -1)).sum(2).contiguous() for x in of_keys),
    )
