"""A model's shape: presets, the recipe's [model] section, and counts of parameters and operations. Imports no torch."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from gloria.config.cli import from_mapping, option, suggest, to_mapping
from gloria.errors import UserError
from gloria.model.families import FAMILIES, GLOBAL, LOCAL, MAX_LAYERS, Family, by_turns, fields_of_config


@dataclass(frozen=True)
class TransformerConfig:
    """Everything that decides a model's parameters and the function they compute."""

    architecture: str = option(help="a family of FAMILIES", choices=tuple(FAMILIES))
    num_layers: int = option(minimum=1, maximum=MAX_LAYERS)
    hidden_size: int = option(minimum=1)
    num_heads: int = option(minimum=1)
    intermediate_size: int = option(help="width of the MLP's hidden layer", minimum=1)
    max_positions: int = option(help="learned positions, so the longest sequence", minimum=1)
    vocab_size: int = option(help="tokens that can be predicted", minimum=1)
    attention_layers: tuple[str, ...] = option(help="of each layer", choices=(GLOBAL, LOCAL))
    window_size: int = option(help="tokens a local layer looks back on, itself included; 0: no layer is", minimum=0)
    dropout: float = option(0.0, "of embeddings, attention weights and residual branches alike", minimum=0.0)
    layer_norm_epsilon: float = option(1e-5, above=0.0)
    init_std: float = option(0.02, above=0.0)

    @property
    def family(self) -> Family:
        """The flags that all models of the family share."""
        return FAMILIES[self.architecture]

    @property
    def padded_vocab(self) -> int:
        """Rows of the embedding: the vocabulary rounded up to 128, for tensor cores and for even shards."""
        return -(-self.vocab_size // 128) * 128

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_heads

    @property
    def windows(self) -> tuple[int, ...]:
        """Tokens that each layer looks back on; 0: all of them."""
        return tuple(self.window_size if kind == LOCAL else 0 for kind in self.attention_layers)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values; `from_dict` is the inverse."""
        return to_mapping(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> TransformerConfig:
        """The shape that a checkpoint's trainer.json holds; `UserError` where the values describe no model."""
        shape = from_mapping(cls, values, "trainer.json: model")
        if len(shape.attention_layers) != shape.num_layers or shape.hidden_size % shape.num_heads:
            raise UserError("trainer.json: model: its layers and heads do not fit its sizes; use another checkpoint")
        return shape


def _preset(architecture: str, num_layers: int, hidden_size: int, num_heads: int) -> TransformerConfig:
    defaults = {name: default for name, (_, default) in FAMILIES[architecture].sizes.items()}
    given: dict[str, Any] = {"num_layers": num_layers, "hidden_size": hidden_size, "num_heads": num_heads}
    given |= {"intermediate_size": 4 * hidden_size, "attention_layers": by_turns(architecture, num_layers)}
    return TransformerConfig(architecture, **{"window_size": 0, **defaults, **given})


PRESETS: dict[str, TransformerConfig] = {
    "gpt2-124m": _preset("gpt2", 12, 768, 12),
    "gpt2-355m": _preset("gpt2", 24, 1024, 16),
    "gpt2-774m": _preset("gpt2", 36, 1280, 20),
    "gpt2-1.5b": _preset("gpt2", 48, 1600, 25),
    "gpt-neo-125m": _preset("gpt-neo", 12, 768, 12),
    "gpt-neo-350m": _preset("gpt-neo", 24, 1024, 16),
    "gpt-neo-1.3b": _preset("gpt-neo", 24, 2048, 16),
    "gpt-neo-2.7b": _preset("gpt-neo", 32, 2560, 20),
    # The models of arXiv 2402.12969: the shapes of GPT-Neo, with a tokenizer of their own.
    "gloria-1.3b": _preset("gpt-neo", 24, 2048, 16),
    "gloria-2.7b": _preset("gpt-neo", 32, 2560, 20),
    "demo": replace(_preset("gpt-neo", 4, 128, 4), vocab_size=2048, max_positions=256, window_size=64),
}


@dataclass(frozen=True)
class ModelSection:
    """The recipe's [model] section: a preset or a folder to start from, and what differs from the preset."""

    preset: str | None = option(
        None,
        f"a shape, trained from random weights: {', '.join(PRESETS)}; "
        "vLLM and llama.cpp (gguf) serve GPT-2, not GPT-Neo",
    )
    from_: str | None = option(
        None, "a Hugging Face folder of GPT-2 or GPT-Neo on disk: its shape, and its weights to start from"
    )
    num_layers: int | None = option(None, "layers; default: the preset's", minimum=1)
    hidden_size: int | None = option(
        None, "width of the residual stream; default: the preset's; num_heads must divide it", minimum=1
    )
    num_heads: int | None = option(None, "attention heads; default: the preset's", minimum=1)
    intermediate_size: int | None = option(
        None, "width inside the MLP; default: 4 * hidden_size, as both families have it", minimum=1
    )
    max_positions: int | None = option(
        None,
        "tokens the model can ever see at once; default: the preset's; at least sequence_length",
        minimum=1,
    )
    window_size: int | None = option(
        None, "tokens a local layer of GPT-Neo looks back on; default: the preset's", minimum=1
    )
    vocab_size: int | None = option(
        None, "tokens; default: the tokenizer's; more leaves room for tokens to come", minimum=1
    )
    dropout: float = option(
        0.0,
        "share of embeddings, attention weights and residual branches zeroed in training, also with `from`; "
        "above 0 the losses depend on the number of ranks",
        minimum=0.0,
        maximum=0.9,
    )


# What a preset (and never a folder, whose weights have their shape) may be given differently: all but these.
_SIZES = [item.name for item in fields(ModelSection) if item.name not in ("preset", "from_", "dropout")]


def resolve_shape(config: ModelSection, *, vocab_size: int, sequence_length: int) -> TransformerConfig:
    """The shape that a recipe requests; `vocab_size` is the tokenizer's. `UserError` has every contradiction."""
    preset, folder = config.preset, config.from_
    if preset is not None and folder is not None:
        raise UserError(f'model: preset "{preset}" and from "{folder}" are both given; keep one')
    if preset is None and folder is None:
        raise UserError(
            "model: neither preset nor from is given; set model.preset to a shape (gpt-neo-125m) or "
            "model.from to a Hugging Face folder"
        )
    if preset is not None and preset not in PRESETS:
        raise UserError(f'model.preset: unknown preset "{preset}"; {suggest(preset, PRESETS)}')
    given = {name: value for name in _SIZES if (value := getattr(config, name)) is not None}
    problems = []
    if folder is not None:
        shape = replace(read_shape(folder), dropout=config.dropout)
        problems += [
            f"model.{name}: {value} contradicts the {own} of {folder}; leave it out"
            for name, value in given.items()
            if value != (own := getattr(shape, name))
        ]
        small = (
            f"model.from: the vocabulary of {folder} ({shape.vocab_size}) is smaller than the "
            f"tokenizer's ({vocab_size}); prepare the corpus with that folder's tokenizer"
        )
        short = f"the {shape.max_positions} positions of {folder}; shorten it"
    else:
        assert preset is not None
        shape = PRESETS[preset]
        sizes = {"vocab_size": vocab_size, "dropout": config.dropout, **given}
        sizes.setdefault("intermediate_size", 4 * sizes.get("hidden_size", shape.hidden_size))
        layers = by_turns(shape.architecture, sizes.get("num_layers", shape.num_layers))
        shape = replace(shape, attention_layers=layers, **sizes)
        if shape.hidden_size % shape.num_heads:
            problems.append(
                f"model.num_heads: {shape.num_heads} does not divide hidden_size {shape.hidden_size}; choose a divisor"
            )
        if config.window_size is not None and LOCAL not in shape.family.attention_kinds:
            problems.append(
                f"model.window_size: {config.window_size} is given, but {preset} has no local layers; leave it out"
            )
        small = (
            f"model.vocab_size: {shape.vocab_size} is smaller than the tokenizer's {vocab_size}; "
            "leave it out or raise it"
        )
        short = (
            f"the model's {shape.max_positions} positions; shorten it or set model.max_positions to {sequence_length}"
        )
    if shape.vocab_size < vocab_size:
        problems.append(small)
    if sequence_length > shape.max_positions:
        problems.append(f"train.sequence_length: {sequence_length} exceeds {short}")
    if problems:
        raise UserError(*problems)
    return shape


def read_shape(folder: str | Path) -> TransformerConfig:
    """The shape in a Hugging Face folder's config.json, with dropout 0 (the recipe decides on dropout)."""
    return TransformerConfig(**fields_of_config(folder))


def parameter_shapes(shape: TransformerConfig) -> dict[str, tuple[int, ...]]:
    """Every parameter of our model by name, in the model's own order: linear weights are (out, in)."""
    hidden, inner = shape.hidden_size, shape.intermediate_size
    sizes: dict[str, tuple[int, ...]] = {
        "transformer.wte.weight": (shape.padded_vocab, hidden),
        "transformer.wpe.weight": (shape.max_positions, hidden),
    }
    for layer in range(shape.num_layers):
        block = f"transformer.h.{layer}"
        sizes[f"{block}.ln_1.weight"] = sizes[f"{block}.ln_1.bias"] = (hidden,)
        fused: tuple[str, ...] = ("c_attn",)
        width = 3 * hidden
        if not shape.family.fused_qkv:
            fused, width = tuple(f"attention.{name}_proj" for name in "kvq"), hidden
        for projection in fused:
            sizes[f"{block}.attn.{projection}.weight"] = (width, hidden)
            if shape.family.qkv_bias:
                sizes[f"{block}.attn.{projection}.bias"] = (width,)
        output = f"{block}.attn.{'c_proj' if shape.family.fused_qkv else 'attention.out_proj'}"
        sizes[f"{output}.weight"], sizes[f"{output}.bias"] = (hidden, hidden), (hidden,)
        sizes[f"{block}.ln_2.weight"] = sizes[f"{block}.ln_2.bias"] = (hidden,)
        sizes[f"{block}.mlp.c_fc.weight"], sizes[f"{block}.mlp.c_fc.bias"] = (inner, hidden), (inner,)
        sizes[f"{block}.mlp.c_proj.weight"], sizes[f"{block}.mlp.c_proj.bias"] = (hidden, inner), (hidden,)
    sizes["transformer.ln_f.weight"] = sizes["transformer.ln_f.bias"] = (hidden,)
    return sizes


def count_parameters(shape: TransformerConfig) -> dict[str, int]:
    """Parameters by part and in all: the tied head once, rows that only pad the vocabulary not at all."""
    counts = dict.fromkeys(("token_embedding", "position_embedding", "attention", "mlp", "layer_norm"), 0)
    for name, size in parameter_shapes(shape).items():
        elements = math.prod(size)
        if ".wte." in name:
            counts["token_embedding"] += shape.vocab_size * shape.hidden_size
        elif ".wpe." in name:
            counts["position_embedding"] += elements
        elif ".attn." in name:
            counts["attention"] += elements
        elif ".mlp." in name:
            counts["mlp"] += elements
        else:
            counts["layer_norm"] += elements
    return {**counts, "total": sum(counts.values())}


def flops_per_token(shape: TransformerConfig, sequence_length: int) -> int:
    """Floating-point operations of forward and backward for one token, as MFU counts them.

    6 N + 12 d sum(reach), the convention of PaLM (arXiv 2204.02311, appendix B) and nanoGPT: N are all
    parameters without the position embeddings (the tied token embedding once, for the head); a global layer
    reaches `sequence_length` keys (causality is not discounted), a local layer only its window. Recomputation
    by activation checkpointing does not count.
    """
    counts = count_parameters(shape)
    reach = sum(min(sequence_length, window or sequence_length) for window in shape.windows)
    return 6 * (counts["total"] - counts["position_embedding"]) + 12 * shape.hidden_size * reach
