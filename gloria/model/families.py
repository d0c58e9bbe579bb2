"""The model families as a table: what all models of a family share, and how config.json describes one of them.

An entry of FAMILIES is all that is known of a family by name; the transformer reads its flags. Imports no torch.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gloria.errors import UserError
from gloria.files import read_json_object

GLOBAL, LOCAL = "global", "local"
# Far above any model: a larger number in a file would only use up memory and time before something else fails.
MAX_LAYERS, MAX_SIZE = 10_000, 2**31 - 1


@dataclass(frozen=True)
class Family:
    """What the models of a family share: first what they compute, then how Hugging Face's folders describe them."""

    fused_qkv: bool  # one projection gives queries, keys and values; otherwise one each
    qkv_bias: bool
    attention_scale: float | None  # factor of the attention scores; None: 1/sqrt(head_dim)
    attention_kinds: tuple[str, ...]  # "global" or "local", which the layers take by turns

    model_type: str
    model_class: str  # of transformers, with the language model's head
    sizes: dict[str, tuple[str, int | None]]  # our name -> (key, what transformers takes where the key is missing)
    dropouts: tuple[str, ...]  # keys of the dropout rates
    fixed: dict[str, Any]  # keys that change what a model computes, with the only value that ours has of each
    transposed: str = r"(?!)"  # pattern of the weights that a folder keeps as (in, out); this one matches nothing


FAMILIES = {
    # Radford et al. 2019
    "gpt2": Family(
        fused_qkv=True,
        qkv_bias=True,
        attention_scale=None,
        attention_kinds=(GLOBAL,),
        model_type="gpt2",
        model_class="GPT2LMHeadModel",
        sizes={
            "num_layers": ("n_layer", 12),
            "hidden_size": ("n_embd", 768),
            "num_heads": ("n_head", 12),
            "intermediate_size": ("n_inner", None),
            "max_positions": ("n_positions", 1024),
            "vocab_size": ("vocab_size", 50257),
        },
        dropouts=("embd_pdrop", "attn_pdrop", "resid_pdrop"),
        fixed={
            "activation_function": "gelu_new",
            "tie_word_embeddings": True,
            "scale_attn_weights": True,
            "scale_attn_by_inverse_layer_idx": False,
            "add_cross_attention": False,
        },
        transposed=r"\.(attn\.c_attn|attn\.c_proj|mlp\.c_fc|mlp\.c_proj)\.weight$",  # transformers' Conv1D
    ),
    # Black et al. 2021 (doi 10.5281/zenodo.5297715)
    "gpt-neo": Family(
        fused_qkv=False,
        qkv_bias=False,
        attention_scale=1.0,
        attention_kinds=(GLOBAL, LOCAL),
        model_type="gpt_neo",
        model_class="GPTNeoForCausalLM",
        sizes={
            "num_layers": ("num_layers", 24),
            "hidden_size": ("hidden_size", 2048),
            "num_heads": ("num_heads", 16),
            "intermediate_size": ("intermediate_size", None),
            "max_positions": ("max_position_embeddings", 2048),
            "vocab_size": ("vocab_size", 50257),
            "window_size": ("window_size", 256),
        },
        dropouts=("embed_dropout", "attention_dropout", "resid_dropout"),
        fixed={"activation_function": "gelu_new", "tie_word_embeddings": True},
    ),
}
_NUMBERS = {"layer_norm_epsilon": ("layer_norm_epsilon", 1e-5), "init_std": ("initializer_range", 0.02)}
_TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")


def by_turns(architecture: str, num_layers: int) -> tuple[str, ...]:
    """The kind of attention of each layer, as the family has it."""
    kinds = FAMILIES[architecture].attention_kinds
    return tuple(kinds[layer % len(kinds)] for layer in range(num_layers))


def read_config(folder: str | Path) -> dict[str, Any]:
    """What a Hugging Face folder's config.json holds; `UserError` where it is no JSON object."""
    if not Path(folder).is_dir():
        raise UserError(f"{folder}: no such folder; give a Hugging Face folder on disk (download the model first)")
    try:
        return read_json_object(Path(folder, "config.json"), "copy the folder again")
    except FileNotFoundError:
        raise UserError(f"{folder}/config.json: no such file; give a Hugging Face folder, which has one") from None


def find_family(model_type: Any) -> str | None:
    """The name of the family that config.json calls `model_type`, if it is one of ours."""
    return next((name for name, family in FAMILIES.items() if family.model_type == model_type), None)


def fields_of_config(folder: str | Path) -> dict[str, Any]:
    """The fields of the `TransformerConfig` that a folder's config.json describes, without dropout.

    Missing keys take the values that transformers gives them. Another family, a variant that computes something else
    and values of a wrong kind are a `UserError` with a line for each obstacle.
    """
    path, values = Path(folder, "config.json"), read_config(folder)
    architecture = find_family(values.get("model_type"))
    if architecture is None:
        known = " or ".join(f'"{family.model_type}"' for family in FAMILIES.values())
        found = _shown(values.get("model_type"))
        raise UserError(f"{path}: model_type {found} is not supported; give a folder of model_type {known}")
    family = FAMILIES[architecture]
    problems = [
        f"{key} {_shown(values[key])} is not supported; only {_shown(only)} is"
        for key, only in family.fixed.items()
        if values.get(key, only) != only
    ]
    fields: dict[str, Any] = {"window_size": 0}
    for name, (key, default) in family.sizes.items():
        value = values.get(key, default)
        if value is None and name == "intermediate_size":
            value = 4 * fields["hidden_size"]
        most = MAX_LAYERS if name == "num_layers" else MAX_SIZE
        if type(value) is not int or not 1 <= value <= most:
            problems.append(f"{key} must be a whole number from 1 to {most}, not {_shown(value)}; correct it")
            value = 1
        fields[name] = value
    for name, (key, usual) in _NUMBERS.items():
        fields[name] = number = values.get(key, usual)
        if type(number) not in (int, float) or not 0 < number < math.inf:
            problems.append(f"{key} must be a positive number, not {_shown(number)}; correct it")
    for key in _TOKEN_IDS:
        value = values.get(key)
        if value is not None and not (type(value) is int and 0 <= value < fields["vocab_size"]):
            problems.append(f"{key} {_shown(value)} is no token of {fields['vocab_size']}; correct it")
    if not problems and fields["hidden_size"] % fields["num_heads"]:
        problems.append(f"{fields['num_heads']} heads don't divide the hidden size {fields['hidden_size']}; correct it")
    fields["attention_layers"] = by_turns(architecture, fields["num_layers"])
    if LOCAL in family.attention_kinds and not problems:
        types = values.get("attention_types")
        layers = _expand([[family.attention_kinds, 12]] if types is None else types)
        if not layers:
            problems.append(
                f'attention_types {_shown(types)} is not of the form [[["global", "local"], N]]; correct it'
            )
        elif len(layers) != fields["num_layers"]:
            problems.append(
                f"attention_types names {len(layers)} layers but num_layers is {fields['num_layers']}; correct it"
            )
        fields["attention_layers"] = layers
    if problems:
        raise UserError(*(f"{path}: {problem}" for problem in problems))
    return {"architecture": architecture, **fields}


def config_of_fields(fields: dict[str, Any]) -> dict[str, Any]:
    """The inverse of `fields_of_config`, with dropout: config.json without token ids and dtype."""
    family, layers = FAMILIES[fields["architecture"]], list(fields["attention_layers"])
    values = {"architectures": [family.model_class], "model_type": family.model_type, "use_cache": True, **family.fixed}
    values |= {key: fields[name] for name, (key, _) in (family.sizes | _NUMBERS).items()}
    values |= dict.fromkeys(family.dropouts, fields["dropout"])
    if LOCAL in family.attention_kinds:
        turns = len(layers) % 2 == 0 and layers == layers[:2] * (len(layers) // 2)
        values["attention_types"] = [[layers[:2], len(layers) // 2]] if turns else [[layers, 1]]
        values["attention_layers"] = layers
    return values


def _expand(types: Any) -> tuple[str, ...]:
    """`[[["global", "local"], 12]]` is 24 layers by turns; () where it is not of that form or names too many."""
    layers: list[str] = []
    try:
        for kinds, times in types:
            if type(times) is not int or len(layers) + len(kinds) * times > MAX_LAYERS:
                return ()
            layers += list(kinds) * times
        return tuple(layers) if set(layers) <= {GLOBAL, LOCAL} else ()
    except (TypeError, ValueError):
        return ()


def _shown(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 100 else f"{text[:100]}..."
