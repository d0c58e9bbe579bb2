"""Prevents a LLaMA that is taken further on other terms than its own: a tokenizer that cuts or means something else, a
first loss that is not the folder's, documents that begin as the model never saw one begin, an export that transformers
reads as another model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, decoders, models, normalizers, processors, trainers
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from gloria.data.corpus import open_corpus
from gloria.data.loader import validation_windows
from gloria.data.tokenizer import SPACE
from gloria.export import main as export
from gloria.generate import main as generate
from gloria.generate import prompt_ids
from gloria.prepare import main as prepare
from gloria.pretrain import main as pretrain
from gloria.tasks.models.backbones import load_model
from tests.conftest import REPOSITORY
from tests.launch import flags, metrics

TEXTS = ["Era uma vez", "  o mar,\no céu  e 7 barcos", "coração: ação — não!", "<s> e </s> são texto"]
BYTES = [f"<0x{number:02X}>" for number in range(256)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random LLaMA whose tokenizer is of Llama 2's kind: a prefix, visible spaces, bytes to fall back on, a BOS."""
    folder = tmp_path_factory.mktemp("llama") / "model"
    backend = Tokenizer(models.BPE(byte_fallback=True, fuse_unk=True, unk_token="<unk>"))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend(SPACE), normalizers.Replace(" ", SPACE)])
    trainer = trainers.BpeTrainer(vocab_size=900, special_tokens=["<unk>", "<s>", "</s>", *BYTES])
    files = sorted((REPOSITORY / "gloria/data/sample/cartas").glob("*.txt"))
    backend.train_from_iterator([file.read_text() for file in files], trainer)
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", 1)]
    )
    fused = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    backend.decoder = decoders.Sequence(fused)
    names = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
    PreTrainedTokenizerFast(tokenizer_object=backend, **names).save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=900,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def corpus(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One source of the sample, with the LLaMA's tokenizer."""
    root = tmp_path_factory.mktemp("corpus")
    recipe = f"""out = "{root / "corpus"}"
        [tokenizer]
        path = "{folder}"
        [[source]]
        name = "cartas"
        paths = ["{{gloria}}/data/sample/cartas/*.txt"]
    """
    (root / "corpus.toml").write_text(recipe)
    assert prepare([str(root / "corpus.toml"), "--workers", "1"]) in (0, None)
    return root / "corpus"


def recipe_of(folder: Path, corpus: Path, run: Path, **changes: Any) -> list[str]:
    recipe = {"model.from": folder, "data.corpus": corpus, "run.dir": run, "train.steps": 3, "train.global_batch": 4}
    recipe |= {"train.micro_batch": 4, "train.sequence_length": 48, "valid.every": 3, "log.every": 1}
    return flags(recipe, log__tensorboard="false", schedule__warmup_steps=0, run__device="cpu", **changes)


def test_a_llama_is_taken_further_and_is_a_llama_again(folder, corpus, tmp_path, capsys) -> None:
    run, out = tmp_path / "run", tmp_path / "out"
    assert pretrain(recipe_of(folder, corpus, run)) == 0
    assert "warning: model" not in capsys.readouterr().err
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    stream = open_corpus(corpus).stream("cartas", "valid")
    windows = validation_windows(stream, 48, 10**6)
    tokens = np.zeros((len(windows), 49), stream.dtype)
    stream.gather(windows, 48, tokens)
    ids = torch.from_numpy(tokens.astype(np.int64))
    with torch.no_grad():
        wanted = F.cross_entropy(theirs(ids[:, :-1]).logits.transpose(1, 2), ids[:, 1:])
    before, after = (line["loss"] for line in metrics(run, "valid"))
    assert before == pytest.approx(wanted.item(), rel=1e-5)
    assert after < before

    assert export(["--run", str(run), "--out", str(out)]) in (0, None)
    exported, ours = AutoModelForCausalLM.from_pretrained(out).eval(), load_model(str(run), language_model=True)
    assert type(exported) is LlamaForCausalLM
    with torch.no_grad():
        logits = exported(ids[:2, :-1]).logits
        assert (ours.language_model(ids[:2, :-1]) - logits).norm() < 1e-5 * logits.norm()
    first, last = AutoTokenizer.from_pretrained(folder), AutoTokenizer.from_pretrained(out)
    for text in TEXTS:
        text_ids = first(text)["input_ids"]
        assert last(text)["input_ids"] == text_ids
        assert last.decode(text_ids) == first.decode(text_ids)
    # The corpus has no BOS: what we trained begins behind EOS, as a run and exported, and the LLaMA behind its BOS.
    bos, eos = first.bos_token_id, first.eos_token_id
    own = first("Era uma vez", add_special_tokens=False)["input_ids"]
    for name, start in ((folder, bos), (run, eos), (out, eos)):
        assert prompt_ids(load_model(str(name)), "Era uma vez") == [start, *own]
        assert generate(["--model", str(name), "--prompt", "Era uma vez", "--max-new-tokens", "3"]) == 0
        assert "\nEra uma vez" in f"\n{capsys.readouterr().out}"


def test_what_is_new_to_the_folder_is_told_before_the_first_step(folder, corpus, sample_corpus, tmp_path, capsys):
    grown = {"model__vocab_size": 1000, "model__max_positions": 96, "train__sequence_length": 80}
    assert pretrain(recipe_of(folder, corpus, tmp_path / "grown", **grown)) == 0
    error = capsys.readouterr().err
    assert f"warning: model.vocab_size: 100 tokens are new to {folder}; they begin as the mean of its own\n" in error
    assert f"warning: model.max_positions: {folder} was made for 64, and has to learn the others\n" in error
    shape = load_model(str(tmp_path / "grown")).backbone.body.shape
    assert (shape.vocab_size, shape.max_positions) == (1000, 96)

    other = {"model__vocab_size": 2048, "train__steps": 1, "valid__every": 0}
    assert pretrain(recipe_of(folder, sample_corpus, tmp_path / "other", **other)) == 0
    (line,) = (line for line in capsys.readouterr().err.splitlines() if "model.from" in line)
    assert line.endswith(
        f"of the corpus's 2048 tokens are others in {folder}/tokenizer.json; prepare the corpus with that folder as "
        "tokenizer.path"
    )
