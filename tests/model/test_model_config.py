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
                "model.num_heads: 5 does not divide hidden_size 128; choose a divisor",
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
        "with that folder's tokenizer",
        f"train.sequence_length: 65 exceeds the 64 positions of {folder}; shorten it",
    ]


def test_a_folders_larger_vocabulary_is_kept_and_its_dropout_is_not(tmp_path: Path) -> None:
    folder = write_small(tmp_path / "m", resid_dropout=0.5)
    config = ModelSection(from_=folder, num_layers=2)  # the same value is no contradiction
    shape = resolve_shape(config, vocab_size=200, sequence_length=64)
    assert (shape.vocab_size, shape.dropout, shape.intermediate_size) == (300, 0.0, 128)
    assert shape.attention_layers == ("global", "local")


def test_missing_keys_are_what_transformers_takes_them_for(tmp_path: Path) -> None:
    assert read_shape(write_config(tmp_path / "a", model_type="gpt2")) == PRESETS["gpt2-124m"]
    assert read_shape(write_config(tmp_path / "b", model_type="gpt_neo")) == PRESETS["gpt-neo-1.3b"]


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        (
            {"model_type": "llama"},
            'model_type "llama" is not supported; give a folder of model_type "gpt2" or "gpt_neo"',
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
        {"architecture": "llama"},
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
