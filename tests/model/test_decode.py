"""Prevents decoding with kept keys and values from being another computation than the model's: a row at a position that
is not its own, a window that looks too far back, padding that is seen, rows mixed up when others leave."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from gloria.model.config import TransformerConfig
from gloria.model.decode import ForeignCache, begin
from gloria.model.transformer import Transformer
from tests.tiny_models import GPT_NEO, SHAPES, random_ids, uneven_model

CPU = torch.device("cpu")
# The tiny GPT-Neo looks back on 8 tokens: prompts and continuations on both sides of that.
LENGTHS = (1, 3, 7, 8, 9, 20, 31)
families = pytest.mark.parametrize(
    "shape",
    [*SHAPES.values(), replace(GPT_NEO, num_layers=3, attention_layers=("local", "local", "global"))],
    ids=[*SHAPES, "gpt-neo local first"],
)


def prompts_of(shape: TransformerConfig, lengths: tuple[int, ...] = LENGTHS) -> list[list[int]]:
    return [random_ids(shape, 1, length, seed=length)[0].tolist() for length in lengths]


@torch.no_grad()
def decode(model: Transformer, prompts: list[list[int]], steps: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Greedy tokens (rows, steps) and the logits they are from, (steps, rows, vocab)."""
    rows, logits = begin(model, prompts, steps, CPU)
    tokens, all_logits = [logits.argmax(1)], [logits]
    while len(tokens) < steps:
        all_logits.append(rows.step(tokens[-1]))
        tokens.append(all_logits[-1].argmax(1))
    return torch.stack(tokens, 1), torch.stack(all_logits)


@torch.no_grad()
def stated(model: Transformer, prompt: list[int], steps: int) -> tuple[list[int], torch.Tensor]:
    """The same of one row, by reading all of it again for every token."""
    ids, logits = list(prompt), []
    for _ in range(steps):
        logits.append(model(torch.tensor([ids]))[0, -1])
        ids.append(int(logits[-1].argmax()))
    return ids[len(prompt) :], torch.stack(logits)


@families
def test_tokens_and_logits_are_those_of_reading_everything_again(shape: TransformerConfig) -> None:
    model, prompts = uneven_model(shape).eval(), prompts_of(shape)
    tokens, logits = decode(model, prompts, 14)
    for number, prompt in enumerate(prompts):
        wanted, wanted_logits = stated(model, prompt, 14)
        assert tokens[number].tolist() == wanted
        torch.testing.assert_close(logits[:, number], wanted_logits, rtol=0, atol=1e-4)
        alone, alone_logits = decode(model, [prompt], 14)
        assert alone[0].tolist() == wanted
        torch.testing.assert_close(alone_logits[:, 0], wanted_logits, rtol=0, atol=1e-4)


@families
def test_the_last_position_can_be_reached(shape: TransformerConfig) -> None:
    model = uneven_model(shape).eval()
    prompts = prompts_of(shape, (shape.max_positions - 3, 5))
    tokens, _ = decode(model, prompts, 4)
    assert [row.tolist() for row in tokens] == [stated(model, prompt, 4)[0] for prompt in prompts]


@families
@torch.no_grad()
def test_rows_leave_change_places_and_are_doubled(shape: TransformerConfig) -> None:
    model, prompts = uneven_model(shape).eval(), prompts_of(shape)
    rows, _ = begin(model, prompts, 8, CPU)
    chosen = [5, 2, 2, 0]
    first = torch.tensor([7, 9, 11, 13])
    rows.keep(torch.tensor(chosen))
    rows.step(first)
    rows.keep(torch.tensor([3, 1, 2]))
    logits = rows.step(torch.tensor([1, 2, 3]))
    whole = [prompts[0] + [13, 1], prompts[2] + [9, 2], prompts[2] + [11, 3]]
    wanted = torch.stack([model(torch.tensor([ids]))[0, -1] for ids in whole])
    torch.testing.assert_close(logits, wanted, rtol=0, atol=1e-4)


@families
@torch.no_grad()
def test_looking_ahead_leaves_the_rows_as_they_are(shape: TransformerConfig) -> None:
    model, prompts = uneven_model(shape).eval(), prompts_of(shape)
    rows, _ = begin(model, prompts, 12, CPU)
    for seed, length in ((1, 12), (2, 3), (3, 10)):
        ids = random_ids(shape, len(prompts), length, seed=seed)
        ahead = rows.look_ahead(ids)
        for number, prompt in enumerate(prompts):
            whole = model.hidden_states(torch.tensor([prompt + ids[number].tolist()]))[0, len(prompt) :]
            torch.testing.assert_close(ahead[number], whole, rtol=0, atol=1e-5)
        lasts = torch.tensor([[prompt[-1]] for prompt in prompts])
        torch.testing.assert_close(rows.look_ahead(torch.cat((lasts, ids), 1), back=1)[:, 1:], ahead, rtol=0, atol=1e-5)


@torch.no_grad()
def test_a_foreign_model_that_keeps_nothing_reads_its_rows_again() -> None:
    from transformers import OpenAIGPTConfig, OpenAIGPTLMHeadModel

    torch.manual_seed(0)
    model = OpenAIGPTLMHeadModel(OpenAIGPTConfig(vocab_size=131, n_positions=64, n_embd=32, n_layer=2, n_head=4)).eval()
    prompts = prompts_of(GPT_NEO, (3, 9, 1))
    rows, logits = begin(model, prompts, 4, CPU)
    assert isinstance(rows, ForeignCache)
    ids = [list(prompt) for prompt in prompts]
    for _ in range(4):
        wanted = torch.stack([model(torch.tensor([row])).logits[0, -1] for row in ids])
        torch.testing.assert_close(logits, wanted, rtol=0, atol=1e-4)
        for row, token in zip(ids, logits.argmax(1).tolist()):
            row.append(token)
        logits = rows.step(logits.argmax(1))
