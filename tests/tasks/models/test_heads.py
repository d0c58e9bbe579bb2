"""Bugs prevented: a head that reads a padding token, a score that starts far from any gold one, heads whose losses
are weighted by accident, and span logits where no answer can be."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from gloria.tasks.models.backbones import Backbone
from gloria.tasks.models.heads import LABEL, SCORE, SPAN, TaskModel, initialise_heads, row_losses


class Positions(nn.Module):
    """A body whose hidden state is the place of the token, so that pooling can be seen."""

    def forward(self, input_ids, attention_mask):
        hidden = torch.arange(input_ids.shape[1]).float()[None, :, None].expand(len(input_ids), -1, 4)
        return type("Output", (), {"last_hidden_state": hidden})()


def model(heads: dict[str, int], *, causal: bool) -> TaskModel:
    made = TaskModel(Backbone(Positions(), causal=causal, hidden_size=4, token_types=False), heads, dropout=0.0)
    for head in made.heads.values():
        nn.init.ones_(head.weight)
    return made


def batch(**more: torch.Tensor) -> dict[str, torch.Tensor]:
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0]])
    return {"ids": torch.zeros(2, 5, dtype=torch.long), "mask": mask, **more}


def test_a_causal_model_is_read_at_its_last_token_and_another_at_its_first():
    assert model({LABEL: 2}, causal=True)(batch())[LABEL][:, 0].tolist() == [16.0, 4.0]
    assert model({LABEL: 2}, causal=False)(batch())[LABEL][:, 0].tolist() == [0.0, 0.0]


def test_heads_start_small_the_same_everywhere_and_at_the_mean_score():
    first, second = (model({LABEL: 3, SCORE: 1}, causal=True) for _ in range(2))
    for made in (first, second):
        initialise_heads(made, seed=5, mean_score=3.25)
    assert first.heads[LABEL].bias is None
    assert first.heads[SCORE].bias.item() == 3.25
    assert first.heads[LABEL].weight.abs().max() < 0.1
    assert torch.equal(first.heads[LABEL].weight, second.heads[LABEL].weight)


def test_the_loss_of_two_heads_is_their_sum():
    outputs = {LABEL: torch.tensor([[2.0, 0.0], [0.0, 1.0]]), SCORE: torch.tensor([[1.0], [4.0]])}
    targets = {LABEL: torch.tensor([0, 0]), SCORE: torch.tensor([3.0, 4.0])}
    expected = F.cross_entropy(outputs[LABEL], targets[LABEL], reduction="none") + torch.tensor([4.0, 0.0])
    torch.testing.assert_close(row_losses(outputs, targets), expected)


def test_an_answer_can_only_be_where_it_is_allowed():
    allowed = torch.tensor([[0, 1, 1, 0, 1], [0, 1, 0, 0, 0]])
    logits = model({SPAN: 2}, causal=True)(batch(allowed=allowed))[SPAN]
    assert logits.shape == (2, 5, 2)
    assert torch.equal(torch.isfinite(logits[..., 0]), allowed.bool())
    targets = {SPAN: torch.tensor([[1, 2], [1, 1]])}
    losses = row_losses({SPAN: logits}, targets)
    assert torch.isfinite(losses).all()
    assert losses[1].item() == pytest.approx(0.0)  # the only place there is
