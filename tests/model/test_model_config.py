"""Prevents a model of another shape than the recipe, or the folder it starts from, says: wrong sizes taken
over silently, counts and FLOPs that are off, contradictions that surface as a crash an hour later."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from gloria.errors import UserError
from gloria.files import MAX_JSON_BYTES
from gloria.model.config import (
    PRESETS,
    ModelSection,
    TransformerConfig,
    count_parameters,
    flops_per_token,
    read_shape,
    resolve_shape,
)
from gloria.model.families import RopeScaling


def problems_of(config: ModelSection, *, vocab_size: int = 2048, sequence_length: int = 128) -> list[str]:
    with pytest.raises(UserError) as caught:
        resolve_shape(config, vocab_size=vocab_size, sequence_length=sequence_length)
    return list(caught.value.problems)


def write_config(folder: Path, **values: object) -> str:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(values))
    return str(folder)


def write_small(folder: Path, **changes: object) -> str:
    values = {"model_type": "gpt_neo", "num_layers": 2, "hidden_size": 32, "num_heads": 4, "vocab_size": 300}
    values |= {"attention_types": [[["global", "local"], 1]], "max_position_embeddings": 64, "window_size": 8}
    return write_config(folder, **{**values, **changes})


def write_llama(folder: Path, **changes: object) -> str:
    values = {"model_type": "llama", "num_hidden_layers": 2, "hidden_size": 32, "num_attention_heads": 4}
    values |= {"num_key_value_heads": 2, "intermediate_size": 64, "max_position_embeddings": 64, "vocab_size": 300}
    return write_config(folder, **{**values, **changes})


# Published sizes: transformers' num_parameters() of the models on the hub.
@pytest.mark.parametrize(
    ("preset", "total"),
    [
        ("gpt2-124m", 124_439_808),
        ("gpt2-355m", 354_823_168),
        ("gpt2-774m", 774_030_080),
        ("gpt2-1.5b", 1_557_611_200),
        ("gpt-neo-125m", 125_198_592),
        ("gpt-neo-1.3b", 1_315_575_808),
        ("gpt-neo-2.7b", 2_651_307_520),
        ("llama-160m", 162_417_408),  # Tucano-160m
        ("llama-630m", 630_253_568),  # Tucano-630m
        ("llama-1b", 1_100_048_384),  # Tucano-1b1, TinyLlama
        ("smollm-135m", 134_515_008),
    ],
)
def test_presets_have_the_published_number_of_parameters(preset: str, total: int) -> None:
    counts = count_parameters(PRESETS[preset])
    assert counts["total"] == total
    assert sum(counts.values()) == 2 * total


def test_gloria_has_the_shapes_of_gpt_neo() -> None:
    assert PRESETS["gloria-1.3b"] == PRESETS["gpt-neo-1.3b"]
    assert PRESETS["gloria-2.7b"] == PRESETS["gpt-neo-2.7b"]


def test_flops_count_local_layers_by_their_window() -> None:
    counts = count_parameters(PRESETS["gpt-neo-1.3b"])
    matmul = counts["total"] - counts["position_embedding"]
    assert flops_per_token(PRESETS["gpt-neo-1.3b"], 2048) == 6 * matmul + 12 * 2048 * (12 * 2048 + 12 * 256)
    # A sequence shorter than the window is all there is to attend to.
    assert flops_per_token(PRESETS["gpt-neo-1.3b"], 100) == 6 * matmul + 12 * 2048 * 24 * 100
    assert flops_per_token(PRESETS["gpt2-124m"], 1024) == 6 * (124_439_808 - 1024 * 768) + 12 * 768 * 12 * 1024


def test_flops_count_no_parameters_that_are_only_looked_up() -> None:
    total, embedding = 630_253_568, 32000 * 2048
    assert flops_per_token(PRESETS["llama-630m"], 2048) == 6 * (total - embedding) + 12 * 2048 * 14 * 2048
    assert flops_per_token(PRESETS["smollm-135m"], 2048) == 6 * 134_515_008 + 12 * 576 * 30 * 2048


def test_overrides_and_the_tokenizers_vocabulary_reach_the_shape() -> None:
    config = ModelSection(preset="gpt-neo-125m", num_layers=3, hidden_size=96, num_heads=6, dropout=0.1)
    shape = resolve_shape(config, vocab_size=300, sequence_length=512)
    assert shape.attention_layers == ("global", "local", "global")
    assert (shape.intermediate_size, shape.head_dim, shape.vocab_size) == (384, 16, 300)
    assert (shape.padded_vocab, shape.dropout, shape.family.attention_scale) == (384, 0.1, 1.0)
    roomy = resolve_shape(ModelSection(preset="gpt2-124m", vocab_size=256), vocab_size=200, sequence_length=1024)
    assert (roomy.vocab_size, roomy.padded_vocab, roomy.family.attention_scale) == (256, 256, None)


@pytest.mark.parametrize("preset", PRESETS)
def test_a_shape_survives_json(preset: str) -> None:
    shape = PRESETS[preset]
    assert TransformerConfig.from_dict(json.loads(json.dumps(shape.to_dict()))) == shape


@pytest.mark.parametrize("preset", ["gpt2-124m", "demo"])
def test_a_checkpoint_of_before_llama_is_the_same_model(preset: str) -> None:
    shape = PRESETS[preset]
    new = ("num_kv_heads", "head_size", "tied_head", "rope_theta", "rope_scaling")
    old = {name: value for name, value in shape.to_dict().items() if name not in new}
    assert len(old) == len(shape.to_dict()) - len(new)
    assert TransformerConfig.from_dict(old) == shape


@pytest.mark.parametrize(
    ("config", "lines"),
    [
        (
            ModelSection(),
            [
                "model: neither preset nor from is given; set model.preset to a shape (gpt-neo-125m) or "
                "model.from to a Hugging Face folder"
            ],
        ),
        (
            ModelSection(preset="demo", from_="m"),
            ['model: preset "demo" and from "m" are both given; keep one'],
        ),
        (
            ModelSection(preset="gpt-neo-1.3"),
            ['model.preset: unknown preset "gpt-neo-1.3"; did you mean "gpt-neo-1.3b"?'],
        ),
        (
            ModelSection(preset="demo", num_heads=5, vocab_size=2000, max_positions=100),
            [
                "model.num_heads: 5 does not divide hidden_size 128; choose another",
                "model.vocab_size: 2000 is smaller than the tokenizer's 2048; leave it out or raise it",
                "train.sequence_length: 128 exceeds the model's 100 positions; shorten it or set "
                "model.max_positions to 128",
            ],
        ),
        (
            ModelSection(preset="gpt2-124m", window_size=64),
            ["model.window_size: 64 is given, but gpt2-124m has no local layers; leave it out"],
        ),
        (
            ModelSection(preset="llama-1b", num_kv_heads=5, window_size=64),
            [
                "model.num_kv_heads: 5 does not divide num_heads 32; choose another",
                "model.window_size: 64 is given, but llama-1b has no local layers; leave it out",
            ],
        ),
        (
            ModelSection(preset="llama-160m", hidden_size=36),
            ["model.num_heads: 12 makes heads of 3, an odd number for rotary positions; choose another"],
        ),
        (
            ModelSection(preset="gpt2-124m", num_kv_heads=4),
            ["model.num_kv_heads: 4 is given, but gpt2-124m has none of its own; leave it out"],
        ),
        (
            ModelSection(from_="missing"),
            ["missing: no such folder; give a Hugging Face folder on disk (download the model first)"],
        ),
    ],
)
def test_contradictions_of_a_recipe(config: ModelSection, lines: list[str]) -> None:
    assert problems_of(config) == lines


def test_contradictions_with_a_folder(tmp_path: Path) -> None:
    folder = write_small(tmp_path / "m")
    assert problems_of(ModelSection(from_=folder, num_layers=3), vocab_size=301, sequence_length=65) == [
        f"model.num_layers: 3 contradicts the 2 of {folder}; leave it out",
        f"model.from: the vocabulary of {folder} (300) is smaller than the tokenizer's (301); prepare the corpus "
        "with that folder's tokenizer, or, if it is that one with more tokens, set model.vocab_size to 301",
        f"train.sequence_length: 65 exceeds the 64 positions of {folder}; shorten it",
    ]


def test_a_folders_larger_vocabulary_is_kept_and_its_dropout_is_not(tmp_path: Path) -> None:
    folder = write_small(tmp_path / "m", resid_dropout=0.5)
    config = ModelSection(from_=folder, num_layers=2)  # the same value is no contradiction
    shape = resolve_shape(config, vocab_size=200, sequence_length=64)
    assert (shape.vocab_size, shape.dropout, shape.intermediate_size) == (300, 0.0, 128)
    assert shape.attention_layers == ("global", "local")


def test_a_folder_may_be_given_more_tokens_and_where_they_are_rotary_positions(tmp_path: Path) -> None:
    neo, llama = write_small(tmp_path / "neo"), write_llama(tmp_path / "llama")
    config = ModelSection(from_=neo, vocab_size=310)
    assert resolve_shape(config, vocab_size=305, sequence_length=64).vocab_size == 310
    config = ModelSection(from_=llama, vocab_size=310, max_positions=100, num_kv_heads=2)
    shape = resolve_shape(config, vocab_size=305, sequence_length=99)
    assert (shape.vocab_size, shape.max_positions, shape.num_kv_heads) == (310, 100, 2)
    assert problems_of(ModelSection(from_=neo, vocab_size=299, max_positions=65), vocab_size=9, sequence_length=9) == [
        f"model.max_positions: 65 contradicts the 64 of {neo}; leave it out",
        f"model.vocab_size: 299 contradicts the 300 of {neo}; leave it out",
    ]
    assert problems_of(ModelSection(from_=llama, num_kv_heads=4), vocab_size=9, sequence_length=65) == [
        f"model.num_kv_heads: 4 contradicts the 2 of {llama}; leave it out",
        f"train.sequence_length: 65 exceeds the 64 positions of {llama}; shorten it, or set model.max_positions to 65, "
        "beyond what it was made for",
    ]


def test_missing_keys_are_what_transformers_takes_them_for(tmp_path: Path) -> None:
    assert read_shape(write_config(tmp_path / "a", model_type="gpt2")) == PRESETS["gpt2-124m"]
    assert read_shape(write_config(tmp_path / "b", model_type="gpt_neo")) == PRESETS["gpt-neo-1.3b"]


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        (
            {"model_type": "gemma"},
            'model_type "gemma" is not supported; give a folder of model_type "gpt2", "gpt_neo", "llama", "mistral", '
            '"qwen2" or "qwen3"',
        ),
        ({"activation_function": "relu"}, 'activation_function "relu" is not supported; only "gelu_new" is'),
        ({"tie_word_embeddings": False}, "tie_word_embeddings false is not supported; only true is"),
        (
            {"model_type": "gpt2", "scale_attn_by_inverse_layer_idx": True},
            "scale_attn_by_inverse_layer_idx true is not supported; only false is",
        ),
        (
            {"model_type": "gpt2", "scale_attn_weights": False},
            "scale_attn_weights false is not supported; only true is",
        ),
        (
            {"model_type": "gpt2", "add_cross_attention": True},
            "add_cross_attention true is not supported; only false is",
        ),
        ({"hidden_size": "32"}, 'hidden_size must be a whole number from 1 to 2147483647, not "32"; correct it'),
        ({"num_heads": 0}, "num_heads must be a whole number from 1 to 2147483647, not 0; correct it"),
        ({"num_heads": 5}, "5 heads don't divide the hidden size 32; correct it"),
        ({"layer_norm_epsilon": 0}, "layer_norm_epsilon must be a positive number, not 0; correct it"),
        ({"num_layers": 3}, "attention_types names 2 layers but num_layers is 3; correct it"),
        (
            {"attention_types": [["global"]]},
            'attention_types [["global"]] is not of the form [[["global", "local"], N]]; correct it',
        ),
        (
            {"attention_types": [[["sparse"], 2]]},
            'attention_types [[["sparse"], 2]] is not of the form [[["global", "local"], N]]; correct it',
        ),
        ({"model_type": ["gpt2"]}, None),
        ({"model_type": "x" * 1000}, None),
        ({"num_layers": [2]}, None),
        ({"num_layers": True}, None),
        ({"num_layers": 10**9}, "num_layers must be a whole number from 1 to 10000, not 1000000000; correct it"),
        ({"vocab_size": 10**4000}, None),
        ({"layer_norm_epsilon": float("nan")}, "layer_norm_epsilon must be a positive number, not NaN; correct it"),
        ({"initializer_range": float("inf")}, "initializer_range must be a positive number, not Infinity; correct it"),
        ({"eos_token_id": 10**9}, "eos_token_id 1000000000 is no token of 300; correct it"),
        ({"pad_token_id": "0"}, 'pad_token_id "0" is no token of 300; correct it'),
        ({"attention_types": "global"}, None),
        ({"attention_types": {"global": 2}}, None),
        ({"attention_types": [["global", 2]]}, None),
        ({"attention_types": [[["global"], 1.5]]}, None),
        ({"attention_types": [[[["global"]], 2]]}, None),
        ({"attention_types": [[["global", "local"], 10**10]]}, None),
        ({"attention_types": [[[], 10**10], [["global", "local"], 1]] * 9}, None),
    ],
)
def test_a_config_that_is_not_our_model_is_refused(tmp_path: Path, changes: dict, line: str | None) -> None:
    folder = write_small(tmp_path / "m", **changes)
    with pytest.raises(UserError) as caught:
        read_shape(folder)
    (found,) = caught.value.problems
    assert found == f"{folder}/config.json: {line}" if line else len(found) < 300 + len(folder)


KINDS = '["full_attention", ...], or with use_sliding_window "sliding_attention" too; correct it'


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"attention_bias": True}, "attention_bias true is not supported; only false is"),
        ({"mlp_bias": True}, "mlp_bias true is not supported; only false is"),
        ({"hidden_act": "gelu"}, 'hidden_act "gelu" is not supported; only "silu" is'),
        ({"attention_dropout": 0.1}, "attention_dropout 0.1 is not supported; only 0.0 is"),
        ({"quantization_config": {"bits": 4}}, 'quantization_config {"bits": 4} is not supported; only null is'),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor 0.5 is not supported; only 1.0 is"),
        (
            {"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}},
            "partial_rotary_factor 0.5 is not supported; only 1.0 is",
        ),
        (
            {"rope_scaling": {"type": "yarn", "factor": 4.0}},
            'rope_type "yarn" is not supported; only "default", "linear" and "llama3" are',
        ),
        (
            {"rope_parameters": {"full_attention": {"rope_type": "default"}}},
            "rope_parameters by kind of layer are not supported; only the same for all layers are",
        ),
        ({"model_type": "mistral", "layer_types": ["full_attention"] * 2}, None),
        ({"rope_scaling": {"rope_type": "linear"}}, None),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, None),
        ({"rope_scaling": {"rope_type": "linear", "factor": -1.0}}, None),
        ({"rope_theta": "big"}, 'rope_theta must be a positive number, not "big"; correct it'),
        ({"rope_parameters": {"rope_theta": 0}}, "rope_theta must be a positive number, not 0; correct it"),
        ({"rms_norm_eps": 0}, "rms_norm_eps must be a positive number, not 0; correct it"),
        ({"tie_word_embeddings": 1}, "tie_word_embeddings must be true or false, not 1; correct it"),
        ({"num_key_value_heads": 3}, "num_key_value_heads 3 does not divide the 4 heads; correct it"),
        ({"head_dim": 7}, "heads of 7 cannot be turned by rotary positions, which take an even number; correct it"),
        ({"hidden_size": 30}, "4 heads don't divide the hidden size 30; correct it"),
        ({"eos_token_id": [2, 300]}, "eos_token_id 300 is no token of 300; correct it"),
        ({"bos_token_id": [2]}, "bos_token_id [2] is no token of 300; correct it"),
        ({"model_type": "mistral", "sliding_window": 0}, None),
        (
            {"model_type": "qwen2", "layer_types": ["full_attention"]},
            "layer_types names 1 layers but num_hidden_layers is 2; correct it",
        ),
        (
            {"model_type": "qwen2", "layer_types": ["sliding_attention"] * 2},
            f'layer_types ["sliding_attention", "sliding_attention"] is not of the form {KINDS}',
        ),
        ({"model_type": "qwen3", "layer_types": 2}, f"layer_types 2 is not of the form {KINDS}"),
        ({"model_type": "qwen3", "use_sliding_window": True, "max_window_layers": "x"}, None),
    ],
)
def test_a_variant_of_llama_that_ours_is_not_is_refused(tmp_path: Path, changes: dict, line: str | None) -> None:
    folder = write_llama(tmp_path / "m", **changes)
    with pytest.raises(UserError) as caught:
        read_shape(folder)
    problems = caught.value.problems
    assert problems == (f"{folder}/config.json: {line}",) if line else all(len(found) < 400 for found in problems)


def test_the_ways_in_which_configurations_say_the_same(tmp_path: Path) -> None:
    llama3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 32}
    old = {"rope_theta": 5e5, "rope_scaling": {"rope_type": "llama3", **llama3}}
    new = {"rope_parameters": {"rope_theta": 5e5, "rope_type": "llama3", **llama3}}
    shapes = [read_shape(write_llama(tmp_path / name, **keys)) for name, keys in (("old", old), ("new", new))]
    assert shapes[0] == shapes[1]
    assert (shapes[0].rope_theta, shapes[0].rope_scaling) == (5e5, RopeScaling("llama3", 8.0, 1.0, 4.0, 32))
    # What says no more than the number of heads says nothing.
    assert read_shape(write_llama(tmp_path / "a", num_key_value_heads=4, head_dim=8)).num_kv_heads is None
    assert read_shape(write_llama(tmp_path / "b", num_key_value_heads=None, head_dim=None)).kv_heads == 4
    qwen = {"model_type": "qwen2", "sliding_window": 8, "max_window_layers": 1}
    assert read_shape(write_llama(tmp_path / "c", **qwen)).windows == (0, 0)
    assert read_shape(write_llama(tmp_path / "d", **qwen, use_sliding_window=True)).windows == (0, 8)
    kinds = ["sliding_attention", "full_attention"]
    assert read_shape(write_llama(tmp_path / "e", **qwen, use_sliding_window=True, layer_types=kinds)).windows == (8, 0)
    mistral = read_shape(write_llama(tmp_path / "f", model_type="mistral", sliding_window=None))
    assert (mistral.windows, mistral.window_size) == ((0, 0), 0)
    assert read_shape(write_llama(tmp_path / "g", model_type="qwen3")).head_dim == 128


def test_a_folder_without_a_readable_config_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "config.json"

    def problem() -> str:
        with pytest.raises(UserError) as caught:
            read_shape(tmp_path)
        (line,) = caught.value.problems
        return line

    assert problem() == f"{path}: no such file; give a Hugging Face folder, which has one"
    os.mkfifo(path)
    assert problem() == f"{path}: is not a plain file; copy the folder again"
    path.unlink()
    for content, reason in {
        b'{"model_type": ': "is not valid JSON (Expecting value: line 1 column 16 (char 15))",
        b"[]": "is not a JSON object",
        b'{"a": ' + b"[" * 100_000: "is not valid JSON (maximum recursion depth exceeded",
        b'{"num_layers": ' + b"9" * 5000 + b"}": "is not valid JSON (a number of 5000 digits)",
        b"\xff\xfe": "is not valid JSON ('utf-8' codec can't decode byte 0xff in position 0: invalid start byte)",
        b" " * (1 + MAX_JSON_BYTES): "16777217 bytes, more than the 16777216 such a file may have",
    }.items():
        path.write_bytes(content)
        assert problem().startswith(f"{path}: {reason}")
        assert problem().endswith("; copy the folder again")


@pytest.mark.parametrize(
    "changes",
    [
        {"num_layers": "2"},
        {"architecture": "gemma"},
        {"num_kv_heads": 3},
        {"rope_scaling": {"kind": "yarn", "factor": 2.0}},
        {"attention_layers": ["global"]},
        {"attention_layers": 7},
        {"num_heads": 5},
        {"hidden_size": -1},
        {"init_std": float("nan")},
        {"surprise": 1},
    ],
)
def test_a_checkpoints_shape_that_describes_no_model_is_refused(changes: dict) -> None:
    with pytest.raises(UserError, match=r"trainer\.json: model"):
        TransformerConfig.from_dict({**PRESETS["demo"].to_dict(), **changes})


def test_torch_is_not_imported() -> None:
    code = "import sys, gloria.model.config; raise SystemExit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
