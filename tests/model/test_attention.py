"""Prevents local attention from seeing too much or too little at the edges of its blocks, tokens from seeing
what comes after them, and documents from seeing each other."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from gloria.model.attention import attend, attention_masks

HEADS, HEAD_DIM = 2, 4


def random_inputs(batch: int, length: int, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    size = (batch, length, HEADS * HEAD_DIM)
    return [torch.randn(size, generator=generator, dtype=torch.float64).requires_grad_() for _ in range(3)]


def blockwise(
    inputs: list[Tensor], window: int, documents: Tensor | None, scale: float | None = 1.0, dropout: float = 0.0
) -> Tensor:
    batch, length, _ = inputs[0].shape
    masks = attention_masks(batch, length, window, documents, device=inputs[0].device, dtype=inputs[0].dtype)
    return attend(*inputs, masks, num_heads=HEADS, window=window, scale=scale, dropout=dropout)


def stated(inputs: list[Tensor], window: int, documents: Tensor | None, scale: float = 1.0) -> Tensor:
    """One token at a time, from the definition."""
    batch, length, hidden = inputs[0].shape
    query, key, value = (x.view(batch, length, HEADS, HEAD_DIM) for x in inputs)
    rows = []
    for row in range(batch):
        for i in range(length):
            seen = [
                j
                for j in range(i + 1)
                if (window == 0 or i - j < window) and (documents is None or documents[row, j] == documents[row, i])
            ]
            scores = torch.einsum("hd,jhd->hj", query[row, i], key[row, seen]) * scale
            rows.append(torch.einsum("hj,jhd->hd", scores.softmax(-1), value[row, seen]).reshape(hidden))
    return torch.stack(rows).view(batch, length, hidden)


@settings(max_examples=40, deadline=None)
@given(
    length=st.integers(1, 14),
    window=st.integers(0, 6),
    cuts=st.one_of(st.none(), st.lists(st.booleans(), min_size=28, max_size=28)),
)
def test_values_and_gradients_are_those_of_the_definition(length: int, window: int, cuts: list | None) -> None:
    documents = None
    if cuts is not None:
        documents = torch.tensor(cuts).view(2, 14).cumsum(1)[:, :length]
    inputs = random_inputs(2, length)
    weights = torch.randn_like(inputs[0])
    ours, wanted = blockwise(inputs, window, documents), stated(inputs, window, documents)
    torch.testing.assert_close(ours, wanted)
    for mine, theirs in zip(
        torch.autograd.grad((ours * weights).sum(), inputs),
        torch.autograd.grad((wanted * weights).sum(), inputs),
    ):
        torch.testing.assert_close(mine, theirs)


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
