"""Prevents generated text that is not the model's: a document start it never saw, sampling where greedy was
requested, other text for the same flags, text beyond the end of a document or of the model's positions."""

from __future__ import annotations

import shutil
from argparse import Namespace
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from gloria.data.tokenizer import TextTokenizer
from gloria.dist.checkpoint import begin_save, publish
from gloria.dist.state import model_state_dict
from gloria.errors import UserError, run_command
from gloria.generate import main, prompt_ids, sample
from gloria.model.huggingface import write_folder
from gloria.model.transformer import Transformer
from gloria.tasks.models.backbones import load_model
from tests.tasks.tiny import make_folder
from tests.tiny_models import GPT_NEO, make_tokenizer, uneven_model

PROMPT = "Os barcos saem"


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Transformer, TextTokenizer]:
    """A folder with an untrained model, its model and its tokenizer."""
    root = tmp_path_factory.mktemp("generate")
    tokenizer = make_tokenizer(root / "tokenizer")
    shape = replace(GPT_NEO, vocab_size=tokenizer.vocab_size)
    model = uneven_model(shape).eval()
    with torch.no_grad():
        # Control bytes and the special tokens are never likely: the text is printable and has no end.
        for unwanted in [tokenizer.eos_id, tokenizer.pad_id]:
            model.transformer.wte.weight[unwanted] *= 0.01
    write_folder(root / "model", shape, model.state_dict().items(), root / "tokenizer", "float32")
    return root / "model", model, tokenizer


def generate(capsys: pytest.CaptureFixture[str], folder: Path, *flags: str) -> str:
    torch.backends.cuda.enable_cudnn_sdp(True)
    assert main(["--model", str(folder), "--prompt", PROMPT, *flags]) == 0
    assert not torch.backends.cuda.cudnn_sdp_enabled()  # each length would be planned anew
    return capsys.readouterr().out.removesuffix("\n")


def test_greedy_takes_the_likeliest_token_behind_eos_and_prompt(
    written: tuple, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, model, tokenizer = written
    ids = [tokenizer.eos_id, *tokenizer.encode(PROMPT)]
    for _ in range(12):
        ids.append(int(model(torch.tensor([ids]))[0, -1].argmax()))
    assert generate(capsys, folder, "--greedy", "--max-new-tokens", "12") == tokenizer.decode(ids[1:])


def test_the_seed_decides_the_text(written: tuple, capsys: pytest.CaptureFixture[str]) -> None:
    folder = written[0]
    flags = ["--max-new-tokens", "12"]
    first = generate(capsys, folder, *flags)
    assert first.startswith(PROMPT)
    assert len(first) > len(PROMPT)
    assert generate(capsys, folder, *flags, "--seed", "0") == first
    assert generate(capsys, folder, *flags, "--seed", "1") != first


@pytest.mark.parametrize(
    "settings", [{}, {"temperature": 0.3}, {"top_k": 5}, {"top_p": 0.6}, {"temperature": 2.0, "top_k": 9, "top_p": 0.8}]
)
def test_tokens_are_drawn_by_the_probabilities_of_transformers(settings: dict) -> None:
    settings = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, **settings}
    torch.manual_seed(0)
    logits, draws = 2 * torch.randn(1, 20), 20_000
    wanted = TemperatureLogitsWarper(settings["temperature"])(None, logits)
    if settings["top_k"]:
        wanted = TopKLogitsWarper(settings["top_k"])(None, wanted)
    wanted = TopPLogitsWarper(settings["top_p"])(None, wanted).softmax(1)[0]
    drawn = sample(logits.expand(draws, -1), Namespace(**settings)).bincount(minlength=20) / draws
    assert ((drawn > 0) <= (wanted > 0)).all()
    assert (drawn - wanted).abs().max() < 6 * (0.25 / draws) ** 0.5  # six standard deviations


def test_a_run_and_its_checkpoint_give_the_text_of_their_export(
    written: tuple, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, model, _ = written
    shutil.copytree(folder.parent / "tokenizer", tmp_path / "tokenizer")
    trainer = {"model": model.shape.to_dict()}
    state = model_state_dict(model)
    save = begin_save(tmp_path, 7, state, {}, trainer, rank=0, world=1, launch="test", asynchronous=False)
    assert publish(save), save.error
    wanted = generate(capsys, folder, "--max-new-tokens", "9")
    assert generate(capsys, tmp_path, "--max-new-tokens", "9") == wanted
    assert generate(capsys, tmp_path / "checkpoints" / "step-00000007", "--max-new-tokens", "9") == wanted


def test_the_narrowest_sampling_is_greedy(written: tuple, capsys: pytest.CaptureFixture[str]) -> None:
    folder = written[0]
    flags = ["--max-new-tokens", "12"]
    greedy = generate(capsys, folder, *flags, "--greedy")
    assert generate(capsys, folder, *flags, "--top-k", "1") == greedy
    assert generate(capsys, folder, *flags, "--top-p", "0.000001") == greedy
    assert generate(capsys, folder, *flags, "--temperature", "0.0001") == greedy
    assert generate(capsys, folder, *flags, "--temperature", "100", "--top-p", "1") != greedy


def test_it_stops_at_the_end_of_a_document(written: tuple, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _, model, tokenizer = written
    ending = Transformer(model.shape)
    ending.load_state_dict(model.state_dict())
    with torch.no_grad():
        # The last norm gives a constant, of which EOS has the largest product.
        ending.transformer.ln_f.weight.zero_()
        ending.transformer.ln_f.bias.copy_(100 * model.transformer.wte.weight[tokenizer.eos_id])
        ending.transformer.wte.weight[tokenizer.eos_id] *= 1e4
    write_folder(tmp_path / "m", ending.shape, ending.state_dict().items(), written[0].parent / "tokenizer", "float32")
    assert generate(capsys, tmp_path / "m", "--greedy") == PROMPT


def test_a_special_tokens_name_in_the_prompt_is_text(written: tuple) -> None:
    folder, _, tokenizer = written
    text = "antes<|endoftext|>depois"
    ids = prompt_ids(load_model(str(folder)), text)
    assert ids == [tokenizer.eos_id, *tokenizer.encode(text)]
    assert ids.count(tokenizer.eos_id) == 1


def test_a_model_that_did_not_begin_behind_eos_begins_with_what_its_tokenizer_adds(tmp_path: Path) -> None:
    bos, eos = 1, 0  # of the tokenizers of tests/tasks/tiny.py
    for family, start in (("llama", [bos]), ("mistral", [bos]), ("gpt_neox", [])):
        loaded = load_model(str(make_folder(family, tmp_path / family)), language_model=True)
        own = loaded.tokenizer(PROMPT, add_special_tokens=False)["input_ids"]
        assert (loaded.behind_eos, prompt_ids(loaded, PROMPT)) == (False, [*start, *own])
        # Run on by us, its documents begin behind EOS, whatever its tokenizer adds.
        assert prompt_ids(replace(loaded, behind_eos=True), PROMPT) == [eos, *own]
    loaded.tokenizer.eos_token = loaded.tokenizer.bos_token = None
    with pytest.raises(UserError, match="has neither BOS nor EOS, and a text must begin with one"):
        prompt_ids(loaded, "")


def test_an_empty_prompt_begins_a_document(written: tuple, capsys: pytest.CaptureFixture[str]) -> None:
    folder, model, tokenizer = written
    assert main(["--model", str(folder), "--prompt", "", "--greedy", "--max-new-tokens", "1"]) == 0
    wanted = int(model(torch.tensor([[tokenizer.eos_id]]))[0, -1].argmax())
    assert capsys.readouterr().out == tokenizer.decode([wanted]) + "\n"


def test_text_never_goes_beyond_the_models_positions(written: tuple, capsys: pytest.CaptureFixture[str]) -> None:
    folder, _, tokenizer = written
    given = 1 + len(tokenizer.encode(PROMPT))
    assert main(["--model", str(folder), "--prompt", PROMPT, "--greedy", "--max-new-tokens", "100"]) == 0
    captured = capsys.readouterr()
    assert captured.err == (
        f"warning: --max-new-tokens: 100 do not fit behind {given} of 64 positions; at most {64 - given} are made\n"
    )
    assert captured.out == generate(capsys, folder, "--greedy", "--max-new-tokens", str(64 - given)) + "\n"


def test_mistakes_are_reported_all_at_once(capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--max-new-tokens", "0", "--temperature", "0", "--top-k", "-1", "--top-p", "1.5", "--seed", "-3"]
    assert run_command(main, ["--model", "models/none", "--prompt", "x", *flags]) == 2
    assert capsys.readouterr().err.splitlines() == [
        "error: --max-new-tokens: 0 is too small; give at least 1",
        "error: --temperature: 0.0 is too small; give more than 0",
        "error: --top-k: -1 is too small; give at least 0",
        "error: --top-p: 1.5 is too large; give at most 1",
        "error: --seed: -3 is too small; give at least 0",
        "error: --model: models/none is no folder; give a run, a checkpoint or a Hugging Face folder",
    ]


def test_sampling_flags_are_not_ignored_with_greedy(written: tuple, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--greedy", "--top-p", "0.5", "--seed", "1"]
    assert run_command(main, ["--model", str(written[0]), "--prompt", "x", *flags]) == 2
    assert capsys.readouterr().err.splitlines() == [
        "error: --top-p: has no effect with --greedy; leave one of them out",
        "error: --seed: has no effect with --greedy; leave one of them out",
    ]


def test_a_prompt_that_fills_all_positions(written: tuple, capsys: pytest.CaptureFixture[str]) -> None:
    folder, _, tokenizer = written
    prompt = "peixe " * 200
    tokens = 1 + len(tokenizer.encode(prompt))
    assert run_command(main, ["--model", str(folder), "--prompt", prompt]) == 2
    assert capsys.readouterr().err == (
        f"error: --prompt: has {tokens} tokens, the model 64 positions; shorten it to at most 63\n"
    )


def test_a_folder_that_is_no_model(written: tuple, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "gpt9"}')
    assert run_command(main, ["--model", str(tmp_path), "--prompt", "x"]) == 2
    assert capsys.readouterr().err == (
        f"error: {tmp_path}: has no model.safetensors; give the folder of a whole model\n"
    )
    (tmp_path / "model.safetensors").write_bytes((written[0] / "model.safetensors").read_bytes())
    assert run_command(main, ["--model", str(tmp_path), "--prompt", "x"]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert lines[0].startswith(
        f"error: --model: {tmp_path} cannot be loaded (The checkpoint you are trying to load has"
    )
