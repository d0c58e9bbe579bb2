"""Cross entropy of a language model whose logits, (tokens, vocabulary), are never held as a whole."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

IGNORED = -100  # a label that is no target, as torch's cross_entropy has it


def row_loss_sums(hidden: Tensor, weight: Tensor, labels: Tensor, chunk_tokens: int = 512) -> Tensor:
    """The summed cross entropy of every row, (batch,) fp32, in nats; labels of -100 count nothing.

    `hidden` (batch, seq, d) times the head `weight` (vocab, d) gives the logits of `labels` (batch, seq).
    They are computed in the dtype of `hidden`, `chunk_tokens` tokens at a time, then in fp32, and once more
    in backward: of a chunk's logits and their softmax one fp32 copy each exists at any time.
    """
    batch, length = labels.shape
    losses = _TokenLosses.apply(hidden.reshape(batch * length, -1), weight, labels.reshape(-1), chunk_tokens)
    return losses.view(batch, length).sum(dim=1)


class _TokenLosses(torch.autograd.Function):
    """hidden (tokens, d), weight (vocab, d), labels (tokens,) -> losses (tokens,) fp32, 0 where ignored."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, labels: Tensor, chunk_tokens: int) -> Tensor:
        losses = torch.empty(labels.shape, dtype=torch.float32, device=hidden.device)
        for chunk in _chunks(len(labels), chunk_tokens):
            logits = F.linear(hidden[chunk], weight).float()  # (chunk, vocab)
            losses[chunk] = F.cross_entropy(logits, labels[chunk], ignore_index=IGNORED, reduction="none")
        ctx.save_for_backward(hidden, weight, labels)
        ctx.chunk_tokens = chunk_tokens
        return losses

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        hidden, weight, labels = ctx.saved_tensors
        valid = labels != IGNORED
        targets = labels.masked_fill(~valid, 0)
        upstream = upstream.masked_fill(~valid, 0.0)
        hidden_gradient = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        # fp32 also for a bf16 weight: the sum over chunks would lose what a late chunk adds.
        weight_gradient = torch.zeros_like(weight, dtype=torch.float32) if ctx.needs_input_grad[1] else None
        for chunk in _chunks(len(targets), ctx.chunk_tokens):
            # d loss / d logits = softmax - one at the target, times the upstream gradient of the token
            gradient = torch.softmax(F.linear(hidden[chunk], weight), dim=1, dtype=torch.float32)
            gradient.scatter_add_(1, targets[chunk, None], gradient.new_full((len(gradient), 1), -1.0))
            gradient = gradient.mul_(upstream[chunk, None]).to(hidden.dtype)
            if hidden_gradient is not None:
                torch.mm(gradient, weight, out=hidden_gradient[chunk])
            if weight_gradient is not None:
                if weight.dtype == torch.float32:
                    weight_gradient.addmm_(gradient.T, hidden[chunk])
                else:
                    weight_gradient.add_(gradient.T @ hidden[chunk])
        if weight_gradient is not None:
            weight_gradient = weight_gradient.to(weight.dtype)
        return hidden_gradient, weight_gradient, None, None


def _chunks(tokens: int, chunk_tokens: int) -> list[slice]:
    return [slice(start, min(start + chunk_tokens, tokens)) for start in range(0, tokens, chunk_tokens)]
