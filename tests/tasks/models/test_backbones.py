"""Bugs prevented: a model recognised by its name, loaded as bf16 or half, with token types looked up among its
words, or padded so that padding is seen; a decoder pooled at a token that has seen nothing."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModel

from gloria.errors import UserError
from gloria.model.transformer import Transformer
from gloria.tasks.models.backbones import load_model, longest_block_list
from gloria.tasks.models.encode import read_template
from tests.tasks.tiny import ENCODERS, FAMILIES, make_folder


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    return {family: make_folder(family, root / family) for family in FAMILIES}


@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_is_told_by_rule(folders, family):
    loaded = load_model(str(folders[family]))
    assert loaded.backbone.causal == (family not in ENCODERS)
    # DeBERTa's tokenizer makes token types, its model has none.
    assert loaded.backbone.token_types == (family == "bert")
    assert isinstance(loaded.backbone.body, Transformer) == (family in ("gpt2", "gpt_neo"))
    assert loaded.max_length == 96
    assert len(longest_block_list(loaded.backbone.body)) == 2


@pytest.mark.parametrize("family", FAMILIES)
def test_hidden_states_are_those_of_transformers_and_padding_is_not_seen(folders, family):
    loaded = load_model(str(folders[family]))
    reference = AutoModel.from_pretrained(folders[family], dtype=torch.float32).eval()
    loaded.backbone.eval()
    ids = torch.randint(10, 250, (2, 20), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[1, 12:] = 0
    with torch.no_grad():
        hidden, _ = loaded.backbone(ids, mask, torch.zeros_like(ids))
        whole = reference(input_ids=ids[:1]).last_hidden_state
        short = reference(input_ids=ids[1:, :12]).last_hidden_state
    torch.testing.assert_close(hidden[:1], whole, atol=2e-5, rtol=1e-4)
    torch.testing.assert_close(hidden[1:, :12], short, atol=2e-5, rtol=1e-4)


def test_a_separator_stands_between_the_parts_of_a_pair(folders):
    found = {family: read_template(load_model(str(folders[family])).tokenizer) for family in FAMILIES}
    eos = {family: load_model(str(folders[family])).tokenizer.eos_token_id for family in FAMILIES}
    for family in ("gpt2", "gpt_neo", "gpt_neox"):
        assert (found[family].start, found[family].middle, found[family].end) == ((), (eos[family],), (eos[family],))
    # LLaMA's own template would put its start between the two and nothing at the end.
    assert found["llama"].start != ()
    assert found["llama"].middle == found["llama"].end == (eos["llama"],)
    assert found["bert"].middle == found["bert"].end != ()
    assert found["bert"].types == (0, 0, 0, 1, 1)


def test_a_folder_of_bf16_is_loaded_as_fp32(folders, tmp_path):
    folder = tmp_path / "half"
    folder.mkdir()
    for file in folders["llama"].iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    tensors = {name: tensor.bfloat16() for name, tensor in load_file(folder / "model.safetensors").items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "dtype": "bfloat16"}))
    assert {parameter.dtype for parameter in load_model(str(folder)).backbone.parameters()} == {torch.float32}


def test_what_cannot_be_loaded_is_told_in_a_line(folders, tmp_path):
    def problem(name: str, **options: bool) -> str:
        with pytest.raises(UserError) as caught:
            load_model(name, **options)
        (line,) = caught.value.problems
        return line

    assert problem(str(tmp_path / "none")) == (
        f"--model: {tmp_path / 'none'} does not exist; name a run's folder or a Hugging Face folder"
    )
    assert problem(str(tmp_path)) == (
        f"--model: {tmp_path} holds neither checkpoints nor a config.json; name a run or a model's folder"
    )
    assert problem(str(folders["bert"]), language_model=True) == (
        f"--model: {folders['bert']} (bert) is no causal language model, and gives no text a likelihood; "
        "fine-tune it on the task first"
    )
    pickled = tmp_path / "pickled"
    pickled.mkdir()
    (pickled / "config.json").write_text((folders["llama"] / "config.json").read_text())
    (pickled / "pytest_model.bin").write_bytes(b"")
    assert problem(str(pickled)).startswith(f"{pickled}: has only pickled weights (pytest_model.bin)")


def test_a_tokenizer_of_another_model_is_refused(folders, tmp_path):
    folder = tmp_path / "small"
    folder.mkdir()
    for file in folders["gpt_neox"].iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    config = json.loads((folder / "config.json").read_text())
    tokens = config["vocab_size"] - 3
    tensors = load_file(folder / "model.safetensors")
    cut = {name: tensor[:100].clone() if tensor.shape[0] == tokens + 3 else tensor for name, tensor in tensors.items()}
    save_file(cut, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps({**config, "vocab_size": 100}))
    with pytest.raises(UserError, match=f"its tokenizer has {tokens} tokens, its model 100; give the tokenizer"):
        load_model(str(folder))
