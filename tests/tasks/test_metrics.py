"""Bug prevented: a missing prediction that is left out or counts as right, a score of other examples than meant, a rule
taken for another, and an empty answer that matches an empty one.
"""

from __future__ import annotations

import math

import numpy as np
import pytest

from gloria.errors import UserError
from gloria.tasks.catalog import TASKS
from gloria.tasks.examples import (
    Choice,
    ChoicePrediction,
    LastWord,
    Pair,
    PairPrediction,
    Span,
    SpanPrediction,
    WordPrediction,
)
from gloria.tasks.formats.lastword import RULES
from gloria.tasks.metrics import ENGLISH, PORTUGUESE, normalise, score

MISSING = "1 predictions are missing and count as wrong"


def values(scores: dict) -> dict[str, float | None]:
    return {name: value.value for name, value in scores.items()}


def test_missing_predictions_are_wrong_in_every_family() -> None:
    pair = [Pair("a", "x", "y", "1"), Pair("b", "x", "y", "0")]
    scores = score(TASKS["mrpc"], pair, {"a": PairPrediction("1")})
    assert values(scores) == pytest.approx({"accuracy": 0.5, "f1": 2 / 3})
    assert scores["f1"].reason == MISSING
    similar = [Pair("a", "x", "y", None, 4.0), Pair("b", "x", "y", None, 1.0)]
    assert (
        score(TASKS["assin2-similarity"], similar, {"a": PairPrediction(None, 4.0)})["mse"].value == 0.5
    )  # 0, as official
    # From 0 to 5 a missing 0 might be right: the far end is as wrong as it gets.
    both = score(TASKS["stsb"], [Pair("a", "x", "y", None, 5.0), Pair("b", "x", "y", None, 0.0)], {})
    assert both["pearson"].value == pytest.approx(-1)
    nan = score(
        TASKS["assin2-similarity"], similar, {"a": PairPrediction(None, 4.0), "b": PairPrediction(None, math.nan)}
    )
    assert (nan["mse"].value, nan["mse"].reason) == (0.5, MISSING)
    spans = [Span("a", "q", "c", (("x", 0),)), Span("b", "q", "c", (), True)]
    assert score(TASKS["squad2"], spans, {"a": SpanPrediction("x")})["exact_match"].value == 0.5
    choices = [Choice("a", "q", ("x", "y"), 0), Choice("b", "q", ("x", "y"), 1)]
    logs = {"a": ChoicePrediction((-1.0, -2.0)), "b": ChoicePrediction()}
    assert values(score(TASKS["exams"], choices, logs)) == {"acc": 0.5, "acc_norm": 0.5}
    words = [LastWord("a", "c", "fim"), LastWord("b", "c", "fim")]
    assert values(score(TASKS["calame"], words, {"a": WordPrediction("fim")}, rule="tucano")) == {
        "exact_match:tucano": 0.5
    }


def test_a_label_that_the_gold_file_does_not_have_is_wrong_and_no_class() -> None:
    gold = [Pair(str(i), "x", "y", label) for i, label in enumerate(["None", "None", "Entailment"])]
    predictions = {"0": PairPrediction("None"), "1": PairPrediction("Paraphrase"), "2": PairPrediction("Entailment")}
    assert values(score(TASKS["assin1-entailment"], gold, predictions)) == pytest.approx(
        {"accuracy": 2 / 3, "macro_f1": (2 / 3 + 1) / 2}
    )


def test_choices_are_scored_as_lm_eval_does() -> None:
    """Its `acc_norm` divides by the characters of the choice alone; ours counted the space before it, too."""
    choices = [Choice("a", "q", ("a", "bcd"), 0), Choice("b", "q", ("a", "bcd"), 1)]
    logs = np.array([[-1.4, -4.0], [-4.0, -6.0]])
    lengths = np.array([float(len(choice)) for choice in choices[0].choices])
    assert np.argmax(logs[0] / lengths) != np.argmax(logs[0] / (lengths + 1))
    expected = {"acc": [1.0, 0.0], "acc_norm": [float(np.argmax(row / lengths) == i) for i, row in enumerate(logs)]}
    found = [score(TASKS["exams"], [c], {c.id: ChoicePrediction(tuple(row))}) for c, row in zip(choices, logs)]
    assert {name: [scores[name].value for scores in found] for name in expected} == expected
    assert expected["acc_norm"] == [0.0, 1.0]


def test_rules_have_names() -> None:
    words = [LastWord("a", "c", "fim")]
    for task, rule, what in (
        ("calame", "", "calame: needs a rule; known: first-word, paper, gloria-script, tucano, log-likelihood"),
        ("calame", "tucanu", 'calame: unknown rule "tucanu"; did you mean "tucano"?'),
        ("rte", "tucano", 'rte: unknown rule "tucano"; there are none'),
    ):
        with pytest.raises(UserError) as error:
            score(TASKS[task], words, {}, rule=rule)
        assert str(error.value) == what


@pytest.mark.parametrize(
    ("text", "first", "paper", "strict"),
    [
        (" coração. E", "coracao", "coracao", "coração"),
        ("Coração", "coracao", "coracao", "Coração"),
        (" «aspas»", "aspas", "aspas", "«aspas»"),
        (' "sim", disse', "sim", "sim", '"sim"'),
        (" guarda-chuva", "guarda", "guarda", "guarda-chuva"),
        ("\nnova\nlinha", "nova", "novalinha", "nova"),
        (" ... !", "", "", ""),
        ("", "", "", ""),
        (" 3.º ano", "3", "3", "3º"),
    ],
)
def test_golden_words(text: str, first: str, paper: str, strict: str) -> None:
    assert [RULES[rule].word(text) for rule in ("first-word", "paper", "tucano")] == [first, paper, strict]


def test_generation_stops_only_when_the_word_is_over() -> None:
    rule = RULES["first-word"]
    assert not rule.is_over(" cora")
    assert not rule.is_over(" cora\ufffd")  # half of a character of two tokens
    assert not rule.is_over(" «")
    assert rule.is_over(" coração ")
    assert rule.is_over(" coração.")
    assert RULES["tucano"].is_over(" guarda-chuva,\n")
    assert not RULES["tucano"].is_over(" guarda-chuva,")
    assert not RULES["paper"].is_over(" coração. ")


def test_an_empty_gold_word_is_never_right_and_has_no_perplexity() -> None:
    words = [LastWord("a", "c", ""), LastWord("b", "c", "fim")]
    for rule in RULES:
        assert (
            score(TASKS["calame"], words, {"a": WordPrediction(""), "b": WordPrediction("fim")}, rule=rule)[
                f"exact_match:{rule}"
            ].value
            == 0.5
        )
    likely = score(TASKS["calame"], words, {"b": WordPrediction(None, -1.0, True)}, rule="log-likelihood")
    assert values(likely) == pytest.approx({"accuracy:log-likelihood": 0.5, "perplexity:log-likelihood": math.e})
    assert likely["perplexity:log-likelihood"].n == 1
    lacking = score(TASKS["calame"], words, {}, rule="log-likelihood")["perplexity:log-likelihood"]
    assert (lacking.value, lacking.reason) == (None, "1 of 1 words have no log-likelihood")


def test_questions_without_an_answer_are_not_scored_and_that_is_reported() -> None:
    choices = [Choice("a", "q", ("x", "y"), 0), Choice("b", "q", (), None)]
    found = score(TASKS["exams"], choices, {"a": ChoicePrediction((-1.0, -2.0))})["acc"]
    assert (found.value, found.n, found.reason) == (1.0, 1, "1 of 2 are not labelled and not scored")


def test_normalisation_is_squads_own() -> None:
    assert normalise(" The  «Rio», a/o Norte!") == "«rio» ao norte"
    assert normalise("A casa da Maria e uns livros", PORTUGUESE) == "casa da maria e livros"
    assert normalise("a an the", ENGLISH) == ""


def test_squad_2_splits_by_whether_there_is_an_answer() -> None:
    spans = [
        Span("yes", "q", "c", (("rio Douro", 0),)),
        Span("lost", "q", "c", (("rio", 0),)),
        Span("no", "q", "c", (), True),
        Span("made up", "q", "c", (), True),
    ]
    predictions = {
        "yes": SpanPrediction("rio", -2.0),
        "lost": SpanPrediction("rio", 0.5),  # no answer is better than the span: ""
        "no": SpanPrediction("mar", 1.0),
        "made up": SpanPrediction("mar", 0.0),  # not above 0
    }
    scores = score(TASKS["squad2"], spans, predictions)
    assert {name: value for name, value in values(scores).items() if not name.endswith("_pt")} == pytest.approx(
        {
            "exact_match": 0.25,
            "f1": (2 / 3 + 1) / 4,
            "has_answer_exact": 0.0,
            "has_answer_f1": 1 / 3,
            "no_answer_exact": 0.5,
            "best_exact_oracle": 0.5,
            "best_f1_oracle": 2 / 3,
        }
    )
    assert scores["best_f1_oracle"].reason == "oracle: threshold -2"
    assert (scores["best_f1_oracle"].low, scores["has_answer_f1"].n) == (None, 2)
    only = score(TASKS["squad2"], spans[:1], {"yes": predictions["yes"]})["no_answer_exact"]
    assert (only.value, only.reason) == (None, "the split has no question without an answer")


def test_in_squad_1_an_empty_answer_overlaps_with_nothing() -> None:
    spans = [Span("0", "q", "c", (("a", 0),))]  # nothing is left of it
    assert values(score(TASKS["squad1"], spans, {"0": SpanPrediction("")}, resamples=0)) == {
        "exact_match": 1.0,
        "f1": 0.0,
        "exact_match_pt": 1.0,
        "f1_pt": 0.0,
    }
