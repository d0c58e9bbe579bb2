"""Bug prevented: a metric, or its value in a resample, that is not what scikit-learn, scipy or the task's script says.

200 random prediction sets a metric; the official scripts are stated here once more, in their own way.
"""

from __future__ import annotations

import collections
import re
import string

import numpy as np
import pytest
from scipy.stats import pearsonr, spearmanr
from sklearn.metrics import accuracy_score, f1_score, mean_squared_error

from gloria.tasks import statistics
from gloria.tasks.catalog import TASKS
from gloria.tasks.examples import Pair, PairPrediction, Span, SpanPrediction
from gloria.tasks.metrics import measures, score

SETS = 200


def random_pairs(draws: np.random.RandomState, labels: tuple[str, ...], low: float, high: float) -> tuple[list, dict]:
    """5 to 60 pairs, with ties in scores, rare classes, and predictions far outside of the range."""
    count = draws.randint(5, 60)
    shares = draws.dirichlet(np.ones(len(labels))) if labels else None
    gold = [
        Pair(
            str(i),
            "a",
            "b",
            str(draws.choice(labels, p=shares)) if labels else None,
            float(draws.randint(4 * low, 4 * high + 1) / 4),
        )
        for i in range(count)
    ]
    noise = draws.choice([0.1, 1, 5])
    return gold, {
        p.id: PairPrediction(
            str(draws.choice(labels)) if labels else None, round(p.score + noise * draws.normal(), draws.randint(0, 4))
        )
        for p in gold
    }


# Both of ASSIN have the same metrics: together they are the 200 sets.
@pytest.mark.parametrize(
    ("name", "low", "sets"), [("assin1", 1, SETS // 2), ("assin2", 1, SETS // 2), ("mrpc", 0, SETS), ("stsb", 0, SETS)]
)
def test_pairs(name: str, low: int, sets: int) -> None:
    task, draws = TASKS[name], np.random.RandomState(3)
    for _ in range(sets):
        gold, predictions = random_pairs(draws, task.labels, low, 5)
        labels, said = [p.label for p in gold], [predictions[p.id].label for p in gold]
        x, y = [p.score for p in gold], [predictions[p.id].score for p in gold]
        expected = {}
        if task.labels:
            expected["accuracy"] = accuracy_score(labels, said)
            expected["macro_f1"] = f1_score(labels, said, average="macro", labels=sorted(set(labels)), zero_division=0)
            expected["f1"] = (
                f1_score(labels, said, pos_label=task.labels[1], average="binary", zero_division=0)
                if name == "mrpc"
                else 0
            )
        if len(set(x)) > 1 and len(set(y)) > 1:
            expected |= {"pearson": pearsonr(x, y).statistic, "spearman": spearmanr(x, y).statistic}
            expected["mean_f1_pearson"] = (expected.get("macro_f1", 0) + expected["pearson"]) / 2
        expected["mse"] = mean_squared_error(x, y)  # the official script: (absolute_diff ** 2).mean()
        found = {metric: value.value for metric, value in score(task, gold, predictions, resamples=0).items()}
        assert found == pytest.approx({metric: expected.get(metric) for metric in task.metrics}, abs=1e-12)


@pytest.mark.parametrize("name", ["assin1", "mrpc", "stsb"])
def test_a_weighted_metric_is_the_metric_of_the_resample(name: str) -> None:
    """What the bootstrap computes from weights is what scikit-learn and scipy say of the examples drawn, one by one."""
    task, draws = TASKS[name], np.random.RandomState(4)
    for _ in range(20):
        gold, predictions = random_pairs(draws, task.labels, 0 if name != "assin1" else 1, 5)
        picks = [draws.randint(0, len(gold), len(gold)) for _ in range(5)]
        weights = np.array([np.bincount(pick, minlength=len(gold)) for pick in picks], float)
        for metric, measure in measures(task, gold, predictions).items():
            if measure.reason:
                continue
            for pick, value in zip(picks, measure.weighted(weights, *measure.columns)):
                columns = [column[pick] for column in measure.columns]
                if (
                    len(columns) > 1
                    and not metric.endswith("f1")
                    and min(np.ptp(columns[-1]), np.ptp(columns[-2])) == 0
                ):
                    assert np.isnan(value)
                else:
                    assert value == pytest.approx(float(measure.exact(*columns)), abs=1e-9), metric


def test_ranks_with_ties() -> None:
    draws = np.random.RandomState(5)
    for _ in range(SETS):
        x, y = draws.randint(0, 6, 30).astype(float), draws.randint(0, 4, 30).astype(float)
        found = statistics.rank_correlation(np.ones((1, 30)), x, y)[0]
        assert found == pytest.approx(spearmanr(x, y).statistic, abs=1e-12)


def test_a_constant_draw_has_no_correlation_though_rounding_says_otherwise() -> None:
    x, y = np.array([0.1] * 9 + [3.3]), np.arange(10.0) / 3
    weights = np.array([[1.0] * 9 + [0.0], [1.0] * 10])
    found = statistics.correlation(weights, x, y)
    assert np.isnan(found[0])
    assert found[1] == pytest.approx(pearsonr(x, y).statistic)


def official_normalise(s: str) -> str:
    """SQuAD's evaluate-v2.0.py."""

    def remove_articles(text: str) -> str:
        return re.sub(re.compile(r"\b(a|an|the)\b", re.UNICODE), " ", text)

    def white_space_fix(text: str) -> str:
        return " ".join(text.split())

    def remove_punc(text: str) -> str:
        exclude = set(string.punctuation)
        return "".join(ch for ch in text if ch not in exclude)

    return white_space_fix(remove_articles(remove_punc(s.lower())))


def official_f1(gold: str, pred: str, *, version2: bool) -> float:
    gold_toks, pred_toks = official_normalise(gold).split(), official_normalise(pred).split()
    num_same = sum((collections.Counter(gold_toks) & collections.Counter(pred_toks)).values())
    if version2 and (len(gold_toks) == 0 or len(pred_toks) == 0):
        return int(gold_toks == pred_toks)
    if num_same == 0:
        return 0
    precision, recall = num_same / len(pred_toks), num_same / len(gold_toks)
    return (2 * precision * recall) / (precision + recall)


def official_best(preds: dict, scores: dict, na_probs: dict, has_ans: dict) -> tuple[float, float]:
    cur_score = sum(1 for k in has_ans if not has_ans[k])
    best_score, best_thresh = cur_score, 0.0
    for qid in sorted(na_probs, key=lambda k: na_probs[k]):
        if has_ans[qid]:
            diff = scores[qid]
        else:
            diff = -1 if preds[qid] else 0
        cur_score += diff
        if cur_score > best_score:
            best_score, best_thresh = cur_score, na_probs[qid]
    return best_score / len(scores), best_thresh


WORDS = ["o", "a", "an", "the", "rio", "Douro", "Porto,", "(2024)", "é", "«mar»", "A", "os", "-"]


@pytest.mark.parametrize("name", ["squad1", "squad2"])
def test_spans(name: str) -> None:
    task, draws, version2 = TASKS[name], np.random.RandomState(6), name == "squad2"

    def text() -> str:
        return " ".join(draws.choice(WORDS, draws.randint(1, 4)))

    for _ in range(SETS):
        spans, predictions = [], {}
        for number in range(draws.randint(2, 12)):
            impossible = version2 and draws.rand() < 0.4
            answers = () if impossible else tuple((text(), 0) for _ in range(draws.randint(1, 4)))
            spans.append(Span(str(number), "q", "c", answers, impossible))
            prediction = answers[0][0] if answers and draws.rand() < 0.4 else text()
            predictions[str(number)] = SpanPrediction(prediction, round(draws.normal(), 1) if version2 else -np.inf)

        def of(said: dict[str, str], spans: list[Span] = spans) -> tuple[dict, dict]:
            exact, f1 = {}, {}
            for span in spans:
                golds = [t for t, _ in span.answers]
                if version2:
                    golds = [t for t in golds if official_normalise(t)] or [""]
                exact[span.id] = max(int(official_normalise(g) == official_normalise(said[span.id])) for g in golds)
                f1[span.id] = max(official_f1(g, said[span.id], version2=version2) for g in golds)
            return exact, f1

        exact, f1 = of(
            {id: "" if prediction.no_answer > 0 else prediction.text for id, prediction in predictions.items()}
        )
        scores = score(task, spans, predictions, resamples=0)
        found = {metric: value.value for metric, value in scores.items()}
        assert found["exact_match"] == pytest.approx(np.mean(list(exact.values())), abs=1e-12)
        assert found["f1"] == pytest.approx(np.mean(list(f1.values())), abs=1e-12)
        if version2:
            has = {span.id: bool(span.answers) for span in spans}
            for metric, values, wanted in (
                ("has_answer_exact", exact, True),
                ("has_answer_f1", f1, True),
                ("no_answer_exact", exact, False),
            ):
                kept = [value for id, value in values.items() if has[id] is wanted]
                assert found[metric] == (pytest.approx(np.mean(kept), abs=1e-12) if kept else None)
            texts, missing = (
                {id: g.text for id, g in predictions.items()},
                {id: g.no_answer for id, g in predictions.items()},
            )
            for metric, values in zip(("best_exact_oracle", "best_f1_oracle"), of(texts)):
                best, threshold = official_best(texts, values, missing, has)
                assert found[metric] == pytest.approx(best, abs=1e-12)
                assert scores[metric].reason in (
                    f"oracle: threshold {threshold:g}",
                    "oracle: no answer to any question",
                )
