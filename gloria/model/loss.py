"""Cross entropy of a language model whose logits, (tokens, vocabulary), are never held as a whole.

The gradients are computed beside the loss, a chunk of tokens at a time, while the chunk's logits are there: three
matrix products, where computing the logits again in backward takes four (Liger-Kernel, arXiv 2410.10989; torchtitan).
torch 2.13's `F.linear_cross_entropy` is not used: 2.11 has none, and it knows no padded vocabulary and no z-loss, does
not compile, and computes the logits twice where losses are wanted by row.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from gloria.model.memory import loss_chunk

IGNORED = -100  # a label that is no target, as torch's cross_entropy has it
TokenLosses = Callable[[Tensor, Tensor, int, float, bool], tuple[Tensor, Tensor, Tensor | None]]


def language_model_loss(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    vocab_size: int,
    *,
    z_loss: float = 0.0,
    chunk_tokens: int | None = None,
    token_losses: TokenLosses | None = None,
) -> tuple[Tensor, Tensor]:
    """The loss to minimise, a scalar with its graph, and the cross entropy of every row, (batch,), without: nats, fp32.

    `hidden` (batch, seq, d) times the head `weight` (rows, d) gives the logits of `labels` (batch, seq), -100 where
    nothing counts. Rows of `weight` from `vocab_size` on pad it: they take part in the products, which are faster for
    it, but in no sum, and their gradient is 0. The scalar is the sum of the cross entropies and of `z_loss` times the
    square of the log of each softmax's denominator (PaLM, arXiv 2204.02311, section 5).

    What is differentiated is the scalar, so that one number scales the gradients that are ready by then. They wait
    for it, unscaled, in fp32 (that of `hidden` on CPU in its own dtype): the most that is held is theirs and a chunk's
    logits. Backward runs once. `token_losses` is `chunk_losses` or what compiles it.
    """
    chunk_tokens = chunk_tokens or loss_chunk(labels.numel(), on_gpu=hidden.device.type != "cpu")
    return _Loss.apply(
        hidden,
        weight,
        labels,
        vocab_size,
        z_loss,
        chunk_tokens,
        token_losses or chunk_losses,
        torch.is_grad_enabled(),
    )


def chunk_losses(
    logits: Tensor, labels: Tensor, vocab_size: int, z_loss: float, with_gradient: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    """From a chunk's `logits` (tokens, rows) and `labels` (tokens,), pointwise: what `_Loss` puts together.

    The cross entropies and these with z-loss, (tokens,) fp32 and 0 where ignored, and if it is wanted the gradient of
    their sum by the logits, of the shape and dtype of `logits`, which may be overwritten.
    """
    dtype, logits = logits.dtype, logits.float()
    if vocab_size < logits.shape[1]:
        logits[:, vocab_size:] = -math.inf
    ignored = labels == IGNORED
    places = torch.arange(len(labels), device=labels.device), labels.masked_fill(ignored, 0)  # of the targets
    log_sums = torch.logsumexp(logits, dim=1)
    losses = objectives = (log_sums - logits[places]).masked_fill(ignored, 0.0)
    if z_loss:
        objectives = losses + (z_loss * log_sums.square()).masked_fill(ignored, 0.0)
    if not with_gradient:
        return losses, objectives, None
    # softmax, and less 1 at the target; an ignored token's is exp(-inf)
    gradient = logits.sub_(log_sums.masked_fill(ignored, math.inf)[:, None]).exp_()
    at_target = torch.expm1(-losses)
    if z_loss:
        slope = (2 * z_loss * log_sums).masked_fill(ignored, 0.0)
        gradient.mul_((1 + slope)[:, None])
        at_target += slope * torch.exp(-losses)
    # Written into the finished gradient: subtracted before it, a compiler would write the softmax out in fp32 first.
    gradient = gradient.to(dtype)
    gradient[places] = at_target.to(dtype)
    return losses, objectives, gradient


class _Loss(torch.autograd.Function):
    """hidden (batch, seq, d), weight (rows, d), labels (batch, seq) -> loss (), row losses (batch,) without a graph."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        labels: Tensor,
        vocab_size: int,
        z_loss: float,
        chunk_tokens: int,
        token_losses: TokenLosses,
        with_gradient: bool,
    ) -> tuple[Tensor, Tensor]:
        of_hidden, of_weight = (with_gradient and needed for needed in ctx.needs_input_grad[:2])
        tokens, targets = hidden.reshape(-1, hidden.shape[-1]), labels.reshape(-1)
        losses, objectives = torch.empty(2, len(targets), dtype=torch.float32, device=hidden.device)
        exact = torch.float32 if _sums_in_fp32(hidden) else hidden.dtype
        hidden_gradient = torch.empty(tokens.shape, dtype=exact, device=hidden.device) if of_hidden else None
        weight_gradient: Tensor | None = None
        for start in range(0, len(targets), chunk_tokens):
            chunk = slice(start, start + chunk_tokens)
            # Copied labels: torch.compile would tell those at the start of their memory from the others.
            losses[chunk], objectives[chunk], gradient = token_losses(
                F.linear(tokens[chunk], weight), targets[chunk].clone(), vocab_size, z_loss, of_hidden or of_weight
            )
            if hidden_gradient is not None and gradient is not None:
                _product(gradient, weight, out=hidden_gradient[chunk])
            if of_weight and gradient is not None:
                weight_gradient = _add_product(weight_gradient, gradient.T, tokens[chunk])
            del gradient  # the next chunk's logits take its place
        ctx.gradients = hidden_gradient, weight_gradient
        ctx.like = hidden.shape, hidden.dtype, weight.dtype
        rows = losses.view(labels.shape).sum(dim=1)
        ctx.mark_non_differentiable(rows)
        return objectives.sum(), rows

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.gradients is None:
            raise RuntimeError("the loss's gradients are scaled in place: backward runs once")
        (of_hidden, of_weight), ctx.gradients = ctx.gradients, None
        shape, dtype, weight_dtype = ctx.like
        if of_hidden is not None:
            of_hidden = _scaled(of_hidden, upstream, dtype).view(shape)
        if of_weight is not None:
            of_weight = _scaled(of_weight, upstream, weight_dtype)
        return of_hidden, of_weight, *[None] * 6


def _sums_in_fp32(factor: Tensor) -> bool:
    """Whether a product of such matrices can come out in fp32: of 16 bits on GPU, since torch 2.8, and not on CPU."""
    return factor.dtype == torch.float32 or factor.device.type != "cpu"


def _product(left: Tensor, right: Tensor, out: Tensor) -> Tensor:
    if left.dtype == out.dtype:
        return torch.mm(left, right, out=out)
    return torch.mm(left, right, out_dtype=out.dtype, out=out)


def _add_product(total: Tensor | None, left: Tensor, right: Tensor) -> Tensor:
    """`total`, fp32, with the product added in place; what 16 bits hold would lose what a late chunk adds."""
    if not _sums_in_fp32(left):
        product = left @ right
        return product.float() if total is None else total.add_(product)
    if total is None:
        size = left.shape[0], right.shape[1]
        return _product(left, right, out=torch.empty(size, dtype=torch.float32, device=left.device))
    if left.dtype == torch.float32:
        return total.addmm_(left, right)
    return torch.addmm(total, left, right, out_dtype=torch.float32, out=total)


def _scaled(gradient: Tensor, factor: Tensor, dtype: torch.dtype) -> Tensor:
    """`gradient` times a scalar, rounded once: in place where the dtype stays."""
    if gradient.dtype == dtype:
        return gradient.mul_(factor)
    return torch.mul(gradient, factor, out=torch.empty_like(gradient, dtype=dtype))
