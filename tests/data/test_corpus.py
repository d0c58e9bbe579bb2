"""Bug prevented: a corpus that is unfinished, damaged, half replaced or made with another tokenizer and is trained on
all the same."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers

from gloria.data.corpus import (
    FORMAT,
    Manifest,
    SourceEntry,
    SplitEntry,
    open_corpus,
    read_manifest,
    source_fingerprint,
    write_manifest,
)
from gloria.data.shards import MAGIC, write_split
from gloria.data.tokenizer import TextTokenizer, load_tokenizer
from gloria.errors import UserError

EOS = 0
VOCAB = 2000
WORDS = {"</s>": EOS, **{f"w{i:04d}": i for i in range(1, VOCAB)}}  # five bytes of text each
AGAIN = "; prepare the corpus again"


@pytest.fixture(scope="module")
def tokenizer_folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    backend = Tokenizer(models.WordLevel(WORDS, unk_token="w0001"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.add_special_tokens(["</s>"])
    backend.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "</s>"}))
    return folder


@pytest.fixture(scope="module")
def tokenizer(tokenizer_folder: Path) -> TextTokenizer:
    return load_tokenizer(tokenizer_folder)


def split(folder: Path, path: str, documents: list[list[int]], shard_tokens: int = 8) -> SplitEntry:
    tokens = np.array([token for document in documents for token in document], "<u2")
    lengths = np.array([len(document) for document in documents])
    shards = write_split(folder, path, np.dtype("<u2"), [(tokens, lengths)], shard_tokens)
    return SplitEntry(len(documents), len(tokens), 4 * len(tokens), len(tokens), shards)


def tree(folder: Path, tokenizer_folder: Path, tokenizer: TextTokenizer) -> Path:
    """A whole corpus of two sources: the first has two training shards and one for validation, the second one."""
    shutil.copytree(tokenizer_folder, folder / "tokenizer")
    known = {"read": 4, "kept": 4}
    wiki = SourceEntry(
        "wiki",
        0.25,
        split(folder, "wiki/train", [[1, 2, 0], [3, 0], [4, 5, 6, 7, 0]]),
        split(folder, "wiki/valid", [[8, 0]]),
        known,
    )
    news = SourceEntry("news", 1.0, split(folder, "news/train", [[9, 0]]), SplitEntry(0, 0, 0, 0, []), {"read": 1})
    record = {
        "fingerprint": tokenizer.fingerprint,
        "vocab_size": tokenizer.vocab_size,
        "eos_id": tokenizer.eos_id,
        "pad_id": tokenizer.pad_id,
    }
    write_manifest(folder, Manifest(FORMAT, record, [wiki, news], {"out": "x", "names": ["água"]}))
    return folder


@pytest.fixture
def corpus(tmp_path: Path, tokenizer_folder: Path, tokenizer: TextTokenizer) -> Path:
    return tree(tmp_path / "corpus", tokenizer_folder, tokenizer)


def problems_of(function: Callable, *args, **kwargs) -> list[str]:
    with pytest.raises(UserError) as caught:
        function(*args, **kwargs)
    return list(caught.value.problems)


def change(corpus: Path, mend: Callable[[dict], object]) -> None:
    path = corpus / "manifest.json"
    values = json.loads(path.read_text())
    mend(values)
    path.write_text(json.dumps(values))


def test_a_whole_corpus_opens(corpus: Path, tokenizer: TextTokenizer) -> None:
    opened = open_corpus(corpus, verify=True)
    assert opened.names == ["wiki", "news"]
    assert opened.weights == {"wiki": 0.25, "news": 1.0}
    assert load_tokenizer(opened.tokenizer_folder).fingerprint == tokenizer.fingerprint
    stream = opened.stream("wiki")
    assert np.concatenate(stream.shards).tolist() == [1, 2, 0, 3, 0, 4, 5, 6, 7, 0]
    assert (stream.num_tokens, len(stream.shards)) == (10, 2)
    assert opened.stream("wiki", "valid").shards[0].tolist() == [8, 0]
    assert stream.fingerprint == source_fingerprint(opened.source("wiki"))
    assert stream.fingerprint != opened.stream("wiki", "valid").fingerprint


def test_the_manifest_comes_back_as_it_was(corpus: Path) -> None:
    manifest = read_manifest(corpus)
    write_manifest(corpus, manifest)
    assert read_manifest(corpus) == manifest
    assert manifest.recipe == {"out": "x", "names": ["água"]}
    assert "água" in (corpus / "manifest.json").read_text("utf-8")
    assert sorted(os.listdir(corpus)) == ["manifest.json", "news", "tokenizer", "wiki"]


def test_a_failed_write_leaves_the_old_manifest(corpus: Path) -> None:
    before = (corpus / "manifest.json").read_bytes()
    broken = dataclasses.replace(read_manifest(corpus), recipe={"not JSON": object()})
    with pytest.raises(TypeError):
        write_manifest(corpus, broken)
    assert (corpus / "manifest.json").read_bytes() == before


def test_the_manifest_is_on_the_disk_before_it_has_its_name(corpus: Path, monkeypatch) -> None:
    steps = []
    monkeypatch.setattr(os, "fsync", lambda descriptor: steps.append(os.fstat(descriptor).st_ino))
    monkeypatch.setattr(os, "replace", lambda source, target: steps.append(Path(target).name))
    write_manifest(corpus, read_manifest(corpus))
    (temporary,) = corpus.glob(".manifest.json.*")
    assert steps == [temporary.stat().st_ino, "manifest.json", corpus.stat().st_ino]


def test_fingerprints_follow_tokens_and_order_alone(corpus: Path) -> None:
    wiki = read_manifest(corpus).sources[0]
    moved = dataclasses.replace(wiki, name="other", weight=3.0, counts={}, valid=wiki.train)
    assert source_fingerprint(moved) == source_fingerprint(wiki)
    turned = dataclasses.replace(wiki.train, shards=wiki.train.shards[::-1])
    assert source_fingerprint(dataclasses.replace(wiki, train=turned)) != source_fingerprint(wiki)


def test_unknown_source_and_empty_split(corpus: Path) -> None:
    opened = open_corpus(corpus)
    assert problems_of(opened.stream, "wikki") == [f'{corpus}: has no source "wikki"; it has wiki, news']
    assert problems_of(opened.stream, "news", "valid") == [
        f'{corpus}: source "news" has no valid tokens; give it more documents'
    ]


def test_no_manifest(tmp_path: Path, corpus: Path) -> None:
    make = "make one with python -m gloria.prepare"
    missing = tmp_path / "other"
    assert problems_of(open_corpus, missing) == [f"{missing}: no such folder; {make}"]
    partial = corpus.rename(tmp_path / "other.partial-a1")
    (partial / "manifest.json").unlink()
    assert problems_of(open_corpus, missing) == [
        f"{missing}: no such folder, only an unfinished other.partial-a1; {make}"
    ]
    assert problems_of(open_corpus, partial) == [f"{partial}: is unfinished, it has no manifest.json; {make}"]
    partial.rename(missing)
    assert problems_of(open_corpus, missing) == [f"{missing}: is no corpus, it has no manifest.json; {make}"]


def test_a_manifest_of_another_kind(corpus: Path) -> None:
    path = corpus / "manifest.json"
    change(corpus, lambda values: values.update(format=2, more="of the future"))
    assert problems_of(open_corpus, corpus) == [f"{path}: format is 2, and this version reads 1{AGAIN}"]
    path.write_text("[]")
    assert problems_of(open_corpus, corpus) == [f"{path}: is not a JSON object{AGAIN}"]
    path.write_text('{"format": 1,')
    assert problems_of(open_corpus, corpus) == [
        f"{path}: is not valid JSON (Expecting property name enclosed in double quotes: "
        f"line 1 column 14 (char 13)){AGAIN}"
    ]
    path.write_bytes(b"\xff\xfe")
    assert problems_of(open_corpus, corpus) == [
        f"{path}: is not valid JSON ('utf-8' codec can't decode byte 0xff in position 0: invalid start byte){AGAIN}"
    ]


def train(values: dict) -> dict:
    return values["sources"][0]["train"]


@pytest.mark.parametrize(
    ("mend", "line"),
    [
        (lambda v: v.pop("recipe"), "recipe: missing; give it"),
        (lambda v: train(v).pop("tokens"), "sources[0].train.tokens: missing; give it"),
        (
            lambda v: train(v)["shards"][1].pop("bin_hash"),
            "sources[0].train.shards[1].bin_hash: missing; give it",
        ),
        (
            lambda v: train(v).update(tokens="10"),
            'sources[0].train.tokens: must be a whole number, not "10"; for example 1000',
        ),
        (
            lambda v: train(v)["shards"][0].update(dtype="float32"),
            'sources[0].train.shards[0].dtype: unknown value "float32"; one of "uint16", "int32"',
        ),
        (lambda v: train(v).update(tokens=11), f"sources[0].train.tokens: is 11, and its shards have 10{AGAIN}"),
        (
            lambda v: train(v)["shards"].pop(),
            f"sources[0].train.documents: is 3, and its shards have 2{AGAIN}",
        ),
        (
            lambda v: train(v)["shards"][0].update(path="/etc/passwd"),
            f'sources[0].train: the path "/etc/passwd" leaves the corpus folder{AGAIN}',
        ),
        (
            lambda v: train(v)["shards"][0].update(path="wiki/../../x"),
            f'sources[0].train: the path "wiki/../../x" leaves the corpus folder{AGAIN}',
        ),
        (
            lambda v: train(v)["shards"][0].update(bin_size=9),
            f'sources[0].train: "wiki/train-00000.bin" can\'t be 9 bytes{AGAIN}',
        ),
        (lambda v: v["sources"][1].update(name="wiki"), f'sources: "wiki" is listed twice{AGAIN}'),
        (lambda v: v.update(sources=[]), f"sources: there are none{AGAIN}"),
        (lambda v: v["tokenizer"].pop("eos_id"), f"tokenizer.eos_id: must be a whole number{AGAIN}"),
        (lambda v: v["tokenizer"].update(fingerprint=7), f"tokenizer.fingerprint: must be a string{AGAIN}"),
    ],
)
def test_a_manifest_that_contradicts_itself(corpus: Path, mend: Callable, line: str) -> None:
    change(corpus, mend)
    assert f"{corpus}/manifest.json: {line}" in problems_of(open_corpus, corpus)


def test_a_missing_shard(corpus: Path) -> None:
    for suffix in (".bin", ".idx"):
        (corpus / f"wiki/train-00001{suffix}").unlink()
    assert problems_of(open_corpus, corpus) == [
        f"{corpus}/wiki/train-00001.bin: no such file, but manifest.json lists it{AGAIN}",
        f"{corpus}/wiki/train-00001.idx: no such file, but manifest.json lists it{AGAIN}",
    ]


def test_a_shard_of_another_size(corpus: Path) -> None:
    """Every broken file is named at once."""
    for path in (corpus / "wiki/valid-00000.bin", corpus / "news/train-00000.idx"):
        path.write_bytes(path.read_bytes() + b"\0")
    assert problems_of(open_corpus, corpus) == [
        f"{corpus}/wiki/valid-00000.bin: is 5 bytes, and manifest.json says 4{AGAIN}",
        f"{corpus}/news/train-00000.idx: is 63 bytes, and manifest.json says 62{AGAIN}",
    ]


@pytest.mark.parametrize("suffix", [".bin", ".idx"])
def test_a_flipped_bit_is_found_by_verify_alone(corpus: Path, suffix: str) -> None:
    path = corpus / f"wiki/train-00000{suffix}"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    assert open_corpus(corpus).names == ["wiki", "news"]
    shard = read_manifest(corpus).sources[0].train.shards[0]
    listed = shard.bin_hash if suffix == ".bin" else shard.idx_hash
    (line,) = problems_of(open_corpus, corpus, verify=True)
    assert line.startswith(f"{path}: its hash is ")
    assert line.endswith(f", and manifest.json says {listed}{AGAIN}")


def test_another_tokenizer_in_the_folder(corpus: Path, tokenizer: TextTokenizer) -> None:
    path = corpus / "tokenizer/tokenizer.json"
    path.write_text(path.read_text() + "\n")
    found = load_tokenizer(corpus / "tokenizer").fingerprint
    assert problems_of(open_corpus, corpus) == [
        f"{path}: its fingerprint is {found}, and the shards were made with {tokenizer.fingerprint}{AGAIN}"
    ]
    path.unlink()
    assert problems_of(open_corpus, corpus) == [f"{path}: no such file; a tokenizer's folder has a tokenizer.json"]


def test_a_shard_whose_header_says_otherwise(corpus: Path) -> None:
    """The same size, but the header makes it other tokens."""
    path = corpus / "news/train-00000.idx"
    data = path.read_bytes()
    path.write_bytes(data[: len(MAGIC) + 8] + b"\4" + data[len(MAGIC) + 9 :])
    assert problems_of(open_corpus(corpus).stream, "news") == [
        f"{path}: has 1 tokens of int32, and manifest.json says 2 of uint16{AGAIN}"
    ]
