"""The transformer: exactly GPT-2, GPT-Neo, LLaMA, Mistral, Qwen2 or Qwen3, by the flags of its shape and family.

Each layer has attention and an MLP, each on a normed copy and added back. Parameters are named as in transformers'
GPT2LMHeadModel and GPTNeoForCausalLM; `Family.names` has what the other families call them.
"""

from __future__ import annotations

import hashlib
import math
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from gloria.model.attention import Masks, attend, attention_masks, cache_masks
from gloria.model.config import EMBEDDING, HEAD, TransformerConfig
from gloria.model.kernels import kept_operations
from gloria.model.loss import TokenLosses, chunk_losses, language_model_loss
from gloria.model.rotary import rotate, rotations

ACTIVATION_CHECKPOINTING = ("none", "full", "selective")


def _norm(shape: TransformerConfig, width: int) -> nn.Module:
    kind = nn.RMSNorm if shape.family.rms_norm else nn.LayerNorm
    return kind(width, eps=shape.layer_norm_epsilon)


class Attention(nn.Module):
    """Queries, keys and values from one projection (`c_attn`) or one each (`attention.*`), attention, and a projection.

    The names are those of transformers: a fused projection is GPT-2's, three are GPT-Neo's.
    """

    def __init__(self, shape: TransformerConfig, layer: int) -> None:
        super().__init__()
        size, width, kv_width, family = shape.hidden_size, shape.query_width, shape.kv_width, shape.family
        self.dropout, self.head_dim = shape.dropout, shape.head_dim
        self.attend = partial(attend, window=shape.windows[layer], scale=family.attention_scale)
        self.fused, self.normed = family.fused_qkv, family.qk_norm
        if self.fused:
            self.c_attn = nn.Linear(size, width + 2 * kv_width, bias=family.qkv_bias)
            self.c_proj = nn.Linear(width, size, bias=family.bias)
        else:
            widths = {"k": kv_width, "v": kv_width, "q": width}
            parts = {f"{name}_proj": nn.Linear(size, rows, bias=family.qkv_bias) for name, rows in widths.items()}
            self.attention = nn.ModuleDict({**parts, "out_proj": nn.Linear(width, size, bias=family.bias)})
            if self.normed:
                self.attention.update({f"{name}_norm": _norm(shape, shape.head_dim) for name in "qk"})

    def forward(
        self,
        hidden: Tensor,
        masks: Masks,
        turned_by: Tensor | None = None,
        cache: Tensor | None = None,
        positions: Tensor | None = None,
    ) -> Tensor:
        """(batch, seq, hidden) -> (batch, seq, hidden); `turned_by` are `rotations`, the last two as in `attend`."""
        if self.fused:
            query, key, value = self.c_attn(hidden).chunk(3, dim=-1)
            output: nn.Module = self.c_proj
        else:
            query, key, value = (self.attention[f"{name}_proj"](hidden) for name in "qkv")
            output = self.attention["out_proj"]
        query, key, value = (x.unflatten(-1, (-1, self.head_dim)) for x in (query, key, value))  # by head
        if self.normed:
            query, key = self.attention["q_norm"](query), self.attention["k_norm"](key)
        if turned_by is not None:
            query, key = rotate(query, turned_by), rotate(key, turned_by)
        dropout = self.dropout if self.training else 0.0
        return output(self.attend(query, key, value, masks, dropout=dropout, cache=cache, positions=positions))


class MLP(nn.Module):
    """hidden -> intermediate -> hidden with GELU in its tanh form ("gelu_new" in transformers), or gated by SiLU."""

    def __init__(self, shape: TransformerConfig) -> None:
        super().__init__()
        size, inner, bias = shape.hidden_size, shape.intermediate_size, shape.family.bias
        self.c_gate = nn.Linear(size, inner, bias=bias) if shape.family.gated_mlp else None
        self.c_fc = nn.Linear(size, inner, bias=bias)
        self.c_proj = nn.Linear(inner, size, bias=bias)

    def forward(self, hidden: Tensor) -> Tensor:
        if self.c_gate is not None:
            return self.c_proj(F.silu(self.c_gate(hidden)) * self.c_fc(hidden))
        return self.c_proj(F.gelu(self.c_fc(hidden), approximate="tanh"))


class Block(nn.Module):
    """One layer: attention, then the MLP, each on a normed copy and added back.

    Activation checkpointing is a call inside forward, so that `block.compile()` and then `fully_shard(block)`
    wrap it without changing a parameter's name.
    """

    def __init__(self, shape: TransformerConfig, layer: int, activation_checkpointing: str, kept: list[Any]) -> None:
        super().__init__()
        self.dropout = shape.dropout
        self.kept = kept
        self.activation_checkpointing = activation_checkpointing
        self.ln_1 = _norm(shape, shape.hidden_size)
        self.attn = Attention(shape, layer)
        self.ln_2 = _norm(shape, shape.hidden_size)
        self.mlp = MLP(shape)

    def forward(
        self,
        hidden: Tensor,
        masks: Masks,
        turned_by: Tensor | None = None,
        cache: Tensor | None = None,
        positions: Tensor | None = None,
    ) -> Tensor:
        """(batch, seq, hidden) -> (batch, seq, hidden); the rest as in `Attention`."""
        if self.activation_checkpointing == "none" or not torch.is_grad_enabled():
            return self._layer(hidden, masks, turned_by, cache, positions)
        selective: dict[str, Any] = {"context_fn": partial(create_selective_checkpoint_contexts, self.kept)}
        # checkpoint keeps the random state, so that dropout draws the same mask when it is computed again
        return checkpoint(
            self._layer,
            hidden,
            masks,
            turned_by,
            use_reentrant=False,
            **(selective if self.activation_checkpointing == "selective" else {}),
        )

    def _layer(self, hidden: Tensor, masks: Masks, *rest: Tensor | None) -> Tensor:
        attention = self.attn(self.ln_1(hidden), masks, *rest)
        hidden = hidden + F.dropout(attention, self.dropout, self.training)
        return hidden + F.dropout(self.mlp(self.ln_2(hidden)), self.dropout, self.training)


class Body(nn.Module):
    """Embeddings, layers and the last norm, under transformers' names."""

    def __init__(self, shape: TransformerConfig, activation_checkpointing: str, kept: list[Any]) -> None:
        super().__init__()
        self.wte = nn.Embedding(shape.padded_vocab, shape.hidden_size)
        self.wpe = None if shape.family.rotary else nn.Embedding(shape.max_positions, shape.hidden_size)
        self.h = nn.ModuleList(Block(shape, layer, activation_checkpointing, kept) for layer in range(shape.num_layers))
        self.ln_f = _norm(shape, shape.hidden_size)


class Transformer(nn.Module):
    """A causal language model; its head is the token embedding or `lm_head`, whose rows from `vocab_size` on pad it.

    `forward` computes the loss itself: with FSDP2 the root's parameters, embedding and head among them, are whole only
    there.
    """

    def __init__(
        self,
        shape: TransformerConfig,
        *,
        activation_checkpointing: str = "none",
        kernel: str = "sdpa",
        z_loss: float = 0.0,
    ) -> None:
        super().__init__()
        assert activation_checkpointing in ACTIVATION_CHECKPOINTING
        self.shape, self.kernel, self.z_loss = shape, kernel, z_loss
        self.token_losses: TokenLosses = chunk_losses  # or what compiles it
        self.transformer = Body(shape, activation_checkpointing, kept_operations(kernel))
        self.lm_head = None if shape.tied_head else nn.Linear(shape.hidden_size, shape.padded_vocab, bias=False)

    @property
    def head(self) -> Tensor:
        """The head's weight, (padded vocab, hidden)."""
        return self.transformer.wte.weight if self.lm_head is None else self.lm_head.weight

    def forward(
        self, ids: Tensor, labels: Tensor | None = None, documents: Tensor | None = None
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Logits, or with `labels` the loss and the cross entropy of every row.

        `ids` (batch, seq) are token ids, seq at most `max_positions`. Without `labels`: logits (batch, seq,
        vocab) in fp32. With `labels` (batch, seq), the token that should come next at each place or -100: what
        `language_model_loss` returns, a sum to call backward on and sums of the rows, (batch,). `documents` as in
        `attention_masks`: a token sees none of another one.
        """
        hidden = self.hidden_states(ids, documents)
        if labels is None:
            return self.logits(hidden)
        return language_model_loss(
            hidden, self.head, labels, self.shape.vocab_size, z_loss=self.z_loss, token_losses=self.token_losses
        )

    def logits(self, hidden: Tensor) -> Tensor:
        """(..., hidden) -> (..., vocab) in fp32; multiplied with the padding, for that is faster, and cut."""
        return F.linear(hidden, self.head)[..., : self.shape.vocab_size].float()

    def hidden_states(
        self,
        ids: Tensor,
        documents: Tensor | None = None,
        positions: Tensor | None = None,
        cache: Tensor | None = None,
    ) -> Tensor:
        """What the head sees, after the last norm: (batch, seq, hidden); arguments as in `forward`.

        `positions` (batch, seq) are 0, 1, ... where they are not given. Rows padded on the left have the mask as
        documents, and as positions its cumulated sum less 1 (-1 at padding, where any position will do).

        With a `cache` of `new_cache` keys and values are kept there, at their positions. Without `positions` the
        tokens begin their rows; with them they go on behind what the cache holds of their row, or overwrite it.
        """
        batch, length = ids.shape
        assert length <= self.shape.max_positions, (length, self.shape.max_positions)
        assert cache is None or documents is None, "a cached row is one document"
        body, last = self.transformer, self.shape.max_positions - 1
        places = torch.arange(length, device=ids.device) if positions is None else positions.clamp(0, last)
        hidden = body.wte(ids)
        turned_by = None if body.wpe else rotations(self.shape, places, hidden.dtype)
        if body.wpe:
            hidden = hidden + body.wpe(places)
        hidden = F.dropout(hidden, self.shape.dropout, self.training)
        window = self.shape.window_size
        if cache is None or positions is None:
            masks = attention_masks(
                batch, length, window, documents, device=ids.device, dtype=hidden.dtype, kernel=self.kernel
            )
        else:
            masks = cache_masks(positions, cache.shape[4], window, hidden.dtype)
        for layer, block in enumerate(body.h):
            if cache is None:
                hidden = block(hidden, masks, turned_by)
            else:
                hidden = block(hidden, masks, turned_by, cache[layer], positions)
        return body.ln_f(hidden)

    def new_cache(self, rows: int, capacity: int) -> Tensor:
        """Room for `capacity` tokens a row: (layers, 2, rows, heads of keys, capacity, head_dim)."""
        shape, like = self.shape, self.transformer.wte.weight
        # Zeros: what is masked is still multiplied by its weight of 0, and must be finite.
        return like.new_zeros(shape.num_layers, 2, rows, shape.kv_heads, capacity, shape.head_dim)


def initial_value(name: str, size: torch.Size, shape: TransformerConfig, seed: int) -> Tensor:
    """The whole starting value, fp32 on the CPU, of the parameter `name`: a function of (seed, name) alone.

    So it depends on neither the number of ranks nor the order of the calls. Biases 0, norms 1, the rest normal with
    `init_std`. So LLaMA and its kin begin in transformers, and with it the models whose curves are published. GPT-2 and
    GPT-Neo: the last projection of each branch is divided by sqrt(2 * num_layers) (GPT-2, section 2.3), and queries
    whose scores are not scaled by sqrt(head_dim), in place of that scale (Mesh TensorFlow,
    `fold_scaling_into_initializer`; with `init_std` alone GPT-Neo's attention starts out nearly one-hot).
    """
    if name.endswith(".bias"):
        return torch.zeros(size)
    if ".ln_" in name or "_norm." in name:
        return torch.ones(size)
    std, family = shape.init_std, shape.family
    if family.scaled_start and name.endswith((".c_proj.weight", ".out_proj.weight")):
        std /= math.sqrt(2 * shape.num_layers)
    if name.endswith(".q_proj.weight") and family.attention_scale == 1.0:
        std /= math.sqrt(shape.head_dim)
    key = int.from_bytes(hashlib.blake2b(f"{seed}/{name}".encode(), digest_size=8).digest(), "little")
    value = torch.empty(size).normal_(std=std, generator=torch.Generator().manual_seed(key >> 1))
    if name in (EMBEDDING, HEAD):
        value[shape.vocab_size :] = 0.0  # rows that only pad
    return value
