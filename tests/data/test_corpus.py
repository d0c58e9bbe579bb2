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
    TokenizerEntry,
    open_corpus,
    read_manifest,
    source_fingerprint,
    write_manifest,
)
from gloria.data.shards import MAGIC, write_split
from gloria.data.tokenizer import TextTokenizer, load_tokenizer
from gloria.errors import UserError
from gloria.files import hash_file

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
    record = TokenizerEntry(tokenizer.fingerprint, tokenizer.vocab_size, tokenizer.eos_id, tokenizer.pad_id)
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
    """A manifest that says something else, without a seal."""
    path = corpus / "manifest.json"
    values = json.loads(path.read_text())
    del values["seal"]
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
    assert manifest.seal
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
    assert problems_of(open_corpus, partial) == [f"{partial}: is unfinished: it has no manifest.json; {make}"]
    partial.rename(missing)
    assert problems_of(open_corpus, missing) == [f"{missing}: is not a corpus: it has no manifest.json; {make}"]


def test_a_manifest_of_another_kind(corpus: Path) -> None:
    path = corpus / "manifest.json"
    change(corpus, lambda values: values.update(format=2, more="of the future"))
    assert problems_of(open_corpus, corpus) == [f"{path}: format is 2, and this version reads 1{AGAIN}"]
    for content, line in (
        (b"[]", "is not a JSON object"),
        (b'{"format": 1,', "is not valid JSON (Expecting property name"),
        (b"\xff\xfe", "is not valid JSON ('utf-8' codec can't decode"),
        (b'{"format":' + b"[" * 100_000, "is not valid JSON (maximum recursion depth"),
        (b'{"format":' + b"9" * 5000 + b"}", "is not valid JSON (a number of 5000 digits"),
    ):
        path.write_bytes(content)
        (problem,) = problems_of(open_corpus, corpus)
        assert problem.startswith(f"{path}: {line}")
        assert problem.endswith(AGAIN)


@pytest.mark.parametrize("name", ["manifest.json", "tokenizer/tokenizer.json", "tokenizer/tokenizer_config.json"])
def test_links_and_pipes_in_place_of_files(corpus: Path, name: str) -> None:
    path = corpus / name
    aside = path.rename(corpus.parent / "aside")
    path.symlink_to(aside)
    assert problems_of(open_corpus, corpus) == [f"{path}: is a symbolic link, which is never followed here{AGAIN}"]
    path.unlink()
    os.mkfifo(path)  # to open it would hang
    assert problems_of(open_corpus, corpus) == [f"{path}: is not a plain file{AGAIN}"]


def train(values: dict) -> dict:
    return values["sources"][0]["train"]


@pytest.mark.parametrize(
    ("mend", "line"),
    [
        (lambda v: v.pop("recipe"), "recipe: missing; give it"),
        (lambda v: v["tokenizer"].pop("eos_id"), "tokenizer.eos_id: missing; give it"),
        (
            lambda v: v["tokenizer"].update(vocab_size=2**40),
            "tokenizer.vocab_size: 1099511627776 is too large; give at most 2147483647",
        ),
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
            f"sources[0].train: the path '/etc/passwd' leaves the corpus folder{AGAIN}",
        ),
        (
            lambda v: train(v)["shards"][0].update(path="wiki/../../x"),
            f"sources[0].train: the path 'wiki/../../x' leaves the corpus folder{AGAIN}",
        ),
        (
            lambda v: train(v)["shards"][0].update(bin_size=9),
            f'sources[0].train: "wiki/train-00000.bin" can\'t be 9 bytes{AGAIN}',
        ),
        (lambda v: v["sources"][1].update(name="wiki"), f'sources: "wiki" is listed twice{AGAIN}'),
        (lambda v: v["sources"][1].update(name="\ud800"), f"sources: '\\ud800' is not a source name{AGAIN}"),
        (lambda v: v.update(sources=[]), f"sources: there are none{AGAIN}"),
        (lambda v: v["tokenizer"].update(eos_id=2**30), f"tokenizer.eos_id: must be below vocab_size{AGAIN}"),
        (
            lambda v: v["tokenizer_files"].update({"../../.ssh/id": "0"}),
            f"tokenizer_files: '../../.ssh/id' is not a file name{AGAIN}",
        ),
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


def flip(path: Path, place: int) -> None:
    """Another lowest bit in one byte of a file."""
    data = bytearray(path.read_bytes())
    data[place] ^= 1
    path.write_bytes(data)


def test_any_flipped_bit_in_manifest_and_tokenizer_is_found_at_once(corpus: Path) -> None:
    """A weight of 0.5 that became 0.1, or another special token, passed even with verify."""
    manifest = (corpus / "manifest.json").read_bytes()
    for place in range(0, len(manifest), 5):  # the seal is a hash of all bytes alike
        flip(corpus / "manifest.json", place)
        problems_of(open_corpus, corpus)
        (corpus / "manifest.json").write_bytes(manifest)
    (corpus / "manifest.json").write_bytes(manifest.replace(b'"weight": 0.25', b'"weight": 0.15'))
    (problem,) = problems_of(open_corpus, corpus)
    assert problem.startswith(f"{corpus}/manifest.json: has changed since it was made; ")
    (corpus / "manifest.json").write_bytes(manifest)
    for path in (corpus / "tokenizer").iterdir():
        listed = hash_file(path)
        flip(path, path.stat().st_size // 2)
        assert problems_of(open_corpus, corpus) == [
            f"{path}: its hash is {hash_file(path)}, and manifest.json says {listed}{AGAIN}"
        ]
        flip(path, path.stat().st_size // 2)
    assert open_corpus(corpus).warnings == []


@pytest.mark.parametrize("suffix", [".bin", ".idx"])
def test_a_flipped_bit_in_a_shard_is_found_by_verify(corpus: Path, suffix: str) -> None:
    path = corpus / f"wiki/train-00000{suffix}"
    flip(path, -1)
    shard = read_manifest(corpus).sources[0].train.shards[0]
    listed = shard.bin_hash if suffix == ".bin" else shard.idx_hash
    assert problems_of(open_corpus, corpus, verify=True) == [
        f"{path}: its hash is {hash_file(path)}, and manifest.json says {listed}{AGAIN}"
    ]


def test_a_shard_that_is_zeroed_or_damaged_in_a_fifteenth_is_found_at_once(corpus: Path, monkeypatch) -> None:
    """And a single bit, between the blocks that are looked at, is not."""
    monkeypatch.setattr("gloria.data.shards.BLOCK_BYTES", 64)
    tokens = np.arange(20_000, dtype="<u2") % 1999 + 1
    shards = write_split(corpus, "web/train", np.dtype("<u2"), [(tokens, np.array([20_000]))], 20_000)
    manifest = read_manifest(corpus)
    wiki, news = manifest.sources
    news = dataclasses.replace(news, train=SplitEntry(1, 20_000, 1, 1, shards))
    write_manifest(corpus, dataclasses.replace(manifest, sources=[wiki, news]))
    path = corpus / "web/train-00000.bin"
    data = path.read_bytes()
    damage = [bytes(len(data)), data[::-1]]
    fifteenth = -(-len(data) // 15)
    damage += [data[:at] + bytes(fifteenth) + data[at + fifteenth :] for at in range(0, len(data) - fifteenth, 777)]
    for content in damage:
        path.write_bytes(content)
        (problem,) = problems_of(open_corpus, corpus)
        assert problem.startswith(f"{path}: its sample's hash is ")
    path.write_bytes(data)
    flip(path, 1000)
    open_corpus(corpus)
    problems_of(open_corpus, corpus, verify=True)


def test_a_corpus_of_an_older_version_opens_with_a_warning(corpus: Path) -> None:
    def without_seals(values: dict) -> None:
        del values["tokenizer_files"]
        for source in values["sources"]:
            for shard in source["train"]["shards"] + source["valid"]["shards"]:
                del shard["bin_sample"]

    change(corpus, without_seals)
    assert open_corpus(corpus, verify=True).warnings == [
        f"{corpus}: an older version made it, so damage to manifest.json, tokenizer/ and shards of the right size may "
        "not be noticed; prepare the corpus again to have it sealed"
    ]
    assert open_corpus(corpus).stream("news").shards[0].tolist() == [9, 0]
    (corpus / "wiki/train-00000.bin").write_bytes(bytes(10))
    open_corpus(corpus)


def test_an_id_outside_the_vocabulary_names_its_shard(corpus: Path) -> None:
    """It was an index error in the embedding, on a GPU a failed assertion of the device."""
    path = corpus / "wiki/train-00001.bin"  # tokens 4 5 6 7 0 behind 1 2 0 3 0
    path.write_bytes(np.array([4, 5, VOCAB, 7, 0], "<u2").tobytes())
    change(corpus, lambda values: train(values)["shards"][1].update(bin_sample=""))
    stream = open_corpus(corpus).stream("wiki")
    stream.gather(np.array([0, 1, 2]), 2, np.zeros((3, 3), np.uint16))
    for windows, length in (([0, 3], 2), ([1], 4)):  # tokens 6 to 8, of one shard, and 4 to 8, of both
        out = np.zeros((len(windows), length + 1), np.uint16)
        assert problems_of(stream.gather, np.array(windows), length, out) == [
            f'{path}: source "wiki": token 2 is {VOCAB}, outside the vocabulary of {VOCAB}; copy the file again from '
            "where it was made, or prepare the corpus again"
        ]


def test_the_tokenizer_is_copied_over_links_and_not_through_them(corpus: Path, tmp_path: Path) -> None:
    victim, run = tmp_path / "victim", tmp_path / "run"
    victim.write_text("mine")
    run.mkdir()
    (run / "tokenizer").mkdir()
    (run / "tokenizer/tokenizer.json").symlink_to(victim)
    open_corpus(corpus).copy_tokenizer(run / "tokenizer")
    assert victim.read_text() == "mine"
    assert load_tokenizer(run / "tokenizer").fingerprint == load_tokenizer(corpus / "tokenizer").fingerprint
    shutil.rmtree(run / "tokenizer")
    (run / "tokenizer").symlink_to(tmp_path)
    assert problems_of(open_corpus(corpus).copy_tokenizer, run / "tokenizer") == [
        f"{run}/tokenizer: is not a folder, and the tokenizer is written there; move it away"
    ]


def test_another_tokenizer_in_the_folder(corpus: Path, tokenizer: TextTokenizer) -> None:
    path = corpus / "tokenizer/tokenizer.json"
    path.write_text(path.read_text() + "\n")
    found = load_tokenizer(corpus / "tokenizer").fingerprint
    assert problems_of(open_corpus, corpus) == [
        f"{path}: its hash is {found}, and manifest.json says {tokenizer.fingerprint}{AGAIN}"
    ]
    path.unlink()
    assert problems_of(open_corpus, corpus) == [f"{path}: is missing{AGAIN}"]


def test_a_shard_whose_header_says_otherwise(corpus: Path) -> None:
    """The same size, but the header makes it other tokens."""
    path = corpus / "news/train-00000.idx"
    data = path.read_bytes()
    path.write_bytes(data[: len(MAGIC) + 8] + b"\4" + data[len(MAGIC) + 9 :])
    assert problems_of(open_corpus(corpus).stream, "news") == [
        f"{path}: has 1 tokens of int32, and manifest.json says 2 of uint16{AGAIN}"
    ]
