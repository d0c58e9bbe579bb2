"""Prevents a Hugging Face folder that is read wrongly or half: weights of another shape, missing or unknown
ones, pickles, an untied head; and one that is written half, over another, with weights that are not finite, for its
owner alone, or with a tokenizer that does not fit or knows no limit."""

from __future__ import annotations

import io
import json
import os
import pickle
import shutil
import stat
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from gloria.errors import UserError
from gloria.model.config import EMBEDDING, HEAD, TransformerConfig
from gloria.model.huggingface import read_shape, read_tensors, weight_files, write_folder
from tests.tiny_models import GPT2, GPT_NEO, LLAMA, SHAPES, make_tokenizer, uneven_model


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
    assert read_shape(out).family == SHAPES[family].family
    for name, tensor in read.items():
        assert torch.equal(tensor, parameters[name]), name
    assert [path.name for path in out.parent.iterdir()] == ["out"]
    assert (out / "tokenizer.json").read_bytes() == (tokenizer_folder / "tokenizer.json").read_bytes()
    assert {stat.S_IMODE(path.stat().st_mode) for path in out.iterdir()} == {0o644}


@pytest.mark.parametrize(("limit", "written"), [(int(1e30), 64), (100, 64), (50, 50), (None, 64)])
def test_the_tokenizers_limit_is_at_most_the_models_positions(
    tmp_path: Path, tokenizer_folder: Path, limit: int | None, written: int
) -> None:
    shutil.copytree(tokenizer_folder, tmp_path / "tokenizer")
    file = tmp_path / "tokenizer" / "tokenizer_config.json"
    config = json.loads(file.read_text()) | {"model_max_length": limit}
    file.write_text(json.dumps(config))
    write(tmp_path / "out", GPT2, tmp_path / "tokenizer")
    found = json.loads((tmp_path / "out" / "tokenizer_config.json").read_text())
    assert found == {**config, "model_max_length": written}


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


def test_buffers_of_old_versions_and_a_tied_head_are_passed_over(tmp_path: Path, tokenizer_folder: Path) -> None:
    parameters = write(tmp_path / "out", GPT2, tokenizer_folder)
    file = tmp_path / "out" / "model.safetensors"
    tensors = load_file(file)
    extra = {
        "lm_head.weight": tensors["transformer.wte.weight"].clone(),
        "transformer.h.0.attn.bias": torch.ones(1, 1, 64, 64),
        "transformer.h.0.attn.masked_bias": torch.tensor(-1e4),
        "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4),
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
        f"{tmp_path}/out: lm_head.weight is not the token embedding, to which config.json ties it; correct it",
    )


@pytest.mark.parametrize("shape", [GPT2, LLAMA], ids=["tied", "own head"])
def test_rows_of_new_tokens_begin_as_the_mean_of_the_others(
    shape: TransformerConfig, tmp_path: Path, tokenizer_folder: Path
) -> None:
    parameters = write(tmp_path / "out", shape, tokenizer_folder)
    read = read_tensors(tmp_path / "out", 700)
    for name, tensor in read.items():
        if name not in (EMBEDDING, HEAD):
            assert torch.equal(tensor, parameters[name])
            continue
        assert len(tensor) == 768
        assert torch.equal(tensor[:600], parameters[name][:600])
        torch.testing.assert_close(tensor[600:700], parameters[name][:600].mean(0).expand(100, -1))
        assert not tensor[700:].any()
    assert (HEAD in read) == (shape == LLAMA)


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


def torch_zip() -> bytes:
    with io.BytesIO() as file:
        torch.save({"a": torch.zeros(1)}, file)
        return file.getvalue()


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: data[:-1],
        lambda data: b"",
        lambda data: data[:5],
        lambda data: pickle.dumps(torch.zeros(3)),
        lambda data: torch_zip(),
        lambda data: (2**63).to_bytes(8, "little") + data[8:],
        lambda data: (10).to_bytes(8, "little") + b"[" * 200_000,
    ],
    ids=["cut", "empty", "five bytes", "pickle", "torch zip", "giant header", "nested"],
)
def test_what_is_no_whole_safetensors_file_is_refused(
    tmp_path: Path, tokenizer_folder: Path, damage: Callable[[bytes], bytes]
) -> None:
    folder = tmp_path / "out"
    write(folder, GPT2, tokenizer_folder)
    file = folder / "model.safetensors"
    file.write_bytes(damage(file.read_bytes()))
    (line,) = problems(lambda: weight_files(folder))
    assert line.startswith(f"{file}: is no whole safetensors file (")
    assert line.endswith("); copy it again")
    assert "\n" not in line


def test_a_pipe_is_no_file_of_weights(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "model.safetensors")
    assert problems(lambda: weight_files(tmp_path)) == (
        f"{tmp_path}: has no model.safetensors; give the folder of a whole model",
    )


@pytest.mark.parametrize(
    ("index", "line"),
    [
        (
            {"weight_map": {"a": name}},
            f"names {name}, which is no safetensors file of the folder; copy the folder again",
        )
        for name in ("missing.safetensors", "evil.bin", "../escape.safetensors", "/etc/passwd", "3")
    ]
    + [(index, "has no weight_map; copy the folder again") for index in ({}, {"weight_map": []}, {"weight_map": {}})],
)
def test_an_index_that_does_not_hold_is_refused(tmp_path: Path, index: dict, line: str) -> None:
    (tmp_path / "evil.bin").write_bytes(b"")
    path = tmp_path / "model.safetensors.index.json"
    path.write_text(json.dumps(index))
    assert problems(lambda: weight_files(tmp_path)) == (f"{path}: {line}",)


def test_a_parameter_that_is_given_twice_is_refused(tmp_path: Path, tokenizer_folder: Path) -> None:
    write(tmp_path / "out", GPT2, tokenizer_folder)
    file = change_weights(tmp_path / "out", lambda tensors: tensors.update({"ln_f.bias": torch.zeros(32)}))
    (line,) = problems(lambda: read_tensors(tmp_path / "out"))
    assert line.startswith(f"{file}: ")
    assert line.endswith("ln_f.bias is given twice; copy the folder again")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_not_written(tmp_path: Path, tokenizer_folder: Path, value: float) -> None:
    shape = replace(GPT2, vocab_size=600)
    parameters = dict(uneven_model(shape).state_dict())
    parameters["transformer.h.1.mlp.c_fc.weight"][3, 4] = value
    line = (
        "model: transformer.h.1.mlp.c_fc.weight holds NaN or infinity, so the model is of no use; go back to an "
        "earlier checkpoint (--step)"
    )
    out = tmp_path / "out"
    assert problems(lambda: write_folder(out, shape, parameters.items(), tokenizer_folder, "float32")) == (line,)
    assert list(tmp_path.iterdir()) == []


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
