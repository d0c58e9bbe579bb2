"""Continue a text with a run, one of its checkpoints, or a Hugging Face folder, ours or another.

    python -m gloria.generate --model runs/demo --prompt "Era uma vez" [--greedy | --temperature 0.8 --top-p 0.95]

The same flags give the same text on the same machine: the seed is 0 by default.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from gloria.config.cli import argument_parser
from gloria.errors import UserError, run_command, warn
from gloria.model.decode import begin, end_ids
from gloria.model.transformer import Transformer
from gloria.tasks.models.backbones import load_model

# What sampling takes where a flag is not given; with --greedy none of them may be.
_SAMPLING = {"temperature": 0.8, "top_k": 0, "top_p": 0.95, "seed": 0}


@torch.no_grad()
def main(argv: list[str] | None = None) -> int:
    arguments = _read_arguments(argv)
    loaded = load_model(str(arguments.model), language_model=True)
    model, tokenizer = loaded.language_model, loaded.tokenizer
    assert model is not None
    ids = prompt_ids(tokenizer, arguments.prompt, document_start=isinstance(model, Transformer))
    limit = new_token_limit(len(ids), arguments.max_new_tokens, loaded.max_length)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(arguments.seed)
    rows, logits = begin(model.to(device).eval(), [ids], limit, device)
    ends, made = end_ids(model, tokenizer.eos_token_id), list(ids)
    while True:
        token = logits.argmax(dim=1) if arguments.greedy else sample(logits, arguments)
        if token.item() in ends:
            break
        made.append(int(token))
        if len(made) == len(ids) + limit:
            break
        logits = rows.step(token)
    # Decoded with the prompt: alone, a first piece may lose its leading space.
    given, whole = (tokenizer.decode(row, skip_special_tokens=True) for row in (ids, made))
    print(arguments.prompt + whole[len(given) :])
    return 0


def sample(logits: Tensor, arguments: argparse.Namespace) -> Tensor:
    """Draw the next token of each row, (rows,), from logits (rows, vocab): temperature, then top-k, then top-p.

    Top-p (arXiv 1904.09751) keeps the smallest set of likeliest tokens that make up the share, so always one.
    """
    values, tokens = (logits / arguments.temperature).sort(descending=True)
    if arguments.top_k:
        values[:, arguments.top_k :] = float("-inf")
    probabilities = values.softmax(dim=1)
    likelier = probabilities.cumsum(dim=1) - probabilities
    chosen = torch.multinomial(probabilities.masked_fill(likelier >= arguments.top_p, 0.0), 1)
    return tokens.gather(1, chosen)[:, 0]


def prompt_ids(tokenizer: PreTrainedTokenizerBase, prompt: str, *, document_start: bool) -> list[int]:
    """The ids to continue. Our own models saw EOS at a `document_start`, which their tokenizers do not add."""
    ids = tokenizer(prompt, split_special_tokens=True)["input_ids"]
    start = tokenizer.eos_token_id
    if document_start and ids[:1] != [start]:
        ids = [start, *ids]
    if not ids:
        raise UserError("--prompt: is empty, and this model has no token to begin with; give some text")
    return ids


def new_token_limit(prompt_tokens: int, max_new_tokens: int, positions: int | None) -> int:
    """How many tokens fit behind the prompt; fewer than requested are reported, none is a `UserError`."""
    if positions is None:
        return max_new_tokens
    room = positions - prompt_tokens
    if room < 1:
        raise UserError(
            f"--prompt: has {prompt_tokens} tokens, the model {positions} positions; "
            f"shorten it to at most {positions - 1}"
        )
    if max_new_tokens > room:
        warn(
            f"--max-new-tokens: {max_new_tokens} do not fit behind {prompt_tokens} of {positions} positions; "
            f"at most {room} are made"
        )
    return min(max_new_tokens, room)


def _read_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argument_parser("python -m gloria.generate", "Continue a text with a run or a Hugging Face folder.")
    parser.add_argument(
        "--model", type=Path, required=True, help="a run, one of its checkpoints, or a Hugging Face folder"
    )
    parser.add_argument("--prompt", required=True, help='the text to continue; "" begins a document')
    parser.add_argument("--max-new-tokens", type=int, default=128, help="at most; less where the text ends")
    parser.add_argument("--greedy", action="store_true", help="always the likeliest token, no sampling")
    parser.add_argument("--temperature", type=float, help="below 1 more likely tokens, above 1 more variety; 0.8")
    parser.add_argument("--top-k", type=int, help="sample among the K likeliest tokens, 0: among all; 0")
    parser.add_argument("--top-p", type=float, help="sample among the likeliest that make up this share; 0.95")
    parser.add_argument("--seed", type=int, help="of the sampling; 0")
    arguments = parser.parse_args(argv)
    bounds = {
        "max_new_tokens": (lambda n: n >= 1, "a whole number from 1 on"),
        "temperature": (lambda t: 0 < t < float("inf"), "a number above 0 (or use --greedy)"),
        "top_k": (lambda k: k >= 0, "a whole number from 0 on"),
        "top_p": (lambda p: 0 < p <= 1, "a number above 0 and at most 1"),
        "seed": (lambda s: 0 <= s < 2**63, "a whole number from 0 to 2^63 - 1"),
    }
    problems = [
        f"{_flag(name)}: must be {what}, not {value}"
        for name, (allowed, what) in bounds.items()
        if (value := getattr(arguments, name)) is not None and not allowed(value)
    ]
    if arguments.greedy:
        problems += [
            f"{_flag(name)}: has no effect with --greedy; leave one of them out"
            for name in _SAMPLING
            if getattr(arguments, name) is not None
        ]
    if not arguments.model.is_dir():
        problems.append(f"--model: {arguments.model} is no folder; give a run, a checkpoint or a Hugging Face folder")
    if problems:
        raise UserError(*problems)
    for name, value in _SAMPLING.items():
        if getattr(arguments, name) is None:
            setattr(arguments, name, value)
    return arguments


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


if __name__ == "__main__":
    raise SystemExit(run_command(main))
