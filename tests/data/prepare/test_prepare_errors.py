"""Prevents: a mistake in a recipe or in its data that ends in a traceback, in a wrong corpus, in a line that
does not say what to do, or in something half-made left behind.
"""

from __future__ import annotations

import json
import os
import shutil
from collections import namedtuple
from pathlib import Path

import numpy as np
import pytest

from gloria import prepare
from gloria.data.corpus import open_corpus
from gloria.data.prepare import scatter as spill
from gloria.data.shards import write_split
from gloria.data.tokenizer import TokenizerConfig, train_tokenizer
from gloria.errors import run_command

TEXT = "Era uma vez um navio que nunca mais voltou ao porto de Lisboa."
GOOD = json.dumps({"text": TEXT}) + "\n"
OTHER = json.dumps({"text": TEXT + " Fim."}) + "\n"


def run(folder: Path, recipe: str, files: dict[str, str | bytes], *flags: str) -> int:
    """The command's exit status for a recipe and its files, made in `folder`, with `folder`/out as its corpus."""
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    (folder / "corpus.toml").write_text(recipe)
    flags = (str(folder / "corpus.toml"), "--out", str(folder / "out"), "--workers", "1", *flags)
    return run_command(prepare.main, list(flags))


def source(name: str = "um", paths: str = '["um/*"]', rest: str = "") -> str:
    return f'[[source]]\nname = "{name}"\npaths = {paths}\n{rest}\n'


BAD_RECIPES = {
    "no TOML": (
        "out = data",
        ["line 1, column 7: invalid value; correct the TOML there"],
    ),
    "no sources": (
        "seed = 1",
        ["source: missing; give it (at least one [[source]] section)"],
    ),
    "an empty list of sources": (
        "source = []",
        ["source: is empty; give at least one [[source]] section"],
    ),
    "unknown keys": (
        source(rest="wieght = 1") + "[tokeniser]\nkind = 1",
        [
            'tokeniser: unknown section; did you mean "tokenizer"?',
            'source[0].wieght: unknown key; did you mean "weight"?',
        ],
    ),
    "wrong types and bounds, all at once": (
        source(rest='weight = -1\nmin_chars = "dez"') + "[tokenizer]\nvocab_size = 100",
        [
            'source[0].min_chars: must be a whole number, not "dez"; for example 1000',
            "source[0].weight: -1.0 is too small; give at least 0",
            "tokenizer.vocab_size: 100 is too small; give at least 512",
        ],
    ),
    "an unknown format": (
        source(rest='format = "jsonl.bz2"'),
        [
            'source[0].format: unknown value "jsonl.bz2"; did you mean "jsonl.gz"? One of "auto", "jsonl", "jsonl.gz", '
            '"jsonl.zst", "txt", "txt.gz", "txt.zst", "parquet", "csv", "csv.gz", "csv.zst", "tsv", "tsv.gz", '
            '"tsv.zst", "conllu", "conllu.gz", "srt", "warc", "warc.gz", "mediawiki", "mediawiki.gz", '
            '"mediawiki.bz2", "json", "json.gz", "json.zst", "squad", "megatron"'
        ],
    ),
    "names": (
        source("a/b") + source("Um") + source("um") + source("tokenizer"),
        [
            'source[0].name: "a/b" can\'t name a folder; '
            "use letters without accents, digits, dots, dashes and underscores",
            'source[2].name: "um" is there twice; give each source its own name',
            'source[3].name: "tokenizer" is a name of the corpus\'s own; choose another',
        ],
    ),
    "no paths": (
        source(paths="[]"),
        ["source[0].paths: is empty; give files, folders or globs"],
    ),
    "no weight": (
        source(rest="weight = 0"),
        ["source: every weight is 0; give at least one source a weight above 0"],
    ),
    "token shards of an unknown tokenizer": (
        source(rest='format = "megatron"\ntext_field = "corpo"'),
        [
            "source[0].format: token shards need the tokenizer that made them; set tokenizer.path",
            "source[0].text_field: has no effect on token shards; remove it",
        ],
    ),
    "paths that lead nowhere": (
        source(paths='["um/*.jsonl", "dois"]'),
        [
            'source[0].paths: "um/*.jsonl" matches no file; correct the path',
            'source[0].paths: "dois" matches no file; correct the path',
        ],
    ),
    "a name without a format": (
        source(paths='["um/a.pdf"]'),
        [
            "source[0].paths: the name of FOLDER/um/a.pdf has no known format; set format, or name it .jsonl, .json, "
            ".txt, .parquet, .csv, .tsv, .conllu, .srt, .warc, .wet, .xml"
        ],
    ),
    "half a shard": (
        source(paths='["half"]', rest='format = "megatron"') + '[tokenizer]\npath = "t"',
        ["source[0].paths: there is no FOLDER/half/a.bin; a shard is a .bin and an .idx"],
    ),
}


@pytest.mark.parametrize("case", BAD_RECIPES)
def test_recipes(tmp_path: Path, capsys: pytest.CaptureFixture[str], case: str) -> None:
    recipe, problems = BAD_RECIPES[case]
    assert run(tmp_path, recipe, {"um/a.pdf": "", "half/a.idx": ""}) == 2
    place = f"{tmp_path}/corpus.toml"
    lines = [f"error: {place}: {problem.replace('FOLDER', str(tmp_path))}" for problem in problems]
    assert capsys.readouterr() == ("", "\n".join(lines) + "\n")
    assert not list(tmp_path.glob("out*"))


BAD_DATA = {
    "too many malformed lines": (
        source(),
        {"um/a.jsonl": GOOD + '{"txt": 1}\n' + OTHER, "um/b.jsonl": "[]\n\nnada\n" + GOOD + b"\xff".decode("latin-1")},
        'source "um": 4 of 7 documents are malformed, over max_malformed = 0.001: '
        'FOLDER/um/a.jsonl:2 (no field "text"), '
        "FOLDER/um/b.jsonl:1 (not a JSON object), FOLDER/um/b.jsonl:3 (not JSON), ...; correct them or raise it",
    ),
    "half a surrogate pair": (
        source(),
        {"um/a.jsonl": GOOD + '{"text": "a \\ud83d b"}\n'},
        'source "um": 1 of 2 documents are malformed, over max_malformed = 0.001: '
        "FOLDER/um/a.jsonl:2 (half a surrogate pair); correct them or raise it",
    ),
    "a text in Latin-1": (
        source(),
        {"um/a.txt": "coração".encode("latin-1"), "um/b.txt": TEXT},
        'source "um": 1 of 2 documents are malformed, over max_malformed = 0.001: '
        "FOLDER/um/a.txt:1 (not UTF-8); correct them or raise it",
    ),
    "a source without documents": (
        source(),
        {"um/a.jsonl": "\n \n"},
        'source "um": its files hold no document; check its paths and options, or remove it',
    ),
    "a source of which nothing is left": (
        source() + source("dois", '["dois/*"]', "min_chars = 20"),
        {"um/a.jsonl": GOOD, "dois/a.txt": TEXT, "dois/b.txt": "curto", "dois/c.txt": " \n"},
        'source "dois": no document is left of 3 (1 empty, 1 too short, 1 in earlier source); '
        "check its paths and options, or remove it",
    ),
    "a gzip file that is none": (
        source(),
        {"um/a.jsonl.gz": GOOD},
        "FOLDER/um/a.jsonl.gz: is no whole .gz file (Not a gzipped file (b'{\"')); get it again",
    ),
    "a Zstandard file that is none": (
        source(),
        {"um/a.jsonl.zst": GOOD},
        "FOLDER/um/a.jsonl.zst: is no whole .zst file (zstd decompressor error: Unknown frame descriptor); "
        "get it again",
    ),
    "no tokenizer at its path": (
        source() + '[tokenizer]\npath = "./nenhum"',
        {"um/a.jsonl": GOOD},
        "./nenhum: no such folder; tokenizer.path is a Hugging Face folder or a name",
    ),
    "no text to train a tokenizer on": (
        source() + "[tokenizer]\nsample_bytes = 1",
        {"um/a.jsonl": GOOD + OTHER},
        "tokenizer: there is no text to train on; check sources and tokenizer.sample_bytes",
    ),
}


NOTHING_IS_FINISHED = ["a gzip file that is none", "a Zstandard file that is none", "no tokenizer at its path"]


@pytest.mark.parametrize("case", BAD_DATA)
def test_data(tmp_path: Path, capsys: pytest.CaptureFixture[str], case: str) -> None:
    recipe, files, problem = BAD_DATA[case]
    assert run(tmp_path, recipe, files) == 2
    errors = [line for line in capsys.readouterr().err.splitlines() if not line.startswith("warning: ")]
    left = list(tmp_path.glob("out*"))
    kept = [f"{tmp_path}/out.partial-kept: holds what is finished; the same command goes on"]
    assert errors == [*(kept if left else []), f"error: {problem.replace('FOLDER', str(tmp_path))}"]
    assert left in ([], [tmp_path / "out.partial-kept"])
    assert bool(left) == (case not in NOTHING_IS_FINISHED)


def test_token_shards_of_another_tokenizer(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train_tokenizer(TokenizerConfig(vocab_size=512), [TEXT], tmp_path / "tokenizer")
    tokens = np.array([5, 6, 7, 8, 0], np.uint16)
    write_split(tmp_path, "shards/a", tokens.dtype, [(tokens, np.array([3, 2]))])
    recipe = source(paths='["shards"]', rest='format = "megatron"') + '[tokenizer]\npath = "tokenizer"'
    assert run(tmp_path, recipe, {}) == 2
    assert capsys.readouterr().err.splitlines()[-1] == (
        f"error: {tmp_path}/shards/a-00000.bin: document 1 does not end with EOS (id 0); "
        "make the shard again with --append-eod"
    )
    assert not list(tmp_path.glob("out*"))


@pytest.mark.parametrize(
    ("flags", "problem"),
    [
        (["--budget-tokens", "0"], "--budget-tokens: 0 is too small; give at least 1"),
        (["--budget-tokens", "muitos"], '--budget-tokens: must be a whole number, not "muitos"; for example 1000'),
        (["--budget", "7"], "--budget: unknown flag; did you mean --budget-tokens?"),
    ],
)
def test_flags(tmp_path: Path, capsys: pytest.CaptureFixture[str], flags: list[str], problem: str) -> None:
    assert run(tmp_path, source(), {"um/a.jsonl": GOOD}, *flags) == 2
    assert capsys.readouterr().err == f"error: {problem}\n"


def test_a_missing_recipe(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(prepare.main, [str(tmp_path / "no.toml")]) == 2
    assert capsys.readouterr().err == f"error: {tmp_path}/no.toml: no such file; check the path\n"


def test_a_folder_that_is_no_corpus_is_never_replaced(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for flags in ([], ["--force"]):
        assert run(tmp_path, source(), {"um/a.jsonl": GOOD, "out/thesis.tex": "anos"}, *flags) == 2
        assert capsys.readouterr().err == (
            f"error: {tmp_path}/out: exists and is no corpus; give another --out, or remove it\n"
        )
    assert (tmp_path / "out" / "thesis.tex").read_text() == "anos"


def test_a_disk_that_is_too_small(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def used(work: Path) -> int:
        return sum(path.stat().st_size for path in Path(work).rglob("*"))

    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**9, 10**9, 99_900 - used(path)))
    assert run(tmp_path, source(), {"um/a.txt": b"a" * 10**5}) == 2
    assert capsys.readouterr().err == (
        f"error: {tmp_path}: making the corpus takes about 150 kB of disk and 99.9 kB are free; "
        "free some, or give another --out\n"
    )
    assert not list(tmp_path.glob("out*"))


def test_a_disk_that_gets_full(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_space(task: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(spill, "scatter", no_space)
    assert run(tmp_path, source(), {"um/a.jsonl": GOOD}) == 2
    problem = "the disk got full; free some, or give another --out"
    assert capsys.readouterr().err == f"error: {tmp_path}/out: {problem}\n"
    assert not list(tmp_path.glob("out*"))


def test_few_malformed_lines_are_left_out_with_a_warning(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    # Cut into pieces, a file's lines must still be counted from its beginning.
    monkeypatch.setattr(spill, "PIECE_BYTES", 1000)
    good = [json.dumps({"text": f"{TEXT} {number}"}) for number in range(96)]
    lines = [*good[:40], "x", *good[40:60], '{"text": 1}', *good[60:], "y", "z"]
    assert run(tmp_path, "max_malformed = 0.05\n" + source(), {"um/a.jsonl": "\n".join(lines)}) == 0
    out, err = capsys.readouterr()
    path = f"{tmp_path}/um/a.jsonl"
    assert err.splitlines()[0] == (
        f"warning: {path}: 4 malformed documents are left out: {path}:41 (not JSON), "
        f'{path}:62 (field "text" is not a string), {path}:99 (not JSON), ...'
    )
    assert open_corpus(tmp_path / "out").source("um").counts == {
        "read": 100,
        "malformed": 4,
        "empty": 0,
        "short": 0,
        "duplicate": 0,
        "duplicate_elsewhere": 0,
        "kept": 96,
        "valid_near_train": 0,  # the texts differ in their numbers only, but have fewer than 16 tokens
    }
    assert out.splitlines()[-2].split()[:4] == ["source", "read", "malformed", "kept"]
    assert out.splitlines()[-1].split()[:4] == ["um", "100", "4", "96"]


def test_what_is_left_out_is_counted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = source(paths='["um"]') + source("dois", '["dois/*"]')
    files = {"um/a.jsonl": GOOD, "um/LEIAME": "nada", "um/b.md": "#", "dois/a.jsonl": OTHER + GOOD, "dois/.b.jsonl": ""}
    files |= {"um/.oculto": "x", "um/.git/config": "", "um/sub/.git/config": ""}
    (tmp_path / "um").mkdir()
    os.mkfifo(tmp_path / "um" / "pipe.txt")
    assert run(tmp_path, recipe, files) == 0
    out, err = capsys.readouterr()
    assert err.splitlines()[:4] == [
        f'warning: source "um": left out 3 hidden files or folders; the first is {tmp_path}/um/.git',
        f'warning: source "um": left out 1 pipes, sockets or devices; the first is {tmp_path}/um/pipe.txt',
        f'warning: source "um": left out 2 files of no known format; the first is {tmp_path}/um/LEIAME',
        f'warning: source "dois": left out 1 hidden files or folders; the first is {tmp_path}/dois/.b.jsonl',
    ]
    assert out.splitlines()[-2:] == [
        f'source "{name}" has no validation: each of its documents is more than 10% of its text and 8 MB'
        for name in ("um", "dois")
    ]
    for entry in open_corpus(tmp_path / "out").manifest.sources:
        assert (entry.train.documents, entry.valid.documents) == (1, 0)


@pytest.mark.parametrize("paths", ['["um"]', '["um/**/*.jsonl"]', '["um/*/a.jsonl"]'])
def test_folders_and_links_that_cannot_be_read_are_errors(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, paths: str
) -> None:
    def list_folder(path: str) -> list[str]:  # the tests may run as root, who reads everything
        if str(path).endswith("um/fechada"):
            raise PermissionError(13, "Permission denied")
        return os_listdir(path)

    os_listdir = os.listdir
    monkeypatch.setattr(os, "listdir", list_folder)
    files = {"um/aberta/a.jsonl": GOOD, "um/fechada/b.jsonl": OTHER}
    (tmp_path / "um/aberta").mkdir(parents=True)
    (tmp_path / "um/aberta/a.jsonl").touch()
    (tmp_path / "um/ligada").mkdir()
    (tmp_path / "um/ligada/a.jsonl").symlink_to("nada")
    (tmp_path / "um/aberta/volta").symlink_to("..")  # round in a circle
    assert run(tmp_path, source(paths=paths), files) == 2
    errors = [
        line.removeprefix(f"error: {tmp_path}/corpus.toml: source[0].paths: {tmp_path}/")
        for line in capsys.readouterr().err.splitlines()
    ]
    link = "um/ligada/a.jsonl is a link to nothing; remove it, or bring back its file"
    folder = "um/fechada can't be read (Permission denied); make it readable, or leave it out"
    assert sorted(errors) == ([link] if paths.endswith('*/a.jsonl"]') else [folder, link])
