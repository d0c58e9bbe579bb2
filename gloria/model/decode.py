"""Greedy decoding with what the layers have already computed kept: prompts are read once, then one token a step.

Rows of different lengths go on side by side, each at its own position, and rows that have ended leave. Our own
models keep keys and values themselves, behind prompts padded on the right, where a causal model never looks. Models
of transformers keep them in a cache of theirs, behind prompts padded on the left, as its `generate` does.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from gloria.model.transformer import Transformer


@dataclass
class OwnCache:
    """Rows of a `Transformer` in progress."""

    model: Transformer
    lengths: Tensor  # (rows,) tokens of each row so far
    cache: Tensor  # of `Transformer.new_cache`

    def step(self, tokens: Tensor) -> Tensor:
        """Put one token, (rows,), behind each row: fp32 logits of the next, (rows, vocab)."""
        hidden = self.look_ahead(tokens[:, None])
        self.lengths = self.lengths + 1
        return self.model.logits(hidden[:, 0])

    def look_ahead(self, ids: Tensor, back: int = 0) -> Tensor:
        """Hidden states of `ids` (rows, n) as they would be behind each row: (rows, n, hidden).

        The rows stay as long as they are: the next call writes over these tokens. With `back` the first of the ids
        are the last of the row, so many of them, once more.
        """
        positions = self.lengths[:, None] - back + torch.arange(ids.shape[1], device=ids.device)  # (rows, n)
        return self.model.hidden_states(ids, positions=positions, cache=self.cache)

    def keep(self, rows: Tensor) -> None:
        """Go on with these rows alone, (n,) numbers, in their order; one may be named several times."""
        self.lengths, self.cache = self.lengths[rows], self.cache[:, :, rows]


@dataclass
class ForeignCache:
    """Rows of a causal model of transformers in progress."""

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
            self.past.reorder_cache(rows)  # type: ignore[arg-type]  # typed as the LongTensor of old, which no call makes


def begin(
    model: nn.Module, prompts: Sequence[Sequence[int]], room: int, device: torch.device
) -> tuple[OwnCache | ForeignCache, Tensor]:
    """The prompts as rows that have `room` for so many tokens more, and fp32 logits of the next, (rows, vocab)."""
    if isinstance(model, Transformer):
        return _read_prompts(model, prompts, room, device)
    longest = max(map(len, prompts))
    ids = torch.tensor([[0] * (longest - len(prompt)) + list(prompt) for prompt in prompts], device=device)
    mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts], device=device)
    rows = ForeignCache(model, ids, mask, _new_cache(model))
    return rows, rows.step()


def _new_cache(model: nn.Module) -> DynamicCache | None:
    """An empty cache for a model of transformers, where it takes one whose layers all keep keys and values."""
    if not _cache_name(model):
        return None
    config: Any = model.config
    cache = DynamicCache(config=config)
    try:
        cache.get_seq_length()
    except ValueError:  # state-space layers: they have no such length
        return None
    return cache


def _cache_name(model: nn.Module) -> str:
    """What a model of transformers calls the cache that it is given: another name since 5.24. "": it takes none."""
    taken = inspect.signature(model.forward).parameters
    return next((name for name in ("past_key_values", "cache") if name in taken), "")


def _read_prompts(
    model: Transformer, prompts: Sequence[Sequence[int]], room: int, device: torch.device
) -> tuple[OwnCache, Tensor]:
    longest = max(map(len, prompts))
    ids = torch.tensor([list(prompt) + [0] * (longest - len(prompt)) for prompt in prompts], device=device)
    rows = OwnCache(
        model,
        torch.tensor([len(prompt) for prompt in prompts], device=device),
        model.new_cache(len(prompts), longest + room),
    )
    hidden = model.hidden_states(ids, cache=rows.cache)
    last = hidden[torch.arange(len(ids), device=device), rows.lengths - 1]  # (rows, hidden)
    return rows, model.logits(last)
