"""The transformer: exactly GPT-2 or exactly GPT-Neo, by its shape.

GPT-2: Radford et al. 2019. GPT-Neo: Black et al. 2021 (doi 10.5281/zenodo.5297715). Both have learned
positions, LayerNorm before each branch, tanh-GELU and a head tied to the token embedding; GPT-Neo alternates
global and local attention, does not scale scores by 1/sqrt(head_dim) and has no bias on queries, keys and
values. Parameters are named as in transformers' GPT2LMHeadModel and GPTNeoForCausalLM.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from gloria.model.attention import Masks, attend, attention_masks
from gloria.model.config import LOCAL, TransformerConfig
from gloria.model.loss import row_loss_sums

ACTIVATION_CHECKPOINTING = ("none", "full", "selective")

# What selective checkpointing keeps: the outputs that are dear to compute. The rest (norms, GELU, dropout) is
# cheap to compute again and most of the memory.
_KEPT = [
    torch.ops.aten.mm.default,
    torch.ops.aten.addmm.default,
    torch.ops.aten._scaled_dot_product_flash_attention.default,
    torch.ops.aten._scaled_dot_product_efficient_attention.default,
    torch.ops.aten._scaled_dot_product_cudnn_attention.default,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default,
]


def _attend(shape: TransformerConfig, layer: int) -> Callable[..., Tensor]:
    """`attend` as this layer does it, still without its dropout, which depends on train and eval."""
    window = shape.window_size if shape.attention_layers[layer] == LOCAL else 0
    return partial(attend, num_heads=shape.num_heads, window=window, scale=shape.attention_scale)


class GPT2Attention(nn.Module):
    """One projection for queries, keys and values, with bias."""

    def __init__(self, shape: TransformerConfig, layer: int) -> None:
        super().__init__()
        self.dropout = shape.dropout
        self.attend = _attend(shape, layer)
        self.c_attn = nn.Linear(shape.hidden_size, 3 * shape.hidden_size)
        self.c_proj = nn.Linear(shape.hidden_size, shape.hidden_size)

    def forward(self, hidden: Tensor, masks: Masks) -> Tensor:
        dropout = self.dropout if self.training else 0.0
        return self.merge(self.attend(*self.project(hidden), masks, dropout=dropout))

    def project(self, hidden: Tensor) -> tuple[Tensor, ...]:
        """Queries, keys and values, (batch, seq, hidden) each."""
        return self.c_attn(hidden).chunk(3, dim=-1)

    def merge(self, heads: Tensor) -> Tensor:
        return self.c_proj(heads)


class GPTNeoAttention(nn.Module):
    """A projection each for queries, keys and values, without bias; transformers names them `attention.*`."""

    def __init__(self, shape: TransformerConfig, layer: int) -> None:
        super().__init__()
        self.dropout = shape.dropout
        self.attend = _attend(shape, layer)
        size = shape.hidden_size
        self.attention = nn.ModuleDict(
            {
                "k_proj": nn.Linear(size, size, bias=False),
                "v_proj": nn.Linear(size, size, bias=False),
                "q_proj": nn.Linear(size, size, bias=False),
                "out_proj": nn.Linear(size, size),
            }
        )

    def forward(self, hidden: Tensor, masks: Masks) -> Tensor:
        dropout = self.dropout if self.training else 0.0
        return self.merge(self.attend(*self.project(hidden), masks, dropout=dropout))

    def project(self, hidden: Tensor) -> tuple[Tensor, ...]:
        """Queries, keys and values, (batch, seq, hidden) each."""
        return tuple(self.attention[name](hidden) for name in ("q_proj", "k_proj", "v_proj"))

    def merge(self, heads: Tensor) -> Tensor:
        return self.attention["out_proj"](heads)


class MLP(nn.Module):
    """hidden -> intermediate -> hidden with GELU in its tanh form ("gelu_new" in transformers)."""

    def __init__(self, shape: TransformerConfig) -> None:
        super().__init__()
        self.c_fc = nn.Linear(shape.hidden_size, shape.intermediate_size)
        self.c_proj = nn.Linear(shape.intermediate_size, shape.hidden_size)

    def forward(self, hidden: Tensor) -> Tensor:
        return self.c_proj(F.gelu(self.c_fc(hidden), approximate="tanh"))


class Block(nn.Module):
    """One layer: attention, then the MLP, each on a normed copy and added back.

    Activation checkpointing is a call inside forward, so that `block.compile()` and then `fully_shard(block)`
    can be laid around it without changing a parameter's name.
    """

    def __init__(self, shape: TransformerConfig, layer: int, activation_checkpointing: str) -> None:
        super().__init__()
        self.dropout = shape.dropout
        self.activation_checkpointing = activation_checkpointing
        self.ln_1 = nn.LayerNorm(shape.hidden_size, eps=shape.layer_norm_epsilon)
        self.attn = GPT2Attention(shape, layer) if shape.architecture == "gpt2" else GPTNeoAttention(shape, layer)
        self.ln_2 = nn.LayerNorm(shape.hidden_size, eps=shape.layer_norm_epsilon)
        self.mlp = MLP(shape)

    def forward(self, hidden: Tensor, masks: Masks) -> Tensor:
        """(batch, seq, hidden) -> (batch, seq, hidden)"""
        if self.activation_checkpointing == "none" or not torch.is_grad_enabled():
            return self._layer(hidden, masks)
        selective = {"context_fn": partial(create_selective_checkpoint_contexts, _KEPT)}
        # checkpoint keeps the random state, so that dropout draws the same mask when it is computed again
        return checkpoint(
            self._layer,
            hidden,
            masks,
            use_reentrant=False,
            **(selective if self.activation_checkpointing == "selective" else {}),
        )

    def _layer(self, hidden: Tensor, masks: Masks) -> Tensor:
        hidden = hidden + F.dropout(self.attn(self.ln_1(hidden), masks), self.dropout, self.training)
        return hidden + F.dropout(self.mlp(self.ln_2(hidden)), self.dropout, self.training)


class Transformer(nn.Module):
    """A causal language model; its head is the token embedding's first `vocab_size` rows.

    `forward` computes the loss itself: with FSDP2 the root's parameters, the tied embedding among them, are
    whole only there.
    """

    def __init__(self, shape: TransformerConfig, *, activation_checkpointing: str = "none") -> None:
        super().__init__()
        assert activation_checkpointing in ACTIVATION_CHECKPOINTING
        self.shape = shape
        self.transformer = nn.ModuleDict(
            {
                "wte": nn.Embedding(shape.padded_vocab, shape.hidden_size),
                "wpe": nn.Embedding(shape.max_positions, shape.hidden_size),
                "h": nn.ModuleList(Block(shape, layer, activation_checkpointing) for layer in range(shape.num_layers)),
                "ln_f": nn.LayerNorm(shape.hidden_size, eps=shape.layer_norm_epsilon),
            }
        )

    def forward(self, ids: Tensor, labels: Tensor | None = None, documents: Tensor | None = None) -> Tensor:
        """Logits, or with `labels` the summed loss of every row.

        `ids` (batch, seq) are token ids, seq at most `max_positions`. Without `labels`: logits (batch, seq,
        vocab) in fp32. With `labels` (batch, seq), the token that should come next at each place or -100: the
        sum of the token losses of each row, (batch,) fp32, in nats. `documents` (batch, seq), integers:
        attention never crosses from one id to another.
        """
        hidden = self.hidden_states(ids, documents)
        head = self.transformer.wte.weight[: self.shape.vocab_size]
        if labels is None:
            return F.linear(hidden, head).float()
        return row_loss_sums(hidden, head, labels)

    def hidden_states(self, ids: Tensor, documents: Tensor | None = None, positions: Tensor | None = None) -> Tensor:
        """What the head sees, after the last norm: (batch, seq, hidden); arguments as in `forward`.

        `positions` (batch, seq) are 0, 1, ... where they are not given. Rows padded on the left have the mask as
        documents, and as positions its cumulated sum less 1 (-1 at padding, where any position will do).
        """
        batch, length = ids.shape
        assert length <= self.shape.max_positions, (length, self.shape.max_positions)
        body = self.transformer
        positions = torch.arange(length, device=ids.device) if positions is None else positions.clamp(min=0)
        hidden = body.wte(ids) + body.wpe(positions)
        hidden = F.dropout(hidden, self.shape.dropout, self.training)
        masks = attention_masks(batch, length, self.shape.window_size, documents, device=ids.device, dtype=hidden.dtype)
        for block in body.h:
            hidden = block(hidden, masks)
        return body.ln_f(hidden)


def initial_value(name: str, size: torch.Size, shape: TransformerConfig, seed: int) -> Tensor:
    """The whole starting value, fp32 on the CPU, of the parameter `name`: a function of (seed, name) alone.

    So it does not depend on the number of ranks or on the order in which they ask. Biases 0, norms 1, the
    rest normal with `init_std`, except: the last projection of each branch is divided by sqrt(2 * num_layers)
    (GPT-2, section 2.3), and GPT-Neo's queries by sqrt(head_dim), which stands in for the scale its attention
    lacks (Mesh TensorFlow, `fold_scaling_into_initializer`; with `init_std` alone attention starts out nearly
    one-hot).
    """
    if name.endswith(".bias"):
        return torch.zeros(size)
    if ".ln_" in name:
        return torch.ones(size)
    std = shape.init_std
    if name.endswith((".c_proj.weight", ".out_proj.weight")):
        std /= math.sqrt(2 * shape.num_layers)
    if name.endswith(".q_proj.weight"):
        std /= math.sqrt(shape.head_dim)
    key = int.from_bytes(hashlib.blake2b(f"{seed}/{name}".encode(), digest_size=8).digest(), "little")
    value = torch.empty(size).normal_(std=std, generator=torch.Generator().manual_seed(key >> 1))
    if name.endswith(".wte.weight"):
        value[shape.vocab_size :] = 0.0  # rows that only pad
    return value
