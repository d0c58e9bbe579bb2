"""Prevents a chunked loss that is not the cross entropy: gradients off at chunk borders, rows mixed up,
ignored labels counted, bf16 sums that lose small terms, and logits of the whole batch held after all."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

from gloria.model.loss import row_loss_sums

VOCAB, HIDDEN = 97, 16


def random_case(batch: int = 3, length: int = 21, ignored: float = 0.3, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    hidden = 3 * torch.randn(batch, length, HIDDEN, generator=generator)
    weight = torch.randn(VOCAB, HIDDEN, generator=generator)
    labels = torch.randint(VOCAB, (batch, length), generator=generator)
    labels[torch.rand(batch, length, generator=generator) < ignored] = -100
    return hidden.requires_grad_(), weight.requires_grad_(), labels


def plain(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    losses = F.cross_entropy(F.linear(hidden, weight).float().transpose(1, 2), labels, reduction="none")
    return losses.sum(dim=1)


def relative(ours: Tensor, wanted: Tensor) -> float:
    return ((ours.double() - wanted.double()).norm() / wanted.double().norm()).item()


class Largest(TorchDispatchMode):
    """The most elements that any tensor made within has."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        made = [x.numel() for x in tree_flatten(result)[0] if isinstance(x, Tensor)]
        self.elements = max([self.elements, *made])
        return result


@settings(max_examples=30, deadline=None)
@given(
    batch=st.integers(1, 4),
    length=st.integers(1, 20),
    chunk=st.integers(1, 90),
    ignored=st.sampled_from([0.0, 0.5, 1.0]),
    seed=st.integers(0, 1000),
)
def test_equal_to_plain_cross_entropy(batch: int, length: int, chunk: int, ignored: float, seed: int) -> None:
    hidden, weight, labels = random_case(batch, length, ignored, seed)
    # Rows that matter differently, as when losses are reported by source.
    upstream = torch.rand(batch, generator=torch.Generator().manual_seed(seed)) + 0.5
    ours, wanted = row_loss_sums(hidden, weight, labels, chunk), plain(hidden, weight, labels)
    assert ours.dtype == torch.float32
    torch.testing.assert_close(ours, wanted, rtol=2e-6, atol=1e-6)
    mine = torch.autograd.grad((ours * upstream).sum(), (hidden, weight))
    theirs = torch.autograd.grad((wanted * upstream).sum(), (hidden, weight))
    if (labels == -100).all():
        assert not any(gradient.any() for gradient in (ours, *mine))
        return
    # Both are fp32 sums of a few terms, each a rounding away from the truth: twice the bound of a real size, below.
    assert relative(mine[0], theirs[0]) < 2e-6
    assert relative(mine[1], theirs[1]) < 2e-6


def test_gradients_at_the_size_of_a_real_vocabulary() -> None:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(2, 40, 64, generator=generator).requires_grad_()
    weight = (0.02 * torch.randn(50257, 64, generator=generator)).requires_grad_()
    labels = torch.randint(50257, (2, 40), generator=generator)
    mine = torch.autograd.grad(row_loss_sums(hidden, weight, labels, 32).sum(), (hidden, weight))
    theirs = torch.autograd.grad(plain(hidden, weight, labels).sum(), (hidden, weight))
    assert relative(mine[0], theirs[0]) < 1e-6
    assert relative(mine[1], theirs[1]) < 1e-6


def test_bf16_inputs_give_fp32_losses_and_bf16_gradients() -> None:
    hidden, weight, labels = random_case(batch=8, length=64)
    hidden, weight = (x.detach().bfloat16().requires_grad_() for x in (hidden, weight))
    ours = row_loss_sums(hidden, weight, labels, chunk_tokens=4)
    assert ours.dtype == torch.float32
    assert relative(ours, plain(hidden, weight, labels)) < 1e-6
    mine = torch.autograd.grad(ours.sum(), (hidden, weight))
    assert [gradient.dtype for gradient in mine] == [torch.bfloat16] * 2
    exact = torch.autograd.grad(plain(hidden.double(), weight.double(), labels).sum(), (hidden, weight))
    # Logits rounded to bf16 are off by up to 2^-9 of themselves.
    assert relative(mine[0], exact[0]) < 8e-3
    assert relative(mine[1], exact[1]) < 8e-3


def test_bf16_gradients_do_not_lose_what_late_chunks_add() -> None:
    """512 chunks of 1/512 after one of 1: summed in bf16, which has 8 bits, they would vanish one by one."""
    hidden, weight, labels = random_case(batch=1, length=1, ignored=0.0)
    hidden = hidden.detach().bfloat16().expand(513, 1, HIDDEN).requires_grad_()
    weight = weight.detach().bfloat16().requires_grad_()
    upstream = torch.tensor([1.0] + 512 * [2**-9])
    losses = row_loss_sums(hidden, weight, labels.expand(513, 1), chunk_tokens=1)
    (twice,) = torch.autograd.grad((losses * upstream).sum(), weight, retain_graph=True)
    (once,) = torch.autograd.grad(losses[0], weight)
    assert relative(twice, 2 * once.float()) < 1e-2


def test_logits_beyond_the_range_of_exp() -> None:
    hidden, weight, labels = random_case(ignored=0.0)
    ours = row_loss_sums(100 * hidden, weight, labels, 8)
    torch.testing.assert_close(ours, plain(100 * hidden, weight, labels), rtol=1e-5, atol=1e-3)
    assert torch.isfinite(torch.autograd.grad(ours.sum(), hidden)[0]).all()


def test_never_more_than_a_chunk_of_logits() -> None:
    hidden, weight, labels = random_case(batch=4, length=256)
    with Largest() as largest:
        row_loss_sums(hidden, weight, labels, chunk_tokens=64).sum().backward()
    assert largest.elements == max(64 * VOCAB, hidden.numel())  # of the 1024 * VOCAB of the batch


@pytest.mark.parametrize("wanted", ["hidden", "weight", "neither"])
def test_only_the_gradients_that_are_asked_for(wanted: str) -> None:
    hidden, weight, labels = random_case()
    expected = plain(hidden, weight, labels)
    references = dict(zip(("hidden", "weight"), torch.autograd.grad(expected.sum(), (hidden, weight))))
    hidden.requires_grad_(wanted == "hidden")
    weight.requires_grad_(wanted == "weight")
    loss = row_loss_sums(hidden, weight, labels, 8).sum()
    assert loss.requires_grad == (wanted != "neither")
    if loss.requires_grad:
        loss.backward()
        assert relative({"hidden": hidden, "weight": weight}[wanted].grad, references[wanted]) < 1e-6


def test_without_gradients_the_values_are_the_same() -> None:
    hidden, weight, labels = random_case()
    with torch.no_grad():
        quiet = row_loss_sums(hidden, weight, labels, 8)
    assert torch.equal(quiet, row_loss_sums(hidden, weight, labels, 8))
    assert not quiet.requires_grad
