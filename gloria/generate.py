"""Continue a text with a run, one of its checkpoints, or a Hugging Face folder, ours or another.

    python -m gloria.generate --model runs/demo --prompt "Era uma vez" [--greedy | --temperature 0.8 --top-p 0.95]

The same flags give the same text on the same machine: the seed is 0 by default.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from gloria.config.cli import Problems, option, parse
from gloria.errors import UserError, run_command, warn
from gloria.model.decode import begin
from gloria.model.kernels import use_cudnn_attention
from gloria.tasks.models.backbones import LoadedModel, load_model
from gloria.tasks.models.encode import start_ids, tokenize

_SAMPLING = ("temperature", "top_k", "top_p", "seed")  # with --greedy none of them has an effect


@dataclass(frozen=True)
class GenerateOptions:
    """What is continued, and how."""

    model: Path = option(help="a run, one of its checkpoints, or a Hugging Face folder")
    prompt: str = option(help='the text to continue; "" begins a document')
    max_new_tokens: int = option(128, "at most; less where the text ends", minimum=1)
    greedy: bool = option(False, "always the likeliest token, no sampling")
    temperature: float = option(0.8, "below 1 more likely tokens, above 1 more variety", above=0)
    top_k: int = option(0, "sample among the K likeliest tokens, 0: among all", minimum=0)
    top_p: float = option(0.95, "sample among the likeliest that make up this share", above=0, maximum=1)
    seed: int = option(0, "of the sampling", minimum=0, maximum=2**63 - 1)


@torch.no_grad()
def main(argv: list[str] | None = None) -> int:
    """Print the prompt and its continuation."""
    arguments = parse(
        GenerateOptions,
        argv,
        prog="python -m gloria.generate",
        description="Continue a text with a run or a Hugging Face folder.",
        recipe=False,
        check=_contradictions,
    ).config
    use_cudnn_attention(False)
    loaded = load_model(str(arguments.model), language_model=True)
    model, tokenizer = loaded.require_language_model(), loaded.tokenizer
    ids = prompt_ids(loaded, arguments.prompt)
    limit = new_token_limit(len(ids), arguments.max_new_tokens, loaded.max_length)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(arguments.seed)
    rows, logits = begin(model.to(device).eval(), [ids], limit, device)
    ends, made = loaded.end_ids(), list(ids)
    while True:
        token = logits.argmax(dim=1) if arguments.greedy else sample(logits, arguments)
        if token.item() in ends:
            break
        made.append(int(token))
        if len(made) == len(ids) + limit:
            break
        logits = rows.step(token)
    # Decoded with the prompt: alone, a first piece may lose its leading space.
    given, whole = (str(tokenizer.decode(row, skip_special_tokens=True)) for row in (ids, made))
    print(arguments.prompt + whole[len(given) :])
    return 0


def sample(logits: Tensor, arguments: GenerateOptions) -> Tensor:
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


def prompt_ids(loaded: LoadedModel, prompt: str) -> list[int]:
    """The ids to continue: a document that begins with the prompt, see `start_ids`."""
    ids: list[int] = tokenize(loaded.tokenizer, [prompt])[0].ids
    return start_ids(loaded, needed=loaded.behind_eos or not ids) + ids


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


def _contradictions(arguments: GenerateOptions) -> Problems:
    for item in dataclasses.fields(arguments):
        if arguments.greedy and item.name in _SAMPLING and getattr(arguments, item.name) != item.default:
            yield (item.name,), "has no effect with --greedy; leave one of them out"
    if arguments.model and not arguments.model.is_dir():
        yield ("model",), f"{arguments.model} is no folder; give a run, a checkpoint or a Hugging Face folder"


if __name__ == "__main__":
    raise SystemExit(run_command(main))
