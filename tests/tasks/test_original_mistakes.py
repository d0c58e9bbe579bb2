"""Bug prevented: the mistakes of the original GlórIA's evaluation, one by one; the wrong number is computed too."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
from scipy.stats import pearsonr
from sklearn.metrics import f1_score

from gloria.tasks.catalog import TASKS
from gloria.tasks.examples import Choice, LastWord, Pair, PairPrediction, Span, SpanPrediction, WordPrediction
from gloria.tasks.formats.lastword import RULES
from gloria.tasks.metrics import score
from gloria.tasks.prompts import original_prompt, read_original
from tests.tasks.published import assin, question, squad

DRAWS = np.random.RandomState(7)


def pairs(labels: list[str | None], scores: list[float | None] | None = None) -> list[Pair]:
    scores = scores or [None] * len(labels)
    return [Pair(str(i), "a", "b", label, value) for i, (label, value) in enumerate(zip(labels, scores))]


def said(values: list[str | float]) -> dict[str, PairPrediction]:
    return {
        str(i): PairPrediction(v) if isinstance(v, str) else PairPrediction(None, float(v))
        for i, v in enumerate(values)
    }


def test_macro_f1_is_not_the_weighted_f1() -> None:
    """`f1_score(average="macro", labels=y_true)` repeats labels, which weights them."""
    gold = ["None"] * 70 + ["Entailment"] * 20 + ["Paraphrase"] * 10
    prediction = ["None"] * 60 + ["Entailment"] * 25 + ["Paraphrase"] * 15
    value = score(TASKS["assin1-entailment"], pairs(gold), said(prediction), resamples=0)["macro_f1"].value
    assert value == pytest.approx(f1_score(gold, prediction, average="macro"), abs=1e-12)
    originals = f1_score(gold, prediction, average="macro", labels=gold)
    assert originals == pytest.approx(f1_score(gold, prediction, average="weighted"))
    assert abs(value - originals) > 0.05


def test_scores_are_of_the_whole_set_and_not_means_over_batches() -> None:
    x = DRAWS.normal(3, 1, 96).clip(1, 5)
    y = x + DRAWS.normal(0, 1, 96) + np.repeat([0, 3, -3], 32)
    examples, predictions = pairs([None] * 96, list(x)), said(list(y))
    value = score(TASKS["assin2-similarity"], examples, predictions, resamples=0)["pearson"].value
    batches = np.mean([pearsonr(x[i : i + 32], y[i : i + 32]).statistic for i in (0, 32, 64)])
    assert value == pytest.approx(pearsonr(x, y).statistic, abs=1e-12)
    assert abs(value - batches) > 0.1
    mixed = [examples[i] for i in DRAWS.permutation(96)]
    assert score(TASKS["assin2-similarity"], mixed, predictions, resamples=0)["pearson"].value == pytest.approx(value)


def test_a_correlation_with_a_constant_is_none_and_not_0() -> None:
    examples = pairs([None] * 4, [1.0, 2.0, 3.0, 4.0])
    scores = score(TASKS["assin2-similarity"], examples, said([3.0] * 4))
    assert scores["pearson"].value is None
    assert scores["pearson"].reason == "the predictions are constant, so there is no correlation"
    assert scores["mse"].value == 1.5
    constant_gold = score(TASKS["stsb"], pairs([None] * 3, [2.0] * 3), said([1.0, 2.0, 3.0]))
    assert constant_gold["spearman"].reason == "the gold scores are constant, so there is no correlation"


def test_every_task_has_a_score_for_every_metric_it_names() -> None:
    """ASSIN as entailment or as similarity alone, the default, raised KeyError."""
    answers = (("rio", 2),)
    for task in TASKS.values():
        examples, predictions, rules = {
            "pair": (
                [Pair(str(i), "a", "b", task.labels[i] if task.labels else None, 1.0 + i) for i in (0, 1)],
                {str(i): PairPrediction(task.labels[i] if task.labels else None, 1.0 + i) for i in (0, 1)},
                [""],
            ),
            "span": (
                [Span("0", "q", "O rio", answers), Span("1", "q", "O mar", (), True)],
                {"0": SpanPrediction("rio"), "1": SpanPrediction("mar", 1.0)},
                [""],
            ),
            "last_word": (
                [LastWord("0", "Era uma", "vez")],
                {"0": WordPrediction(" vez", -1.0, True)},
                [*RULES, "log-likelihood"],
            ),
            "choice": ([Choice("0", "q", ("a", "b"), 1)], {}, [""]),
        }[task.family]
        scores = {
            name: value for rule in rules for name, value in score(task, examples, predictions, rule=rule).items()
        }
        assert scores.keys() == set(task.metrics)
        assert all(value.value is not None for value in scores.values())
        assert task.selection in task.metrics


def test_mrpc_is_chosen_by_what_is_reported_and_its_f1_is_binary() -> None:
    gold, prediction = ["1"] * 6 + ["0"] * 4, ["1"] * 5 + ["0"] * 3 + ["1"] * 2
    value = score(TASKS["mrpc"], pairs(gold), said(prediction), resamples=0)["f1"].value
    assert value == pytest.approx(f1_score(gold, prediction, pos_label="1"))
    assert abs(value - f1_score(gold, prediction, average="macro")) > 0.05
    assert TASKS["mrpc"].selection == "f1"


def test_a_paraphrase_is_a_class_of_its_own() -> None:
    """It was mapped to None."""
    assert TASKS["assin1"].labels == ("None", "Entailment", "Paraphrase")
    scores = score(TASKS["assin1-entailment"], pairs(["Paraphrase", "None"]), said(["None", "None"]), resamples=0)
    assert scores["accuracy"].value == 0.5
    assert scores["macro_f1"].value == pytest.approx(1 / 3)


def test_assin_1_reads_assin_1(tmp_path: Path) -> None:
    """`== "1"` on a number made it read ASSIN-2."""
    for name, id in (("assin-ptbr-dev.xml", "first"), ("assin2-dev.xml", "second")):
        assin(tmp_path / name, f'id="{id}" entailment="None" similarity="1"')
    assert TASKS["assin1-ptbr"].read(tmp_path, "dev")[0].id == "first"
    assert TASKS["assin2"].read(tmp_path, "dev")[0].id == "second"


def test_a_set_without_labels_is_not_scored_and_no_error() -> None:
    """Labels had to be there to predict anything."""
    scores = score(TASKS["rte"], pairs([None, None]), said(["entailment", "entailment"]))
    assert scores["accuracy"].value is None
    assert (scores["accuracy"].n, scores["accuracy"].reason) == (0, "not scored: no example is labelled")


def test_english_articles_are_not_all_that_is_reported() -> None:
    """The official normalisation eats the Portuguese "a" of "vitamina A" and keeps "os" of "os autores"."""
    examples = [Span("0", "q", "c", (("vitamina A", 0),)), Span("1", "q", "c", (("os autores", 0),))]
    scores = score(
        TASKS["squad1"], examples, {"0": SpanPrediction("vitamina"), "1": SpanPrediction("autores")}, resamples=0
    )
    assert {name: value.value for name, value in scores.items()} == pytest.approx(
        {"exact_match": 0.5, "f1": (1 + 2 / 3) / 2, "exact_match_pt": 1.0, "f1_pt": 1.0}
    )


def test_an_answer_ends_where_it_ends(tmp_path: Path) -> None:
    """The end was idx + 2."""
    squad(tmp_path / "dev.json", question("1", ("Espanha", 21)))
    span = TASKS["squad1"].reader(tmp_path / "dev.json", TASKS["squad1"]).examples[0]
    ((text, start),) = span.answers
    assert span.context[start : start + len(text)] == "Espanha"


def test_an_answer_that_cannot_be_read_is_wrong_and_not_left_out() -> None:
    """The few-shot score was over the pairs whose answer the pattern found."""
    assert read_original("\nSemelhança: 3.75\nConsequência: 1 \n\nPremissa:") == PairPrediction("Entailment", 3.75)
    assert read_original("\nSemelhança: quatro\nConsequência: 1") == PairPrediction()
    assert read_original("\nConsequência: 10") == PairPrediction()
    gold = pairs(["Entailment"] * 4 + ["None"] * 4, [5.0, 4.0, 5.0, 4.0, 1.0, 2.0, 1.0, 2.0])
    predictions = {pair.id: PairPrediction(pair.label, pair.score) for pair in gold} | {
        "0": read_original("não sei"),
        "4": PairPrediction(),
    }
    scores = score(TASKS["assin2"], gold, predictions, resamples=0)
    assert scores["accuracy"].value == 0.75
    assert scores["accuracy"].n == 8
    assert scores["mse"].value == (25 + 1) / 8
    assert scores["mse"].reason == "2 predictions are missing and count as wrong"


def test_the_original_prompt_is_word_for_word() -> None:
    pair = Pair("0", "Uma {frase}", "Outra", "Entailment", 4.5)
    assert original_prompt(Pair("9", "P", "H"), [pair]) == (
        "Exemplos Classificados:\nPremissa: Uma {frase}\nHipotese: Outra\nSemelhança: 4.5\nConsequência: 1 \n\n"
        "Para classificar a Semelhança e Consequência:\nPremissa: P\nHipotese: H"
    )


def test_calame_is_scored_under_a_rule_with_a_name() -> None:
    """ "Exact match" folded accents and case, generated 5 tokens whatever was asked, and penalised repetition."""
    gold, predictions = [LastWord("0", "O", "Árvores")], {"0": WordPrediction(" arvores, e")}
    values = {rule: score(TASKS["calame"], gold, predictions, rule=rule) for rule in RULES}
    assert {rule: list(scores) for rule, scores in values.items()} == {rule: [f"exact_match:{rule}"] for rule in RULES}
    assert [value.value for scores in values.values() for value in scores.values()] == [1.0, 1.0, 1.0, 0.0]
    assert (RULES["paper"].max_new_tokens, RULES["paper"].repetition_penalty) == (5, 2.0)
    assert RULES["first-word"].repetition_penalty == RULES["tucano"].repetition_penalty == 1.0
    likely = score(TASKS["calame"], gold, {"0": WordPrediction(None, math.log(0.25), True)}, rule="log-likelihood")
    assert likely["perplexity:log-likelihood"].value == pytest.approx(4.0)
