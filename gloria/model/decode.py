"""Greedy decoding with what the layers have already computed kept: prompts are read once, then one token a step.

Rows of different lengths go on side by side, each at its own position, and those that are over leave. Our own
models keep keys and values here, behind prompts padded on the right, where a causal model never looks. Models of
transformers keep them in a cache of theirs, behind prompts padded on the left, as its `generate` has it.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import DynamicCache

from gloria.model.attention import additive_mask, attention_masks
from gloria.model.config import LOCAL
from gloria.model.transformer import Transformer


@dataclass
class OwnCache:
    """Rows of a `Transformer` under way. Keys and values of a layer are (rows, heads, capacity, head_dim)."""

    model: Transformer
    lengths: Tensor  # (rows,) tokens of each row so far
    longest: int  # the largest of them or more, known without asking the device
    keys: list[Tensor] = field(default_factory=list)
    values: list[Tensor] = field(default_factory=list)

    def step(self, tokens: Tensor) -> Tensor:
        """Put one token, (rows,), behind each row: fp32 logits of the next, (rows, vocab)."""
        hidden = self.look_ahead(tokens[:, None])
        self.lengths, self.longest = self.lengths + 1, self.longest + 1
        return _head(self.model, hidden[:, 0])

    def look_ahead(self, ids: Tensor, back: int = 0) -> Tensor:
        """Hidden states of `ids` (rows, n) as they would be behind each row: (rows, n, hidden).

        The rows stay as long as they are: the next call writes over these tokens. With `back` the first of the ids
        are the last of the row, so many of them, once more.
        """
        shape = self.model.shape
        length, width = ids.shape[1], self.longest - back + ids.shape[1]
        rows = torch.arange(len(ids), device=ids.device)[:, None]
        positions = self.lengths[:, None] - back + torch.arange(length, device=ids.device)  # (rows, n)
        distance = positions[:, :, None] - torch.arange(width, device=ids.device)  # (rows, n, width)
        dtype = self.keys[0].dtype
        whole = additive_mask(distance >= 0, dtype)
        local = additive_mask((distance >= 0) & (distance < shape.window_size), dtype)

        def attend(layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            query, key, value = (x.unflatten(2, (shape.num_heads, -1)) for x in (query, key, value))
            self.keys[layer][rows, :, positions] = key  # (rows, n, heads, head_dim)
            self.values[layer][rows, :, positions] = value
            output = F.scaled_dot_product_attention(
                query.transpose(1, 2),
                self.keys[layer][:, :, :width],
                self.values[layer][:, :, :width],
                attn_mask=local if shape.attention_layers[layer] == LOCAL else whole,
                scale=shape.attention_scale,
            )
            return output.transpose(1, 2).flatten(2)

        # Tokens that pad `ids` may lie behind the last position.
        return _hidden_states(self.model, ids, positions.clamp(max=shape.max_positions - 1), attend)

    def keep(self, rows: Tensor) -> None:
        """Go on with these rows alone, (n,) numbers, in their order; one may be named several times."""
        self.lengths = self.lengths[rows]
        self.keys = [layer[rows] for layer in self.keys]
        self.values = [layer[rows] for layer in self.values]


@dataclass
class ForeignCache:
    """Rows of a causal model of transformers under way."""

    model: nn.Module
    ids: Tensor  # (rows, seq), padded on the left
    mask: Tensor  # (rows, seq), 1: a token
    past: DynamicCache | None  # what the layers keep; None where the model keeps none: whole rows at every step

    def step(self, tokens: Tensor | None = None) -> Tensor:
        """Put one token, (rows,), behind each row: fp32 logits of the next, (rows, vocab)."""
        if tokens is not None:
            self.ids = torch.cat((self.ids, tokens[:, None]), dim=1)
            self.mask = torch.cat((self.mask, torch.ones_like(tokens)[:, None]), dim=1)
        positions = (self.mask.cumsum(dim=1) - 1).clamp(min=0)
        new = slice(0 if tokens is None or self.past is None else -1, None)
        # Not every model has all of these: BLOOM no positions, OpenAI GPT no cache, others make all logits.
        extra = {
            "position_ids": positions[:, new],
            "logits_to_keep": 1,
            _cache_name(self.model): self.past,
            "use_cache": self.past is not None,
        }
        taken = inspect.signature(self.model.forward).parameters
        output = self.model(
            input_ids=self.ids[:, new],
            attention_mask=self.mask,
            **{name: value for name, value in extra.items() if name in taken},
        )
        if self.past is not None and not self.past.get_seq_length():
            self.past = None  # the model takes a cache and has kept nothing in it
        return output.logits[:, -1].float()

    def keep(self, rows: Tensor) -> None:
        """Go on with these rows alone, (n,) numbers, in their order; one may be named several times."""
        self.ids, self.mask = self.ids[rows], self.mask[rows]
        if self.past is not None:
            self.past.reorder_cache(rows)


def begin(
    model: nn.Module, prompts: Sequence[Sequence[int]], room: int, device: torch.device
) -> tuple[OwnCache | ForeignCache, Tensor]:
    """The prompts as rows that have `room` for so many tokens more, and fp32 logits of the next, (rows, vocab)."""
    if isinstance(model, Transformer):
        return _read_prompts(model, prompts, room, device)
    longest = max(map(len, prompts))
    ids = torch.tensor([[0] * (longest - len(prompt)) + list(prompt) for prompt in prompts], device=device)
    mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts], device=device)
    rows = ForeignCache(model, ids, mask, DynamicCache(config=model.config) if _cache_name(model) else None)
    return rows, rows.step()


def _cache_name(model: nn.Module) -> str:
    """What a model of transformers calls the cache that it is given: another name since 5.24. "": it takes none."""
    taken = inspect.signature(model.forward).parameters
    return next((name for name in ("past_key_values", "cache") if name in taken), "")


def _read_prompts(
    model: Transformer, prompts: Sequence[Sequence[int]], room: int, device: torch.device
) -> tuple[OwnCache, Tensor]:
    shape, longest = model.shape, max(map(len, prompts))
    assert longest <= shape.max_positions, (longest, shape.max_positions)
    ids = torch.tensor([list(prompt) + [0] * (longest - len(prompt)) for prompt in prompts], device=device)
    rows = OwnCache(model, torch.tensor([len(prompt) for prompt in prompts], device=device), longest)
    dtype = model.transformer.wte.weight.dtype
    masks = attention_masks(len(prompts), longest, shape.window_size, None, device=device, dtype=dtype)

    def attend(layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        for kept, new in ((rows.keys, key), (rows.values, value)):
            # Zeros: what is masked is still multiplied by its weight of 0, and must be finite.
            kept.append(new.new_zeros(len(ids), shape.num_heads, longest + room, shape.head_dim))
            kept[-1][:, :, :longest] = new.unflatten(2, (shape.num_heads, -1)).transpose(1, 2)
        return model.transformer.h[layer].attn.attend(query, key, value, masks, dropout=0.0)

    hidden = _hidden_states(model, ids, torch.arange(longest, device=device), attend)
    return rows, _head(model, hidden[torch.arange(len(ids), device=device), rows.lengths - 1])


def _hidden_states(model: Transformer, ids: Tensor, positions: Tensor, attend: Callable[..., Tensor]) -> Tensor:
    """`Transformer.hidden_states` with the attention of each layer, (number, query, key, value), left to `attend`."""
    body = model.transformer
    hidden = body.wte(ids) + body.wpe(positions)  # (rows, seq, hidden)
    for layer, block in enumerate(body.h):
        hidden = hidden + block.attn.merge(attend(layer, *block.attn.project(block.ln_1(hidden))))
        hidden = hidden + block.mlp(block.ln_2(hidden))
    return body.ln_f(hidden)


def _head(model: Transformer, hidden: Tensor) -> Tensor:
    """(rows, hidden) -> (rows, vocab) in fp32"""
    return F.linear(hidden, model.transformer.wte.weight[: model.shape.vocab_size]).float()
