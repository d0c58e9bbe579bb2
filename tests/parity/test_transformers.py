"""Prevents a model that is nearly GPT-2, GPT-Neo, LLaMA, Mistral, Qwen2 or Qwen3: transformers must compute the same
logits, loss and gradients from the same folder, in both directions, at lengths below and above the local window."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import transformers
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer

from gloria.model.config import EMBEDDING, HEAD, PRESETS, TransformerConfig, count_parameters
from gloria.model.huggingface import read_shape, read_tensors, write_folder
from gloria.model.transformer import Transformer
from tests.tiny_models import GPT2, GPT_NEO, QWEN2, SHAPES, gradients, make_tokenizer, random_ids, uneven_model

LENGTHS = [1, 7, 8, 9, 16, 37, 64]  # the window is 8, there are 64 positions
families = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Transformer, Path]]:
    """A model of each family, and the folder it was written to."""
    root = tmp_path_factory.mktemp("exported")
    make_tokenizer(root / "tokenizer")
    models = {}
    for family, shape in SHAPES.items():
        shape = TransformerConfig.from_dict({**shape.to_dict(), "vocab_size": 600})
        model = uneven_model(shape)
        write_folder(root / family, shape, model.state_dict().items(), root / "tokenizer", "float32")
        models[family] = (model, root / family)
    return models


def transformers_config(shape: TransformerConfig) -> transformers.PreTrainedConfig:
    """The same shape in transformers' own words, not ours."""
    common = {"vocab_size": shape.vocab_size, "bos_token_id": 0, "eos_token_id": 0}
    if shape.architecture == "gpt2":
        return transformers.GPT2Config(
            n_layer=shape.num_layers,
            n_embd=shape.hidden_size,
            n_head=shape.num_heads,
            n_inner=shape.intermediate_size,
            n_positions=shape.max_positions,
            **common,
        )
    common |= {"hidden_size": shape.hidden_size, "intermediate_size": shape.intermediate_size}
    common["max_position_embeddings"] = shape.max_positions
    if shape.architecture == "gpt-neo":
        return transformers.GPTNeoConfig(
            num_layers=shape.num_layers,
            num_heads=shape.num_heads,
            attention_types=[[["global", "local"], shape.num_layers // 2]],
            window_size=shape.window_size,
            **common,
        )
    common |= {"num_hidden_layers": shape.num_layers, "num_attention_heads": shape.num_heads}
    common |= {"num_key_value_heads": shape.kv_heads, "head_dim": shape.head_dim, "rms_norm_eps": 1e-5}
    common["tie_word_embeddings"] = shape.tied_head
    if shape.architecture == "llama":
        rope = {"rope_theta": shape.rope_theta, "rope_type": "default"}
        if shape.rope_scaling:
            rope |= {"rope_type": "llama3", "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
            rope["original_max_position_embeddings"] = 16
        return transformers.LlamaConfig(rope_parameters=rope, **common)
    if shape.architecture == "mistral":
        return transformers.MistralConfig(sliding_window=shape.window_size, rope_theta=shape.rope_theta, **common)
    if shape.architecture == "qwen2":
        sliding = {"use_sliding_window": True, "sliding_window": shape.window_size, "max_window_layers": 1}
        return transformers.Qwen2Config(rope_theta=shape.rope_theta, **sliding, **common)
    return transformers.Qwen3Config(rope_scaling={"rope_type": "linear", "factor": 2.0}, **common)


def theirs_from_scratch(shape: TransformerConfig) -> transformers.PreTrainedModel:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(transformers_config(shape)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def assert_close(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    """Equal in fp32 up to the order of sums: 1e-5 of the whole, as a vector."""
    assert (ours - theirs).norm() < 1e-5 * theirs.norm()


def ours_from_folder(folder: Path) -> Transformer:
    model = Transformer(read_shape(folder)).eval()
    model.load_state_dict(dict(read_tensors(folder)))
    return model


@pytest.mark.parametrize("family", SHAPES)
@pytest.mark.parametrize("length", LENGTHS)
def test_our_folder_gives_transformers_the_same_logits(exported: dict, family: str, length: int) -> None:
    ours, folder = exported[family]
    theirs = AutoModelForCausalLM.from_pretrained(folder)
    ids = random_ids(ours.shape, 2, length)
    with torch.no_grad():
        assert_close(ours(ids), theirs(ids).logits)


@families
def test_their_folder_gives_us_the_same_logits_loss_and_gradients(shape: TransformerConfig, tmp_path: Path) -> None:
    theirs = theirs_from_scratch(shape)
    theirs.save_pretrained(tmp_path)
    ours = ours_from_folder(tmp_path)
    assert ours.shape == shape
    assert ours.transformer.wte.weight[shape.vocab_size :].abs().sum() == 0
    assert ours.head[shape.vocab_size :].abs().sum() == 0
    for length in LENGTHS[1:]:
        ids = random_ids(shape, 2, length)
        ours.zero_grad()
        theirs.zero_grad()
        logits = theirs(ids[:, :-1]).logits
        assert_close(ours(ids[:, :-1]), logits)
        their_loss = F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="sum")
        loss, _ = ours(ids[:, :-1], ids[:, 1:])
        assert_close(loss, their_loss)
        their_loss.backward()
        loss.backward()
        wanted = gradients(theirs)
        found = gradients(ours)
        assert len(found) == len(wanted)
        for name, gradient in found.items():
            if name in (EMBEDDING, HEAD):
                gradient = gradient[: shape.vocab_size]
            if shape.architecture == "gpt2" and ".c_" in name and gradient.ndim == 2:
                gradient = gradient.T  # Conv1D
            assert_close(gradient, wanted[shape.family.folder_name(name)])


@pytest.mark.parametrize("shape", [GPT2, QWEN2], ids=["gpt2", "qwen2"])
def test_a_backbone_saved_without_the_prefix_is_read(shape: TransformerConfig, tmp_path: Path) -> None:
    """The folder of GPT-2 on the hub is of this kind."""
    theirs = AutoModel.from_config(transformers_config(shape)).eval()
    theirs.save_pretrained(tmp_path)
    ids = random_ids(shape, 1, 20)
    with torch.no_grad():
        logits = theirs(ids).last_hidden_state @ theirs.get_input_embeddings().weight.T
        assert (ours_from_folder(tmp_path)(ids) - logits).abs().max() < 1e-4


@pytest.mark.parametrize("preset", PRESETS)
def test_presets_have_as_many_parameters_as_transformers_makes(preset: str) -> None:
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(transformers_config(PRESETS[preset]))
    assert model.num_parameters() == count_parameters(PRESETS[preset])["total"]


@pytest.mark.parametrize("family", SHAPES)
def test_an_exported_folder_keeps_its_tie_and_special_tokens(exported: dict, family: str) -> None:
    ours, folder = exported[family]
    theirs = AutoModelForCausalLM.from_pretrained(folder)
    assert (theirs.lm_head.weight is theirs.get_input_embeddings().weight) == ours.shape.tied_head
    assert theirs.num_parameters() == count_parameters(ours.shape)["total"]
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert theirs.config.eos_token_id == theirs.config.bos_token_id == tokenizer.eos_token_id
    generation = theirs.generation_config
    assert generation.eos_token_id == generation.bos_token_id == tokenizer.eos_token_id
    assert generation.pad_token_id == tokenizer.pad_token_id != tokenizer.eos_token_id
    assert read_shape(folder) == ours.shape


def test_a_half_precision_folder_in_several_files_is_loaded(tmp_path: Path) -> None:
    make_tokenizer(tmp_path / "tokenizer")
    shape = TransformerConfig.from_dict({**GPT_NEO.to_dict(), "vocab_size": 512})
    model = uneven_model(shape)
    write_folder(
        tmp_path / "out",
        shape,
        model.state_dict().items(),
        tmp_path / "tokenizer",
        "bfloat16",
        shard_bytes=20_000,
    )
    assert len(list((tmp_path / "out").glob("model-*-of-*.safetensors"))) > 2
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert theirs.dtype == torch.bfloat16
    ids = random_ids(shape, 1, 30)
    with torch.no_grad():
        rounded = ours_from_folder(tmp_path / "out")(ids)
        assert (rounded - theirs.float()(ids).logits).abs().max() < 1e-4
