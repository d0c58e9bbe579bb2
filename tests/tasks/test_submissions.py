"""Bug prevented: predictions that a task's own script cannot read, or that come back other than they were written."""

from __future__ import annotations

import json
import math
from pathlib import Path
from xml.etree import ElementTree

import pytest

from gloria.errors import UserError
from gloria.tasks.catalog import TASKS
from gloria.tasks.examples import ChoicePrediction, LastWord, Pair, PairPrediction, Span, SpanPrediction, WordPrediction
from gloria.tasks.submissions import read_predictions, write_predictions, write_submission

PAIRS = [Pair("1", "É & foi", 'disse "não"', "None", 1.0), Pair("2", "a <b>", "c", "Entailment", 5.0)]


def test_assin_is_read_back_by_its_reader(tmp_path: Path) -> None:
    predictions = {"1": PairPrediction("Entailment", 2.25), "2": PairPrediction("None", 1.5)}
    (path,) = write_submission(TASKS["assin2"], PAIRS, predictions, tmp_path / "new")
    assert path.name == "assin2.xml"
    task = TASKS["assin2"]
    assert task.reader(path, task).examples == [
        Pair("1", "É & foi", 'disse "não"', "Entailment", 2.25),
        Pair("2", "a <b>", "c", "None", 1.5),
    ]
    # One target writes one attribute; a pair without prediction is left out, as the official script's -f expects.
    (path,) = write_submission(TASKS["assin2-entailment"], PAIRS, {"2": PairPrediction("None")}, tmp_path)
    (pair,) = ElementTree.parse(path).getroot()
    assert pair.attrib == {"id": "2", "entailment": "None"}


def test_varieties_have_a_file_each_with_the_ids_of_their_gold(tmp_path: Path) -> None:
    pairs = [Pair("ptpt-1", "a", "b"), Pair("ptbr-1", "c", "d")]
    paths = write_submission(TASKS["assin1"], pairs, {p.id: PairPrediction("None", 1) for p in pairs}, tmp_path)
    assert [path.name for path in paths] == ["ptpt-assin1.xml", "ptbr-assin1.xml"]
    assert [[p.get("id") for p in ElementTree.parse(path).getroot()] for path in paths] == [["1"], ["1"]]


def test_glue_needs_every_row(tmp_path: Path) -> None:
    predictions = {"1": PairPrediction("not_entailment"), "2": PairPrediction("entailment")}
    (path,) = write_submission(TASKS["rte"], PAIRS, predictions, tmp_path)
    assert path.name == "RTE.tsv"
    assert path.read_text() == "index\tprediction\n1\tnot_entailment\n2\tentailment\n"
    (path,) = write_submission(
        TASKS["stsb"], PAIRS, {"1": PairPrediction(None, 1.23456), "2": PairPrediction(None, 5)}, tmp_path
    )
    assert path.read_text() == "index\tprediction\n1\t1.2346\n2\t5.0000\n"
    with pytest.raises(UserError, match=r"RTE.tsv: 1 examples have no prediction; GLUE needs every row$"):
        write_submission(TASKS["rte"], PAIRS, {"1": PairPrediction("entailment")}, tmp_path)


def test_squad_says_nothing_where_no_answer_is_better(tmp_path: Path) -> None:
    spans = [Span("a", "q", "c"), Span("b", "q", "c")]
    predictions = {"a": SpanPrediction("maçã", -1.0), "b": SpanPrediction("x", 0.25)}
    (path,) = write_submission(TASKS["squad2"], spans, predictions, tmp_path)
    assert json.loads(path.read_bytes()) == {"a": "maçã", "b": ""}


@pytest.mark.parametrize(
    ("task", "predictions"),
    [
        ("assin2", {"1": PairPrediction("None", 2.5), "2": PairPrediction()}),
        ("squad2", {"a": SpanPrediction("maçã", -1.5), "b": SpanPrediction("")}),
        ("calame", {"0": WordPrediction(" fim\n"), "1": WordPrediction(None, -3.25, False)}),
        ("wsc", {"0": ChoicePrediction((-1.5, -2.0))}),
    ],
)
def test_predictions_come_back(tmp_path: Path, task: str, predictions: dict) -> None:
    write_predictions(tmp_path / "a.jsonl", predictions)
    assert read_predictions(TASKS[task], tmp_path / "a.jsonl", [LastWord(id, "a", "b") for id in predictions]) == (
        predictions
    )


def test_what_json_cannot_say(tmp_path: Path) -> None:
    write_predictions(
        tmp_path / "a.jsonl", {"1": PairPrediction("None", math.nan), "2": PairPrediction(None, math.inf)}
    )
    assert read_predictions(TASKS["assin2"], tmp_path / "a.jsonl", PAIRS) == {
        "1": PairPrediction("None"),
        "2": PairPrediction(None, 1e308),
    }


def test_other_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    with pytest.raises(UserError, match=r"a.jsonl: no such file; give predictions that gloria.evaluate wrote$"):
        read_predictions(TASKS["wsc"], path, PAIRS)
    path.write_text(
        '{"id": "1", "label": "None"}\n{"id": "2", "log_likelihoods": ["1"]}\n'
        '{"id": "2", "log_likelihoods": [-1.5]}\n{"id": "2"}\n'
        '{"id": "3", "log_likelihoods": [-1.5]}\n'
    )
    with pytest.raises(UserError) as error:
        read_predictions(TASKS["wsc"], path, PAIRS)
    wrong = "is no prediction of wsc; id, once each, and log_likelihoods are expected"
    other = '"3" is not among the 2 examples; give --data and --split of this file'
    assert error.value.problems == (*(f"{path}:{line}: {wrong}" for line in (1, 2, 4)), f"{path}:5: {other}")
