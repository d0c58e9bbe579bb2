"""Bug prevented: an interval that is too narrow (examples of one context taken for independent), of another metric than
the one reported, or different at every call; a paired test that finds what is not there, or misses what is.
"""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from scipy.stats import binomtest

from gloria.tasks.catalog import TASKS
from gloria.tasks.examples import Choice, ChoicePrediction, Pair, PairPrediction, Span, SpanPrediction
from gloria.tasks.metrics import compare, score


def labelled(count: int, right: float, seed: int = 0) -> tuple[list[Pair], dict[str, PairPrediction]]:
    draws = np.random.RandomState(seed)
    examples = [Pair(str(i), "x", "y", "None" if i % 3 else "Entailment", 1.0 + i % 5) for i in range(count)]
    other = {"None": "Entailment", "Entailment": "None"}
    predictions = {
        e.id: PairPrediction(e.label if draws.rand() < right else other[e.label], e.score + draws.normal())
        for e in examples
    }
    return examples, predictions


def test_an_accuracy_has_wilsons_interval() -> None:
    examples = [Pair(str(i), "x", "y", "entailment") for i in range(71)]
    found = score(TASKS["rte"], examples, {str(i): PairPrediction("entailment") for i in range(40)})["accuracy"]
    z, p, n = 1.959963984540054, 40 / 71, 71
    middle, half = (p + z * z / 2 / n), z * math.sqrt(p * (1 - p) / n + z * z / 4 / n / n)
    low, high = ((middle - half) / (1 + z * z / n), (middle + half) / (1 + z * z / n))
    assert (found.low, found.high) == pytest.approx((low, high), abs=1e-12)


def test_bootstraps_are_the_same_each_time_and_hold_the_value() -> None:
    examples, predictions = labelled(300, 0.8)
    first = score(TASKS["assin2"], examples, predictions)
    assert first == score(TASKS["assin2"], examples, predictions)
    assert first != score(TASKS["assin2"], examples, predictions, seed=1)
    for name, value in first.items():
        assert value.low < value.value < value.high, name
    # Without a bootstrap, Wilson's is still there.
    bare = score(TASKS["assin2"], examples, predictions, resamples=0)
    assert [name for name, value in bare.items() if value.low is not None] == ["accuracy"]


def test_a_bootstrap_is_as_wide_as_theory_has_it() -> None:
    examples, predictions = labelled(2000, 0.8)
    found = score(TASKS["assin2"], examples, predictions, resamples=2000)
    r, n = found["pearson"].value, 2000
    fisher = [math.tanh(math.atanh(r) + sign * 1.96 / math.sqrt(n - 3)) for sign in (-1, 1)]
    assert found["pearson"].high - found["pearson"].low == pytest.approx(fisher[1] - fisher[0], rel=0.15)
    errors = [(predictions[e.id].score - e.score) ** 2 for e in examples]
    assert found["mse"].high - found["mse"].low == pytest.approx(2 * 1.96 * np.std(errors) / math.sqrt(n), rel=0.1)


def test_examples_of_a_context_are_drawn_together() -> None:
    """Ten questions a context, all right or all wrong: the interval is of 40 contexts, not of 400 questions."""
    spans = [Span(str(i), "q", "c", (("x", 0),), group=f"context {i // 10}") for i in range(400)]
    predictions = {span.id: SpanPrediction("x" if int(span.id) // 10 % 2 else "y") for span in spans}
    found = score(TASKS["squad1"], spans, predictions)["exact_match"]
    assert found.high - found.low == pytest.approx(2 * 1.96 * 0.5 / math.sqrt(40), rel=0.15)


@pytest.mark.parametrize(("answer", "low", "high"), [("y", 0.0, 3.8414588 / 43.8414588), ("x", 0.9123783, 1.0)])
def test_none_right_and_all_right_have_an_interval(answer: str, low: float, high: float) -> None:
    """0 of 63 was 0.0000 to 0.0000, as every resample is the same. Of n contexts it is Wilson's, z² / (n + z²)."""
    spans = [Span(str(i), "q", "c", (("x", 0),), group=f"context {i // 10}") for i in range(400)]
    found = score(TASKS["squad1"], spans, {span.id: SpanPrediction(answer) for span in spans})
    for name in ("exact_match", "f1_pt"):
        assert (found[name].low, found[name].high) == pytest.approx((low, high), abs=1e-6)


def test_twin_schemas_are_drawn_together_and_others_are_not() -> None:
    def width(groups: int) -> float:
        choices = [Choice(str(i), "", ("a", "b"), 0, str(i // groups)) for i in range(200)]
        logs = {c.id: ChoicePrediction(((-1.0, -2.0), (-2.0, -1.0))[int(c.id) // 2 % 2]) for c in choices}
        found = score(TASKS["wsc"], choices, logs)["acc"]
        return found.high - found.low

    assert width(2) == pytest.approx(math.sqrt(2) * width(1), rel=0.15)


def test_a_resample_without_a_class_still_has_the_class() -> None:
    """Two examples of a rare class: a third of ... resamples have none, and its F1 is 0 there."""
    examples = [Pair(str(i), "x", "y", "None" if i > 1 else "Entailment") for i in range(50)]
    predictions = {e.id: PairPrediction(e.label) for e in examples}
    found = score(TASKS["assin2-entailment"], examples, predictions)["macro_f1"]
    assert (found.value, found.low, found.high) == (1.0, 0.5, 1.0)


def test_a_paired_test_of_accuracies_is_mcnemars() -> None:
    examples, a = labelled(200, 0.9, seed=1)
    b = labelled(200, 0.8, seed=2)[1]
    found = compare(TASKS["assin2-entailment"], examples, a, b)["accuracy"]
    right = [[g[e.id].label == e.label for e in examples] for g in (a, b)]
    only = [sum(x and not y for x, y in zip(*pair)) for pair in (right, right[::-1])]
    assert found.p == pytest.approx(binomtest(only[0], sum(only)).pvalue)
    assert found.value == pytest.approx((only[0] - only[1]) / 200)
    assert found.low < found.value < found.high
    assert found.test == "McNemar, exact"


def test_a_paired_test_of_anything_else_swaps_answers() -> None:
    examples, a = labelled(300, 0.9, seed=1)
    noisy = {id: PairPrediction(g.label, g.score + 2 * np.random.RandomState(int(id)).normal()) for id, g in a.items()}
    found = compare(TASKS["assin2"], examples, a, noisy)
    assert found["pearson"].p < 0.01
    assert found["mse"].value < 0
    assert found["macro_f1"].value == 0
    assert found["macro_f1"].p == 1
    same = compare(TASKS["assin2"], examples, a, labelled(300, 0.9, seed=5)[1])
    assert min(value.p for value in same.values()) > 0.01
    back = compare(TASKS["assin2"], examples, noisy, a)
    assert back["pearson"].value == -found["pearson"].value
    assert back["pearson"].p == found["pearson"].p


def test_the_paired_test_is_the_one_over_all_swaps() -> None:
    """Eight pairs have 256 swaps, which can be counted."""
    examples = [Pair(str(i), "x", "y", None, 3.0) for i in range(8)]
    errors = np.array([[1.0, 2.0, 0.5, 1.5, 1.0, 0.2, 2.0, 0.1], [1.5, 2.5, 0.4, 2.0, 1.1, 1.0, 1.9, 0.6]])
    a, b = ({str(i): PairPrediction(None, 3.0 + error) for i, error in enumerate(row)} for row in errors)
    apart = (errors[0] ** 2 - errors[1] ** 2) @ np.array(list(itertools.product([-1, 1], repeat=8))).T / 8
    found = compare(TASKS["assin2-similarity"], examples, a, b, resamples=4000)["mse"]
    exact = np.mean(np.abs(apart) >= abs(found.value) - 1e-12)
    assert 0.02 < exact < 0.3
    assert found.p == pytest.approx(exact, abs=0.02)


def test_the_paired_test_keeps_its_promise() -> None:
    """Of two models equally good, about one in twenty comparisons is below 0.05, not one in two."""
    below = 0
    for seed in range(60):
        examples, a = labelled(60, 0.7, seed=seed)
        b = labelled(60, 0.7, seed=1000 + seed)[1]
        below += compare(TASKS["assin2-similarity"], examples, a, b, resamples=200)["pearson"].p < 0.05
    assert below <= 9


def test_what_cannot_be_compared_says_why() -> None:
    spans = [Span("0", "q", "c", (("x", 0),)), Span("1", "q", "c", (), True)]
    found = compare(TASKS["squad2"], spans, {"0": SpanPrediction("x")}, {"0": SpanPrediction("y")})
    assert found["best_f1_oracle"].test == "no paired test for a threshold chosen on these examples"
    assert found["exact_match"].value == 0.5
