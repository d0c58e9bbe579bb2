"""Prevents: token shards made elsewhere that lose, change or double documents in a corpus, or whose documents are in
validation here and in the training text of another source."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers

from gloria import prepare
from gloria.data.corpus import SplitEntry, open_corpus
from gloria.data.prepare import adopt
from gloria.data.shards import HEADER, MAGIC, map_tokens, read_index
from gloria.errors import run_command

EOS = 0
VOCAB = 2000
WORDS = {"</s>": EOS, **{f"w{i:04d}": i for i in range(1, VOCAB)}}


def foreign(prefix: Path, documents: list[list[list[int]]], dtype: str = "<u2", code: int = 8) -> Path:
    """Shards as another program writes them: each document a list of sequences."""
    sequences = [sequence for document in documents for sequence in document]
    lengths = np.array([len(sequence) for sequence in sequences], "<i4")
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype("<i8")
    indices = np.concatenate([[0], np.cumsum([len(document) for document in documents])]).astype("<i8")
    tokens = np.array([token for sequence in sequences for token in sequence], dtype)
    prefix.parent.mkdir(parents=True, exist_ok=True)
    Path(f"{prefix}.bin").write_bytes(tokens.tobytes())
    pointers = offsets[:-1] * tokens.itemsize
    header = HEADER.pack(MAGIC, 1, code, len(sequences), len(indices))
    Path(f"{prefix}.idx").write_bytes(header + lengths.tobytes() + pointers.tobytes() + indices.tobytes())
    return prefix


def random_documents(count: int, seed: int = 0) -> list[list[list[int]]]:
    draws = np.random.RandomState(seed)
    return [[[*draws.randint(1, VOCAB, draws.randint(1, 400)).tolist(), EOS]] for _ in range(count)]


def text_of(document: list[list[int]]) -> str:
    return " ".join(f"w{token:04d}" for sequence in document for token in sequence if token != EOS)


def make(folder: Path, *sources: str, extra: str = "") -> int:
    """The exit status of preparing `sources` (folders of shards, or .jsonl files), with the tokenizer of words."""
    backend = Tokenizer(models.WordLevel(WORDS, unk_token="w0001"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    backend.add_special_tokens(["</s>"])
    (folder / "tokenizer").mkdir(exist_ok=True)
    backend.save(str(folder / "tokenizer/tokenizer.json"))
    (folder / "tokenizer/tokenizer_config.json").write_text(json.dumps({"eos_token": "</s>"}))
    recipe = f'{extra}\n[tokenizer]\npath = "tokenizer"\n'
    for source in sources:
        format = "auto" if source.endswith("jsonl") else "megatron"
        recipe += f'[[source]]\nname = "{Path(source).stem}"\npaths = ["{source}"]\nformat = "{format}"\n'
    (folder / "corpus.toml").write_text(recipe)
    return run_command(prepare.main, [str(folder / "corpus.toml"), "--out", str(folder / "out"), "--workers", "1"])


def documents_of(folder: Path, entry: SplitEntry) -> list[tuple[int, ...]]:
    found = []
    for shard in entry.shards:
        tokens, offsets = map_tokens(folder / shard.path), read_index(folder / shard.path).document_offsets()
        found += [tuple(tokens[a:b].tolist()) for a, b in pairwise(offsets)]
    return found


def made(folder: Path, name: str) -> tuple[set[tuple[int, ...]], set[tuple[int, ...]], dict[str, int]]:
    """Documents for training and for validation, and counts, of a source of the corpus; no document is there twice."""
    entry = open_corpus(folder / "out", verify=True).source(name)
    splits = [documents_of(folder / "out", part) for part in (entry.train, entry.valid)]
    assert len(splits[0]) + len(splits[1]) == len(set(splits[0])) + len(set(splits[1])) == entry.counts["kept"]
    return set(splits[0]), set(splits[1]), entry.counts


@pytest.mark.parametrize(("dtype", "code"), [("<u2", 8), ("<i4", 4), ("<i8", 5)])
def test_adopted_shards_keep_every_document(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: str, code: int
) -> None:
    monkeypatch.setattr(adopt, "PIECE_TOKENS", 10_000)
    monkeypatch.setattr(adopt, "BATCH_TOKENS", 1000)
    documents = random_documents(300)
    foreign(tmp_path / "web/0", documents[:250], dtype, code)
    foreign(tmp_path / "web/1", documents[240:], dtype, code)
    assert make(tmp_path, "web", extra="shard_tokens = 20_000") == 0
    train, valid, counts = made(tmp_path, "web")
    assert train | valid == {tuple(document[0]) for document in documents}
    assert not train & valid
    assert valid
    assert (counts["read"], counts["duplicate"], counts["kept"]) == (310, 10, 300)
    entry = open_corpus(tmp_path / "out").source("web")
    assert {shard.dtype for shard in entry.train.shards} == {"uint16"}
    assert entry.train.bytes == sum(len(document) * 6 - 7 for document in train)  # of text, without EOS
    assert entry.train.words == sum(len(document) - 1 for document in train)


@pytest.mark.parametrize("order", [("web", "news.jsonl"), ("news.jsonl", "web"), ("web", "more", "news.jsonl")])
def test_no_document_is_in_validation_here_and_in_training_there(
    tmp_path: Path, order: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    """The first source keeps what several hold, be it tokens or text."""
    documents = random_documents(100)
    texts = [text_of(document) for document in documents]
    foreign(tmp_path / "web/a", documents[:70])
    foreign(tmp_path / "more/a", documents[20:80], "<i4", 4)
    (tmp_path / "news.jsonl").write_text("".join(json.dumps({"text": f" {text}\n"}) + "\n" for text in texts[40:]))
    assert make(tmp_path, *order) == 0
    splits = {name: made(tmp_path, Path(name).stem) for name in order}
    together = [document for train, valid, _ in splits.values() for part in (train, valid) for document in part]
    assert len(together) == len(set(together)) == 100
    assert [counts["duplicate_elsewhere"] for _, _, counts in splits.values()] == {
        2: [0, 30],
        3: [0, 50, 40],
    }[len(order)]
    assert all(valid for _, valid, _ in splits.values())
    assert "warning: tokenizer: changes texts, so equal documents in token" in capsys.readouterr().err


def test_a_text_gives_the_same_split_as_its_tokens(tmp_path: Path) -> None:
    documents = random_documents(100)
    foreign(tmp_path / "web/a", documents)
    (tmp_path / "text.jsonl").write_text("".join(json.dumps({"text": text_of(d)}) + "\n" for d in documents))
    splits = []
    for source in ("web", "text.jsonl"):
        assert make(tmp_path, source) == 0
        splits.append(made(tmp_path, Path(source).stem)[:2])
        (tmp_path / "out").rename(tmp_path / f"out-{source}")
    assert splits[0] == splits[1]


def test_sequences_become_one_document_and_empty_ones_go(tmp_path: Path) -> None:
    foreign(tmp_path / "s/a", [[[1, 2], [3, EOS]], [], [[]], [[4], [], [5, EOS]], [[EOS]], [[6, EOS], []]])
    foreign(tmp_path / "s/b", [])
    assert make(tmp_path, "s") == 0
    train, valid, counts = made(tmp_path, "s")
    assert train | valid == {(1, 2, 3, EOS), (4, 5, EOS), (6, EOS)}
    assert (counts["read"], counts["kept"], counts["empty"]) == (6, 3, 3)


def test_eos_inside_adopted_documents_is_a_warning(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    prefix = foreign(tmp_path / "s/a", [[[1, EOS, 2, EOS]], [[EOS, EOS]], [[3, EOS]]])
    assert make(tmp_path, "s") == 0
    line = f"warning: {prefix}.bin: 2 documents from 1 to 3 have EOS inside; these count as several\n"
    assert line in capsys.readouterr().err


@pytest.mark.parametrize(
    ("documents", "dtype", "code", "what"),
    [
        ([[[1, EOS]], [[2, 3]]], "<u2", 8, "2 does not end with EOS (id 0); make the shard again with --append-eod"),
        ([[[EOS, 4]]], "<u2", 8, "1 does not end with EOS (id 0); make the shard again with --append-eod"),
        ([[[1, VOCAB, EOS]]], "<u2", 8, "1 has token id 2000 in a vocabulary of 2000; "),
        ([[[1, EOS]], [[10**6, EOS]]], "<i4", 4, "2 has token id 1000000 in a vocabulary of 2000; "),
        ([[[1, -7, EOS]]], "<i2", 3, "1 has token id -7 in a vocabulary of 2000; "),
    ],
)
def test_shards_of_another_tokenizer_are_errors(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], documents: list, dtype: str, code: int, what: str
) -> None:
    prefix = foreign(tmp_path / "s/a", documents, dtype, code)
    assert make(tmp_path, "s") == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error")]
    remedy = "name the tokenizer that made it" if what.endswith("; ") else ""
    assert line == f"error: {prefix}.bin: document {what}{remedy}"
    assert not (tmp_path / "out").exists()


def test_shards_without_documents(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    foreign(tmp_path / "s/a", [])
    assert make(tmp_path, "s") == 2
    error = 'error: source "s": its files hold no document; check its paths and options, or remove it'
    assert capsys.readouterr().err.splitlines()[-1] == error
