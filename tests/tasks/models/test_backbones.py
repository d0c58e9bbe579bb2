"""Bugs prevented: a model recognised by its name, loaded as bf16 or half, with token types looked up among its
words, or padded so that padding is seen; a decoder pooled at a token that has seen nothing; a damaged, hostile or
incomplete folder that ends in a traceback, runs a pickle or scores as if it were whole; minutes of retries to reach a
hub for a folder that is not there."""

from __future__ import annotations

import json
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, PreTrainedTokenizerFast

import gloria.tasks.models.backbones as backbones
from gloria.errors import UserError
from gloria.model.transformer import Transformer
from gloria.tasks.models.backbones import load_model, longest_block_list
from gloria.tasks.models.encode import read_template
from tests.tasks.tiny import ENCODERS, FAMILIES, OWN, make_folder, make_tokenizer

WEIGHTS = "model.safetensors"


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    return {family: make_folder(family, root / family) for family in FAMILIES}


@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_is_recognised_by_rule(folders, family):
    loaded = load_model(str(folders[family]))
    assert loaded.backbone.causal == (family not in ENCODERS)
    # DeBERTa's tokenizer makes token types, its model has none.
    assert loaded.backbone.token_types == (family == "bert")
    assert isinstance(loaded.backbone.body, Transformer) == (family in OWN)
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


def changed(folder: Path, target: Path, change: Callable[[Path], object]) -> str:
    """The name of a copy of a model's folder with something changed in it."""
    shutil.copytree(folder, target)
    change(target)
    return str(target)


def edit_config(**values: object) -> Callable[[Path], object]:
    def change(folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, **values}))

    return change


def test_a_folder_of_bf16_is_loaded_as_fp32(folders, tmp_path):
    def halve(folder: Path) -> None:
        tensors = {name: tensor.bfloat16() for name, tensor in load_file(folder / WEIGHTS).items()}
        save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
        edit_config(dtype="bfloat16")(folder)

    loaded = load_model(changed(folders["gpt_neox"], tmp_path / "half", halve))
    assert {parameter.dtype for parameter in loaded.backbone.parameters()} == {torch.float32}


def test_a_variant_of_a_family_of_ours_goes_through_transformers(folders, tmp_path):
    rope = {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 48, "rope_theta": 1e4}
    name = changed(folders["llama"], tmp_path / "yarn", edit_config(rope_parameters=rope))
    loaded = load_model(name, language_model=True)
    assert not isinstance(loaded.backbone.body, Transformer)
    ids = torch.arange(20, 40)[None]
    with torch.no_grad():
        wanted = AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32).eval()(ids).logits
        torch.testing.assert_close(loaded.require_language_model().eval()(ids).logits, wanted)
        plain = load_model(str(folders["llama"])).require_language_model()
        assert (plain(ids) - wanted).abs().max() > 1e-4, "the scaling changes nothing"


def index(file: str, content: bytes) -> Callable[[Path], object]:
    """Weights in a file that an index names."""

    def change(folder: Path) -> None:
        (folder / file).write_bytes(content or (folder / WEIGHTS).read_bytes())
        names = load_file(folder / WEIGHTS)
        (folder / WEIGHTS).unlink()
        (folder / f"{WEIGHTS}.index.json").write_text(json.dumps({"weight_map": dict.fromkeys(names, file)}))

    return change


def pickled(folder: Path) -> bytes:
    torch.save(load_file(folder / WEIGHTS), folder / "made")
    return (folder / "made").read_bytes()


def cut(rows: int) -> Callable[[Path], object]:
    """A model with fewer tokens than its tokenizer."""

    def change(folder: Path) -> None:
        tensors = load_file(folder / WEIGHTS)
        tokens = json.loads((folder / "config.json").read_text())["vocab_size"]
        small = {name: tensor[:rows].clone() if len(tensor) == tokens else tensor for name, tensor in tensors.items()}
        save_file(small, folder / WEIGHTS, metadata={"format": "pt"})
        edit_config(vocab_size=rows)(folder)

    return change


def unknown_words(folder: Path) -> None:
    """A tokenizer for which every text is one unknown token after the other."""
    backend = Tokenizer(models.WordLevel({"[UNK]": 0, "[PAD]": 1, "</s>": 2}, unk_token="[UNK]"))
    PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="[UNK]", eos_token="</s>").save_pretrained(folder)


DAMAGED = [
    (cut(100), "its tokenizer has 320 tokens, its model 100; give the tokenizer that the model was trained with"),
    (unknown_words, 'knows nothing of "O gato dorme."; copy its files again'),
    (lambda folder: (folder / "tokenizer.json").write_text("{"), "cannot be loaded ("),
    (lambda folder: (folder / WEIGHTS).write_bytes(b""), f"{WEIGHTS}: is no whole safetensors file ("),
    (lambda folder: (folder / WEIGHTS).write_bytes(b"garbage" * 99), f"{WEIGHTS}: is no whole safetensors file ("),
    (lambda folder: (folder / WEIGHTS).write_bytes(pickled(folder)), f"{WEIGHTS}: is no whole safetensors file ("),
    (lambda folder: os.truncate(folder / WEIGHTS, 5000), f"{WEIGHTS}: is no whole safetensors file ("),
    (index("evil.bin", pickle.dumps({})), "names evil.bin, which is no safetensors file"),
    (index("evil.bin", b"PK" + bytes(99)), "names evil.bin, which is no safetensors file"),
    (edit_config(eos_token_id=10**9), "config.json: eos_token_id 1000000000 is no token of 323; correct it"),
    (edit_config(pad_token_id="one"), "cannot be loaded (Validation error for field 'pad_token_id': TypeError: "),
    (edit_config(pad_token_id=323), "config.json: pad_token_id 323 is no token of 323; correct it"),
    (edit_config(num_hidden_layers=10**9), "config.json has 1000000000 layers, the weights 28 tensors; copy it again"),
    (edit_config(num_hidden_layers="two"), "cannot be loaded ("),
    (edit_config(hidden_size=[32]), "cannot be loaded ("),
    (edit_config(vocab_size=None), "cannot be loaded ("),
    (edit_config(model_type=7), "cannot be loaded ("),
    (edit_config(model_type="no-such-family"), "cannot be loaded ("),
    (edit_config(auto_map={"AutoModel": "code.Evil"}, model_type="evil"), "cannot be loaded ("),
    (edit_config(hidden_size=64), "cannot be loaded ("),
    (lambda folder: (folder / "config.json").write_text("[" * 100_000), "config.json: is not valid JSON ("),
    (lambda folder: (folder / "config.json").write_text("[]"), "config.json: is not a JSON object"),
]


@pytest.mark.parametrize("number", range(len(DAMAGED)))
def test_a_damaged_folder_is_refused_in_a_line(number, folders, tmp_path, monkeypatch):
    monkeypatch.setattr(torch, "load", lambda *_, **__: pytest.fail("torch.load was called"))
    change, line = DAMAGED[number]
    name = changed(folders["gpt_neox"], tmp_path / "model", change)
    with pytest.raises(UserError) as caught:
        load_model(name)
    (problem,) = caught.value.problems
    assert line in problem
    assert "\n" not in problem


@pytest.mark.parametrize("family", FAMILIES)
def test_a_folder_without_a_tokenizer_is_refused(family, folders, tmp_path):
    name = changed(folders[family], tmp_path / "model", lambda folder: [file.unlink() for file in folder.glob("tok*")])
    with pytest.raises(
        UserError, match=r"has no tokenizer.json; copy the tokenizer's|Couldn't instantiate the backend"
    ):
        load_model(name)


def test_what_cannot_be_loaded_is_reported_in_a_line(folders, tmp_path, monkeypatch):
    def problem(name: object, **options: bool) -> str:
        with pytest.raises(UserError) as caught:
            load_model(str(name), **options)
        (line,) = caught.value.problems
        return line

    monkeypatch.chdir(tmp_path)
    Path("models").mkdir()
    for name in (tmp_path / "none", "models/none", "models/none/model", "none", "./none", "none/"):
        assert problem(name) == f"--model: {name} does not exist; name a run's folder or a Hugging Face folder"
    # A hub name has two parts, the first of them no folder here.
    asked: list[str] = []

    def offline(name: str, **_: object) -> str:
        asked.append(name)
        raise OSError("outgoing traffic has been disabled\nmore")

    monkeypatch.setattr(backbones, "snapshot_download", offline)
    assert problem("owner/name") == (
        "--model: owner/name is no folder here, and the Hugging Face hub does not give it (outgoing traffic has been "
        "disabled more); name a run or a model's folder"
    )
    assert asked == ["owner/name"]
    assert problem(tmp_path) == (
        f"--model: {tmp_path} has neither checkpoints nor a config.json; name a run or a model's folder"
    )
    for family in ("bert", "deberta-v2"):
        assert problem(folders[family], language_model=True) == (
            f"--model: {folders[family]} ({family}) is no causal language model, and gives no text a likelihood; "
            "fine-tune it on the task first"
        )
    pickles = tmp_path / "pickled"
    pickles.mkdir()
    (pickles / "config.json").write_text((folders["llama"] / "config.json").read_text())
    (pickles / "pytest_model.bin").write_bytes(b"")
    assert problem(pickles).startswith(f"{pickles}: has only pickled weights (pytest_model.bin)")


def test_encoder_decoders_and_models_that_see_ahead_are_refused(tmp_path):
    tokenizer = make_tokenizer("llama")
    shapes = {
        "t5": {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4},
        "xlnet": {"d_model": 32, "n_layer": 2, "n_head": 4, "d_inner": 64},
    }
    for family, kind in (("t5", AutoModel), ("xlnet", AutoModelForCausalLM)):
        config = AutoConfig.for_model(family, vocab_size=len(tokenizer), pad_token_id=0, **shapes[family])
        kind.from_config(config).save_pretrained(tmp_path / family)
        tokenizer.save_pretrained(tmp_path / family)
    for options in ({}, {"language_model": True}):
        with pytest.raises(UserError, match=r"\(t5\) is an encoder-decoder; name an encoder or a decoder"):
            load_model(str(tmp_path / "t5"), **options)
    with pytest.raises(UserError, match=r"\(xlnet\) is no causal language model"):
        load_model(str(tmp_path / "xlnet"), language_model=True)
    loaded = load_model(str(tmp_path / "xlnet"))
    assert (loaded.backbone.causal, loaded.max_length) == (False, None)


@pytest.mark.parametrize("family", ["gpt_neo", "llama", "gpt_neox"])
def test_weights_that_are_not_finite_are_reported(family, folders, tmp_path, capsys):
    def spoil(folder: Path) -> None:
        tensors = load_file(folder / WEIGHTS)
        next(tensor for name, tensor in tensors.items() if name.endswith("norm.weight") or "ln_f" in name)[0] = (
            torch.nan
        )
        save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})

    load_model(str(folders[family]), language_model=True)
    assert "not finite" not in capsys.readouterr().err
    load_model(changed(folders[family], tmp_path / "model", spoil), language_model=True)
    assert "tensors are not finite (" in capsys.readouterr().err
