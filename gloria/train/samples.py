"""Text that a run writes while it trains: the same prompts every so many steps, to be read beside the curves."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from gloria.data.corpus import Corpus
from gloria.data.tokenizer import TextTokenizer, load_tokenizer
from gloria.errors import UserError
from gloria.train.metrics import LogConfig
from gloria.train.run import Run


def encode_prompts(config: LogConfig, corpus: Corpus, max_positions: int) -> list[list[int]]:
    """The ids of the prompts behind an EOS, the document start that the model knows; none where none are continued."""
    if not config.samples_every:
        return []
    tokenizer = load_tokenizer(corpus.tokenizer_folder)
    prompts = [[tokenizer.eos_id, *tokenizer.encode(prompt)] for prompt in config.prompts]
    room = max_positions - max(map(len, prompts))
    if room < config.sample_tokens:
        raise UserError(
            f"log.prompts: the longest has {max_positions - room} tokens with its start, and log.sample_tokens = "
            f"{config.sample_tokens} do not fit behind them into {max_positions} positions; shorten one of them"
        )
    return prompts


@torch.no_grad()
def write_samples(run: Run) -> None:
    """Continue the prompts on all ranks alike, and log what rank 0 has written.

    The model's forward is a collective, so every rank takes as many as there are tokens to make. It reads whole rows at
    each token: what a cache would keep lies outside the root's forward, where FSDP has the weights whole. Drawn from a
    generator of its own, so that the run's losses are the same with and without samples.
    """
    log, prompts, device = run.config.log, run.objective.prompts, run.process.device
    longest = max(map(len, prompts)) + log.sample_tokens
    width = min(-(-longest // 16) * 16, run.objective.plan.shape.max_positions)  # float8 takes rows by sixteens
    ids = torch.zeros(len(prompts), width, dtype=torch.int64)  # behind a row's end no token of it looks
    for row, prompt in zip(ids, prompts):
        row[: len(prompt)] = torch.tensor(prompt)
    ids = ids.to(device)
    ends = torch.tensor([len(prompt) for prompt in prompts], device=device)
    rows = torch.arange(len(prompts), device=device)
    generator = torch.Generator(device).manual_seed(run.seed + run.step)
    run.model.eval()
    for number in range(log.sample_tokens):
        run.watch.beat(run.step, "samples", slow=number == 0)
        logits = run.model(ids)[rows, ends - 1]  # (prompts, vocab)
        ids[rows, ends] = draw(logits, log.sample_temperature, generator)
        ends = ends + 1
    run.model.train()
    if run.log:
        tokenizer = load_tokenizer(run.objective.plan.corpus.tokenizer_folder)
        for number, (text, prompt, row) in enumerate(zip(log.prompts, prompts, ids.cpu().numpy())):
            made = row[len(prompt) : len(prompt) + log.sample_tokens]
            run.log.sample(run.step, number, text, continuation(tokenizer, prompt, made))


def draw(logits: Tensor, temperature: float, generator: torch.Generator) -> Tensor:
    """The next token of each row, (rows,), from logits (rows, vocab); temperature 0 takes the likeliest."""
    if not temperature:
        return logits.argmax(dim=1)
    # A model that has diverged must not end the run here: multinomial refuses NaN.
    probabilities = (logits / temperature).nan_to_num().softmax(dim=1)
    return torch.multinomial(probabilities, 1, generator=generator)[:, 0]


def continuation(tokenizer: TextTokenizer, prompt: list[int], made: np.ndarray) -> str:
    """The text of the tokens made behind a prompt, up to the end of the document."""
    ends = np.flatnonzero(made == tokenizer.eos_id)
    made = made[: ends[0]] if ends.size else made
    # Decoded with the prompt: alone, a first piece may lose its leading space.
    given = np.array(prompt[1:], dtype=np.int64)
    before, whole = tokenizer.decode_batch([given, np.concatenate((given, made))])
    return whole[len(before) :]
