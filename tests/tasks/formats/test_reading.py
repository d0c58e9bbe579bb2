"""Bug prevented: a wrong file that is read as if it were right (labels mapped to others, columns mixed up, an id twice,
half a file), or a message that does not say which line of which file is to be mended.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from gloria.errors import UserError
from gloria.tasks.catalog import TASKS, find_task
from gloria.tasks.examples import NOT_FOUND, LastWord, Pair
from tests.tasks.published import assin, question, rows, squad

GOOD = 'id="1" entailment="None" similarity="1.5"'
HEADER = "index\tsentence1\tsentence2\tlabel\n"


def problems(name: str, folder: Path, split: str = "train") -> list[str]:
    with pytest.raises(UserError) as error:
        TASKS[name].read(folder, split)
    return [problem.replace(f"{folder}", "D") for problem in error.value.problems]


def test_wrong_names_and_folders(tmp_path: Path) -> None:
    with pytest.raises(UserError) as error:
        find_task("asin2")
    assert str(error.value) == 'asin2: unknown task; did you mean "assin2"?'
    assert problems("wsc", tmp_path) == ['wsc: has no split "train"; it has test']
    assert problems("assin2", tmp_path) == [
        "D: does not hold the train split of assin2; expected assin2-train-only.xml or assin2/assin2-train-only.xml"
    ]
    assert problems("rte", tmp_path / "no") == ["D: no such folder; give the folder that holds the train split of rte"]
    for name in ("train.tsv", "train.jsonl"):
        (tmp_path / name).write_text("")
    assert problems("rte", tmp_path) == ["D: train.tsv and train.jsonl are both the train split of rte; keep one"]
    (tmp_path / "train.jsonl").unlink()
    assert problems("rte", tmp_path) == ["D/train.tsv: is empty; get the file again"]


def test_wrong_assin(tmp_path: Path) -> None:
    path = assin(
        tmp_path / "assin2-dev.xml",
        GOOD,
        'id="2" entailment="Paraphrase" similarity="2"',
        'id="3" entailment="None" similarity="7"',
        'id="4" entailment="None" similarity="nan"',
        'id="1" entailment="None" similarity="2"',
        'entailment="None" similarity="2"',
    )
    assert problems("assin2", tmp_path, "dev") == [
        'D/assin2-dev.xml:4: unknown label "Paraphrase"; assin2 has None, Entailment',
        'D/assin2-dev.xml:5: wrong score "7"; assin2 has numbers from 1 to 5',
        'D/assin2-dev.xml:6: wrong score "nan"; assin2 has numbers from 1 to 5',
        "D/assin2-dev.xml:8: the pair has no id; predictions are kept by id",
        'D/assin2-dev.xml:7: id "1" is already at 3; ids must differ',
    ]
    path.write_text(path.read_text().replace("<h>Ele saiu.</h>", "<h> </h>", 1))
    assert problems("assin2", tmp_path, "dev")[0] == (
        "D/assin2-dev.xml:3: the pair has no text in <h>; both sentences are needed"
    )
    assin(path, 'id="1"', 'id="2"')
    assert problems("assin2", tmp_path, "dev") == [
        "D/assin2-dev.xml: no example is labelled; only a test split may be without labels"
    ]
    path.write_text("<entailment-corpus></entailment-corpus>")
    assert problems("assin2", tmp_path, "dev") == ["D/assin2-dev.xml: has no <pair>; an ASSIN file is expected"]
    path.write_text("<entailment-corpus>\n<pair>")
    assert problems("assin2", tmp_path, "dev") == [
        "D/assin2-dev.xml:2: is not XML (no element found); get the file again"
    ]
    path.write_text('<?xml version="1.0"?>\n<!DOCTYPE x [<!ENTITY a "aaaa">]>\n<x>&a;</x>')
    assert problems("assin2", tmp_path, "dev") == [
        "D/assin2-dev.xml:2: has a document type; remove it, ASSIN files have none"
    ]


def test_a_blind_assin_test_has_no_labels(tmp_path: Path) -> None:
    assin(tmp_path / "assin2-test.xml", 'id="7"', 'id="8" entailment="" similarity=""')
    text = ("O João saiu & foi.", "Ele saiu.")
    assert TASKS["assin2"].read(tmp_path, "test") == [Pair("7", *text), Pair("8", *text)]


def test_both_varieties_keep_their_ids_apart(tmp_path: Path) -> None:
    for variety in ("ptpt", "ptbr"):
        assin(tmp_path / f"assin-{variety}-dev.xml", GOOD)
    assert [pair.id for pair in TASKS["assin1"].read(tmp_path, "dev")] == ["ptpt-1", "ptbr-1"]


def test_wrong_tables(tmp_path: Path) -> None:
    path = tmp_path / "dev.tsv"
    path.write_text(HEADER + '0\ta "b\tc\tentailment\r\n1\td\te\tf\tentailment\n2\tg\th\tmaybe\n3\ti\t\tentailment\n')
    assert problems("rte", tmp_path, "dev") == [
        "D/dev.tsv:3: has 5 fields where the header has 4; cut at tabs, no quoting"
    ]
    path.write_text(HEADER + '0\ta "b\tc\tentailment\r\n2\tg\th\tmaybe\n3\ti\t\tentailment\n0\tx\ty\tentailment\n')
    assert problems("rte", tmp_path, "dev") == [
        'D/dev.tsv:3: unknown label "maybe"; rte has entailment, not_entailment',
        "D/dev.tsv:4: a sentence is empty or no text; every row needs its sentences",
        'D/dev.tsv:5: id "0" is already at 2; ids must differ',
    ]
    assert problems("mrpc", tmp_path, "dev")[0] == 'D/dev.tsv:2: unknown label "entailment"; mrpc has 0, 1'
    path.write_text("premise\thypothesis\tlabel\na\tb\tentailment\n")
    assert problems("rte", tmp_path, "dev") == [
        "D/dev.tsv:1: has no column sentence1 or #1 String; it has premise, hypothesis, label",
        "D/dev.tsv:1: has no column sentence2 or #2 String; it has premise, hypothesis, label",
    ]
    path.write_text(HEADER)
    assert problems("rte", tmp_path, "dev") == ["D/dev.tsv: has no rows; get the file again"]
    path.write_text("index\tsentence1\tsentence2\n0\ta\tb\n")
    assert problems("rte", tmp_path, "dev") == [
        "D/dev.tsv: no example is labelled (it has no column label or Quality, but index, sentence1, sentence2); only "
        "a test split may be without labels"
    ]
    path.write_bytes(HEADER.encode() + b"0\tol\xe1\tb\tentailment\n")
    assert problems("rte", tmp_path, "dev") == ["D/dev.tsv:2: is not UTF-8; convert the file"]


def test_only_the_first_ten_problems_are_reported(tmp_path: Path) -> None:
    (tmp_path / "dev.tsv").write_text(HEADER + "".join(f"{i}\ta\tb\tx\n" for i in range(13)))
    found = problems("rte", tmp_path, "dev")
    assert len(found) == 11
    assert found[-1] == "D/dev.tsv: and 3 more problems"


def test_a_table_as_json_lines_has_labels_by_index_and_hidden_ones(tmp_path: Path) -> None:
    row = {"sentence1": "a", "sentence2": "b"}
    path = tmp_path / "test.jsonl"
    rows(path, {**row, "idx": 5, "label": 0}, {**row, "idx": 6, "label": 1}, {**row, "idx": 7, "label": -1})
    assert [(p.id, p.label) for p in TASKS["rte"].read(tmp_path, "test")] == [
        ("5", "entailment"),
        ("6", "not_entailment"),
        ("7", None),
    ]
    rows(path, {**row, "label": 2})
    assert problems("rte", tmp_path, "test") == [
        'D/test.jsonl:1: unknown label "2"; rte has entailment, not_entailment'
    ]
    rows(path, {**row, "label": 2.5}, {**row, "label": -1.0})
    assert [(p.id, p.score) for p in TASKS["stsb"].read(tmp_path, "test")] == [("0", 2.5), ("1", None)]
    path.write_text('{"sentence1": "a"\n[1]\n')
    assert problems("stsb", tmp_path, "test") == [
        "D/test.jsonl:1: is not JSON (Expecting ',' delimiter); one object a line is expected",
        "D/test.jsonl:2: is no JSON object; one object a line is expected",
    ]


def test_one_sentence_a_row(tmp_path: Path) -> None:
    (tmp_path / "train.tsv").write_text("sentence\tlabel\nmuito bom\t1\n")
    assert TASKS["sst2"].read(tmp_path, "train") == [Pair("0", "muito bom", "", "1")]


def test_a_line_separator_inside_a_sentence_ends_no_row(tmp_path: Path) -> None:
    (tmp_path / "dev.tsv").write_text(HEADER + "0\ta\u2028b\tc\x85d\tentailment\n")
    pair = TASKS["rte"].read(tmp_path, "dev")[0]
    assert (pair.first, pair.second) == ("a\u2028b", "c\x85d")


def test_spans_keep_an_answer_that_is_elsewhere_and_do_not_look_for_it(tmp_path: Path) -> None:
    squad(tmp_path / "dev.json", question("1", ("Espanha", 21), ("Porto", 0)), question("2", is_impossible=True))
    first, second = TASKS["faquad"].read(tmp_path, "dev")
    assert first.answers == (("Espanha", 21), ("Porto", NOT_FOUND))
    assert second.impossible
    assert first.group == second.group


def test_flat_rows_of_questions(tmp_path: Path) -> None:
    answers = {"text": ["rio"], "answer_start": [2]}
    row = {"id": "a", "question": "Que?", "context": "O rio.", "answers": answers}
    rows(tmp_path / "dev.jsonl", row, {**row, "id": "b", "answers": {"text": [], "answer_start": []}})
    first, second = TASKS["squad2"].read(tmp_path, "dev")
    assert (first.answers, first.impossible) == ((("rio", 2),), False)
    assert (second.answers, second.impossible) == ((), True)


def test_wrong_spans(tmp_path: Path) -> None:
    path = tmp_path / "dev.json"
    squad(path, question("1"), question("1", ("rio", 2)), question("3", ("rio", 2), is_impossible=True), {"id": "4"})
    assert problems("faquad", tmp_path, "dev") == [
        'D/dev.json: question "3" of "Rios": is_impossible, and yet it has answers; take out one of them',
        'D/dev.json: question "4" of "Rios": a part is missing or no text; id, question and context are expected',
        'D/dev.json: question "1" of "Rios": id "1" is already at question "1" of "Rios"; ids must differ',
    ]
    path.write_text('{"data": [{"title": "x", "paragraphs": [{"qas": []}]}]}')
    assert problems("faquad", tmp_path, "dev") == [
        "D/dev.json: has no question; SQuAD's JSON or rows of questions are expected"
    ]
    path.write_text('{"rows": []}')
    assert problems("faquad", tmp_path, "dev") == [
        "D/dev.json: is not SQuAD's JSON (no 'data'); data, paragraphs, context, qas are expected"
    ]
    path.write_text('{"data": [')
    assert problems("faquad", tmp_path, "dev") == ["D/dev.json:1: is not JSON (Expecting value); get the file again"]


def test_last_words(tmp_path: Path) -> None:
    path = tmp_path / "test.jsonl"
    rows(path, {"sentence": "Era uma ", "last_word": "vez"})
    assert TASKS["calame"].read(tmp_path, "test") == [LastWord("0", "Era uma ", "vez")]
    rows(path, {"text": "Era uma vez\n"}, {"text": "O fim"})
    assert TASKS["lambada"].read(tmp_path, "test") == [LastWord("0", "Era uma", "vez"), LastWord("1", "O", "fim")]
    # The translations differ in whether the sentence has its last word: only if all have it is it cut off.
    rows(path, {"sentence": "Era uma vez", "last_word": "vez"}, {"sentence": "O fim", "last_word": "fim"})
    assert [e.context for e in TASKS["lambada"].read(tmp_path, "test")] == ["Era uma ", "O "]
    rows(path, {"sentence": "de bem para", "last_word": "para"}, {"sentence": "O", "last_word": "fim"})
    assert [e.context for e in TASKS["calame"].read(tmp_path, "test")] == ["de bem para", "O"]
    rows(path, {"sentence": "", "last_word": "fim"}, {"sentence": "a", "last_word": 3})
    assert problems("calame", tmp_path, "test") == [
        f"D/test.jsonl:{line}: a part is missing or no text; sentence and last_word, or text, are expected"
        for line in (1, 2)
    ]


def test_wrong_choices(tmp_path: Path) -> None:
    question = {"stem": "Qual?", "choices": [{"text": "um", "label": "A"}, {"text": "dois", "label": "B"}]}
    rows(
        tmp_path / "dev_pt.jsonl", {"id": "x", "question": question, "answerKey": "C"}, {"id": "y", "question": "Qual?"}
    )
    assert problems("exams", tmp_path, "dev") == [
        'D/dev_pt.jsonl:1: unknown answerKey "C"; the choices are A, B',
        "D/dev_pt.jsonl:2: a part is missing or no text; question with stem and choices is expected",
    ]
    rows(
        tmp_path / "2024.jsonl", {"question": "Qual?", "alternatives": ["a", "b"], "label": "Z"}, {"question": "Qual?"}
    )
    assert problems("enem-2024", tmp_path, "test") == [
        'D/2024.jsonl:1: unknown label "Z"; a letter from A to E or Anulado is expected',
        "D/2024.jsonl:2: a part is missing or no text; question, and options or alternatives, are expected",
    ]
    (tmp_path / "portuguese_wsc.json").write_text(json.dumps([{"correct_sentence": "a", "incorrect_sentence": "a"}, 1]))
    assert problems("wsc", tmp_path, "test") == [
        "D/portuguese_wsc.json: question 0: a sentence is missing or both are alike; two are expected",
        "D/portuguese_wsc.json: question 1: is no JSON object; a list of objects is expected",
    ]


def test_a_tenth_of_train_chooses_where_dev_is_what_is_reported(tmp_path: Path) -> None:
    body = "".join(f"{i}\tfrase {i // 2}\tb\t{('entailment', 'not_entailment')[i % 2]}\n" for i in range(400))
    (tmp_path / "train.tsv").write_text(HEADER + body)
    kept, chosen = TASKS["rte"].training(tmp_path)
    assert len(kept) + len(chosen) == 400
    assert 20 < len(chosen) < 60
    assert not {pair.first for pair in kept} & {pair.first for pair in chosen}
    # The same rows whatever their order and their neighbours.
    lines = body.splitlines(keepends=True)
    (tmp_path / "train.tsv").write_text(HEADER + "".join(reversed(lines[:200])))
    again = TASKS["rte"].training(tmp_path)[1]
    assert {pair.id for pair in again} == {pair.id for pair in chosen if int(pair.id) < 200}
    (tmp_path / "train.tsv").write_text(HEADER + lines[0])
    with pytest.raises(UserError, match=r"1 training examples are too few for a tenth to be held out; get more"):
        TASKS["rte"].training(tmp_path)
