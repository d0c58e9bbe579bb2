"""Bugs prevented: a batch that writes other tokens than `generate` of transformers writes one by one; a repetition
penalty on padding; a rule whose answers depend on which other rules are asked; answers scored behind another question's
context."""

from __future__ import annotations

import json
import random
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from gloria.dist.process import start_process_group, stop_process_group
from gloria.tasks.models.backbones import LoadedModel, load_model
from gloria.tasks.models.loglikelihood import (
    Request,
    Settings,
    _by_context,
    _penalise,
    _Row,
    continuations,
    log_likelihoods,
)
from tests.tasks.tiny import make_folder, make_tokenizer, sentence

MANY = [sentence(random.Random(number), 1 + number % 12) for number in range(10)] + ["", "o"]
PLAIN, PENALTY = Settings(9), Settings(5, repetition_penalty=2.0)


@pytest.fixture(scope="module")
def process():
    found = start_process_group("cpu", timeout_minutes=5)
    yield found
    stop_process_group()


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> Callable[[str], Path]:
    """Models whose every parameter matters, made when they are asked for."""
    made: dict[str, Path] = {}

    def folder(family: str) -> Path:
        if family in made:
            return made[family]
        path = made[family] = tmp_path_factory.mktemp("models") / family
        model = AutoModelForCausalLM.from_pretrained(make_folder(family, path))
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
        model.save_pretrained(path)
        return path

    return folder


def load(path: Path, *, foreign: bool = False) -> LoadedModel:
    """A model whose texts show the tokens they are made of: "<12><7>"."""
    loaded = load_model(str(path), language_model=True)
    if foreign:
        loaded = replace(loaded, language_model=AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32))
    loaded.language_model.eval()
    loaded.tokenizer.decode = lambda ids, **_: "".join(f"<{token}>" for token in ids)
    loaded.tokenizer.batch_decode = lambda rows, **_: [loaded.tokenizer.decode(ids) for ids in rows]
    return loaded


@cache
def reference(path: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()


@torch.no_grad()
def one_by_one(loaded: LoadedModel, path: Path, prompts: list[str], settings: Settings) -> list[str]:
    model, tokenizer = reference(path), loaded.tokenizer
    texts = []
    for prompt in prompts:
        ids = tokenizer(prompt)["input_ids"] or [tokenizer.eos_token_id]
        output = model.generate(
            torch.tensor([ids]),
            attention_mask=torch.ones(1, len(ids), dtype=torch.long),
            max_new_tokens=settings.max_new_tokens,
            do_sample=False,
            repetition_penalty=settings.repetition_penalty,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=0,
        )[0, len(ids) :].tolist()
        texts.append(tokenizer.decode([token for token in output if token != tokenizer.eos_token_id]))
    return texts


@pytest.mark.parametrize(
    ("family", "foreign"),
    [
        ("gpt2", False),
        ("gpt_neo", False),
        ("gpt2", True),
        ("gpt_neo", True),
        ("llama", False),
        ("mistral", False),
        ("mistral", True),
        ("gpt_neox", True),
    ],
)
def test_a_batch_writes_what_generate_writes_one_by_one(family, foreign, folders, process):
    path = folders(family)
    loaded = load(path, foreign=foreign)
    plain = one_by_one(loaded, path, MANY, PLAIN)
    assert len(set(plain)) > 8
    # Texts end with a token that several of them come to.
    loaded.tokenizer.eos_token_id = max(range(320), key=lambda token: sum(f"<{token}>" in text for text in plain))
    prompts = [prompt for prompt in MANY if prompt]  # without EOS before them
    wanted = [one_by_one(loaded, path, prompts, settings) for settings in (PLAIN, PENALTY)]
    assert sum(text.count("<") < PLAIN.max_new_tokens for text in wanted[0]) > 1
    assert wanted[0] != wanted[1]
    for batch in (1, 5, 64):
        found = continuations(loaded, prompts, [PLAIN, PENALTY], batch, process)
        assert [texts for texts, _ in found] == wanted, batch
        assert [cut for _, cut in found] == [0, 0]
    ((texts, _),) = continuations(loaded, [""], [PLAIN], 1, process)
    assert texts == one_by_one(loaded, path, [""], PLAIN)


def test_the_penalty_is_on_each_rows_own_tokens_alone():
    rows = [_Row(0, [3], 2.0), _Row(1, [1, 2, 4], 1.5, tokens=[2]), _Row(2, [1, 2], 1.0)]
    logits = torch.tensor([[6.0, 6, 6, 6, -6]]).repeat(3, 1)
    wanted = [[6, 6, 6, 3, -6], [6, 4, 4, 6, -9], [6, 6, 6, 6, -6]]
    assert _penalise(logits, rows).tolist() == wanted


@pytest.mark.parametrize("family", ["gpt_neo", "llama", "gpt_neox"])
def test_settings_asked_together_answer_as_each_alone(family, folders, process):
    loaded = load(folders(family))
    long = sentence(random.Random(0), 120)  # more than the model sees: how much is cut depends on the new tokens
    prompts = [*MANY, long]
    asked = [
        Settings(16, is_over=lambda text: text.count("<") > 1 and text.endswith("1>")),
        Settings(5, repetition_penalty=2.0),
        Settings(10, is_over=lambda text: len(text) > 14),
        Settings(3),
        Settings(16, repetition_penalty=2.0, is_over=lambda text: len(text) > 19),
    ]
    together = continuations(loaded, prompts, asked, 4, process)
    assert together == [continuations(loaded, prompts, [settings], 4, process)[0] for settings in asked]
    assert [cut for _, cut in together] == [1] * 5


@pytest.mark.parametrize("family", ["llama", "gpt_neox"])
def test_the_end_tokens_of_generation_config_end_a_text(family, folders, process, tmp_path):
    ((texts, _),) = continuations(load(folders(family)), MANY, [PLAIN], 4, process)
    end = int(texts[0].split("<")[3].rstrip(">"))
    path = tmp_path / family
    shutil.copytree(folders(family), path)
    (path / "generation_config.json").write_text(json.dumps({"eos_token_id": [1, end]}))
    ((shorter, _),) = continuations(load(path), MANY, [PLAIN], 4, process)
    assert shorter == [text.partition(f"<{end}>")[0] for text in texts]
    assert shorter[0] != texts[0]


@pytest.mark.parametrize("family", ["gpt_neo", "llama"])
def test_answers_behind_a_context_read_once_score_as_each_alone(family, folders, process):
    loaded = load(folders(family))
    generator = random.Random(5)
    contexts = [sentence(generator, 8 + 5 * number) for number in range(6)]
    asked: list[Request] = []
    for number, context in enumerate(contexts):
        ids = loaded.tokenizer(context)["input_ids"]
        for _ in range(1 + number % 4):
            answer = loaded.tokenizer(" " + sentence(generator, generator.choice((1, 2, 6))))["input_ids"]
            asked.append(Request(ids + answer, len(answer)))
    asked += [Request([7, 1, 2], 2), Request([7, 3, 4], 2), Request([7, 5], 1)]  # hardly any context
    generator.shuffle(asked)
    groups = _by_context(asked)
    assert sorted(number for group in groups for number in group) == list(range(len(asked)))
    assert sorted(map(len, groups))[-2:] == [3, 4]
    alone = np.concatenate([log_likelihoods(loaded, [request], 1, process) for request in asked])
    assert len(set(alone[:, 0].round(3))) == len(asked)
    for batch in (1, 2, 64):
        np.testing.assert_allclose(log_likelihoods(loaded, asked, batch, process), alone, rtol=0, atol=1e-4)


def test_models_that_see_padding_continue_one_text_at_a_time(folders, process, tmp_path, capsys):
    """Mamba keeps no keys and values, and the decoder of BART counts its positions from the padding on."""
    tokenizer = make_tokenizer("llama")
    shapes = {
        "mamba": {"hidden_size": 32, "num_hidden_layers": 2, "state_size": 4},
        "bart": {"d_model": 32, "decoder_layers": 2, "decoder_attention_heads": 4, "decoder_ffn_dim": 64},
    }
    for family, shape in shapes.items():
        config = AutoConfig.for_model(family, vocab_size=len(tokenizer), **shape, is_encoder_decoder=False)
        model = AutoModelForCausalLM.from_config(config)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
        model.save_pretrained(tmp_path / family)
        tokenizer.save_pretrained(tmp_path / family)
        loaded = load(tmp_path / family)
        assert loaded.pads_left == ("padding changes" not in capsys.readouterr().err) == (family == "mamba")
        texts = [text for text in MANY if text]
        ((found, _),) = continuations(loaded, texts, [Settings(4)], 5, process)
        for text, continuation in zip(texts, found):
            ids = tokenizer(text)["input_ids"]
            with torch.no_grad():
                for token in re.findall(r"\d+", continuation):
                    ids.append(int(loaded.language_model(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
                    assert ids[-1] == int(token)
