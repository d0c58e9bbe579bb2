"""Prevents: bits per byte of other bytes or tokens than they say, a text scored twice or cut, and validation that
depends on the ranks."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gloria.data.corpus import open_corpus
from gloria.data.loader import text_windows
from gloria.data.tokenizer import load_tokenizer
from gloria.errors import run_command
from gloria.pretrain import main
from gloria.train.metrics import bits_per_byte, weighted_mean
from gloria.train.texts import read_all_texts
from tests import launch
from tests.conftest import REPOSITORY
from tests.launch import SMALL, flags, metrics

LONG = " ".join(["Em Lisboa, no mês de abril, choveu todos os dias."] * 12)
SHORT = ["A maré subiu.", "O comboio chegou tarde à estação."]


@pytest.fixture
def recipe(sample_corpus: Path, tmp_path: Path) -> dict[str, Any]:
    """Two steps with a validation before, between and behind them, on a long text and two sentences."""
    (tmp_path / "longo.txt").write_text(LONG)
    (tmp_path / "frases.jsonl").write_text("".join(json.dumps({"frase": text}) + "\n" for text in SHORT))
    own = {"train.steps": 2, "valid.every": 1, "valid.windows": 4, "valid.text_field": "frase"}
    paths = {"valid.paths.longo": tmp_path / "longo.txt", "valid.paths.frases": tmp_path / "frases.jsonl"}
    config = REPOSITORY / "launch/demo.toml"
    return {"config": config, "data.corpus": sample_corpus, **SMALL, **own, **paths, "run.dir": tmp_path / "run"}


CUTS = [(1, 8, 4), (2, 8, 4), (9, 8, 4), (10, 8, 4), (50, 8, 3), (7, 1, 1)]


@pytest.mark.parametrize(("count", "length", "stride"), CUTS)
def test_every_token_but_the_first_is_scored_once(count, length, stride):
    scored = [place for begin, end, n in text_windows(count, length, stride) for place in range(end - n, end)]
    assert scored == list(range(1, count))
    for begin, end, n in text_windows(count, length, stride):
        assert end - begin <= length + 1
        assert n <= (length if begin == 0 else stride)


def test_rows_hold_whole_documents_behind_an_eos(sample_corpus: Path, recipe, tmp_path):
    tokenizer = load_tokenizer(sample_corpus / "tokenizer")
    texts = read_all_texts({"longo": str(tmp_path / "longo.txt")}, "text", tokenizer, 32)["longo"]
    ids = tokenizer.encode(LONG)
    assert (texts.documents, texts.num_tokens, texts.num_bytes) == (1, len(ids), len(LONG.encode()))
    assert texts.tokens[0, 0] == tokenizer.eos_id
    targets = [row[1:][first:end] for row, (first, end) in zip(texts.tokens, texts.scored)]
    assert np.concatenate(targets).tolist() == ids
    assert (texts.tokens[:, 1:] != tokenizer.eos_id).all()


def test_bits_per_byte_are_loss_by_tokens_by_bytes():
    assert bits_per_byte(math.log(2) * 3, 1.5) == pytest.approx(2.0)  # 3 bits a token, which is 1.5 bytes
    assert bits_per_byte(None, 1.5) is bits_per_byte(1.0, None) is None
    assert weighted_mean({"a": 1.0, "b": 4.0}, {"a": 0.75, "b": 0.25, "c": 0.0}) == 1.75
    assert weighted_mean({"a": 1.0}, {"a": 0.5, "b": 0.5}) is None


def test_a_run_logs_bits_by_source_and_its_texts_as_evaluate_scores_them(recipe, tmp_path, capsys):
    """In training, in validation, and of whole texts: those are what `gloria.evaluate` finds."""
    from gloria.evaluate import main as evaluate

    assert main(flags(recipe)) == 0
    printed = capsys.readouterr().out
    tokens = len(load_tokenizer(tmp_path / "run/tokenizer").encode(LONG))
    assert f"\ntext        longo: 1 documents, {len(LONG.encode())} bytes, {tokens} tokens in " in printed
    corpus = open_corpus(recipe["data.corpus"])
    for kind, split in (("train", "train"), ("valid", "valid")):
        line = metrics(tmp_path / "run", kind)[-1]
        for name, entry in ((entry.name, getattr(entry, split)) for entry in corpus.manifest.sources):
            ratio = entry.tokens / entry.bytes / math.log(2)
            if kind == "valid":
                assert line["source_bits_per_byte"][name] == pytest.approx(line["sources"][name] * ratio)
            elif (source := line["sources"][name])["loss"] is not None:
                assert source["bits_per_byte"] == pytest.approx(source["loss"] * ratio)
    bits = list(line["source_bits_per_byte"].values())
    assert min(bits) < line["bits_per_byte"] < max(bits)
    found = line["texts"]["longo"]
    model = ["--model", str(tmp_path / "run"), "--data", str(recipe["valid.paths.longo"]), "--length", "32"]
    assert evaluate(["--task", "perplexity", *model, "--out", str(tmp_path / "scores")]) == 0
    scores = json.loads((tmp_path / "scores/results.json").read_text())["results"][0]["scores"]
    assert found["bits_per_byte"] == pytest.approx(scores["bits_per_byte"]["value"], rel=1e-5)
    assert found["perplexity"] == pytest.approx(scores["token_perplexity"]["value"], rel=1e-5)


def test_three_ranks_find_what_one_finds(recipe, tmp_path):
    assert main(flags(recipe)) == 0
    launch.run(flags(recipe, run__dir=tmp_path / "three", train__micro_batch=2), 3, tmp_path)
    for one, three in zip(metrics(tmp_path / "run", "valid"), metrics(tmp_path / "three", "valid")):
        for name in ("longo", "frases"):
            assert three["texts"][name] == pytest.approx(one["texts"][name], rel=1e-5)


def test_what_is_wrong_with_a_text_is_one_line(recipe, tmp_path, capsys):
    (tmp_path / "leer.txt").write_text(" \n")
    paths = {"valid.paths.a": tmp_path / "nowhere.txt", "valid.paths.b": tmp_path / "leer.txt"}
    wrong = paths | {"valid.text_field": "text"}
    assert run_command(main, flags(recipe | wrong)) == 2
    assert [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")] == [
        f'error: --valid.paths.frases: {tmp_path}/frases.jsonl:1: no field "text"; correct it',
        f'error: --valid.paths.a: "{tmp_path}/nowhere.txt" matches no file; correct the path',
        f"error: --valid.paths.b: there is no text in {tmp_path}/leer.txt; name another file",
    ]
    assert run_command(main, flags(recipe, valid__every=0)) == 2
    line = "is never read, for valid.every is 0; set that to a number of steps"
    assert f"valid.paths: {line}" in capsys.readouterr().err
