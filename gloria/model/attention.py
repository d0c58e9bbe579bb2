"""Causal attention, over the whole sequence or over a window.

By torch's scaled_dot_product_attention; layers with a window and masked documents by another kernel, where
`gloria.model.kernels` has chosen one.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class Masks(NamedTuple):
    """Where tokens may look in layers without and with a window; None: at all before them.

    For sdpa it is what is added to attention scores: 0 where a token may look, -inf elsewhere. Its shapes are those of
    `attention_masks`; those of `cache_masks` are (rows, 1, seq, capacity) both. For varlen flash it is where sequences
    begin and end, for FlexAttention a BlockMask.
    """

    whole: Any  # sdpa: (batch, 1, seq, seq); varlen: (sequences + 1,) int32
    local: Any  # sdpa: (batch * blocks, 1, window, 2 * window), None where the sequence fits into one window


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    masks: Masks,
    *,
    window: int,
    scale: float | None,
    dropout: float,
    cache: Tensor | None = None,
    positions: Tensor | None = None,
) -> Tensor:
    """Causal multi-head attention between the projections: (batch, seq, heads * head_dim).

    `query` is (batch, seq, heads, head_dim); `key` and `value` have as many heads, or fewer, each of which a group of
    neighbouring queries' heads shares (arXiv 2305.13245). `window` 0 looks back over the whole sequence, otherwise
    over the last `window` tokens, itself included. `scale` None is 1/sqrt(head_dim). `masks` are those of
    `attention_masks` for the same window and length.

    Keys and values are kept in `cache`, (2, batch, their heads, capacity, head_dim), if there is one: at `positions`
    (batch, seq), where they are attended to with all that the cache holds and the masks of `cache_masks`; without
    `positions` at 0, 1, ..., where nothing lies before them.
    """
    if cache is not None and positions is not None:
        rows = torch.arange(len(query), device=query.device)[:, None]
        cache[0, rows, :, positions], cache[1, rows, :, positions] = key, value
        mask = masks.local if window else masks.whole
        keys, values = cache.transpose(2, 3)  # (batch, capacity, their heads, head_dim) each
        return _grouped_attention(query, keys, values, mask, scale).flatten(2)
    if cache is not None:
        cache[:, :, :, : key.shape[1]] = torch.stack((key, value)).transpose(2, 3)
    local = 0 < window < query.shape[1]
    mask = masks.local if local else masks.whole
    if mask is not None and not isinstance(mask, Tensor):
        output = _flex_attention(query, key, value, mask, scale)
    elif mask is not None and mask.dtype == torch.int32:
        output = _varlen_attention(query, key, value, mask, window, scale)
    elif local:
        assert mask is not None
        output = _local_attention(query, key, value, mask, window, scale, dropout)
    else:
        output = _attention(query, key, value, mask, scale, dropout)
    return output.flatten(2)


def _attention(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float | None, dropout: float
) -> Tensor:
    """(batch, seq, heads, head_dim), and so the output; without a mask it is causal."""
    groups = query.shape[2] // key.shape[2]
    if groups > 1 and (mask is not None or query.device.type == "cpu"):
        # With a mask no kernel for GPUs takes fewer keys than queries, and on CPU copies are the faster way.
        key, value, groups = key.repeat_interleave(groups, dim=2), value.repeat_interleave(groups, dim=2), 1
    output = F.scaled_dot_product_attention(
        query.transpose(1, 2),  # (batch, heads, seq, head_dim)
        key.transpose(1, 2),
        value.transpose(1, 2),
        attn_mask=mask,
        is_causal=mask is None,
        scale=scale,
        dropout_p=dropout,
        enable_gqa=groups > 1,
    )
    return output.transpose(1, 2)


def _grouped_attention(query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scale: float | None) -> Tensor:
    """The same with the queries of a group behind one another, where copies of all keys would cost more than masks."""
    groups = query.shape[2] // key.shape[2]
    queries = query.unflatten(2, (-1, groups)).transpose(2, 3).flatten(1, 2)  # (batch, seq * groups, their heads, ...)
    mask = mask.repeat_interleave(groups, dim=2) if groups > 1 else mask
    output = _attention(queries, key, value, mask, scale, 0.0)
    return output.unflatten(1, (-1, groups)).transpose(2, 3).flatten(2, 3)


def _local_attention(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor, window: int, scale: float | None, dropout: float
) -> Tensor:
    """The same within a window, in time linear in the sequence.

    The sequence is cut into blocks of `window`: a block's queries need no keys but its own and those of the
    block before it.
    """
    batch, length = query.shape[:2]
    blocks = -(-length // window)
    tail = blocks * window - length

    def with_previous(x: Tensor) -> Tensor:
        padded = F.pad(x, (0, 0, 0, 0, window, tail)).view(batch, blocks + 1, window, *x.shape[2:])
        return torch.cat((padded[:, :-1], padded[:, 1:]), dim=2).flatten(0, 1)

    output = _attention(
        F.pad(query, (0, 0, 0, 0, 0, tail)).reshape(batch * blocks, window, *query.shape[2:]),
        with_previous(key),  # (batch * blocks, 2 * window, heads, head_dim)
        with_previous(value),
        mask,
        scale,
        dropout,
    )
    return output.reshape(batch, blocks * window, *query.shape[2:])[:, :length]


def _varlen_attention(
    query: Tensor, key: Tensor, value: Tensor, bounds: Tensor, window: int, scale: float | None
) -> Tensor:
    """(batch, seq, heads, head_dim); a token sees its sequence, of it the last `window` tokens (0: all before)."""
    from torch.nn.attention.varlen import varlen_attn  # imports the compiler, which takes seconds

    batch, length = query.shape[:2]
    # torch 2.11 has no such argument
    grouped: dict[str, Any] = {"enable_gqa": True} if key.shape[2] < query.shape[2] else {}
    query, key, value = (x.flatten(0, 1) for x in (query, key, value))  # (batch * seq, heads, head_dim)
    output = varlen_attn(
        query,
        key,
        value,
        bounds,
        bounds,
        length,  # no sequence is longer, and a bound that never changes compiles once
        length,
        scale=scale,
        window_size=(window - 1, 0),  # -1: no bound on the left
        **grouped,
    )
    assert isinstance(output, Tensor)
    return output.unflatten(0, (batch, length))


def _flex_attention(query: Tensor, key: Tensor, value: Tensor, mask: Any, scale: float | None) -> Tensor:
    """(batch, seq, heads, head_dim), and so the output."""
    from torch.nn.attention.flex_attention import flex_attention  # imports the compiler

    query, key, value = (x.transpose(1, 2) for x in (query, key, value))  # (batch, heads, seq, head_dim)
    grouped = key.shape[1] < query.shape[1]
    output: Tensor = flex_attention(query, key, value, block_mask=mask, scale=scale, enable_gqa=grouped)
    return output.transpose(1, 2)


def attention_masks(
    batch: int,
    length: int,
    window: int,
    documents: Tensor | None,
    *,
    device: torch.device,
    dtype: torch.dtype,
    kernel: str = "sdpa",
) -> Masks:
    """The masks for sequences of `length`; with `documents` a token sees none of another document.

    `documents` are ids, (batch, seq) integers, or the bounds of `gloria.data.loader.document_bounds`, (places + 1,)
    int32; varlen flash needs bounds, and with ids it is sdpa. `window` is that of the local layers, 0 if there are
    none. Made once a forward, in the dtype of the queries, and shared by all layers: a boolean mask would be converted,
    and kept for backward, in every one of them.
    """
    bounds = documents if documents is not None and documents.dim() == 1 else None
    if kernel == "varlen" and (documents is None or bounds is not None):
        rows = torch.arange(0, batch * length + 1, length, dtype=torch.int32, device=device)
        return Masks(documents, rows if documents is None else documents)
    if bounds is not None:
        places = torch.arange(batch * length, dtype=torch.int32, device=device)
        documents = torch.searchsorted(bounds, places, right=True).view(batch, length)
    if kernel == "flex":
        whole = None if documents is None else _block_mask(length, 0, device, documents)
        return Masks(whole, _block_mask(length, window, device, documents) if 0 < window < length else None)
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


def _block_mask(length: int, window: int, device: torch.device, documents: Tensor | None) -> Any:
    """FlexAttention's mask, (batch, 1, seq, seq) in blocks; without documents one for all batches."""
    if documents is None:
        return _window_blocks(length, window, device)
    from torch.nn.attention.flex_attention import create_block_mask

    def allowed(row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return _sees(query, key, window) & (documents[row, query] == documents[row, key])

    return create_block_mask(allowed, len(documents), None, length, length, device=str(device))


@lru_cache(maxsize=8)
def _window_blocks(length: int, window: int, device: torch.device) -> Any:
    from torch.nn.attention.flex_attention import create_block_mask

    def allowed(row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return _sees(query, key, window)

    return create_block_mask(allowed, None, None, length, length, device=str(device))


def _sees(query: Tensor, key: Tensor, window: int) -> Tensor:
    distance = query - key
    return (distance >= 0) & (distance < window) if window else distance >= 0


def cache_masks(positions: Tensor, capacity: int, window: int, dtype: torch.dtype) -> Masks:
    """The masks of tokens at `positions` (rows, seq) over a cache with room for `capacity` tokens a row."""
    distance = positions[:, :, None] - torch.arange(capacity, device=positions.device)  # (rows, seq, capacity)
    local = _additive((distance >= 0) & (distance < window), dtype) if window else None
    return Masks(_additive(distance >= 0, dtype), local)


def _additive(allowed: Tensor, dtype: torch.dtype) -> Tensor:
    """(batch, queries, keys) booleans as what is added to scores: (batch, 1, queries, keys)."""
    mask = torch.zeros(allowed.shape, dtype=dtype, device=allowed.device)
    return mask.masked_fill_(~allowed, float("-inf")).unsqueeze(1)
