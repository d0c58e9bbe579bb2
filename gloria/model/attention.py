"""Causal attention, over the whole sequence or over a window, by torch's scaled_dot_product_attention."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class Masks(NamedTuple):
    """What is added to attention scores: 0 where a token may look, -inf elsewhere.

    The shapes are those of `attention_masks`; those of `cache_masks` are (rows, 1, seq, capacity) both.
    """

    whole: Tensor | None  # (batch, 1, seq, seq); None: plain causality
    local: Tensor | None  # (batch * blocks, 1, window, 2 * window); None: the sequence fits into one window


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    masks: Masks,
    *,
    num_heads: int,
    window: int,
    scale: float | None,
    dropout: float,
    cache: Tensor | None = None,
    positions: Tensor | None = None,
) -> Tensor:
    """Causal multi-head attention between the projections: (batch, seq, hidden) each, and so the output.

    `window` 0 looks back over the whole sequence, otherwise over the last `window` tokens, itself included.
    `scale` None is 1/sqrt(head_dim). `masks` are those of `attention_masks` for the same window and length.

    Keys and values are kept in `cache`, (2, batch, heads, capacity, head_dim), if there is one: at `positions`
    (batch, seq), where they are attended to with all that the cache holds and the masks of `cache_masks`; without
    `positions` at 0, 1, ..., where nothing lies before them.
    """
    query, key, value = (x.unflatten(-1, (num_heads, -1)) for x in (query, key, value))
    if cache is not None and positions is not None:
        rows = torch.arange(len(query), device=query.device)[:, None]
        cache[0, rows, :, positions], cache[1, rows, :, positions] = key, value
        mask = masks.local if window else masks.whole
        return _attention(query, *cache.transpose(2, 3), mask, scale, dropout).flatten(2)
    if cache is not None:
        cache[:, :, :, : key.shape[1]] = torch.stack((key, value)).transpose(2, 3)
    if 0 < window < query.shape[1]:
        output = _local_attention(query, key, value, masks.local, window, scale, dropout)
    else:
        output = _attention(query, key, value, masks.whole, scale, dropout)
    return output.flatten(2)


def _attention(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float | None, dropout: float
) -> Tensor:
    """(batch, seq, heads, head_dim) each, and so the output; without a mask it is causal."""
    output = F.scaled_dot_product_attention(
        query.transpose(1, 2),  # (batch, heads, seq, head_dim)
        key.transpose(1, 2),
        value.transpose(1, 2),
        attn_mask=mask,
        is_causal=mask is None,
        scale=scale,
        dropout_p=dropout,
    )
    return output.transpose(1, 2)


def _local_attention(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor, window: int, scale: float | None, dropout: float
) -> Tensor:
    """The same within a window, in time linear in the sequence.

    The sequence is cut into blocks of `window`: a block's queries need no keys but its own and those of the
    block before it.
    """
    batch, length, heads, head_dim = query.shape
    blocks = -(-length // window)
    tail = blocks * window - length

    def with_previous(x: Tensor) -> Tensor:
        padded = F.pad(x, (0, 0, 0, 0, window, tail)).view(batch, blocks + 1, window, heads, head_dim)
        return torch.cat((padded[:, :-1], padded[:, 1:]), dim=2).flatten(0, 1)

    output = _attention(
        F.pad(query, (0, 0, 0, 0, 0, tail)).reshape(batch * blocks, window, heads, head_dim),
        with_previous(key),  # (batch * blocks, 2 * window, heads, head_dim)
        with_previous(value),
        mask,
        scale,
        dropout,
    )
    return output.reshape(batch, blocks * window, heads, head_dim)[:, :length]


def attention_masks(
    batch: int,
    length: int,
    window: int,
    documents: Tensor | None,
    *,
    device: torch.device,
    dtype: torch.dtype,
) -> Masks:
    """The masks for sequences of `length`; `documents`, (batch, seq) integers, hides tokens of other ids.

    `window` is that of the local layers, 0 if there are none. Made once a forward, in the dtype of the
    queries, and shared by all layers: a boolean mask would be converted, and kept for backward, in every one
    of them.
    """
    whole = local = None
    if documents is not None:
        causal = torch.ones(length, length, dtype=torch.bool, device=device).tril()
        same = documents[:, :, None] == documents[:, None, :]  # (batch, seq, seq)
        whole = _additive(causal & same, dtype)
    if 0 < window < length:
        blocks = -(-length // window)
        position = torch.arange(window, device=device)
        distance = (position + window)[:, None] - torch.arange(2 * window, device=device)  # (window, 2 * window)
        allowed = ((distance >= 0) & (distance < window)).repeat(blocks, 1, 1)
        allowed[0, :, :window] = False  # nothing lies before the first block
        allowed = allowed.expand(batch, blocks, window, 2 * window)
        if documents is not None:
            padded = F.pad(documents, (window, blocks * window - length)).view(batch, blocks + 1, window)
            around = torch.cat((padded[:, :-1], padded[:, 1:]), dim=2)  # (batch, blocks, 2 * window)
            allowed = allowed & (padded[:, 1:, :, None] == around[:, :, None, :])
        local = _additive(allowed.flatten(0, 1), dtype)
    return Masks(whole, local)


def cache_masks(positions: Tensor, capacity: int, window: int, dtype: torch.dtype) -> Masks:
    """The masks of tokens at `positions` (rows, seq) over a cache with room for `capacity` tokens a row."""
    distance = positions[:, :, None] - torch.arange(capacity, device=positions.device)  # (rows, seq, capacity)
    local = _additive((distance >= 0) & (distance < window), dtype) if window else None
    return Masks(_additive(distance >= 0, dtype), local)


def _additive(allowed: Tensor, dtype: torch.dtype) -> Tensor:
    """(batch, queries, keys) booleans as what is added to scores: (batch, 1, queries, keys)."""
    mask = torch.zeros(allowed.shape, dtype=dtype, device=allowed.device)
    return mask.masked_fill_(~allowed, float("-inf")).unsqueeze(1)
