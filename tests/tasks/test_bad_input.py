"""Bug prevented: a user's mistake in a fine-tuning that ends in a traceback, after minutes, in a line that does not say
where and what to do, or with a run folder that looks as if something had been trained."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

import gloria.finetune as finetune
from gloria.errors import run_command
from tests.tasks.test_finetune import command
from tests.tasks.tiny import make_folder, write_assin, write_squad

PAIR = '<pair id="{}" {}><t>o gato</t><h>o cão</h></pair>'
GOLD = 'entailment="None" similarity="1.0"'


@pytest.fixture(scope="module")
def neo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_folder("gpt_neo", tmp_path_factory.mktemp("neo") / "neo")


def line_of(capsys: pytest.CaptureFixture, arguments: list[str]) -> str:
    """The one line that the command ends with."""
    assert run_command(finetune.main, arguments) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if not line.startswith("warning: ")]
    return line.removeprefix("error: ")


def assin(*pairs: str, dev: str = PAIR.format("9", GOLD), test: str = PAIR.format("9", "")) -> Callable[[Path], None]:
    """Writes ASSIN-2 files: a line a pair, the first in line 2."""

    def write(folder: Path) -> None:
        for name, rows in (("assin2-train-only.xml", pairs), ("assin2-dev.xml", (dev,)), ("assin2-test.xml", (test,))):
            (folder / name).write_text("\n".join(["<entailment-corpus>", *rows, "</entailment-corpus>"]))

    return write


def table(*rows: str) -> Callable[[Path], None]:
    return lambda folder: (folder / "train.tsv").write_text("".join(f"{row}\n" for row in rows)) and None


def squad(content: str) -> Callable[[Path], None]:
    return lambda folder: [(folder / f"{split}.json").write_text(content) for split in ("train", "dev")] and None


def questions(answer: str, question: str = "quem?") -> str:
    rows = [
        {
            "context": f"o gato {number} dorme",
            "qas": [{"id": str(number), "question": question, "answers": [{"text": answer, "answer_start": 2}]}],
        }
        for number in range(30)
    ]
    return json.dumps({"data": [{"title": "t", "paragraphs": rows}]})


HEADER = "index\tsentence1\tsentence2\tlabel"
BAD_FILES = [
    ("assin2", lambda folder: None, "{data}: does not hold the train split of assin2; expected assin2-train-only.xml "
     "or assin2/assin2-train-only.xml"),
    ("assin2", assin(PAIR.format(1, GOLD), PAIR.format(2, 'entailment="Maybe" similarity="2"')),
     '{data}/assin2-train-only.xml:3: unknown label "Maybe"; assin2 has None, Entailment'),
    ("assin2", assin(PAIR.format(1, 'entailment="None" similarity="7"')),
     '{data}/assin2-train-only.xml:2: wrong score "7"; assin2 has numbers from 1 to 5'),
    ("assin2", assin(PAIR.format(1, GOLD), PAIR.format(1, GOLD)),
     '{data}/assin2-train-only.xml:3: id "1" is already at 2; ids must differ'),
    ("assin2", assin(f'<pair id="1" {GOLD}><t>o gato</t></pair>'),
     "{data}/assin2-train-only.xml:2: the pair has no text in <h>; both sentences are needed"),
    ("assin2", assin(PAIR.format(1, GOLD), PAIR.format(2, "")),
     "{data}: 1 of 2 training examples are not labelled; take them out"),
    ("assin2", assin(PAIR.format(1, GOLD), dev=PAIR.format(2, "")),
     "{data}/assin2-dev.xml: no example is labelled; only a test split may be without labels"),
    ("assin2", assin(PAIR.format(1, GOLD), test=PAIR.format(2, 'entailment="Maybe"')),
     '{data}/assin2-test.xml:2: unknown label "Maybe"; assin2 has None, Entailment'),
    ("assin2", assin(), "{data}/assin2-train-only.xml: has no <pair>; an ASSIN file is expected"),
    ("assin2", lambda folder: (folder / "assin2-train-only.xml").write_bytes(b"  \n") and None,
     "{data}/assin2-train-only.xml: is empty; get the file again"),
    ("assin2", lambda folder: (folder / "assin2-train-only.xml").write_bytes(b"<a>\xe3</a>") and None,
     "{data}/assin2-train-only.xml:1: is not XML (not well-formed (invalid token)); get the file again"),
    ("rte", table("index\tfirst\tsentence2\tlabel", "0\ta\tb\tentailment"),
     "{data}/train.tsv:1: has no column sentence1 or #1 String; it has index, first, sentence2, label"),
    ("rte", table(HEADER, "0\ta\tentailment"),
     "{data}/train.tsv:2: has 3 fields where the header has 4; cut at tabs, no quoting"),
    ("rte", table(HEADER, "0\ta\tb\tsim"),
     '{data}/train.tsv:2: unknown label "sim"; rte has entailment, not_entailment'),
    ("rte", table(HEADER, "0\ta\tb\tentailment"),
     "{data}: 1 training examples are too few for a tenth to be held out; get more"),
    ("faquad", squad("{"), "{data}/train.json:1: is not JSON (Expecting property name enclosed in double quotes); "
     "get the file again"),
    ("faquad", squad(questions("peixe")), "{data}: no answer of 29 questions is in its context; check the files"),
    ("faquad", squad(questions("gato", "quem " * 60)), None),
]  # fmt: skip


@pytest.mark.parametrize(("task", "write", "line"), BAD_FILES)
def test_a_wrong_file_is_reported_in_a_line(task, write, line, neo, tmp_path, capsys):
    data = tmp_path / "data"
    data.mkdir()
    write(data)
    found = line_of(capsys, command(task, neo, data, tmp_path / "run"))
    if line is None:
        assert found.endswith(
            "leave 0 of train.max_length 64 to the context, whose windows share 8; raise it or lower train.stride"
        )
        assert found.startswith('question "')
    else:
        assert found == line.format(data=data)
    assert not (tmp_path / "run" / "checkpoints").exists()


@pytest.mark.parametrize(
    ("flags", "line"),
    [
        ({"data": "nowhere"}, "nowhere: no such folder; give the folder that holds the train split of assin2"),
        ({"model": "/no/model"}, "--model: /no/model does not exist; name a run's folder or a Hugging Face folder"),
        (
            {"model": "models/demo"},
            "--model: models/demo is not there; make it with `make demo`, or name a run or a model's folder",
        ),
        ({"task": "enem"}, "enem: has nothing to train a head on; score a language model on it with gloria.evaluate"),
        ({"task": "asin2-entailmnt"}, 'asin2-entailmnt: unknown task; did you mean "assin2-entailment"?'),
        ({"train.epoch": 3}, "--train.epoch: unknown flag; did you mean --train.epochs?"),
        ({"train.global_batch": 0}, "--train.global_batch: 0 is too small; give at least 1"),
        ({"train.precision": "fp8"}, '--train.precision: unknown value "fp8"; one of '
         '"auto", "fp32", "bf16", "fp16"'),
        ({"dist.replicas": 3}, "--dist.replicas: 3 does not divide the number of ranks, 1; give one of 1"),
        ({"run.device": "cuda"}, "run.device: cuda is asked for and torch sees no GPU; use --run.device cpu or auto"),
        ({"checkpoint.keep": 1}, "--checkpoint.keep: 1 is too small; give at least 2"),
        ({"config": "none.toml"}, "none.toml: no such file; check the path"),
    ],
)  # fmt: skip
def test_a_wrong_flag_is_reported_in_a_line(flags, line, neo, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    write_assin(tmp_path / "data", {"train": 4, "dev": 4})
    asked = {"task": "assin2", "model": neo, "data": tmp_path / "data"} | flags
    arguments = command(asked.pop("task"), asked.pop("model"), asked.pop("data"), tmp_path / "run")
    given = {f"--{key}" for key in asked}
    arguments = [word for word in arguments if word.partition("=")[0] not in given]
    found = line_of(capsys, [*arguments, *(f"--{key}={value}" for key, value in asked.items())])
    assert found == line
    assert not (tmp_path / "run").exists() or not list((tmp_path / "run").glob("checkpoints/*"))


def test_a_run_does_not_continue_with_other_examples_and_is_no_model_itself(neo, tmp_path, capsys):
    data = write_assin(tmp_path / "data", {"train": 8, "dev": 4})
    run = tmp_path / "run"
    arguments = command("assin2", neo, data, run, train__steps=2)
    assert finetune.main(arguments) == 0
    (run / "results.json").unlink()
    write_assin(data, {"train": 8, "dev": 4}, seed=1)
    assert line_of(capsys, arguments) == (
        f"{run}: the set to train on or the one that chooses the model is another than its run began with; "
        "choose another run.dir"
    )
    assert line_of(capsys, command("assin2", run, data, tmp_path / "other")) == (
        f"--model: {run} is an unfinished fine-tuning; its best model so far is {run / 'model'}"
    )
    never = command("assin2", neo, data, run, train__steps=2, run__resume="never")
    assert line_of(capsys, never) == (
        f"run.resume: never, but {run} holds checkpoints up to step 2; choose another run.dir, or go on with auto"
    )


def test_a_tokenizer_without_end_or_separator_is_reported_and_one_without_padding_works(neo, tmp_path, capsys):
    data = write_squad(tmp_path / "data", {"train": 30, "dev": 4}, words=6)
    tokenizer = json.loads((neo / "tokenizer_config.json").read_text())
    assert "pad_token" not in tokenizer
    assert finetune.main(command("faquad", neo, data, tmp_path / "run", train__steps=2, eval__every=2)) == 0
    bare = tmp_path / "bare"
    bare.mkdir()
    for file in neo.iterdir():
        (bare / file.name).write_bytes(file.read_bytes())
    tokenizer.pop("eos_token")
    (bare / "tokenizer_config.json").write_text(json.dumps(tokenizer))
    capsys.readouterr()
    assert line_of(capsys, command("faquad", bare, data, tmp_path / "other")) == (
        "--model: its tokenizer has neither a separator nor an EOS; name an eos_token in its config"
    )
