"""A misspelt key that is ignored, one error reported at a time, or a flag that quietly does not win over the file."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gloria.config.cli import (
    from_mapping,
    option,
    parse,
    read_toml,
    suggest,
    to_mapping,
    to_toml,
)
from gloria.config.schema import label
from gloria.config.toml import show_value, write_toml
from gloria.errors import UserError


@dataclass(frozen=True)
class Train:
    """How long."""

    steps: int | None = option(None, "optimizer steps", minimum=1)
    epochs: float | None = option(None, "passes over the data", above=0)
    compile: Literal["auto", True, False] = option("auto", "compile the blocks")
    precision: str = option("auto", "of the products", choices=("auto", "fp32", "bf16"))
    betas: tuple[float, float] = option((0.9, 0.95), "decays", minimum=0.0, maximum=1.0)
    stop_early: bool = option(False, "stop when nothing improves")


@dataclass(frozen=True)
class Data:
    """What is read."""

    corpus: str = option(help="folder of the corpus", other_names=("folder",))
    weights: dict[str, float] = option({}, "shares", minimum=0)
    from_: str | None = option(None, "where to begin")


@dataclass(frozen=True)
class Source:
    """One source."""

    name: str = option(help="its name")
    paths: list[str] = option([], "files and globs")


@dataclass(frozen=True)
class Recipe:
    """All of it."""

    train: Train
    data: Data
    out: str = option("here", "folder to write")
    dry_run: bool = option(False, "print and stop")
    seed: int = option(0, "of everything", maximum=100)
    source: list[Source] = option([], "the sources")


GOOD = """
out = "there"
[train]
steps = 10_000
betas = [0, 0.5]
[data]
corpus = "corpus"
from = "a folder"
[data.weights]
ptwiki = 1
europarl = 0.5
[[source]]
name = "ptwiki"
paths = ["a", "b"]
[[source]]
name = "europarl"
"""


def read(argv: str, **options):
    return parse(Recipe, argv.split(), prog="prog", **options)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory, with good.toml in it."""
    monkeypatch.chdir(tmp_path)
    Path("good.toml").write_text(GOOD, encoding="utf-8")
    return tmp_path


def problems(action) -> list[str]:
    with pytest.raises(UserError) as caught:
        action()
    return list(caught.value.problems)


@pytest.mark.usefixtures("folder")
def test_a_file_becomes_the_tree_it_says() -> None:
    config = read("--config good.toml").config
    assert config == Recipe(
        train=Train(steps=10_000, betas=(0.0, 0.5)),
        data=Data("corpus", {"ptwiki": 1.0, "europarl": 0.5}, "a folder"),
        out="there",
        source=[Source("ptwiki", ["a", "b"]), Source("europarl")],
    )
    assert type(config.data.weights["ptwiki"]) is float


@pytest.mark.usefixtures("folder")
def test_flags_win_over_the_file_and_are_read_as_toml() -> None:
    parsed = read(
        "--config=good.toml --train.steps 7 --train.betas 0.1,0.2 --train.compile false --train.stop-early "
        "--data.weights.pt-wiki.v2 0.25 --data.from=x --out 2024 --dry-run --train.precision bf16 --seed -1"
    )
    train, data = parsed.config.train, parsed.config.data
    assert (train.steps, train.betas, train.compile, train.precision) == (7, (0.1, 0.2), False, "bf16")
    assert train.stop_early is True
    assert parsed.config.dry_run is True
    assert data.weights == {"ptwiki": 1.0, "europarl": 0.5, "pt-wiki.v2": 0.25}
    assert (data.from_, parsed.config.out, parsed.config.seed) == ("x", "2024", -1)
    assert label("train.steps", parsed.where, parsed.given) == "--train.steps"
    assert label("data.corpus", parsed.where, parsed.given) == "good.toml: data.corpus"


@pytest.mark.usefixtures("folder")
def test_a_flag_for_a_whole_table_replaces_it() -> None:
    parsed = parse(Recipe, ["--config", "good.toml", "--data.weights", "{cartas = 2, ptwiki = 1}"], prog="prog")
    assert parsed.config.data.weights == {"cartas": 2.0, "ptwiki": 1.0}
    assert label("data.weights.cartas", parsed.where, parsed.given) == "--data.weights: data.weights.cartas"


@pytest.mark.usefixtures("folder")
def test_one_of_two_rivals_as_a_flag_clears_the_other_of_the_file() -> None:
    rivals = [("train.steps", "train.epochs")]
    train = read("--config good.toml --train.epochs 2", rivals=rivals).config.train
    assert (train.steps, train.epochs) == (None, 2.0)
    train = read("--config good.toml --train.epochs 2 --train.steps 3", rivals=rivals).config.train
    assert (train.steps, train.epochs) == (3, 2.0), "two flags are the user's own contradiction"


BAD_FILES = {
    "[trian]\nsteps = 1": 'trian: unknown section; did you mean "train"?',
    "[train]\nstep = 1": 'train.step: unknown key; did you mean "steps"?',
    "[train]\ncorpus = 'x'": 'train.corpus: unknown key; did you mean "data.corpus"?',
    "[train]\nzzz = 1": "train.zzz: unknown key; known: steps, epochs, compile, precision, betas, stop_early",
    "[train]\nsteps = 'many'": 'train.steps: must be a whole number, not "many"; for example 1000',
    "[train]\nsteps = 1.5": "train.steps: must be a whole number, not 1.5; for example 1000",
    "[train]\nsteps = true": "train.steps: must be a whole number, not true; for example 1000",
    "[train]\nsteps = 0": "train.steps: 0 is too small; give at least 1",
    "[train]\nepochs = 0": "train.epochs: 0.0 is too small; give more than 0",
    "[train]\nepochs = nan": "train.epochs: must be finite, not nan; for example 0.1",
    "seed = 101": "seed: 101 is too large; give at most 100",
    "[train]\nstop_early = 1": "train.stop_early: must be true or false, not 1; for example true",
    "[train]\nprecision = 'bf61'": (
        'train.precision: unknown value "bf61"; did you mean "bf16"? One of "auto", "fp32", "bf16"'
    ),
    "[train]\ncompile = 1": 'train.compile: unknown value 1; one of "auto", true, false',
    "[train]\nbetas = 0.9": "train.betas: must be a list, not 0.9; for example [0.1, 0.1]",
    "[train]\nbetas = [0.9]": "train.betas: must have 2 values, not 1; for example [0.1, 0.1]",
    "[train]\nbetas = [0.9, 2]": "train.betas[1]: 2.0 is too large; give at most 1.0",
    "train = 3": "train: must be a section, not 3; write it as [train]",
    "[data]\ncorpus = 'c'\nweights = 1": "data.weights: must be a table, not 1; write it as [data.weights]",
    "[data]\ncorpus = 'c'\nweights = {a = -1}": "data.weights.a: -1.0 is too small; give at least 0",
    "[[source]]\npaths = ['a']": "source[0].name: missing; give it (its name)",
    "[[source]]\nname = 'x'\n[[source]]\nname = 'y'\npaths = [1]": (
        'source[1].paths[0]: must be a string, not 1; for example "text"'
    ),
}


@pytest.mark.usefixtures("folder")
@pytest.mark.parametrize(("text", "expected"), BAD_FILES.items())
def test_every_mistake_in_a_file_has_its_line(text: str, expected: str) -> None:
    values = read_text(text)
    values.setdefault("data", {"corpus": "c"})
    assert problems(lambda: from_mapping(Recipe, values, "bad.toml")) == [f"bad.toml: {expected}"]


def read_text(text: str) -> dict:
    Path("bad.toml").write_text(text, encoding="utf-8")
    return read_toml("bad.toml")


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        ("--trian.steps 3", "--trian.steps: unknown flag; did you mean --train.steps?"),
        ("--train.step=3", "--train.step: unknown flag; did you mean --train.steps?"),
        ("--steps 3", "--steps: unknown flag; did you mean --train.steps?"),
        ("--dry-rnu", "--dry-rnu: unknown flag; did you mean --dry-run?"),
        ("--qqq", "--qqq: unknown flag; see --help"),
        ("--train 3", "--train: is a section; set one of its keys, --train.KEY VALUE"),
        ("good.toml", "good.toml: is no flag; flags begin with --"),
        ("--train.steps", "--train.steps: needs a value; write --train.steps VALUE"),
        ("--train.steps --dry-run", "--train.steps: needs a value; write --train.steps VALUE"),
        ("--out a --out b", "--out: given twice; give it once"),
        ("--train.steps x", '--train.steps: must be a whole number, not "x"; for example 1000'),
        ("--train.steps 1.5", "--train.steps: must be a whole number, not 1.5; for example 1000"),
        ("--data.folder x", "--data.folder: unknown flag; did you mean --data.corpus?"),
        ("--data.weights.a b", '--data.weights.a: must be a number, not "b"; for example 0.1'),
        ("--train.steps.more 1", "--train.steps.more: unknown flag; did you mean --train.steps?"),
        ("--config no.toml", "no.toml: no such file; check the path"),
        ("--config .", ".: can't be read (Is a directory); check the path"),
    ],
)
@pytest.mark.usefixtures("folder")
def test_every_mistake_in_a_flag_has_its_line(argv: str, expected: str) -> None:
    assert problems(lambda: read(f"--data.corpus c {argv}")) == [expected]


@pytest.mark.usefixtures("folder")
def test_all_problems_of_file_flags_and_combinations_come_at_once() -> None:
    Path("bad.toml").write_text("seed = 'x'\n[train]\nsteps = 5\nepochs = 3\nstpes = 3\n", encoding="utf-8")

    def check(config: Recipe) -> Iterator[tuple[tuple[str, ...], str]]:
        if config.train.steps and config.train.epochs:
            yield ("train.epochs", "train.steps"), "steps and epochs are both given; give one"
        if config.seed == 0:
            yield ("out", "seed"), "follows from a seed that is wrong anyway, so it is not reported"

    assert problems(lambda: read("--config bad.toml --dry --train.precision x", check=check)) == [
        "--dry: unknown flag; did you mean --dry-run?",
        'bad.toml: train.stpes: unknown key; did you mean "steps"?',
        '--train.precision: unknown value "x"; one of "auto", "fp32", "bf16"',
        "bad.toml: data.corpus: missing; give it (folder of the corpus)",
        'bad.toml: seed: must be a whole number, not "x"; for example 1000',
        "bad.toml: train.epochs: steps and epochs are both given; give one",
    ]


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"a = 1\nb = = 2\n", "bad.toml: line 2, column 5: invalid value; correct the TOML there"),
        (b"a = 1\na = 2\n", "bad.toml: line 2, column 6: cannot overwrite a value; correct the TOML there"),
        (b"a = [1,\n", "bad.toml: end of file: invalid value; correct the TOML there"),
        (b"a = '\xff'\n", "bad.toml: is not UTF-8 (byte 5); save it as UTF-8"),
    ],
)
@pytest.mark.usefixtures("folder")
def test_a_file_that_is_no_toml_is_reported_with_its_line(content: bytes, expected: str) -> None:
    Path("bad.toml").write_bytes(content)
    assert problems(lambda: read("--config bad.toml")) == [expected]


@pytest.mark.usefixtures("folder")
def test_a_byte_order_mark_does_no_harm() -> None:
    Path("good.toml").write_text(GOOD, encoding="utf-8-sig")
    assert read("--config good.toml").config.out == "there"


def test_help_shows_every_key_with_its_default_and_reason(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        read("--help", description="Does it.", default_config="good.toml")
    assert ended.value.code == 0
    text = capsys.readouterr().out
    for line in (
        "  --config FILE\n      the recipe, in TOML (default good.toml)",
        "  --dry-run  (true or false; default false)\n      print and stop",
        '  --out  (a string; default "here")\n      folder to write',
        "[train] How long.\n  --train.steps  (a whole number; optional)\n      optimizer steps",
        '  --train.precision  ("auto", "fp32", "bf16"; default "auto")',
        "  --data.corpus  (a string; required)\n      folder of the corpus",
        "  --data.weights.NAME  (a number; default {})",
        "[[source]] One source. (in the file only)\n  name  (a string; required)",
    ):
        assert line in text, line


@dataclass(frozen=True)
class Options:
    """Of a command without a recipe."""

    recipe: Path = option(help="what is made", positional="RECIPE.toml")
    step: int = option(help="which", minimum=0)
    max_new_tokens: int = option(8, "at most")
    budget: int | None = option(None, "tokens")
    pair: tuple[Path, Path] | None = option(None, "two files")
    verify: bool = option(False, "read all")


def read_options(argv: str) -> Options:
    return parse(Options, argv.split(), prog="prog", recipe=False, file_keys=Source).config


def test_a_command_without_recipe_takes_words_and_flags_in_both_cases() -> None:
    options = read_options("--step 3 corpus.toml --max_new_tokens 4 --pair a b --verify --budget 35.5e9")
    assert options == Options(Path("corpus.toml"), 3, 4, 35_500_000_000, (Path("a"), Path("b")), True)
    assert read_options("x --step=3 --max-new-tokens=5").max_new_tokens == 5


@pytest.mark.parametrize(
    ("argv", "lines"),
    [
        ("r --step x", ['--step: must be a whole number, not "x"; for example 1000']),
        ("r --step 1 --sttep 3", ["--sttep: unknown flag; did you mean --step?"]),
        ("r --step 1 --max-tokens 3", ["--max-tokens: unknown flag; did you mean --max-new-tokens?"]),
        ("r --step 1 --config x", ["--config: unknown flag; see --help"]),
        ("r more --step 1", ["more: is no flag; flags begin with --"]),
        ("r --step 1 --pair a", ['--pair: must have 2 values, not 1; for example ["folder", "folder"]']),
        (
            "--budget 1.5",
            [
                "--recipe: missing; give it (what is made)",
                "--step: missing; give it (which)",
                "--budget: must be a whole number, not 1.5; for example 1000",
            ],
        ),
    ],
)
def test_a_command_without_recipe_reports_problems_in_the_same_way(argv: str, lines: list[str]) -> None:
    assert sorted(problems(lambda: read_options(argv))) == sorted(lines)


def test_help_of_a_command_without_recipe(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        read_options("--help")
    text = capsys.readouterr().out
    assert text.startswith("usage: prog RECIPE.toml --step N [--flag VALUE ...]\n")
    assert "  --max-new-tokens  (a whole number; default 8)\n      at most\n" in text
    assert "  --budget  (a whole number; optional)\n" in text
    assert "\nKeys of the file:\n  name  (a string; required)\n" in text
    assert "None" not in text


@pytest.mark.usefixtures("folder")
def test_what_the_command_does_next_is_tried_as_well() -> None:
    """So that a wrong flag and a corpus that does not go with another are one report."""

    def later(parsed) -> None:
        raise UserError(
            "good.toml: data.weights.x: unknown", "good.toml: seed: -1 is odd", f"--out: {parsed.config.out}"
        )

    assert problems(lambda: read("--config good.toml --seed=x --out there", later=later)) == [
        '--seed: must be a whole number, not "x"; for example 1000',
        "good.toml: data.weights.x: unknown",
        "--out: there",
    ]
    assert read("--config good.toml", later=later).config.out == "there", "what is right is not tried twice"


HOSTILE = {
    f"a = {'[' * 5000}": "it is nested too deeply; write it in plain TOML",
    f"a = {'[' * 20}{']' * 20}": "it is nested too deeply; write it in plain TOML",
    f"{'a.' * 5000}a = 1": "it is nested too deeply; write it in plain TOML",
    f"seed = {'9' * 5000}": "a number has too many digits; write it in plain TOML",
    f"seed = 0x{'f' * 5000}": f"seed: 0x{'f' * 78}... is too large; give at most 100",
    f"[train]\nsteps = {2**63}": "train.steps: 9223372036854775808 is too large; give at most 9223372036854775807",
    f"[train]\nepochs = 1{'0' * 400}": "train.epochs: must be finite, not inf; for example 0.1",
    f"[train]\nsteps = '{'x' * 500}'": f'train.steps: must be a whole number, not "{"x" * 79}...; for example 1000',
    'out = "a\\u0000b"': "out: has a NUL character, which no path or text here can hold; remove it",
}


@pytest.mark.usefixtures("folder")
@pytest.mark.parametrize(("text", "line"), HOSTILE.items(), ids=range(len(HOSTILE)))
def test_a_hostile_file_is_one_short_line(text: str, line: str) -> None:
    Path("bad.toml").write_text(text, encoding="utf-8")
    assert problems(lambda: read("--config bad.toml --data.corpus c")) == [f"bad.toml: {line}"]


@pytest.mark.parametrize("value", ["[" * 5000, "9" * 5000, "{a = " * 500])
def test_a_hostile_flag_is_one_short_line(value: str) -> None:
    (line,) = problems(lambda: parse(Recipe, ["--data.corpus", "c", "--train.steps", value], prog="prog"))
    assert line.startswith("--train.steps: must be a whole number, not ")
    assert len(line) < 200


def test_the_nearest_name_is_suggested_and_else_all() -> None:
    assert suggest("ptwikki", ["ptwiki", "oscar"]) == 'did you mean "ptwiki"?'
    assert suggest("zzz", ["ptwiki", "oscar"]) == "known: ptwiki, oscar"
    assert suggest("zzz", []) == "there are none"
    assert suggest("A100", ["A10", "A100-80GB", "A100-40GB"]) == 'did you mean "A100-80GB" or "A100-40GB"?'


texts = st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=8)
trees = st.builds(
    Recipe,
    train=st.builds(
        Train,
        steps=st.none() | st.integers(1, 2**63 - 1),
        epochs=st.none() | st.floats(1e-300, 1e300),
        compile=st.sampled_from(["auto", True, False]),
        betas=st.tuples(st.floats(0, 1), st.floats(0, 1)),
    ),
    data=st.builds(Data, corpus=texts, weights=st.dictionaries(texts, st.floats(0, 1e308)), from_=st.none() | texts),
    out=texts,
    seed=st.integers(-(2**63), 100),
    source=st.lists(st.builds(Source, name=texts, paths=st.lists(texts))),
)


@settings(max_examples=150, deadline=None)
@given(trees)
def test_a_tree_reads_back_from_its_toml_and_its_mapping(tree: Recipe) -> None:
    import json
    import tomllib

    assert from_mapping(Recipe, tomllib.loads(to_toml(tree)), "x") == tree
    assert from_mapping(Recipe, json.loads(json.dumps(to_mapping(tree))), "x") == tree


def test_what_is_not_set_is_a_comment_in_toml() -> None:
    assert write_toml({"a": None, "b": {"c d": [1, "x"], "e": {}}}) == (
        '# a = not set\n\n[b]\n"c d" = [1, "x"]\n\n[b.e]\n'
    )
    assert show_value({"a": True, "b": [None]}) == "{a = true, b = [not set]}"
