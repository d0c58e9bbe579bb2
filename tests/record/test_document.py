"""Prevents: an answer that a text was never read, or when, which the run's own samples contradict."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest

from gloria.audit import main as audit
from gloria.data.corpus import Corpus, open_corpus
from gloria.data.mixture import Mixture, new_mixture
from gloria.data.shards import read_index
from gloria.data.weights import Source
from gloria.errors import run_command
from gloria.prepare import main as prepare
from gloria.record.document import Place, reads_of
from gloria.record.history import History, read_history
from gloria.record.ledger import add_draws, epoch_sums, ledger, new_count

STEPS, BATCH, LENGTH = 60, 12, 16
COPY = "O rio corre para o mar,  e a cidade dorme à beira dele."


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    """Two sources; a text stands in both of them, with other white space around it, and one is too short."""
    folder = tmp_path_factory.mktemp("document")
    words = [f"palavra{number}" for number in range(14)]
    for name in ("a", "b"):
        texts = [" ".join(words[(i * 7 + j * (3 + len(name))) % len(words)] for j in range(5 + i % 40)) + f" {name}{i}."
                 for i in range(150)]  # fmt: skip
        texts += [f" {COPY}\r\n", "não"]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    recipe = folder / "corpus.toml"
    recipe.write_text(
        f'out = "{folder}/out"\nseed = 3\n[tokenizer]\nvocab_size = 512\n'
        + "".join(f'[[source]]\nname = "{name}"\npaths = ["{name}.jsonl"]\nmin_chars = 10\n' for name in ("a", "b"))
    )
    assert prepare([str(recipe), "--workers", "1"]) == 0
    return open_corpus(folder / "out")


@pytest.fixture(scope="module")
def history(corpus: Corpus, tmp_path_factory: pytest.TempPathFactory) -> History:
    """A run on it of three stages, the last of which leaves samples out; `read_history` of its folder."""
    folder = tmp_path_factory.mktemp("document") / "run"
    folder.mkdir()
    mixture = mixture_on(corpus)
    mixture.next_sample = STEPS * BATCH
    state: dict[str, Any] = {"recipe": {"data": {"corpus": str(corpus.folder)}}, "mixture": mixture.state_dict()}
    (folder / "mixture.json").write_text(json.dumps(state))
    (folder / "metrics.jsonl").write_text("")
    return read_history(folder)


def mixture_on(corpus: Corpus) -> Mixture:
    streams = {name: corpus.stream(name) for name in corpus.names}
    sources = {name: Source(stream.num_tokens, stream.fingerprint) for name, stream in streams.items()}
    tokenizer = corpus.manifest.tokenizer.fingerprint
    mixture = new_mixture(
        1, LENGTH, sources, {"a": 0.7, "b": 0.3}, global_batch=BATCH, period=1000, tokenizer=tokenizer
    )
    mixture.next_sample = 20 * BATCH
    mixture.begin_stage(mixture.next_sample, {"a": 0.2, "b": 0.8})
    mixture.next_sample = 40 * BATCH
    mixture.leave_out(range(45 * BATCH + 1, 50 * BATCH))
    return mixture


def answer(capsys: pytest.CaptureFixture[str], history: History, wanted: str) -> list[str]:
    assert run_command(audit, [str(history.folder), "--document", wanted]) == 0
    return capsys.readouterr().out.splitlines()


@pytest.mark.parametrize("number", [0, 1, 60, -1])
def test_a_document_is_read_in_the_windows_that_hold_its_tokens(corpus, history, number):
    """Every window that was drawn is looked through for the document's own tokens."""
    name = "a"
    (shard,) = corpus.source(name).train.shards
    offsets = read_index(corpus.folder / shard.path).document_offsets()
    number %= len(offsets) - 1
    place = Place(name, "train", number, int(offsets[number]), int(offsets[number + 1]))
    drawn = history.mixture.plan(0, STEPS * BATCH)
    expected = {
        (sample // BATCH, sample)
        for sample, source, window in zip(range(STEPS * BATCH), drawn.source.tolist(), drawn.window.tolist())
        if history.mixture.names[source] == name
        and window * LENGTH < place.end
        and place.first <= (window + 1) * LENGTH
    }
    found = {(step, sample) for step, sample, *_ in reads_of(place, history, STEPS * BATCH)}
    assert found == expected
    assert expected or number == len(offsets) - 2  # the tail fills no window


def test_a_text_is_found_as_prepare_cleaned_it_and_its_copies_are_counted(corpus, history, capsys, tmp_path):
    lines = answer(capsys, history, f"\n{COPY} ")
    assert lines[0].startswith("document  hash ")
    assert lines[0].endswith("56 bytes once cleaned")
    assert sum(line.startswith("found ") for line in lines) == 1
    assert lines[1] == "one copy of a text is kept, the first source's; 1 duplicates were dropped in all"
    assert lines[2].startswith("found     a, document ")
    (tmp_path / "text.txt").write_text(COPY)
    assert answer(capsys, history, f"@{tmp_path}/text.txt") == lines
    number, _, split = lines[2].partition(",")[2].split(",")[0].removeprefix(" document ").partition(" of ")
    assert answer(capsys, history, f"a/{split}:{number}") == lines[1:]


def test_what_was_never_read_says_why(corpus, history, capsys):
    absent = answer(capsys, history, "Não está em lado nenhum.")
    assert absent[1].startswith("not in the corpus, so never read: no document of a, b has exactly this text (2 docum")
    held_out = answer(capsys, history, "b/valid:0")
    assert held_out[2] == "never read: it is held out for validation"
    capsys.readouterr()
    assert run_command(audit, [str(history.folder), "--document", "a:9999"]) == 2
    count = corpus.source("a").train.documents
    assert capsys.readouterr().err == (
        f"error: --document: train of a has {count} documents, counted from 0; name one of them\n"
    )


def test_the_closed_form_counts_what_is_drawn(history):
    mixture, end = history.mixture, 53 * BATCH
    counted = new_count(mixture)
    add_draws(mixture, counted, 0, end)
    drawn = mixture.plan(0, end)
    assert counted.windows.tolist() == np.bincount(drawn.source).tolist()
    assert counted.windows.tolist() == [read.windows for read in ledger(mixture, end)]
    assert counted.epochs.tolist() == epoch_sums(mixture, end).tolist()
    assert counted.epochs.any()
    assert [read.epochs for read in ledger(mixture, end)] == list(mixture.epochs_at(end).values())
