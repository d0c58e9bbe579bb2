"""Prevents: work that a killed launch had finished and the next one does again; an update that tokenises what has not
changed, or takes over what has; and a corpus that is another for having been killed or updated.
"""

from __future__ import annotations

import json
import os
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest

from gloria.data.prepare import passes, scatter
from gloria.data.prepare import training as tokenizer_training
from gloria.errors import UserError
from tests.data.prepare.test_prepare import files_of, make_texts, run, tokenizer, write_lines, write_recipe

__all__ = ["tokenizer"]  # the fixture

NAMES = ["um", "dois", "tres"]
TEXTS = {name: make_texts(name, 60) for name in NAMES}
SHARED = make_texts("ambos", 5)


class Killed(BaseException):
    """As a signal ends a launch."""


@pytest.fixture(autouse=True)
def few_buckets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scatter, "LEAST_BUCKETS", 8)


@pytest.fixture
def work_done(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """What is read and tokenised from here on, by source: pieces, and bytes of text."""
    done: Counter[str] = Counter()

    def read(piece, config, folder):
        done[f"read {config.name}"] += 1
        return read_piece(piece, config, folder)

    def tokenise(task):
        result = tokenise_bucket(task)
        for source, _, documents, *_ in result["segments"]:
            done[f"tokenised {source}"] += documents
        return result

    read_piece, tokenise_bucket = scatter.read_piece, passes.tokenise
    monkeypatch.setattr(scatter, "read_piece", read)
    monkeypatch.setattr(passes, "tokenise", tokenise)
    return done


def write_sources(folder: Path) -> None:
    for name, texts in TEXTS.items():
        write_lines(folder / name / "a.jsonl", texts + (SHARED if name != "um" else []))


def append(path: Path, texts: list[str]) -> None:
    with open(path, "a") as file:
        file.write("".join(json.dumps({"text": text}) + "\n" for text in texts))


def everything(folder: Path) -> dict[str, bytes]:
    return files_of(folder) | {"inputs.json": (folder / "inputs.json").read_bytes()}


def edit(recipe: Path, before: str, after: str) -> None:
    assert before in recipe.read_text()
    recipe.write_text(recipe.read_text().replace(before, after))


def insert_first(folder: Path) -> None:
    write_lines(folder / "novo" / "a.jsonl", make_texts("novo", 20))
    new = '[[source]]\nname = "novo"\npaths = ["novo"]\n'
    edit(folder / "corpus.toml", '[[source]]\nname = "um"', f'{new}[[source]]\nname = "um"')


CHANGES: dict[str, tuple[Callable[[Path], object], set[str], list[str]]] = {
    "documents more": (lambda f: append(f / "dois" / "a.jsonl", make_texts("mais", 3)), {"read dois"}, NAMES),
    "a source first": (insert_first, {"read novo"}, ["novo", *NAMES]),
    "a source less": (
        lambda f: edit(f / "corpus.toml", '[[source]]\nname = "um"\npaths = ["um"]\nweight = 1\n', ""),
        set(),
        ["dois", "tres"],
    ),
    "texts that a later source holds": (
        lambda f: append(f / "um" / "a.jsonl", SHARED[:2]),
        {"read um", "read dois"},  # the third's were the second's duplicates, and are now the first's
        NAMES,
    ),
    "texts no longer in an earlier source": (
        lambda f: write_lines(f / "dois" / "a.jsonl", TEXTS["dois"]),
        {"read dois", "read tres"},
        NAMES,
    ),
    "an option": (
        lambda f: edit(f / "corpus.toml", 'name = "tres"', 'name = "tres"\nmin_chars = 100'),
        {"read tres"},
        NAMES,
    ),
    "a weight": (lambda f: edit(f / "corpus.toml", "weight = 3", "weight = 7"), set(), NAMES),
    "another name of a file": (lambda f: (f / "um" / "a.jsonl").rename(f / "um" / "b.jsonl"), set(), NAMES),
    "the seed": (lambda f: edit(f / "corpus.toml", "seed = 2", "seed = 3"), {f"read {name}" for name in NAMES}, NAMES),
    "the shards' size": (
        lambda f: edit(f / "corpus.toml", "shard_tokens = 3000", "shard_tokens = 1000"),
        {f"read {name}" for name in NAMES},
        NAMES,
    ),
}


@pytest.mark.parametrize("what", CHANGES)
def test_an_update_is_as_made_from_nothing_and_does_only_what_has_changed(
    tmp_path: Path, tokenizer: str, work_done: Counter[str], what: str
) -> None:
    change, reads, names = CHANGES[what]
    write_sources(tmp_path)
    recipe = write_recipe(tmp_path, NAMES, tokenizer, "seed = 2\nshard_tokens = 3000")
    run(recipe, tmp_path / "out")
    before = {path: path.stat().st_ino for path in (tmp_path / "out").rglob("*.bin")}
    change(tmp_path)
    work_done.clear()
    run(recipe, tmp_path / "out", "--update")
    assert {key for key in work_done if key.startswith("read ")} == reads
    numbers = {names.index(key.removeprefix("read ")) for key in reads}
    assert {key for key in work_done if key.startswith("tokenised ")} == {f"tokenised {number}" for number in numbers}
    for path, inode in before.items():  # links, but for the sources that were read
        if path.parent.name in names and f"read {path.parent.name}" not in reads:
            assert path.stat().st_ino == inode
    run(recipe, tmp_path / "other")
    assert everything(tmp_path / "out") == everything(tmp_path / "other")
    assert not list(tmp_path.glob("*partial*"))


def test_an_update_of_what_has_not_changed_is_a_check(
    tmp_path: Path, tokenizer: str, work_done: Counter[str], capsys: pytest.CaptureFixture[str]
) -> None:
    write_sources(tmp_path)
    recipe = write_recipe(tmp_path, NAMES, tokenizer)
    run(recipe, tmp_path / "out", "--update")  # there is none yet
    work_done.clear()
    capsys.readouterr()
    run(recipe, tmp_path / "out", "--update")
    assert capsys.readouterr().out.startswith(f"{tmp_path}/out: is already whole\n")
    assert not work_done


@pytest.mark.parametrize("name", ["um/train-00000.bin", "um/train-00000.idx", "um/documents.hashes"])
def test_a_damaged_file_is_never_taken_over(
    tmp_path: Path, tokenizer: str, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    write_sources(tmp_path)
    recipe, out = write_recipe(tmp_path, NAMES, tokenizer), tmp_path / "out"
    run(recipe, out)
    data = (out / name).read_bytes()
    (out / name).write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    append(tmp_path / "tres" / "a.jsonl", ["mais um texto"])
    run(recipe, out, "--update")
    assert (
        f"warning: {out}/{name}: has changed since it was made; its source is read again\n" in capsys.readouterr().err
    )
    run(recipe, tmp_path / "other")
    assert everything(out) == everything(tmp_path / "other")


def test_a_tokenizer_that_is_trained_from_the_text_changes_with_it_and_can_be_kept(
    tmp_path: Path, work_done: Counter[str], capsys: pytest.CaptureFixture[str]
) -> None:
    write_sources(tmp_path)
    recipe, out = write_recipe(tmp_path, NAMES, None), tmp_path / "out"
    run(recipe, out)
    append(tmp_path / "tres" / "a.jsonl", ["mais um texto"])
    work_done.clear()
    run(recipe, out, "--update")
    assert set(work_done) == {f"read {name}" for name in NAMES} | {f"tokenised {number}" for number in range(3)}
    assert (
        "warning: tokenizer: is trained from the text, which has changed, so every source is read and tokenised again; "
        f'with [tokenizer] path = "{out}/tokenizer" it stays, and only what has changed is\n'
    ) in capsys.readouterr().err
    edit(recipe, "vocab_size = 600", f'path = "{out}/tokenizer"')
    append(tmp_path / "tres" / "a.jsonl", ["e mais um"])
    work_done.clear()
    run(recipe, out, "--update")
    assert set(work_done) == {"read tres", "tokenised 2"}
    edit(recipe, f"{out}/tokenizer", str(shutil.copytree(out / "tokenizer", tmp_path / "kept")))
    run(recipe, tmp_path / "other")
    assert everything(out) == everything(tmp_path / "other")


def test_a_corpus_of_an_older_version_is_made_again(tmp_path: Path, tokenizer: str, capsys) -> None:
    write_sources(tmp_path)
    recipe, out = write_recipe(tmp_path, NAMES, tokenizer), tmp_path / "out"
    run(recipe, out)
    files = json.loads((out / "inputs.json").read_text())["files"]
    (out / "inputs.json").write_text(json.dumps(files))
    run(recipe, out)
    append(tmp_path / "um" / "a.jsonl", ["mais um texto"])
    run(recipe, out, "--update")
    assert "lists of its documents; every source is read again\n" in capsys.readouterr().err
    run(recipe, tmp_path / "other")
    assert everything(out) == everything(tmp_path / "other")


STEPS = {
    scatter: ["scatter"],
    passes: ["survey", "choose", "tokenise", "gather", "count_near", "write_list"],
    tokenizer_training: ["draw", "train_tokenizer"],
}


@pytest.mark.parametrize("trained", [False, True])
def test_killed_at_every_step_it_is_as_never_killed(
    tmp_path: Path, tokenizer: str, monkeypatch: pytest.MonkeyPatch, trained: bool
) -> None:
    """A launch dies at the first, the fifth, ... call; the units that it has finished are never done again."""
    monkeypatch.setattr(scatter, "PIECE_BYTES", 2000)
    write_sources(tmp_path)
    recipe, out = write_recipe(tmp_path, NAMES, None if trained else tokenizer), tmp_path / "out"
    calls: Counter[str] = Counter()
    left = [0]

    def dying(name: str, function: Callable) -> Callable:
        def call(*args, **kwargs):
            left[0] -= 1
            if left[0] == 0:
                raise Killed
            calls[name] += 1
            return function(*args, **kwargs)

        return call

    for module, names in STEPS.items():
        for name in names:
            monkeypatch.setattr(module, name, dying(name, getattr(module, name)))
    run(recipe, tmp_path / "whole")
    units = dict(calls)
    assert units["scatter"] > 5
    assert units["tokenise"] == 8
    calls.clear()
    kills = 0
    for lifetime in range(1, 200, 4):
        left[0] = lifetime
        try:
            run(recipe, out)
        except Killed:
            kills += 1
            assert not out.exists()
        else:
            break
    assert kills > 6
    assert {name: calls[name] for name in ("scatter", "tokenise", "train_tokenizer")} == {
        name: units.get(name, 0) for name in ("scatter", "tokenise", "train_tokenizer")
    }
    assert everything(out) == everything(tmp_path / "whole")
    assert not list(tmp_path.glob("*partial*"))


@pytest.mark.parametrize("damage", ["spill cut", "mark cut", "another seed", "another file"])
def test_what_a_killed_launch_left_is_used_only_if_it_is_whole_and_of_this_recipe(
    tmp_path: Path, tokenizer: str, monkeypatch: pytest.MonkeyPatch, work_done: Counter[str], damage: str
) -> None:
    def die(task: object) -> None:
        raise Killed

    write_sources(tmp_path)
    recipe, out = write_recipe(tmp_path, NAMES, tokenizer, "seed = 2"), tmp_path / "out"
    with monkeypatch.context() as context:
        context.setattr(passes, "gather", die)
        with pytest.raises(Killed):
            run(recipe, out)
    spill = tmp_path / "out.partial-kept" / "spill" / "um-00000.spill"
    mark = spill.with_suffix(".json")
    if damage == "another seed":
        edit(recipe, "seed = 2", "seed = 3")
    elif damage == "another file":
        append(tmp_path / "um" / "a.jsonl", ["mais um texto"])
    else:
        path = spill if damage == "spill cut" else mark
        os.truncate(path, path.stat().st_size - 1)
    work_done.clear()
    run(recipe, out)
    assert {key for key in work_done if key.startswith("read ")} == (
        {f"read {name}" for name in NAMES} if damage == "another seed" else {"read um"}
    )
    run(recipe, tmp_path / "other")
    assert everything(out) == everything(tmp_path / "other")


def test_malformed_documents_are_named_again_where_the_bound_is_lowered(tmp_path: Path, tokenizer: str) -> None:
    write_sources(tmp_path)
    with open(tmp_path / "um" / "a.jsonl", "a") as file:
        file.write("{}\n")
    recipe, out = write_recipe(tmp_path, NAMES, tokenizer, "max_malformed = 0.5"), tmp_path / "out"
    run(recipe, out)
    append(tmp_path / "tres" / "a.jsonl", ["mais um texto"])
    edit(recipe, "max_malformed = 0.5", "max_malformed = 0.001")
    with pytest.raises(UserError, match=r'a\.jsonl:61 \(no field "text"\); correct them or raise it'):
        run(recipe, out, "--update")
