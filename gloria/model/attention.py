"""Causal attention, over the whole sequence or over a window, by torch's scaled_dot_product_attention."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class Masks(NamedTuple):
    """What is added to attention scores: 0 where a token may look, -inf elsewhere; see `attention_masks`."""

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
) -> Tensor:
    """Causal multi-head attention between the projections: (batch, seq, hidden) each, and so the output.

    `window` 0 looks back over the whole sequence, otherwise over the last `window` tokens, itself included.
    `scale` None is 1/sqrt(head_dim). `masks` are those of `attention_masks` for the same window and length.
    """
    query, key, value = (x.unflatten(-1, (num_heads, -1)) for x in (query, key, value))
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
        whole = additive_mask(causal & same, dtype)
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
        local = additive_mask(allowed.flatten(0, 1), dtype)
    return Masks(whole, local)


def additive_mask(allowed: Tensor, dtype: torch.dtype) -> Tensor:
    """(batch, queries, keys) booleans as what is added to scores: (batch, 1, queries, keys)."""
    mask = torch.zeros(allowed.shape, dtype=dtype, device=allowed.device)
    return mask.masked_fill_(~allowed, float("-inf")).unsqueeze(1)
