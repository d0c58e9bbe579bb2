"""Prevents: a task of the user's own that needs our source touched, is read otherwise than its file says, or is wrong
without a line that says where.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from gloria import evaluate, finetune
from gloria.errors import UserError
from gloria.tasks.catalog import find_task
from gloria.tasks.examples import Choice, LastWord, Pair
from gloria.tasks.prompts import prompt
from tests.tasks.tiny import make_folder

TEXT = """
kind = "text"
files = { train = "train.tsv", test = "test.jsonl" }
columns = { text = "frase", label = "emocao" }
labels = ["mal", "bem"]
metrics = ["macro_f1", "accuracy"]
prompt = "Frase: {text}\\nEstá:"
words = { mal = "triste", bem = "contente" }
"""


@pytest.fixture(scope="module")
def neo(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(make_folder("gpt_neo", tmp_path_factory.mktemp("neo") / "neo"))


def write(folder: Path, text: str, **files: str) -> str:
    for name, content in files.items():
        (folder / name.replace("_", ".")).write_text(content)
    path = folder / "emoções.toml"
    path.write_text(text)
    return str(path)


def scores(folder: Path) -> dict[str, dict]:
    return {record["task"]: record["scores"] for record in json.loads((folder / "results.json").read_text())["results"]}


def test_single_texts_are_read_prompted_trained_on_and_scored(neo: str, tmp_path: Path) -> None:
    rows = [f"o gato {n} dorme\t{('mal', 'bem')[n % 2]}\n" for n in range(40)]
    lines = [json.dumps({"frase": f"um {n} {{x}}", "emocao": n % 2}) + "\n" for n in range(6)]
    name = write(tmp_path, TEXT, train_tsv="".join(["frase\temocao\n", *rows]), test_jsonl="".join(lines))
    task = find_task(name)
    (first, *_) = task.read(tmp_path, "test")
    assert first == Pair("0", "um 0 {x}", "", "mal")
    asked = prompt(task, first, task.read(tmp_path, "train")[1:2])
    assert asked.context == "Frase: o gato 1 dorme\nEstá: contente\n\nFrase: um 0 {x}\nEstá:"
    assert (asked.answers, asked.values) == ((" triste", " contente"), ("mal", "bem"))
    given = [f"--task={name}", f"--model={neo}", "--device=cpu", "--shots=2", f"--out={tmp_path / 'out'}"]
    assert evaluate.main(given) == 0
    assert scores(tmp_path / "out")["emoções"].keys() == {"macro_f1", "accuracy"}
    flags = ["--train.steps=2", f"--run.dir={tmp_path / 'run'}", "--run.device=cpu", "--log.tensorboard=false"]
    assert finetune.main([f"--task={name}", f"--model={neo}", *flags]) == 0
    assert scores(tmp_path / "run")["emoções"].keys() == {"macro_f1", "accuracy"}
    # The head that was trained answers the task, which the model's folder names by its file.
    head = [f"--task={name}", f"--model={tmp_path / 'run'}", "--device=cpu", f"--out={tmp_path / 'head'}"]
    assert evaluate.main(head) == 0
    assert scores(tmp_path / "head") == scores(tmp_path / "run")


def test_words_choices_pairs_and_spans(neo: str, tmp_path: Path) -> None:
    (tmp_path / "w.jsonl").write_text('{"inicio": "Era uma", "fim": "vez"}\n{"inicio": "O rato", "fim": "roeu"}\n')
    (tmp_path / "c.tsv").write_text("id\tquestion\tchoices\tanswer\n7\tQual?\tum | dois\tB\n8\tQue?\to | a\to\n")
    (tmp_path / "p.tsv").write_text("first\tsecond\tscore\nA\tB\t2.5\n")
    answers = {"text": ["aqui"], "answer_start": [4]}
    (tmp_path / "s.jsonl").write_text(
        json.dumps({"id": "0", "question": "Onde?", "context": "Foi aqui", "answers": answers})
    )
    own = {
        "words": 'kind = "last_word"\nfiles.test = "w.jsonl"\ncolumns = {context = "inicio", word = "fim"}\n'
        'prompt = "Completa: {context}"\nmetrics = ["exact_match:tucano", "accuracy:log-likelihood"]',
        "choices": 'kind = "choice"\nfiles.test = "c.tsv"\nprompt = "P: {question}\\nR:"',
        "pairs": 'kind = "pair"\nfiles.dev = "p.tsv"\nrange = [0, 5]',
        "spans": 'kind = "span"\nfiles.test = "s.jsonl"',
    }
    for name, text in own.items():
        (tmp_path / f"{name}.toml").write_text(text)
    tasks = {name: find_task(str(tmp_path / f"{name}.toml")) for name in own}
    word, _ = tasks["words"].read(tmp_path, "test")
    assert word == LastWord("1", "Completa: Era uma", "vez")
    first, second = tasks["choices"].read(tmp_path, "test")
    assert (first, second.answer) == (Choice("7", "Qual?", ("um", "dois"), 1), 0)
    assert prompt(tasks["choices"], first, [second]).context == "P: Que?\nR: o\n\nP: Qual?\nR:"
    assert tasks["pairs"].read(tmp_path, "dev") == [Pair("0", "A", "B", None, 2.5)]
    assert list(tasks["pairs"].metrics) == ["pearson", "spearman", "mse"]
    (span,) = tasks["spans"].read(tmp_path, "test")
    assert (span.answers, tasks["spans"].selection) == ((("aqui", 4),), "f1")
    given = ",".join(str(tmp_path / f"{name}.toml") for name in ("words", "choices"))
    flags = ["--device=cpu", "--rule=tucano,log-likelihood", f"--out={tmp_path / 'out'}"]
    assert evaluate.main([f"--task={given}", f"--model={neo}", *flags]) == 0
    found = scores(tmp_path / "out")
    assert found["choices"]["acc"]["n"] == 2
    assert found["words"].keys() == {"accuracy:log-likelihood"}


@pytest.mark.parametrize(
    ("before", "after", "what"),
    [
        ('kind = "text"', 'kind = "texto"', 'kind: unknown value "texto"; did you mean "text"?'),
        ("macro_f1", "macro_f2", 'metrics: macro_f2: unknown metric; did you mean "macro_f1"?'),
        ("text = ", "texts = ", 'columns.texts: unknown field; did you mean "text"?'),
        ("train = ", "trian = ", 'files.trian: unknown split; did you mean "train"?'),
        (', bem = "contente"', "", "words: has none for bem; give each label its word"),
        ("{text}", "{frase}", "prompt: names no field; write {text} where it stands"),
        ("labels =", "range = [0, 1]\nlabels =", "labels: give labels of a classification or the range of a score"),
        ('kind = "text"', 'kind = "span"', "labels: has no effect on span; remove it"),
    ],
)
def test_mistakes_are_named_with_their_place(tmp_path: Path, before: str, after: str, what: str) -> None:
    name = write(tmp_path, TEXT.replace(before, after))
    with pytest.raises(UserError) as error:
        find_task(name)
    assert any(problem.startswith(f"{name}: {what}") for problem in error.value.problems), error.value.problems


def test_an_answer_that_is_no_choice_is_named_by_its_line(tmp_path: Path) -> None:
    (tmp_path / "c.tsv").write_text("question\tchoices\tanswer\nQual?\tum | dois\tC\n")
    name = write(tmp_path, 'kind = "choice"\nfiles.test = "c.tsv"')
    with pytest.raises(UserError, match=r'c\.tsv:2: answer "C" is none of the choices'):
        find_task(name).read(tmp_path, "test")
