"""Prevents a chunked loss that is not the cross entropy: gradients off at chunk borders, rows mixed up, ignored labels
or padding counted, bf16 sums that lose small terms, logits of the whole batch held after all, a z-loss in the reported
loss, products with an odd leading dimension, and a compiled loss that breaks its graph or compiles for each size."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

from bench.roofline import TOKENS, count_loss, count_loss_before
from gloria.model.config import PRESETS
from gloria.model.loss import chunk_losses, language_model_loss
from gloria.model.transformer import Transformer
from tests.tiny_models import GPT_NEO

VOCAB, ROWS, HIDDEN = 97, 128, 16
EPS = 2.0**-24  # a rounding to fp32


def random_case(batch: int = 3, length: int = 21, ignored: float = 0.3, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """The rows of the weight that pad it are not 0: nothing may depend on them."""
    generator = torch.Generator().manual_seed(seed)
    hidden = 3 * torch.randn(batch, length, HIDDEN, generator=generator)
    weight = torch.randn(ROWS, HIDDEN, generator=generator)
    labels = torch.randint(VOCAB, (batch, length), generator=generator)
    labels[torch.rand(batch, length, generator=generator) < ignored] = -100
    return hidden.requires_grad_(), weight.requires_grad_(), labels


def plain(hidden: Tensor, weight: Tensor, labels: Tensor, z_loss: float = 0.0) -> tuple[Tensor, Tensor]:
    """By torch's own cross entropy: 16 bits become fp32 behind the logits, fp64 stays."""
    logits = F.linear(hidden, weight[:VOCAB])
    logits = logits if logits.dtype == torch.float64 else logits.float()
    rows = F.cross_entropy(logits.transpose(1, 2), labels, reduction="none").sum(dim=1)
    return rows.sum() + z_loss * (logits.logsumexp(dim=2).square() * (labels != -100)).sum(), rows


def gradients(function, hidden: Tensor, weight: Tensor, *rest, factor: float = 1.0, **options) -> tuple[Tensor, ...]:
    loss, rows = function(hidden, weight, *rest, **options)
    return loss.detach(), rows.detach(), *torch.autograd.grad(factor * loss, (hidden, weight))


def relative(ours: Tensor, wanted: Tensor) -> float:
    return ((ours.double() - wanted.double()).norm() / wanted.double().norm()).item()


class Made(TorchDispatchMode):
    """The most elements that any tensor made within has, and the matrices that are multiplied."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0
        self.products: list[list[Tensor]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        made = [x.numel() for x in tree_flatten(result)[0] if isinstance(x, Tensor)]
        self.elements = max([self.elements, *made])
        if func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.addmm_):
            matrices = tree_flatten((args, kwargs, result))[0]
            self.products.append([x for x in matrices if isinstance(x, Tensor) and x.dim() == 2])
        return result


@settings(max_examples=30, deadline=None)
@given(
    batch=st.integers(1, 4),
    length=st.integers(1, 20),
    chunk=st.integers(1, 90),
    ignored=st.sampled_from([0.0, 0.5, 1.0]),
    z_loss=st.sampled_from([0.0, 1e-2]),
    seed=st.integers(0, 1000),
)
@example(batch=1, length=1, chunk=1, ignored=0.0, z_loss=0.0, seed=620)  # a target that is nearly certain
def test_equal_to_plain_cross_entropy(batch, length, chunk, ignored, z_loss, seed) -> None:
    """Against float64, within what arithmetic allows.

    A logit sums HIDDEN products: it is off by at most gamma = (HIDDEN + 1) EPS times the sum of their sizes, `reach`.
    The log of the softmax's sum is off by no more than the worst logit and a few roundings of numbers as large as it,
    and so is the loss. A probability is off by that times itself, and so are the sums that it goes into, of VOCAB or
    batch * length terms.
    """
    hidden, weight, labels = random_case(batch, length, ignored, seed)
    options = {"z_loss": z_loss, "chunk_tokens": chunk}
    loss, rows, *mine = gradients(language_model_loss, hidden, weight, labels, VOCAB, factor=0.7, **options)
    exact = [x.detach().double().requires_grad_() for x in (hidden, weight)]
    wanted_loss, wanted_rows, *wanted = gradients(plain, *exact, labels, factor=0.7, z_loss=z_loss)
    reach = (exact[0].detach().abs() @ exact[1].detach()[:VOCAB].abs().T).max().item()
    bound = (HIDDEN + 1 + 20) * EPS * (1 + reach)  # of a loss, and relative of a probability
    assert rows.dtype == loss.dtype == torch.float32
    counted = (labels != -100).sum(dim=1)
    assert ((rows - wanted_rows).abs() <= bound * counted * 2).all()
    assert abs(loss - wanted_loss) <= bound * (1 + 2 * z_loss * (1 + reach)) * counted.sum() * 2
    # A gradient is a sum of softmax - onehot, of size 2 at most a token, times hidden or weight.
    sizes = ((labels != -100) * 2.0)[..., None] * (1 + 2 * z_loss * (1 + reach))
    of_hidden = bound * sizes * exact[1].detach().abs().max()
    of_weight = bound * (sizes * exact[0].detach().abs()).sum()
    terms = 1 + (VOCAB + batch * length) * EPS
    assert ((mine[0] - wanted[0]).abs() <= of_hidden * 2 * terms).all()
    assert ((mine[1] - wanted[1]).abs() <= of_weight * 2 * terms).all()
    assert not mine[1][VOCAB:].any(), "padding learns nothing"
    assert not mine[0][labels == -100].any()


@pytest.mark.parametrize("z_loss", [0.0, 1e-4])
def test_fp32_at_the_size_of_a_real_vocabulary(z_loss: float) -> None:
    """No further from float64 than 1e-6, as torch's own."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(2, 40, 64, generator=generator)
    weight = F.pad(0.02 * torch.randn(50257, 64, generator=generator), (0, 0, 0, 47))
    labels = torch.randint(50257, (2, 40), generator=generator)
    hidden, weight = hidden.requires_grad_(), weight.requires_grad_()
    ours = gradients(language_model_loss, hidden, weight, labels, 50257, z_loss=z_loss, chunk_tokens=32)
    logits = F.linear(hidden.double(), weight[:50257].double())
    rows = F.cross_entropy(logits.transpose(1, 2), labels, reduction="none").sum(dim=1)
    loss = rows.sum() + z_loss * logits.logsumexp(dim=2).square().sum()
    for one, wanted in zip(ours, (loss, rows, *torch.autograd.grad(loss, (hidden, weight)))):
        assert relative(one, wanted) < 1e-6


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("factor", [1.0, 0.7])
def test_16_bits_are_no_further_from_fp32_than_torchs_own(dtype: torch.dtype, factor: float) -> None:
    hidden, weight, labels = random_case(batch=8, length=64)
    exact = gradients(plain, hidden, weight, labels, factor=factor)
    hidden, weight = (x.detach().to(dtype).requires_grad_() for x in (hidden, weight))
    torchs = gradients(plain, hidden, weight, labels, factor=factor)
    ours = gradients(language_model_loss, hidden, weight, labels, VOCAB, factor=factor, chunk_tokens=100)
    assert [x.dtype for x in ours] == [torch.float32, torch.float32, dtype, dtype]
    # Both round the logits, by far the most; what is rounded behind them is a draw.
    for one, other, wanted in zip(ours, torchs, exact):
        assert relative(one, wanted) <= 1.05 * relative(other, wanted)


def test_bf16_gradients_do_not_lose_what_late_chunks_add() -> None:
    """512 chunks of little after one of much: summed in bf16, which has 8 bits, they would vanish one by one."""
    hidden, weight, labels = random_case(batch=1, length=1, ignored=0.0)
    little = hidden.detach() / 512
    many = torch.cat([hidden.detach(), little.expand(1, 512, HIDDEN)], dim=1).bfloat16()
    weight = torch.zeros_like(weight).bfloat16().requires_grad_()  # the same softmax everywhere
    loss, _ = language_model_loss(many, weight, labels.expand(1, 513), VOCAB, chunk_tokens=1)
    (twice,) = torch.autograd.grad(loss, weight)
    loss, _ = language_model_loss(many[:, :1], weight, labels, VOCAB)
    (once,) = torch.autograd.grad(loss, weight)
    assert relative(twice, 2 * once.float()) < 1e-2


def test_logits_beyond_the_range_of_exp() -> None:
    hidden, weight, labels = random_case(ignored=0.0)
    _, rows, *ours = gradients(language_model_loss, 100 * hidden, weight, labels, VOCAB)
    torch.testing.assert_close(rows, plain(100 * hidden, weight, labels)[1], rtol=1e-5, atol=1e-3)
    assert all(torch.isfinite(gradient).all() for gradient in ours)


def test_never_more_than_a_chunk_of_logits() -> None:
    hidden, weight, labels = random_case(batch=4, length=256)
    with Made() as made:
        language_model_loss(hidden, weight, labels, VOCAB, chunk_tokens=64)[0].backward()
    assert made.elements == max(64 * ROWS, hidden.numel())  # of the 1024 * ROWS of the batch


def test_three_products_a_chunk_and_no_leading_dimension_that_is_odd() -> None:
    """On meta tensors, which take the way of a GPU: bf16 into fp32, and no product in backward."""
    hidden = torch.empty(5, 1001, 64, dtype=torch.bfloat16, device="meta", requires_grad=True)
    weight = torch.empty(50304, 64, dtype=torch.bfloat16, device="meta", requires_grad=True)
    with Made() as made:
        loss, _ = language_model_loss(hidden, weight, torch.empty(5, 1001, dtype=torch.int64, device="meta"), 50257)
        forward = len(made.products)
        loss.backward()
    assert (forward, len(made.products)) == (3 * 4, 3 * 4), "5005 tokens are four chunks"
    strides = {stride for product in made.products for matrix in product for stride in matrix.stride()}
    assert strides == {1, 64, 50304}
    assert {product[-1].dtype for product in made.products} == {torch.bfloat16, torch.float32}
    assert (hidden.grad.dtype, weight.grad.dtype) == (torch.bfloat16, torch.bfloat16)


def test_a_pass_of_the_largest_shape_launches_and_moves_a_tenth_of_what_it_did() -> None:
    """As bench/roofline.py counts it: its forecast stands on this."""
    shape = PRESETS["gloria-1.3b"]
    before, after = count_loss_before(shape), count_loss(shape)
    assert before.flops == 4 * 2 * TOKENS * 50257 * 2048
    assert after.flops == 3 * 2 * TOKENS * 50304 * 2048
    assert 9 * after.launches < before.launches
    assert 10 * after.bytes < before.bytes


def test_logits_are_multiplied_padded_and_cut() -> None:
    model = Transformer(GPT_NEO)
    assert GPT_NEO.vocab_size % 8 != 0
    hidden = torch.randn(2, 3, GPT_NEO.hidden_size)
    with Made() as made:
        logits = model.logits(hidden)
    assert logits.shape == (2, 3, GPT_NEO.vocab_size)
    assert [matrices[-1].shape[1] for matrices in made.products] == [GPT_NEO.padded_vocab]
    torch.testing.assert_close(logits, hidden @ model.transformer.wte.weight[: GPT_NEO.vocab_size].T)


@pytest.mark.parametrize("wanted", ["hidden", "weight", "neither"])
def test_only_the_gradients_that_are_asked_for(wanted: str) -> None:
    hidden, weight, labels = random_case()
    references = dict(zip(("hidden", "weight"), gradients(plain, hidden, weight, labels)[2:]))
    hidden.requires_grad_(wanted == "hidden")
    weight.requires_grad_(wanted == "weight")
    with Made() as made:
        loss, rows = language_model_loss(hidden, weight, labels, VOCAB, chunk_tokens=8)
    assert loss.requires_grad == (wanted != "neither")
    assert not rows.requires_grad
    assert len(made.products) == 8 * (1 if wanted == "neither" else 2)
    if loss.requires_grad:
        loss.backward()
        assert relative({"hidden": hidden, "weight": weight}[wanted].grad, references[wanted]) < 1e-6


def test_without_gradients_the_values_are_the_same_and_backward_runs_once() -> None:
    hidden, weight, labels = random_case()
    with torch.no_grad(), Made() as made:
        quiet = language_model_loss(hidden, weight, labels, VOCAB, z_loss=1e-2)
    assert len(made.products) == 1
    loss, rows = language_model_loss(hidden, weight, labels, VOCAB, z_loss=1e-2)
    assert torch.equal(quiet[0], loss)
    assert torch.equal(quiet[1], rows)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="backward runs once"):
        loss.backward()


@pytest.mark.parametrize("z_loss", [0.0, 1e-2])
def test_it_compiles_whole_and_once_for_all_sizes(z_loss: float) -> None:
    """Fifty passes of other lengths, as validation and a changed micro-batch have them: once as it is, once for any."""
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(chunk_losses, fullgraph=True, backend=counter)
    for number in range(50):
        hidden, weight, labels = random_case(batch=1, length=20 + 7 * number % 31, seed=number)
        options = {"z_loss": z_loss, "chunk_tokens": 13 + number % 5}
        ours = gradients(language_model_loss, hidden, weight, labels, VOCAB, **options, token_losses=compiled)
        if number < 3:
            for one, wanted in zip(ours, gradients(language_model_loss, hidden, weight, labels, VOCAB, **options)):
                torch.testing.assert_close(one, wanted, rtol=1e-6, atol=1e-6)
    assert counter.frame_count <= 3  # and once more for a tail of one token, which is a size of its own
    before = counter.frame_count
    with torch.no_grad():
        language_model_loss(hidden, weight, labels, VOCAB, z_loss=z_loss, token_losses=compiled)
    assert counter.frame_count == before + 1
