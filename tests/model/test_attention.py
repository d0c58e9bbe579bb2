"""Prevents local attention from seeing too much or too little at the edges of its blocks, tokens from seeing
what comes after them, and documents from seeing each other."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.func import functional_call
from torch.utils._python_dispatch import TorchDispatchMode

from gloria.data.loader import document_bounds
from gloria.model.attention import attend, attention_masks
from gloria.model.config import PRESETS
from gloria.model.transformer import Transformer
from tests.varlen import check_arguments

HEADS, HEAD_DIM = 4, 2


def random_inputs(batch: int, length: int, seed: int = 0, kv_heads: int = HEADS) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    sizes = [(batch, length, heads, HEAD_DIM) for heads in (HEADS, kv_heads, kv_heads)]
    return [torch.randn(size, generator=generator, dtype=torch.float64).requires_grad_() for size in sizes]


def blockwise(
    inputs: list[Tensor],
    window: int,
    documents: Tensor | None,
    scale: float | None = 1.0,
    dropout: float = 0.0,
    kernel: str = "sdpa",
) -> Tensor:
    batch, length = inputs[0].shape[:2]
    device, dtype = inputs[0].device, inputs[0].dtype
    masks = attention_masks(batch, length, window, documents, device=device, dtype=dtype, kernel=kernel)
    return attend(*inputs, masks, window=window, scale=scale, dropout=dropout)


def stated(inputs: list[Tensor], window: int, documents: Tensor | None, scale: float = 1.0) -> Tensor:
    """One token at a time, from the definition."""
    batch, length = inputs[0].shape[:2]
    query = inputs[0]
    key, value = (x[:, :, [head * x.shape[2] // HEADS for head in range(HEADS)]] for x in inputs[1:])
    rows = []
    for row in range(batch):
        for i in range(length):
            seen = [
                j
                for j in range(i + 1)
                if (window == 0 or i - j < window) and (documents is None or documents[row, j] == documents[row, i])
            ]
            scores = torch.einsum("hd,jhd->hj", query[row, i], key[row, seen]) * scale
            rows.append(torch.einsum("hj,jhd->hd", scores.softmax(-1), value[row, seen]).flatten())
    return torch.stack(rows).view(batch, length, -1)


@settings(max_examples=40, deadline=None)
@given(
    length=st.integers(1, 14),
    window=st.integers(0, 6),
    cuts=st.one_of(st.none(), st.lists(st.booleans(), min_size=28, max_size=28)),
    kv_heads=st.sampled_from([HEADS, 2, 1]),
)
def test_values_and_gradients_are_those_of_the_definition(
    length: int, window: int, cuts: list | None, kv_heads: int
) -> None:
    documents = None
    if cuts is not None:
        documents = torch.tensor(cuts).view(2, 14).cumsum(1)[:, :length]
    inputs = random_inputs(2, length, kv_heads=kv_heads)
    weights = torch.randn_like(inputs[0]).flatten(2)
    ours, wanted = blockwise(inputs, window, documents), stated(inputs, window, documents)
    torch.testing.assert_close(ours, wanted)
    for mine, theirs in zip(
        torch.autograd.grad((ours * weights).sum(), inputs),
        torch.autograd.grad((wanted * weights).sum(), inputs),
    ):
        torch.testing.assert_close(mine, theirs)


@settings(max_examples=40, deadline=None)
@given(
    length=st.integers(1, 14),
    window=st.integers(0, 15),
    ends=st.one_of(st.none(), st.lists(st.booleans(), min_size=28, max_size=28)),
    kv_heads=st.sampled_from([HEADS, 2, 1]),
)
def test_varlen_flash_is_given_what_the_definition_says(
    length: int, window: int, ends: list | None, kv_heads: int
) -> None:
    """The arguments of CUDA's kernel, run by its definition; and the bounds of documents mean the same to sdpa."""
    bounds = documents = None
    if ends is not None:
        ids = np.array(ends, np.uint16).reshape(2, 14)[:, :length]  # token 1 is EOS
        bounds = torch.from_numpy(document_bounds(ids, eos_id=1))
        documents = torch.from_numpy(np.cumsum(ids, axis=1) - ids)  # an EOS belongs to the document it ends
    inputs = random_inputs(2, length, kv_heads=kv_heads)
    weights = torch.randn_like(inputs[0]).flatten(2)
    wanted = stated(inputs, window, documents)
    gradients = torch.autograd.grad((wanted * weights).sum(), inputs)
    for kernel in ("varlen", "sdpa"):
        ours = blockwise(inputs, window, bounds, kernel=kernel)
        torch.testing.assert_close(ours, wanted)
        torch.testing.assert_close(torch.autograd.grad((ours * weights).sum(), inputs), gradients)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize(("window", "ends"), [(130, None), (7, (5, 6, 150)), (300, (5, 6, 150))])
def test_flex_attention_sees_what_the_others_see(window: int, ends: tuple[int, ...] | None) -> None:
    """On CPU it has no backward; the mask is what is ours."""
    bounds = None
    if ends is not None:
        ids = np.zeros((2, 200), np.int32)
        ids[1, list(ends)] = 1
        bounds = torch.from_numpy(document_bounds(ids, eos_id=1))
    inputs = [x.detach().float() for x in random_inputs(2, 200, kv_heads=2)]
    ours, wanted = (blockwise(inputs, window, bounds, kernel=kernel) for kernel in ("flex", "varlen"))
    torch.testing.assert_close(ours, wanted)


def test_the_call_for_cuda_is_one_that_its_kernel_takes() -> None:
    """Fake tensors on a GPU that is not there: what reaches the operation has the dtype, layout and sizes it checks."""
    shape = replace(PRESETS["gpt-neo-125m"], num_layers=2, attention_layers=("global", "local"), window_size=256)
    # Queries, keys and values of their own, or cut out of one, or turned, and fewer keys than queries.
    for one in (shape, replace(shape, architecture="gpt2"), replace(shape, architecture="qwen2", num_kv_heads=4)):
        with torch.device("meta"):
            model = Transformer(one, kernel="varlen")
        with torch.no_grad(), FakeTensorMode():
            like = {"dtype": torch.bfloat16, "device": "cuda"}
            weights = {name: torch.empty(weight.shape, **like) for name, weight in model.named_parameters()}
            ids = torch.empty(3, 700, dtype=torch.int64, device="cuda")
            bounds = torch.empty(49, dtype=torch.int32, device="cuda")
            with Arguments("_varlen_attn") as seen:
                model.forward = model.hidden_states
                hidden = functional_call(model, weights, (ids, bounds))
        assert hidden.shape == (3, 700, 768)
        assert len(seen.calls) == 2
        for call, window in zip(seen.calls, ([-1, 0], [255, 0])):
            query, key, value, cuts, others, max_q, max_k, causal, scale, reach = call[:10]
            check_arguments(query, key, value, cuts, others, max_q)
            assert query.shape == (2100, 12, 64)
            assert key.shape == (2100, one.kv_heads, 64)
            assert query.device.type == "cuda"
            assert query.dtype == torch.bfloat16
            assert (max_q, max_k, scale) == (700, 700, one.family.attention_scale)
            assert (reach, causal) == (window, window == [-1, 0])


class Arguments(TorchDispatchMode):
    """The arguments of each call of an operation within."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name
        self.calls: list[tuple] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func._schema.name.endswith(f"::{self.name}"):
            self.calls.append(args)
        return func(*args, **(kwargs or {}))


def test_there_are_as_many_places_for_documents_as_before_until_they_do_not_suffice() -> None:
    ids = np.full((2, 1000), 7, np.uint16)
    bounds = document_bounds(ids, eos_id=3)
    assert bounds.dtype == np.int32
    assert bounds.tolist() == [0, 1000] + [2000] * 15
    ids[1, 10] = ids[1, 999] = 3  # the last one ends its row, which ends its document anyway
    assert document_bounds(ids, eos_id=3).tolist() == [0, 1000, 1011] + [2000] * 14
    ids[0, ::50] = 3
    bounds = document_bounds(ids, eos_id=3)  # 21 in the first row, two in the second
    assert len(bounds) == 2 * 16 + 1
    assert np.count_nonzero(np.diff(bounds)) == 23


@pytest.mark.parametrize("window", [0, 5])
def test_without_a_scale_it_is_one_over_the_root_of_head_dim(window: int) -> None:
    inputs = random_inputs(1, 12)
    torch.testing.assert_close(
        blockwise(inputs, window, None, scale=None), stated(inputs, window, None, HEAD_DIM**-0.5)
    )


def test_documents_may_be_any_numbers_and_come_back() -> None:
    inputs = random_inputs(1, 12)
    documents = torch.tensor([[-1, -1, 7, 7, 0, 0, -1, -1, 0, 7, 7, 7]])
    for window in (0, 5):
        torch.testing.assert_close(blockwise(inputs, window, documents), stated(inputs, window, documents))


def test_dropout_drops_attention_weights_alone() -> None:
    torch.manual_seed(0)
    query, key, _ = random_inputs(8, 40)
    ones = torch.ones_like(query)
    for window in (0, 8):
        output = blockwise([query, key, ones], window, None, dropout=0.5)
        # Without dropout every output is exactly 1; with it the mean stays 1 and the first token is 0 or 2.
        assert abs(output.mean() - 1) < 0.05
        assert set(output[:, 0].unique().tolist()) == {0.0, 2.0}


def test_the_local_mask_is_linear_in_the_sequence() -> None:
    masks = attention_masks(1, 4096, 8, None, device=torch.device("cpu"), dtype=torch.float32)
    assert masks.whole is None
    assert masks.local.numel() == 2 * 8 * 4096
