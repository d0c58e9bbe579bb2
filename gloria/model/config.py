"""What a model's shape is: presets, the recipe's [model] section, Hugging Face's config.json, and counts.

Imports no torch, so that a recipe is checked, and its parameters told, before anything heavy is loaded.
"""

from __future__ import annotations

import dataclasses
import json
import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from gloria.config.cli import option, suggest
from gloria.errors import UserError

GLOBAL, LOCAL = "global", "local"


@dataclass(frozen=True)
class TransformerConfig:
    """Everything that decides a model's parameters and the function they compute."""

    architecture: str  # "gpt2" or "gpt-neo"
    num_layers: int
    hidden_size: int
    num_heads: int
    intermediate_size: int  # width of the MLP's hidden layer
    max_positions: int  # learned positions, so the longest sequence
    vocab_size: int  # tokens that can be predicted
    attention_layers: tuple[str, ...]  # "global" or "local" for each layer
    window_size: int  # tokens a local layer looks back on, itself included; 0 where no layer is local
    dropout: float = 0.0  # of embeddings, attention weights and residual branches alike
    layer_norm_epsilon: float = 1e-5
    init_std: float = 0.02

    @property
    def padded_vocab(self) -> int:
        """Rows of the embedding: the vocabulary rounded up to 128, for tensor cores and for even shards."""
        return -(-self.vocab_size // 128) * 128

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_heads

    @property
    def attention_scale(self) -> float | None:
        """What scores are multiplied with: None is 1/sqrt(head_dim) (GPT-2); GPT-Neo does not scale."""
        return None if self.architecture == "gpt2" else 1.0

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values; `from_dict` is the inverse."""
        return {**dataclasses.asdict(self), "attention_layers": list(self.attention_layers)}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> TransformerConfig:
        return cls(**{**values, "attention_layers": tuple(values["attention_layers"])})


def _attention_layers(architecture: str, num_layers: int) -> tuple[str, ...]:
    if architecture == "gpt2":
        return (GLOBAL,) * num_layers
    return tuple(LOCAL if layer % 2 else GLOBAL for layer in range(num_layers))


def _preset(architecture: str, num_layers: int, hidden_size: int, num_heads: int) -> TransformerConfig:
    is_gpt2 = architecture == "gpt2"
    return TransformerConfig(
        architecture=architecture,
        num_layers=num_layers,
        hidden_size=hidden_size,
        num_heads=num_heads,
        intermediate_size=4 * hidden_size,
        max_positions=1024 if is_gpt2 else 2048,
        vocab_size=50257,
        attention_layers=_attention_layers(architecture, num_layers),
        window_size=0 if is_gpt2 else 256,
    )


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

    preset: str | None = option(None, f"a shape, trained from random weights: {', '.join(PRESETS)}")
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


# What a preset (and never a folder, whose weights have their shape) may be given differently.
_SIZES = (
    "num_layers",
    "hidden_size",
    "num_heads",
    "intermediate_size",
    "max_positions",
    "window_size",
    "vocab_size",
)


def resolve_shape(config: ModelSection, *, vocab_size: int, sequence_length: int) -> TransformerConfig:
    """The shape a recipe asks for; `vocab_size` is the tokenizer's. `UserError` has every contradiction."""
    if config.preset is not None and config.from_ is not None:
        raise UserError(f'model: preset "{config.preset}" and from "{config.from_}" are both given; keep one')
    if config.from_ is not None:
        return _shape_of_folder(config, vocab_size, sequence_length)
    if config.preset is None:
        raise UserError(
            "model: neither preset nor from is given; set model.preset to a shape (gpt-neo-125m) or "
            "model.from to a Hugging Face folder"
        )
    if config.preset not in PRESETS:
        raise UserError(f'model.preset: unknown preset "{config.preset}"; {suggest(config.preset, PRESETS)}')
    return _shape_of_preset(config, vocab_size, sequence_length)


def _shape_of_preset(config: ModelSection, vocab_size: int, sequence_length: int) -> TransformerConfig:
    preset = PRESETS[config.preset]
    given = {name: getattr(config, name) for name in _SIZES if getattr(config, name) is not None}
    sizes = {"vocab_size": vocab_size, "dropout": config.dropout, **given}
    sizes.setdefault("intermediate_size", 4 * sizes.get("hidden_size", preset.hidden_size))
    num_layers = sizes.get("num_layers", preset.num_layers)
    shape = replace(preset, attention_layers=_attention_layers(preset.architecture, num_layers), **sizes)
    problems = []
    if shape.hidden_size % shape.num_heads:
        problems.append(
            f"model.num_heads: {shape.num_heads} does not divide hidden_size {shape.hidden_size}; choose a divisor"
        )
    if config.window_size is not None and shape.architecture == "gpt2":
        problems.append(
            f"model.window_size: {config.window_size} is given, but {config.preset} has no local layers; leave it out"
        )
    if shape.vocab_size < vocab_size:
        problems.append(
            f"model.vocab_size: {shape.vocab_size} is smaller than the tokenizer's {vocab_size}; "
            "leave it out or raise it"
        )
    if sequence_length > shape.max_positions:
        problems.append(
            f"train.sequence_length: {sequence_length} exceeds the model's {shape.max_positions} positions; "
            f"shorten it or set model.max_positions to {sequence_length}"
        )
    if problems:
        raise UserError(*problems)
    return shape


def _shape_of_folder(config: ModelSection, vocab_size: int, sequence_length: int) -> TransformerConfig:
    shape = replace(read_shape(config.from_), dropout=config.dropout)
    problems = [
        f"model.{name}: {given} contradicts the {own} of {config.from_}; leave it out"
        for name in _SIZES
        if (given := getattr(config, name)) not in (None, own := getattr(shape, name))
    ]
    if shape.vocab_size < vocab_size:
        problems.append(
            f"model.from: the vocabulary of {config.from_} ({shape.vocab_size}) is smaller than the "
            f"tokenizer's ({vocab_size}); prepare the corpus with that folder's tokenizer"
        )
    if sequence_length > shape.max_positions:
        problems.append(
            f"train.sequence_length: {sequence_length} exceeds the {shape.max_positions} positions of "
            f"{config.from_}; shorten it"
        )
    if problems:
        raise UserError(*problems)
    return shape


# Our name -> (key in config.json, the value transformers takes when the key is missing).
_INTEGERS = {
    "gpt2": {
        "num_layers": ("n_layer", 12),
        "hidden_size": ("n_embd", 768),
        "num_heads": ("n_head", 12),
        "intermediate_size": ("n_inner", None),
        "max_positions": ("n_positions", 1024),
        "vocab_size": ("vocab_size", 50257),
    },
    "gpt_neo": {
        "num_layers": ("num_layers", 24),
        "hidden_size": ("hidden_size", 2048),
        "num_heads": ("num_heads", 16),
        "intermediate_size": ("intermediate_size", None),
        "max_positions": ("max_position_embeddings", 2048),
        "vocab_size": ("vocab_size", 50257),
        "window_size": ("window_size", 256),
    },
}
_NUMBERS = {"layer_norm_epsilon": 1e-5, "initializer_range": 0.02}
# Switches that change what the model computes, and the only value our model has of each.
_SWITCHES = {
    "activation_function": "gelu_new",
    "tie_word_embeddings": True,
    "scale_attn_weights": True,
    "scale_attn_by_inverse_layer_idx": False,
    "add_cross_attention": False,
}


def read_shape(folder: str | Path) -> TransformerConfig:
    """The shape in a Hugging Face folder's config.json, with dropout 0 (the recipe decides on dropout).

    Missing keys take the values that transformers gives them. A model that is neither GPT-2 nor GPT-Neo, or a
    variant that computes something else, is a `UserError` with a line for each obstacle.
    """
    path = Path(folder) / "config.json"
    values = _read_config(path)
    model_type = values.get("model_type")
    if model_type not in _INTEGERS:
        raise UserError(
            f"{path}: model_type {json.dumps(model_type)} is not supported; give a folder of model_type "
            '"gpt2" or "gpt_neo"'
        )
    problems = [
        f"{path}: {key} {json.dumps(values[key])} is not supported; only {json.dumps(only)} is"
        for key, only in _SWITCHES.items()
        if values.get(key, only) != only
    ]
    sizes = {}
    for name, (key, default) in _INTEGERS[model_type].items():
        value = values.get(key, default)
        if value is None and name == "intermediate_size":
            value = 4 * sizes["hidden_size"]
        sizes[name] = value
        if type(value) is not int or value < 1:
            problems.append(f"{path}: {key} must be a positive whole number, not {json.dumps(value)}; mend it")
            sizes[name] = 1
    numbers = {key: values.get(key, default) for key, default in _NUMBERS.items()}
    for key, value in numbers.items():
        if type(value) not in (int, float) or not value > 0:
            problems.append(f"{path}: {key} must be a positive number, not {json.dumps(value)}; mend it")
    if problems:
        raise UserError(*problems)
    if sizes["hidden_size"] % sizes["num_heads"]:
        raise UserError(
            f"{path}: {sizes['num_heads']} heads don't divide the hidden size {sizes['hidden_size']}; mend it"
        )
    if model_type == "gpt2":
        layers = _attention_layers("gpt2", sizes["num_layers"])
    else:
        layers = _expand_attention_types(path, values.get("attention_types"), sizes["num_layers"])
    return TransformerConfig(
        architecture=model_type.replace("_", "-"),
        attention_layers=layers,
        layer_norm_epsilon=float(numbers["layer_norm_epsilon"]),
        init_std=float(numbers["initializer_range"]),
        **{"window_size": 0, **sizes},
    )


def _read_config(path: Path) -> dict[str, Any]:
    if not path.parent.is_dir():
        raise UserError(f"{path.parent}: no such folder; give a Hugging Face folder on disk (download the model first)")
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; give a Hugging Face folder, which has one") from None
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise UserError(f"{path}: is not JSON ({error}); copy the folder again") from None
    if not isinstance(values, dict):
        raise UserError(f"{path}: is not a JSON object; copy the folder again")
    return values


def _expand_attention_types(path: Path, attention_types: Any, num_layers: int) -> tuple[str, ...]:
    """`[[["global", "local"], 12]]` is 24 layers by turns, and also what a missing value means."""
    if attention_types is None:
        attention_types = [[[GLOBAL, LOCAL], 12]]
    try:
        layers = tuple(kind for kinds, times in attention_types for _ in range(times) for kind in kinds)
    except (TypeError, ValueError):
        layers = ()
    if not layers or not set(layers) <= {GLOBAL, LOCAL}:
        raise UserError(
            f"{path}: attention_types {json.dumps(attention_types)} is not of the form "
            '[[["global", "local"], N]]; mend it'
        )
    if len(layers) != num_layers:
        raise UserError(f"{path}: attention_types names {len(layers)} layers but num_layers is {num_layers}; mend it")
    return layers


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
        if shape.architecture == "gpt2":
            sizes[f"{block}.attn.c_attn.weight"] = (3 * hidden, hidden)
            sizes[f"{block}.attn.c_attn.bias"] = (3 * hidden,)
            output = f"{block}.attn.c_proj"
        else:
            for projection in ("k_proj", "v_proj", "q_proj"):
                sizes[f"{block}.attn.attention.{projection}.weight"] = (hidden, hidden)
            output = f"{block}.attn.attention.out_proj"
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
    reach = sum(
        sequence_length if kind == GLOBAL else min(sequence_length, shape.window_size)
        for kind in shape.attention_layers
    )
    return 6 * (counts["total"] - counts["position_embedding"]) + 12 * shape.hidden_size * reach
