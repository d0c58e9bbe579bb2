"""Continue a text with a Hugging Face folder, ours or another.

    python -m gloria.generate --model models/demo --prompt "Era uma vez" [--greedy | --temperature 0.8 --top-p
    0.95]

Generation itself is that of transformers. The same flags give the same text: the seed is 0 unless told.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase
from transformers.utils import logging as transformers_logging

from gloria.config.cli import argument_parser
from gloria.errors import UserError, run_command, warn
from gloria.model.huggingface import weight_files

# What sampling takes where a flag is not given; with --greedy none of them may be.
_SAMPLING = {"temperature": 0.8, "top_k": 0, "top_p": 0.95, "seed": 0}


def main(argv: list[str] | None = None) -> int:
    arguments = _read_arguments(argv)
    folder = arguments.model
    weight_files(folder)
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"{folder}: cannot be loaded ({_first_line(error)}); give a causal model's folder") from None
    ids = prompt_ids(tokenizer, arguments.prompt, config.model_type)
    limit = new_token_limit(len(ids), arguments.max_new_tokens, getattr(config, "max_position_embeddings", None))
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        model = AutoModelForCausalLM.from_pretrained(
            folder,
            trust_remote_code=False,
            use_safetensors=True,
            # bf16 has no fast kernels on many CPUs
            dtype="auto" if device.type == "cuda" else torch.float32,
        )
    except (OSError, ValueError, RuntimeError) as error:
        raise UserError(f"{folder}: cannot be loaded ({_first_line(error)}); give a causal model's folder") from None
    torch.manual_seed(arguments.seed)
    prompt = torch.tensor([ids], device=device)  # (1, prompt)
    output = model.to(device).generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        max_new_tokens=limit,
        pad_token_id=tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id,
        **_sampling(arguments),
    )
    # Decoded with the prompt: alone, a first piece may lose its leading space.
    given, whole = (tokenizer.decode(row, skip_special_tokens=True) for row in (ids, output[0].tolist()))
    print(arguments.prompt + whole[len(given) :])
    return 0


def prompt_ids(tokenizer: PreTrainedTokenizerBase, prompt: str, model_type: str) -> list[int]:
    """The ids to continue. GPT-2 and GPT-Neo saw EOS at a document's start, which their tokenizers do not add."""
    ids = tokenizer(prompt, split_special_tokens=True)["input_ids"]
    start = tokenizer.eos_token_id
    if model_type in ("gpt2", "gpt_neo") and start is not None and ids[:1] != [start]:
        ids = [start, *ids]
    if not ids:
        raise UserError("--prompt: is empty, and this model has no token to begin with; give some text")
    return ids


def new_token_limit(prompt_tokens: int, max_new_tokens: int, positions: int | None) -> int:
    """How many tokens fit behind the prompt; fewer than asked for are said, none is a `UserError`."""
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
    parser = argument_parser("python -m gloria.generate", "Continue a text with a Hugging Face folder.")
    parser.add_argument("--model", type=Path, required=True, help="the folder")
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
    if not (arguments.model / "config.json").is_file():
        problems.append(f"--model: {arguments.model} is no Hugging Face folder (no config.json); check the path")
    if problems:
        raise UserError(*problems)
    for name, value in _SAMPLING.items():
        if getattr(arguments, name) is None:
            setattr(arguments, name, value)
    return arguments


def _sampling(arguments: argparse.Namespace) -> dict[str, Any]:
    if arguments.greedy:
        # None: a folder's generation_config.json may set them, which transformers would complain about
        return {"do_sample": False, "temperature": None, "top_k": None, "top_p": None}
    return {"do_sample": True, **{name: getattr(arguments, name) for name in ("temperature", "top_k", "top_p")}}


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0]


if __name__ == "__main__":
    raise SystemExit(run_command(main))
