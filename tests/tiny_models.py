"""Models and a tokenizer small enough for a test."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch

from gloria.data.tokenizer import TextTokenizer, TokenizerConfig, train_tokenizer
from gloria.model.config import TransformerConfig
from gloria.model.families import RopeScaling
from gloria.model.transformer import Transformer, initial_value

GPT_NEO = TransformerConfig(
    architecture="gpt-neo",
    num_layers=2,
    hidden_size=32,
    num_heads=4,
    intermediate_size=64,
    max_positions=64,
    vocab_size=131,  # not a multiple of 128: rows that only pad
    attention_layers=("global", "local"),
    window_size=8,
)
GPT2 = replace(GPT_NEO, architecture="gpt2", attention_layers=("global", "global"), window_size=0)
# Each has what the others of its line have not: heads of its own, a window, biases, heads of another width, a scaling.
LLAMA = replace(
    GPT2,
    architecture="llama",
    num_kv_heads=2,
    tied_head=False,
    rope_scaling=RopeScaling("llama3", 4.0, original_max_positions=16),
)
MISTRAL = replace(
    LLAMA, architecture="mistral", attention_layers=("local", "local"), window_size=8, rope_theta=5e3, rope_scaling=None
)
QWEN2 = replace(MISTRAL, architecture="qwen2", attention_layers=("global", "local"), num_kv_heads=1, tied_head=True)
QWEN3 = replace(LLAMA, architecture="qwen3", head_size=12, rope_scaling=RopeScaling("linear", 2.0))
SHAPES = {
    "gpt2": GPT2,
    "gpt-neo": GPT_NEO,
    "llama": LLAMA,
    "mistral": MISTRAL,
    "qwen2": QWEN2,
    "qwen3": QWEN3,
}

TEXT = (
    "Um tokenizador pequeno aprende com pouco texto, e este texto é pouco. As palavras repetem-se, as letras "
    "também: não há mais nada que aprender numa frase só. Os barcos saem cedo e voltam tarde, com peixe ou sem ele."
)


def build_model(shape: TransformerConfig, *, seed: int = 0, **options: str) -> Transformer:
    """A model with the values that a run of `seed` starts from; `options` are those of Transformer."""
    model = Transformer(shape, **options)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(initial_value(name, parameter.shape, shape, seed))
    return model


def uneven_model(shape: TransformerConfig, *, seed: int = 0) -> Transformer:
    """A model in which every parameter matters: no zero biases, norms that are not one, sharp attention."""
    model = build_model(shape, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
        for rows in (model.transformer.wte.weight, model.head):
            rows[shape.vocab_size :] = 0.0
    return model


def random_ids(shape: TransformerConfig, rows: int, length: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(shape.vocab_size, (rows, length), generator=torch.Generator().manual_seed(seed))


def gradients(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: parameter.grad for name, parameter in model.named_parameters()}


def make_tokenizer(folder: Path, vocab_size: int = 320) -> TextTokenizer:
    return train_tokenizer(TokenizerConfig(vocab_size=vocab_size), [TEXT] * 2, folder)
