"""A model's shape: presets, the recipe's [model] section, and counts of parameters and operations. Imports no torch."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from gloria.config.cli import from_mapping, option, suggest, to_mapping
from gloria.data.tokenizer import other_meanings, tokenizer_fingerprint
from gloria.errors import UserError
from gloria.model.config_json import fields_of_config
from gloria.model.families import FAMILIES, GLOBAL, LOCAL, MAX_LAYERS, Family, RopeScaling, by_turns


@dataclass(frozen=True)
class TransformerConfig:
    """Everything that decides a model's parameters and the function they compute."""

    architecture: str = option(help="a family of FAMILIES", choices=tuple(FAMILIES))
    num_layers: int = option(minimum=1, maximum=MAX_LAYERS)
    hidden_size: int = option(minimum=1)
    num_heads: int = option(minimum=1)
    intermediate_size: int = option(help="width of the MLP's hidden layer", minimum=1)
    max_positions: int = option(
        help="the longest sequence: positions learned, or rotary ones it is made for", minimum=1
    )
    vocab_size: int = option(help="tokens that can be predicted", minimum=1)
    attention_layers: tuple[str, ...] = option(help="of each layer", choices=(GLOBAL, LOCAL))
    window_size: int = option(help="tokens a local layer looks back on, itself included; 0: no layer is", minimum=0)
    dropout: float = option(0.0, "of embeddings, attention weights and residual branches alike", minimum=0.0)
    layer_norm_epsilon: float = option(1e-5, "of norms of either kind", above=0.0)
    init_std: float = option(0.02, above=0.0)
    # Checkpoints of older versions lack these: the defaults are what GPT-2 and GPT-Neo are.
    num_kv_heads: int | None = option(
        None, "heads of keys and values, each for as many queries' (arXiv 2305.13245); None: num_heads", minimum=1
    )
    head_size: int | None = option(None, "width of a head; None: hidden_size / num_heads", minimum=1)
    tied_head: bool = option(True, "the head is the token embedding; otherwise it has weights of its own")
    rope_theta: float = option(10_000.0, "base of the wave lengths of rotary positions", above=0.0)
    rope_scaling: RopeScaling | None = None

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
        return self.head_size or self.hidden_size // self.num_heads

    @property
    def kv_heads(self) -> int:
        """Heads of keys and values."""
        return self.num_kv_heads or self.num_heads

    @property
    def query_width(self) -> int:
        """Elements of a token's queries; of its keys, and of its values, `kv_width`."""
        return self.num_heads * self.head_dim

    @property
    def kv_width(self) -> int:
        return self.kv_heads * self.head_dim

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
        if len(shape.attention_layers) != shape.num_layers or _misfit(shape):
            raise UserError("trainer.json: model: its layers and heads do not fit its sizes; use another checkpoint")
        return shape


def _misfit(shape: TransformerConfig) -> str:
    """Which number of heads does not fit the shape, and how; "" where all do."""
    if shape.head_size is None and shape.hidden_size % shape.num_heads:
        return f"num_heads: {shape.num_heads} does not divide hidden_size {shape.hidden_size}"
    if shape.num_heads % shape.kv_heads:
        return f"num_kv_heads: {shape.kv_heads} does not divide num_heads {shape.num_heads}"
    if shape.family.rotary and shape.head_dim % 2:
        return f"num_heads: {shape.num_heads} makes heads of {shape.head_dim}, an odd number for rotary positions"
    return ""


def _preset(architecture: str, num_layers: int, hidden_size: int, num_heads: int, **more: Any) -> TransformerConfig:
    defaults = {name: default for name, (_, default) in FAMILIES[architecture].sizes.items()}
    given: dict[str, Any] = {"num_layers": num_layers, "hidden_size": hidden_size, "num_heads": num_heads}
    given |= {"intermediate_size": 4 * hidden_size, "attention_layers": by_turns(architecture, num_layers)}
    return TransformerConfig(architecture, **{"window_size": 0, **defaults, **given, **more})


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
    # Tucano's shapes (arXiv 2411.07854), the last one TinyLlama's (arXiv 2401.02385).
    "llama-160m": _preset("llama", 12, 768, 12, tied_head=False),
    "llama-630m": _preset("llama", 14, 2048, 16, num_kv_heads=4, intermediate_size=4096, tied_head=False),
    "llama-1b": _preset("llama", 22, 2048, 32, num_kv_heads=4, intermediate_size=5632, tied_head=False),
    # Allal et al. 2025 (arXiv 2502.02737)
    "smollm-135m": _preset("llama", 30, 576, 9, num_kv_heads=3, intermediate_size=1536, vocab_size=49152),
    "demo": replace(_preset("gpt-neo", 4, 128, 4), vocab_size=2048, max_positions=256, window_size=64),
}


@dataclass(frozen=True)
class ModelSection:
    """The recipe's [model] section: a preset or a folder to start from, and what differs from the preset."""

    preset: str | None = option(
        None,
        f"a shape, trained from random weights: {', '.join(PRESETS)}; "
        "vLLM and llama.cpp (gguf) serve GPT-2 and LLaMA, not GPT-Neo",
    )
    from_: str | None = option(
        None,
        "a Hugging Face folder on disk, of GPT-2, GPT-Neo, LLaMA, Mistral, Qwen2 or Qwen3: its shape, and its weights "
        "to start from",
    )
    num_layers: int | None = option(None, "layers; default: the preset's", minimum=1)
    hidden_size: int | None = option(
        None, "width of the residual stream; default: the preset's; num_heads must divide it", minimum=1
    )
    num_heads: int | None = option(None, "attention heads; default: the preset's", minimum=1)
    num_kv_heads: int | None = option(
        None, "heads of keys and values of a llama; num_heads is a multiple; default: the preset's", minimum=1
    )
    intermediate_size: int | None = option(
        None,
        "width inside the MLP; default: in the preset's proportion to hidden_size, 4 for GPT-2 and GPT-Neo",
        minimum=1,
    )
    max_positions: int | None = option(
        None,
        "tokens the model can ever see at once; default: the preset's or the folder's, which can be raised where "
        "positions are rotary; at least sequence_length",
        minimum=1,
    )
    window_size: int | None = option(
        None, "tokens a local layer of GPT-Neo looks back on; default: the preset's", minimum=1
    )
    vocab_size: int | None = option(
        None,
        "tokens; default: the tokenizer's, or the folder's; more leaves room for tokens to come, and behind a folder's "
        "own they begin as their mean",
        minimum=1,
    )
    dropout: float = option(
        0.0,
        "share of embeddings, attention weights and residual branches zeroed in training, also with `from`; "
        "above 0 the losses depend on the number of ranks",
        minimum=0.0,
        maximum=0.9,
    )


EMBEDDING, HEAD = "transformer.wte.weight", "lm_head.weight"  # parameters with a row for each token
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
        own = read_shape(folder)
        grown = {name: value for name, value in given.items() if name in _may_grow(own) and value > getattr(own, name)}
        shape = replace(own, dropout=config.dropout, **grown)
        kept = {**{name: getattr(shape, name) for name in given}, "num_kv_heads": shape.kv_heads}
        problems += [
            f"model.{name}: {value} contradicts the {kept[name]} of {folder}; leave it out"
            for name, value in given.items()
            if value != kept[name]
        ]
        small = (
            f"model.from: the vocabulary of {folder} ({shape.vocab_size}) is smaller than the tokenizer's "
            f"({vocab_size}); prepare the corpus with that folder's tokenizer, or, if it is that one with more tokens, "
            f"set model.vocab_size to {vocab_size}"
        )
        short = f"the {shape.max_positions} positions of {folder}; shorten it"
        if shape.family.rotary:
            short += f", or set model.max_positions to {sequence_length}, beyond what it was made for"
    else:
        assert preset is not None
        shape = PRESETS[preset]
        sizes = {"vocab_size": vocab_size, "dropout": config.dropout, **given}
        hidden = sizes.get("hidden_size", shape.hidden_size)
        sizes.setdefault("intermediate_size", hidden * shape.intermediate_size // shape.hidden_size)
        layers = by_turns(shape.architecture, sizes.get("num_layers", shape.num_layers))
        shape = replace(shape, attention_layers=layers, **sizes)
        if misfit := _misfit(shape):
            problems.append(f"model.{misfit}; choose another")
        if config.window_size is not None and LOCAL not in shape.family.attention_kinds:
            problems.append(
                f"model.window_size: {config.window_size} is given, but {preset} has no local layers; leave it out"
            )
        if config.num_kv_heads is not None and "num_kv_heads" not in shape.family.sizes:
            problems.append(
                f"model.num_kv_heads: {config.num_kv_heads} is given, but {preset} has none of its own; leave it out"
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


def start_warnings(config: ModelSection, shape: TransformerConfig, tokenizer_folder: Path) -> list[str]:
    """What to know, before the first step, of the folder that a run starts from; `tokenizer_folder` is the corpus's."""
    folder = config.from_
    if folder is None:
        return []
    own, found = read_shape(folder), []
    if new := shape.vocab_size - own.vocab_size:
        found.append(f"model.vocab_size: {new} tokens are new to {folder}; they begin as the mean of its own")
    if shape.max_positions > own.max_positions:
        found.append(f"model.max_positions: {folder} was made for {own.max_positions}, and has to learn the others")
    path = Path(folder, "tokenizer.json")
    remedy = "prepare the corpus with that folder as tokenizer.path"
    if not path.is_file():
        found.append(f"model.from: {path} is not there, so whether the corpus has its tokens is unknown")
    elif tokenizer_fingerprint(folder) != tokenizer_fingerprint(tokenizer_folder):
        others, tokens = other_meanings(tokenizer_folder, folder)
        what = f"{path} has the corpus's tokens, and may cut text into others of them"
        if others > new:
            what = f"{others} of the corpus's {tokens} tokens are others in {path}"
        found.append(f"model.from: {what}; {remedy}")
    return found


def read_shape(folder: str | Path) -> TransformerConfig:
    """The shape in a Hugging Face folder's config.json, with dropout 0 (the recipe decides on dropout)."""
    return TransformerConfig(**fields_of_config(folder))


def _may_grow(shape: TransformerConfig) -> tuple[str, ...]:
    """What a folder's model may have more of: rows for new tokens, and positions that are no weights."""
    return ("vocab_size", "max_positions") if shape.family.rotary else ("vocab_size",)


def parameter_shapes(shape: TransformerConfig) -> dict[str, tuple[int, ...]]:
    """Every parameter of our model by name, in the model's own order: linear weights are (out, in)."""
    hidden, inner, family = shape.hidden_size, shape.intermediate_size, shape.family
    sizes: dict[str, tuple[int, ...]] = {}

    def linear(name: str, rows: int, columns: int, bias: bool) -> None:
        sizes[f"{name}.weight"] = (rows, columns)
        if bias:
            sizes[f"{name}.bias"] = (rows,)

    def norm(name: str, width: int = hidden) -> None:
        sizes[f"{name}.weight"] = (width,)
        if not family.rms_norm:
            sizes[f"{name}.bias"] = (width,)

    sizes["transformer.wte.weight"] = (shape.padded_vocab, hidden)
    if not family.rotary:
        sizes["transformer.wpe.weight"] = (shape.max_positions, hidden)
    for layer in range(shape.num_layers):
        block = f"transformer.h.{layer}"
        norm(f"{block}.ln_1")
        if family.fused_qkv:
            linear(f"{block}.attn.c_attn", shape.query_width + 2 * shape.kv_width, hidden, family.qkv_bias)
            linear(f"{block}.attn.c_proj", hidden, shape.query_width, family.bias)
        else:
            attention = f"{block}.attn.attention"
            for name, width in (("k", shape.kv_width), ("v", shape.kv_width), ("q", shape.query_width)):
                linear(f"{attention}.{name}_proj", width, hidden, family.qkv_bias)
            linear(f"{attention}.out_proj", hidden, shape.query_width, family.bias)
            if family.qk_norm:
                norm(f"{attention}.q_norm", shape.head_dim)
                norm(f"{attention}.k_norm", shape.head_dim)
        norm(f"{block}.ln_2")
        for name in ("c_gate", "c_fc") if family.gated_mlp else ("c_fc",):
            linear(f"{block}.mlp.{name}", inner, hidden, family.bias)
        linear(f"{block}.mlp.c_proj", hidden, inner, family.bias)
    norm("transformer.ln_f")
    if not shape.tied_head:
        sizes[HEAD] = (shape.padded_vocab, hidden)
    return sizes


def count_parameters(shape: TransformerConfig) -> dict[str, int]:
    """Parameters by part and in all: a tied head once, rows that only pad the vocabulary not at all."""
    counts = dict.fromkeys(("token_embedding", "position_embedding", "attention", "mlp", "norms", "head"), 0)
    marks = {"norm": "norms", ".ln_": "norms", ".attn.": "attention", ".mlp.": "mlp", ".wpe.": "position_embedding"}
    marks |= {EMBEDDING: "token_embedding", HEAD: "head"}
    for name, size in parameter_shapes(shape).items():
        part = next(part for mark, part in marks.items() if mark in name)
        counts[part] += math.prod((shape.vocab_size, *size[1:]) if name in (EMBEDDING, HEAD) else size)
    return {**{part: count for part, count in counts.items() if count}, "total": sum(counts.values())}


def flops_per_token(shape: TransformerConfig, sequence_length: int) -> int:
    """Floating-point operations of forward and backward for one token, as MFU counts them.

    6 N + 12 q sum(reach), the convention of PaLM (arXiv 2204.02311, appendix B) and nanoGPT: N are all parameters but
    those that are only looked up (position embeddings, and the token embedding where the head has its own weights), q
    is the width of the queries; a global layer reaches `sequence_length` keys (causality is not discounted), a local
    layer only its window. Recomputation by activation checkpointing does not count.
    """
    counts = count_parameters(shape)
    looked_up = counts.get("position_embedding", 0) + (0 if shape.tied_head else counts["token_embedding"])
    reach = sum(min(sequence_length, window or sequence_length) for window in shape.windows)
    return 6 * (counts["total"] - looked_up) + 12 * shape.query_width * reach
