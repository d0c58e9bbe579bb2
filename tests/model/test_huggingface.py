"""Prevents a Hugging Face folder that is read wrongly or half: weights of another shape, missing or strange
ones, pickles, an untied head; and one that is written half, over another, or with a tokenizer that does not
fit."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from gloria.errors import UserError
from gloria.model.config import TransformerConfig
from gloria.model.huggingface import read_shape, read_tensors, write_folder
from tests.tiny_models import GPT2, GPT_NEO, SHAPES, make_tokenizer, uneven_model


@pytest.fixture(scope="module")
def tokenizer_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    make_tokenizer(folder)
    return folder


def write(folder: Path, shape: TransformerConfig, tokenizer_folder: Path, **options: object) -> dict[str, Tensor]:
    """Write a model of `shape`, whose vocabulary is made to fit, and give its parameters."""
    shape = replace(shape, vocab_size=600)
    parameters = dict(uneven_model(shape).state_dict())
    write_folder(folder, shape, parameters.items(), tokenizer_folder, "float32", **options)
    return parameters


def problems(function: Callable[[], object]) -> tuple[str, ...]:
    with pytest.raises(UserError) as caught:
        function()
    return caught.value.problems


@pytest.mark.parametrize("family", SHAPES)
@pytest.mark.parametrize("shard_bytes", [30_000, 10**9])
def test_what_is_written_is_read_back_bit_for_bit(
    tmp_path: Path, tokenizer_folder: Path, family: str, shard_bytes: int
) -> None:
    out = tmp_path / "made" / "out"
    parameters = write(out, SHAPES[family], tokenizer_folder, shard_bytes=shard_bytes)
    assert read_shape(out) == replace(SHAPES[family], vocab_size=600)
    read = read_tensors(out)
    assert list(read) == list(parameters)
    for name, tensor in read.items():
        assert torch.equal(tensor, parameters[name]), name
    assert [path.name for path in out.parent.iterdir()] == ["out"]
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (out / name).read_bytes() == (tokenizer_folder / name).read_bytes()


def test_files_of_a_cut_folder_are_within_the_limit_and_named_by_their_number(
    tmp_path: Path, tokenizer_folder: Path
) -> None:
    write(tmp_path / "out", GPT_NEO, tokenizer_folder, shard_bytes=100_000)
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    files = sorted(set(index["weight_map"].values()))
    assert files == [f"model-{n:05d}-of-{len(files):05d}.safetensors" for n in range(1, len(files) + 1)]
    assert len(files) == 2
    sizes = [sum(tensor.nbytes for tensor in load_file(tmp_path / "out" / file).values()) for file in files]
    assert max(sizes) <= 100_000
    assert sum(sizes) == index["metadata"]["total_size"]
    assert not list((tmp_path / "out").glob("part-*"))


def test_layers_that_do_not_take_turns_survive(tmp_path: Path, tokenizer_folder: Path) -> None:
    shape = replace(GPT_NEO, num_layers=3, attention_layers=("local", "local", "global"))
    write(tmp_path / "out", shape, tokenizer_folder)
    assert read_shape(tmp_path / "out").attention_layers == ("local", "local", "global")


def test_masks_of_old_versions_and_a_tied_head_are_passed_over(tmp_path: Path, tokenizer_folder: Path) -> None:
    parameters = write(tmp_path / "out", GPT2, tokenizer_folder)
    file = tmp_path / "out" / "model.safetensors"
    tensors = load_file(file)
    extra = {
        "lm_head.weight": tensors["transformer.wte.weight"].clone(),
        "transformer.h.0.attn.bias": torch.ones(1, 1, 64, 64),
        "transformer.h.0.attn.masked_bias": torch.tensor(-1e4),
    }
    save_file({**tensors, **extra}, file)
    assert list(read_tensors(tmp_path / "out")) == list(parameters)


def change_weights(folder: Path, change: Callable[[dict[str, Tensor]], object]) -> Path:
    file = folder / "model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file)
    return file


def test_weights_that_are_not_those_of_the_config_are_refused(tmp_path: Path, tokenizer_folder: Path) -> None:
    folder = tmp_path / "out"
    write(folder, GPT2, tokenizer_folder)

    def spoil(tensors: dict[str, Tensor]) -> None:
        tensors["transformer.wpe.weight"] = torch.zeros(32, 32)
        tensors["transformer.h.0.attn.c_attn.weight"] = torch.zeros(96, 32)  # nn.Linear's, not Conv1D's
        tensors["transformer.h.0.mlp.c_fc.bias"] = torch.zeros(64, dtype=torch.int8)
        tensors["transformer.h.2.ln_1.weight"] = torch.zeros(32)
        del tensors["transformer.ln_f.bias"]

    file = change_weights(folder, spoil)
    assert sorted(problems(lambda: read_tensors(folder))) == sorted(
        [
            f"{file}: transformer.wpe.weight is (32, 32), config.json makes it (64, 32); they must agree",
            f"{file}: transformer.h.0.attn.c_attn.weight is (96, 32), config.json makes it (32, 96); they must agree",
            f"{file}: transformer.h.0.mlp.c_fc.bias is of type I8; give weights that are not quantised",
            f"{file}: transformer.h.2.ln_1.weight is no parameter of such a model; check config.json",
            f"{folder}: transformer.ln_f.bias is missing; give a whole model",
        ]
    )


def test_an_untied_head_is_refused(tmp_path: Path, tokenizer_folder: Path) -> None:
    write(tmp_path / "out", GPT2, tokenizer_folder)
    change_weights(tmp_path / "out", lambda tensors: tensors.update({"lm_head.weight": torch.zeros(600, 32)}))
    assert problems(lambda: read_tensors(tmp_path / "out")) == (
        f"{tmp_path}/out: lm_head.weight is not the token embedding; only models with a tied head are read",
    )


def test_pickled_weights_are_refused(tmp_path: Path, tokenizer_folder: Path) -> None:
    folder = tmp_path / "out"
    write(folder, GPT2, tokenizer_folder)
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    assert problems(lambda: read_tensors(folder)) == (
        f"{folder}: has only pickled weights (pytorch_model.bin), which can run code when read; have them "
        "converted to safetensors (transformers: save_pretrained)",
    )
    (folder / "pytorch_model.bin").unlink()
    assert problems(lambda: read_tensors(folder)) == (
        f"{folder}: has no model.safetensors; give the folder of a whole model",
    )


def test_damaged_files_are_refused(tmp_path: Path, tokenizer_folder: Path) -> None:
    folder = tmp_path / "out"
    write(folder, GPT2, tokenizer_folder)
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    (line,) = problems(lambda: read_tensors(folder))
    assert line.startswith(f"{file}: is no whole safetensors file (")
    assert line.endswith("); copy it again")


def test_an_index_that_does_not_hold_is_refused(tmp_path: Path, tokenizer_folder: Path) -> None:
    folder = tmp_path / "out"
    write(folder, GPT2, tokenizer_folder)
    (folder / "model.safetensors").rename(folder / "model-00001-of-00002.safetensors")
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "model-00002-of-00002.safetensors", "b": "../escape"}}))
    assert problems(lambda: read_tensors(folder)) == (
        f"{index}: names ../escape, which is not in the folder; copy it again",
        f"{index}: names model-00002-of-00002.safetensors, which is not in the folder; copy it again",
    )
    index.write_text("{}")
    assert problems(lambda: read_tensors(folder)) == (
        f"{index}: is not an index of weights ('weight_map'); copy the folder again",
    )


def test_nothing_is_written_over_or_half(tmp_path: Path, tokenizer_folder: Path) -> None:
    shape = replace(GPT2, vocab_size=600)
    parameters = dict(uneven_model(shape).state_dict())
    out = tmp_path / "there"
    out.mkdir()
    assert problems(lambda: write_folder(out, shape, parameters.items(), tokenizer_folder, "float32")) == (
        f"{out}: is there already; remove it or choose another --out",
    )
    assert list(out.iterdir()) == []
    del parameters["transformer.ln_f.bias"]
    out = tmp_path / "new"
    assert problems(lambda: write_folder(out, shape, parameters.items(), tokenizer_folder, "float32")) == (
        "model: transformer.ln_f.bias is missing among the weights",
    )
    assert [path.name for path in tmp_path.iterdir()] == ["there"]


def test_a_tokenizer_with_more_tokens_than_the_model_is_refused(tmp_path: Path) -> None:
    tokens = make_tokenizer(tmp_path / "tokenizer").vocab_size
    line = (
        f"{tmp_path}/tokenizer: has {tokens} tokens, the model only 131; give the tokenizer that the model was "
        "trained with"
    )
    assert problems(lambda: write_folder(tmp_path / "out", GPT2, [], tmp_path / "tokenizer", "float32")) == (line,)
