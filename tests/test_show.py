"""Bug prevented: samples shown that are not those the run took or will take, above all after changes, and text from
another corpus shown as the run's."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers

from gloria import show
from gloria.data.corpus import FORMAT, Manifest, SourceEntry, SplitEntry, TokenizerEntry, open_corpus, write_manifest
from gloria.data.loader import Loader
from gloria.data.mixture import Mixture, new_mixture
from gloria.data.shards import write_split
from gloria.data.tokenizer import load_tokenizer
from gloria.data.weights import Source
from gloria.errors import run_command

LENGTH = 4
VOCAB = 500
TOKENS = {"wiki": 400, "poems": 90}


def make_corpus(folder: Path, shift: int = 0, end: str = "</s>") -> Path:
    """Two sources whose tokens are words w1, w2, ... in a row."""
    words = {end: 0, **{f"w{i}": i for i in range(1, VOCAB)}}
    (folder / "tokenizer").mkdir(parents=True)
    backend = Tokenizer(models.WordLevel(words, unk_token="w1"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.add_special_tokens([end])
    backend.save(str(folder / "tokenizer/tokenizer.json"))
    (folder / "tokenizer/tokenizer_config.json").write_text(json.dumps({"eos_token": end}))
    tokenizer = load_tokenizer(folder / "tokenizer")
    entries = []
    for name, count in TOKENS.items():
        tokens = np.arange(1 + shift, count + 1 + shift, dtype="<u2")
        tokens[-1] = 0
        shards = write_split(folder, f"{name}/train", np.dtype("<u2"), [(tokens, np.array([count]))], 10_000)
        train = SplitEntry(1, count, 4 * count, count, shards)
        entries.append(SourceEntry(name, 1.0, train, SplitEntry(0, 0, 0, 0, []), {"read": 1, "kept": 1}))
    record = TokenizerEntry(tokenizer.fingerprint, VOCAB, 0)
    write_manifest(folder, Manifest(FORMAT, record, entries, {}))
    return folder


@pytest.fixture(scope="module")
def corpus_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_corpus(tmp_path_factory.mktemp("show") / "corpus")


def mixture_on(folder: Path, weights: dict[str, float], *, batch: int = 12, length: int = LENGTH) -> Mixture:
    corpus = open_corpus(folder)
    streams = {name: corpus.stream(name) for name in corpus.names}
    sources = {name: Source(stream.num_tokens, stream.fingerprint) for name, stream in streams.items()}
    tokenizer = corpus.manifest.tokenizer.fingerprint
    return new_mixture(1, length, sources, weights, global_batch=batch, period=1000, tokenizer=tokenizer)


def save(run: Path, mixture: Mixture, corpus: Path | str, checkpoint: int | None = None) -> None:
    state = {"mixture": mixture.state_dict(), "recipe": {"data": {"corpus": str(corpus)}}}
    run.mkdir(exist_ok=True)
    if checkpoint is None:
        (run / "mixture.json").write_text(json.dumps(state))
    else:
        folder = run / f"checkpoints/step-{checkpoint:08}"
        folder.mkdir(parents=True)
        content = {"format": 1, "step": checkpoint, "state": state}
        (folder / "trainer.json").write_text(json.dumps(content))


def shown(capsys: pytest.CaptureFixture[str], run: Path, step: int, *flags: str) -> list[dict[str, Any]]:
    assert run_command(show.main, ["--run", str(run), "--step", str(step), *flags]) == 0
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


def error_of(capsys: pytest.CaptureFixture[str], run: Path, step: int, *flags: str) -> str:
    assert run_command(show.main, ["--run", str(run), "--step", str(step), *flags]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    return err


def test_steps_are_shown_as_the_loader_reads_them(tmp_path: Path, corpus_folder: Path, capsys) -> None:
    """Past and future, over a change of weights and of the batch, with the ranks of the world that is named."""
    corpus = open_corpus(corpus_folder)
    streams = {name: corpus.stream(name) for name in corpus.names}
    tokenizer = load_tokenizer(corpus.tokenizer_folder)
    read: dict[int, list[dict[str, Any]]] = {}

    def go_on(mixture: Mixture, steps: int) -> None:
        with Loader(streams, mixture) as loader:
            for batch in (next(loader) for _ in range(steps)):
                names = [mixture.names[source] for source in batch.source]
                columns = (batch.rows, names, batch.window, batch.epoch, batch.tokens)
                read[batch.step] = [
                    {
                        "row": int(row),
                        "sample": batch.first_sample + int(row),
                        "source": name,
                        "window": int(window),
                        "epoch": int(epoch),
                        "rank": int(row) % 3,
                        "text": tokenizer.decode(tokens.tolist()),
                    }
                    for row, name, window, epoch, tokens in zip(*columns)
                ]

    mixture = mixture_on(corpus_folder, {"wiki": 3, "poems": 1})
    save(tmp_path / "run", mixture, corpus_folder)
    go_on(mixture, 5)
    resumed = mixture_on(corpus_folder, {"poems": 2, "wiki": 1}, batch=6)
    resumed.load_state_dict(json.loads(json.dumps(mixture.state_dict())))
    save(tmp_path / "run", resumed, corpus_folder)  # the second launch begins
    go_on(resumed, 1)
    save(tmp_path / "run", resumed, corpus_folder, checkpoint=6)
    go_on(resumed, 4)
    assert [len(rows) for _, rows in sorted(read.items())] == [12] * 5 + [6] * 5
    for step, rows in read.items():
        assert shown(capsys, tmp_path / "run", step, "--world", "3", "--text") == rows
    assert read[0][0]["text"].split()[0].startswith("w")


def test_without_text_no_corpus_is_needed(tmp_path: Path, corpus_folder: Path, capsys) -> None:
    save(tmp_path / "run", mixture_on(corpus_folder, {"wiki": 1}), "not/there")
    rows = shown(capsys, tmp_path / "run", 10**9)
    assert [row["sample"] for row in rows] == list(range(12 * 10**9, 12 * 10**9 + 12))
    assert [list(row) for row in rows] == [["row", "sample", "source", "window", "epoch", "rank"]] * 12
    assert {row["rank"] for row in rows} == {0}


def test_the_newest_state_that_can_be_read_is_used(tmp_path: Path, corpus_folder: Path, capsys) -> None:
    run = tmp_path / "run"
    old = mixture_on(corpus_folder, {"wiki": 1})
    save(run, old, corpus_folder)
    new = mixture_on(corpus_folder, {"wiki": 1})
    new.next_sample = 24
    new.begin_stage(24, {"poems": 1})
    save(run, new, corpus_folder, checkpoint=2)
    broken = run / "checkpoints/step-00000003"
    broken.mkdir()
    assert run_command(show.main, ["--run", str(run), "--step", "2"]) == 0
    out, err = capsys.readouterr()
    assert {json.loads(line)["source"] for line in out.splitlines()} == {"poems"}
    assert err == f"warning: {broken}/trainer.json: is missing; passed over\n"
    new.begin_stage(24, {"wiki": 1, "poems": 1})  # a launch that resumed there with other weights
    save(run, new, corpus_folder)
    assert {row["source"] for row in shown(capsys, run, 2)} == {"wiki", "poems"}


def test_text_before_and_after_another_sequence_length(tmp_path: Path, corpus_folder: Path, capsys) -> None:
    before = mixture_on(corpus_folder, {"wiki": 1})
    before.next_sample = 24
    after = mixture_on(corpus_folder, {"wiki": 1}, length=8)
    after.load_state_dict(before.state_dict(), new_epoch=True)
    save(tmp_path / "run", after, corpus_folder)
    for step, length in ((1, 4), (2, 8)):
        for row in shown(capsys, tmp_path / "run", step, "--text"):
            first = row["window"] * length + 1
            words = [f"w{number}" for number in range(first, first + length + 1)]
            assert row["text"].split() == [word.replace("w400", "</s>") for word in words]


def test_what_is_asked_for_wrongly(tmp_path: Path, corpus_folder: Path, capsys) -> None:
    run = tmp_path / "run"
    assert error_of(capsys, run, 0) == f"error: --run: {run} is not a folder; name a run's folder (runs/NAME)\n"
    run.mkdir()
    expected = (
        f"error: --run: {run} has no checkpoint and no mixture.json that can be read; name a run that was begun\n"
    )
    assert error_of(capsys, run, 0) == expected
    save(run, mixture_on(corpus_folder, {"wiki": 1}), corpus_folder)
    assert error_of(capsys, run, -1) == "error: --step: -1 is too small; give at least 0\n"
    assert error_of(capsys, run, 0, "--world", "0") == "error: --world: 0 is too small; give at least 1\n"
    expected = "error: --world: 5 ranks cannot share the 12 rows of step 0; give a divisor\n"
    assert error_of(capsys, run, 0, "--world", "5") == expected


@pytest.mark.parametrize(
    ("content", "line"),
    [
        ("{", "is not valid JSON"),
        ('{"mixture": 3}', "holds no mixture and recipe; passed over"),
        ('{"mixture": 3, "recipe": {}}', "is not a JSON object; continue from an older checkpoint; passed over"),
    ],
)
def test_a_damaged_state_is_reported(tmp_path: Path, capsys, content: str, line: str) -> None:
    (tmp_path / "mixture.json").write_text(content)
    err = error_of(capsys, tmp_path, 0)
    assert err.startswith(f"warning: {tmp_path}/mixture.json: {line}")
    assert err.splitlines()[1].startswith("error: --run: ")


def test_text_of_a_corpus_that_is_not_the_runs(tmp_path: Path, corpus_folder: Path, capsys) -> None:
    run = tmp_path / "run"
    save(run, mixture_on(corpus_folder, {"wiki": 1}), tmp_path / "gone")
    assert error_of(capsys, run, 0, "--text") == (
        f"error: {tmp_path}/gone: no such folder; make one with python -m gloria.prepare\n"
    )
    shifted = make_corpus(tmp_path / "shifted", shift=1)
    save(run, mixture_on(corpus_folder, {"wiki": 1}), shifted)
    theirs, ours = (open_corpus(folder).stream("wiki").fingerprint for folder in (shifted, corpus_folder))
    assert error_of(capsys, run, 0, "--text") == (
        f'error: {shifted}: the shards of source "wiki" are {theirs}, and the run read {ours}; put the run\'s corpus '
        f"back, or leave --text out\n"
    )
    other = make_corpus(tmp_path / "other", end="<end>")
    save(run, mixture_on(corpus_folder, {"wiki": 1}), other)
    theirs, ours = (load_tokenizer(folder / "tokenizer").fingerprint for folder in (other, corpus_folder))
    assert error_of(capsys, run, 0, "--text") == (
        f"error: {other}: its tokenizer is {theirs}, and the run's was {ours}; put the run's corpus back, or leave "
        f"--text out\n"
    )


def test_text_of_shards_that_were_replaced_during_the_run(tmp_path: Path, corpus_folder: Path, capsys) -> None:
    shifted = make_corpus(tmp_path / "shifted", shift=1)
    shutil.rmtree(shifted / "tokenizer")
    shutil.copytree(corpus_folder / "tokenizer", shifted / "tokenizer")
    before = mixture_on(corpus_folder, {"wiki": 1})
    before.next_sample = 24
    after = mixture_on(shifted, {"wiki": 1})
    after.load_state_dict(before.state_dict(), allow_change=True)
    after.leave_out(range(36, 48))  # which changes no tokens
    save(tmp_path / "run", after, shifted)
    assert error_of(capsys, tmp_path / "run", 1, "--text") == (
        "left out: samples 36:48\n"
        'error: --text: source "wiki" has had other tokens since sample 24; those before can\'t be shown, leave --text '
        "out\n"
    )
    assert len(shown(capsys, tmp_path / "run", 2, "--text")) == 12
    assert shown(capsys, tmp_path / "run", 1)[0]["epoch"] == 0
