"""A model's shape to and from the config.json of a Hugging Face folder. Imports no torch."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from gloria.config.cli import from_mapping
from gloria.errors import UserError
from gloria.files import read_json_object
from gloria.model.families import FAMILIES, GLOBAL, LOCAL, MAX_LAYERS, MAX_SIZE, Family, RopeScaling, find_family

_TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")
_FULL, _SLIDING = "full_attention", "sliding_attention"  # kinds of layers, as Qwen's configurations have them


def read_config(folder: str | Path) -> dict[str, Any]:
    """What a Hugging Face folder's config.json holds; `UserError` where it is no JSON object."""
    if not Path(folder).is_dir():
        raise UserError(f"{folder}: no such folder; give a Hugging Face folder on disk (download the model first)")
    try:
        return read_json_object(Path(folder, "config.json"), "copy the folder again")
    except FileNotFoundError:
        raise UserError(f"{folder}/config.json: no such file; give a Hugging Face folder, which has one") from None


def obstacles(values: dict[str, Any]) -> list[str]:
    """What a config.json has that our transformer does not compute, a line for each; its keys may still be wrong."""
    architecture = find_family(values.get("model_type"))
    if architecture is None:
        *others, last = (f'"{family.model_type}"' for family in FAMILIES.values())
        found = _shown(values.get("model_type"))
        return [f"model_type {found} is not supported; give a folder of model_type {', '.join(others)} or {last}"]
    family = FAMILIES[architecture]
    fixed = dict(family.fixed)
    rope = _rope(values) if family.rotary else {}
    if family.rotary:
        fixed |= {"partial_rotary_factor": 1.0, "quantization_config": None}
    problems = [
        f"{key} {_shown(value)} is not supported; only {_shown(only)} is"
        for key, only in fixed.items()
        if (value := rope.get(key, values.get(key, only))) != only
    ]
    if any(isinstance(value, dict) for value in rope.values()):
        problems.append("rope_parameters by kind of layer are not supported; only the same for all layers are")
    elif (kind := _rope_kind(rope)) not in ("default", "linear", "llama3"):
        problems.append(f'rope_type {_shown(kind)} is not supported; only "default", "linear" and "llama3" are')
    return problems


def fields_of_config(folder: str | Path) -> dict[str, Any]:
    """The fields of the `TransformerConfig` that a folder's config.json describes, without dropout.

    Missing keys take the values that transformers gives them. Another family, a variant that computes something else
    and values of a wrong kind are a `UserError` with a line for each obstacle.
    """
    path, values = Path(folder, "config.json"), read_config(folder)
    problems = obstacles(values)
    architecture = find_family(values.get("model_type"))
    if architecture is None:
        raise UserError(*(f"{path}: {problem}" for problem in problems))
    family = FAMILIES[architecture]
    fields: dict[str, Any] = {"window_size": 0}
    for name, (key, default) in family.sizes.items():
        value = values.get(key, default)
        if value is None and name == "intermediate_size":
            value = 4 * fields["hidden_size"]
        if value is None and name in ("num_kv_heads", "head_size", "window_size"):
            continue
        most = MAX_LAYERS if name == "num_layers" else MAX_SIZE
        if type(value) is not int or not 1 <= value <= most:
            problems.append(f"{key} must be a whole number from 1 to {most}, not {_shown(value)}; correct it")
            value = 1
        fields[name] = value
    for name, (key, usual) in _numbers(family).items():
        number = _rope(values).get(key, values.get(key, usual)) if name == "rope_theta" else values.get(key, usual)
        fields[name] = number
        if type(number) not in (int, float) or not 0 < number < math.inf:
            problems.append(f"{key} must be a positive number, not {_shown(number)}; correct it")
    for key in _TOKEN_IDS:
        ids = values.get(key)
        for value in ids if isinstance(ids, list) and key == "eos_token_id" else [ids]:
            if value is not None and not (type(value) is int and 0 <= value < fields["vocab_size"]):
                problems.append(f"{key} {_shown(value)} is no token of {fields['vocab_size']}; correct it")
    if family.rotary:
        problems += _read_rope(values, fields)
        fields["tied_head"] = tied = values.get("tie_word_embeddings", False)
        if type(tied) is not bool:
            problems.append(f"tie_word_embeddings must be true or false, not {_shown(tied)}; correct it")
    if not problems:
        problems += _check_heads(fields, family)
    fields["attention_layers"] = (GLOBAL,) * fields["num_layers"]
    if not problems:
        fields["attention_layers"], problems = _read_layers(values, family, fields)
        if LOCAL not in fields["attention_layers"]:
            fields["window_size"] = 0
    if problems:
        raise UserError(*(f"{path}: {problem}" for problem in problems))
    return {"architecture": architecture, **fields}


def config_of_fields(fields: dict[str, Any]) -> dict[str, Any]:
    """The inverse of `fields_of_config`, with dropout: config.json without token ids and dtype."""
    family, layers = FAMILIES[fields["architecture"]], list(fields["attention_layers"])
    fixed = {key: only for key, only in family.fixed.items() if only is not None}
    values = {"architectures": [family.model_class], "model_type": family.model_type, "use_cache": True, **fixed}
    values |= {key: fields[name] for name, (key, _) in (family.sizes | _numbers(family)).items()}
    values |= dict.fromkeys(family.dropouts, fields["dropout"])
    if family.rotary:
        values["num_key_value_heads"] = fields.get("num_kv_heads") or fields["num_heads"]
        values["head_dim"] = fields.get("head_size") or fields["hidden_size"] // fields["num_heads"]
        values["tie_word_embeddings"] = fields["tied_head"]
        values |= _rope_of_fields(fields)
    local = LOCAL in layers
    if family.layers_key == "attention_types":
        turns = len(layers) % 2 == 0 and layers == layers[:2] * (len(layers) // 2)
        values["attention_types"] = [[layers[:2], len(layers) // 2]] if turns else [[layers, 1]]
        values["attention_layers"] = layers
    elif family.layers_key:
        values["sliding_window"] = fields["window_size"] if local else None
    if family.layers_key == "layer_types":
        values["use_sliding_window"] = local
        values["layer_types"] = [_SLIDING if kind == LOCAL else _FULL for kind in layers]
        # What older versions read in its place: the layers from here on slide.
        values["max_window_layers"] = layers.index(LOCAL) if local else len(layers)
    return values


def _numbers(family: Family) -> dict[str, tuple[str, float]]:
    numbers = {"layer_norm_epsilon": family.norm_epsilon, "init_std": ("initializer_range", 0.02)}
    return numbers | ({"rope_theta": ("rope_theta", 10_000.0)} if family.rotary else {})


def _check_heads(fields: dict[str, Any], family: Family) -> list[str]:
    """What does not fit among the sizes of heads; `fields` loses what says no more than the number of heads."""
    hidden, heads, kv_heads = fields["hidden_size"], fields["num_heads"], fields.get("num_kv_heads")
    if hidden % heads and "head_size" not in fields:
        return [f"{heads} heads don't divide the hidden size {hidden}; correct it"]
    if kv_heads and heads % kv_heads:
        return [f"num_key_value_heads {kv_heads} does not divide the {heads} heads; correct it"]
    size = fields.get("head_size", hidden // heads)
    if family.rotary and size % 2:
        return [f"heads of {size} cannot be turned by rotary positions, which take an even number; correct it"]
    for name, usual in (("num_kv_heads", heads), ("head_size", hidden / heads)):
        if fields.get(name) == usual:
            del fields[name]
    return []


def _read_layers(values: dict[str, Any], family: Family, fields: dict[str, Any]) -> tuple[tuple[str, ...], list[str]]:
    """The kind of each layer, and what is wrong with how config.json says it."""
    number, key = fields["num_layers"], family.layers_key
    if not key:
        return (GLOBAL,) * number, []
    window, types = fields.get("window_size"), values.get(key)
    if key == "sliding_window":
        return (LOCAL if window else GLOBAL,) * number, []
    number_key = family.sizes["num_layers"][0]
    if key == "attention_types":
        layers = _expand([[family.attention_kinds, 12]] if types is None else types)
        form = '[[["global", "local"], N]]'
    else:
        slides = values.get("use_sliding_window", False) is True and window
        first = values.get("max_window_layers", 28)
        if types is None and type(first) is int:
            types = [_SLIDING if slides and layer >= first else _FULL for layer in range(number)]
        kinds = {_FULL: GLOBAL} | ({_SLIDING: LOCAL} if slides else {})
        given = types if isinstance(types, list) else []
        layers = tuple(kinds.get(kind, "") if isinstance(kind, str) else "" for kind in given)
        layers = () if "" in layers else layers
        form = f'["{_FULL}", ...], or with use_sliding_window "{_SLIDING}" too'
    if not layers:
        return (), [f"{key} {_shown(types)} is not of the form {form}; correct it"]
    if len(layers) != number:
        return (), [f"{key} names {len(layers)} layers but {number_key} is {number}; correct it"]
    return layers, []


def _rope(values: dict[str, Any]) -> dict[str, Any]:
    """What config.json says of rotary positions: `rope_scaling` of transformers 4, `rope_parameters` since 5."""
    given = values.get("rope_scaling") or values.get("rope_parameters")
    return given if isinstance(given, dict) else {}


def _rope_kind(rope: dict[str, Any]) -> Any:
    return rope.get("rope_type", rope.get("type", "default"))


def _read_rope(values: dict[str, Any], fields: dict[str, Any]) -> list[str]:
    """Put `rope_scaling` among the fields; what is wrong with it."""
    rope = _rope(values)
    if (kind := _rope_kind(rope)) not in ("linear", "llama3"):
        return []
    original = values.get("original_max_position_embeddings", rope.get("original_max_position_embeddings"))
    numbers = {"factor": rope.get("factor")}
    if kind == "llama3":
        numbers |= {name: rope.get(name) for name in ("low_freq_factor", "high_freq_factor")}
        numbers["original_max_positions"] = fields["max_positions"] if original is None else original
    try:
        fields["rope_scaling"] = from_mapping(RopeScaling, {"kind": kind, **numbers}, "rope")
    except UserError as error:
        return [f"rope_scaling: {problem.removeprefix('rope: ')}; correct it" for problem in error.problems]
    return []


def _rope_of_fields(fields: dict[str, Any]) -> dict[str, Any]:
    """The keys of config.json on rotary positions: as transformers 5 reads them, and as version 4 and others do."""
    scaling = dict(fields.get("rope_scaling") or {})
    kind = scaling.pop("kind", "default")
    original = scaling.pop("original_max_positions", None)
    if kind == "llama3":
        scaling["original_max_position_embeddings"] = original
    elif kind == "linear":
        scaling = {"factor": scaling["factor"]}
    rope = {"rope_type": kind, **scaling}
    theta = fields["rope_theta"]
    return {
        "rope_theta": theta,
        "rope_scaling": rope if scaling else None,
        "rope_parameters": {**rope, "rope_theta": theta},
    }


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
