"""Official metrics on a whole set: what ASSIN's, GLUE's, SQuAD's and lm-eval's own code computes.

A metric is a function from an `Answered` set to a `Measure`; a task names those that it reports (`Task.metrics`).
"""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gloria.config.cli import suggest
from gloria.errors import UserError
from gloria.tasks.examples import Example, Prediction
from gloria.tasks.formats.lastword import RULES
from gloria.tasks.statistics import (
    Array,
    Difference,
    Measure,
    correlation,
    difference,
    f1,
    interval,
    mean,
    rank_correlation,
)
from gloria.tasks.task import Task

ENGLISH = re.compile(r"\b(a|an|the)\b")
PORTUGUESE = re.compile(r"\b(o|a|os|as|um|uma|uns|umas)\b")  # as lighteval has them; contractions (do, na) stay
PUNCTUATION = str.maketrans("", "", string.punctuation)


@dataclass(frozen=True)
class Score:
    """A metric over a whole set, a fraction and never per cent, with its 95 % interval.

    `value` is None where the metric has none, and `reason` says why; with a value, `reason` is a remark about it.
    """

    value: float | None
    low: float | None
    high: float | None
    n: int
    reason: str = ""


@dataclass(frozen=True, eq=False)
class Answered:
    """The labelled examples of a set with the prediction of each (None: missing), in the same order.

    `groups` numbers the examples' groups from 0, `rule` is the part of the metric's name after a colon, `note` is kept
    with the value.
    """

    task: Task
    gold: Sequence[Any]
    predictions: Sequence[Any]
    groups: NDArray[np.int64]
    rule: str
    note: str

    def share(self, right: Sequence[bool] | Array, rows: NDArray[np.bool_] | None = None, reason: str = "") -> Measure:
        """The mean of a column of values from 0 to 1; of some `rows` of the examples, or of all."""
        groups = self.groups if rows is None else _renumbered(self.groups[rows])
        return Measure(np.mean, mean, (np.array(right, float),), groups, share=True, reason=reason, note=self.note)


def score(
    task: Task,
    examples: Sequence[Example],
    predictions: Mapping[str, Prediction],
    *,
    rule: str = "",
    resamples: int = 1000,
    seed: int = 0,
) -> dict[str, Score]:
    """Metric -> Score over all labelled examples; a missing prediction is wrong. resamples=0: no bootstrap.

    `rule`, for last words only: a name of `RULES`, or "log-likelihood". Predictions must be of these examples.
    """
    scores = {}
    for name, measure in measures(task, examples, predictions, rule).items():
        if measure.reason:
            scores[name] = Score(None, None, None, measure.n, measure.reason)
            continue
        low, high = interval(measure, resamples, seed)
        scores[name] = Score(float(measure.exact(*measure.columns)), low, high, measure.n, measure.note)
    return scores


def compare(
    task: Task,
    examples: Sequence[Example],
    a: Mapping[str, Prediction],
    b: Mapping[str, Prediction],
    *,
    rule: str = "",
    resamples: int = 1000,
    seed: int = 0,
) -> dict[str, Difference]:
    """Metric -> model A less model B on the same examples, with a paired test."""
    of_a, of_b = measures(task, examples, a, rule), measures(task, examples, b, rule)
    return {name: difference(of_a[name], of_b[name], resamples, seed) for name in of_a}


def measures(
    task: Task, examples: Sequence[Example], predictions: Mapping[str, Prediction], rule: str = ""
) -> dict[str, Measure]:
    """Each metric of the task with the columns it is computed from."""
    assert predictions.keys() <= {example.id for example in examples}, "predictions of other examples"
    chosen = {name: metric for name, metric in task.metrics.items() if name.partition(":")[2] == rule}
    if not chosen:
        rules = dict.fromkeys(name.partition(":")[2] for name in task.metrics if ":" in name)
        what = f'unknown rule "{rule}"' if rule else "needs a rule"
        raise UserError(f"{task.name}: {what}; {suggest(rule, rules)}")
    gold = [example for example in examples if task.labelled(example)]
    if not gold:
        none = Measure(np.mean, mean, (np.zeros(0),), np.zeros(0, int), reason="not scored: no example is labelled")
        return dict.fromkeys(chosen, none)
    groups = _renumbered([getattr(e, "group", "") or f"example {e.id}" for e in gold])
    answers = [predictions.get(example.id) for example in gold]
    answers = [None if one is None or one.missing(()) else one for one in answers]
    missing, hidden = missing_count(task, gold, predictions), len(examples) - len(gold)
    notes = [f"{missing} predictions are missing and count as wrong"] if missing else []
    notes += [f"{hidden} of {len(examples)} are not labelled and not scored"] if hidden else []
    answered = Answered(task, gold, answers, groups, rule, "; ".join(notes))
    return {name: metric(answered) for name, metric in chosen.items()}


def missing_count(task: Task, examples: Sequence[Example], predictions: Mapping[str, Prediction]) -> int:
    """How many examples have no prediction, or one without a value or with one that is not a number."""
    found = [predictions.get(example.id) for example in examples]
    return sum(one is None or one.missing(task.targets) for one in found)


def _renumbered(groups: Any) -> NDArray[np.int64]:
    return np.unique(groups, return_inverse=True)[1]


# Pairs: labels and scores.


def accuracy(a: Answered) -> Measure:
    return a.share([p is not None and p.label == e.label for e, p in zip(a.gold, a.predictions)])


def macro_f1(a: Answered) -> Measure:
    """The mean F1 of the labels that the gold file has; a prediction with another label, or none, is wrong."""
    from sklearn.metrics import f1_score  # in here, as it takes a second and most commands score nothing

    labels = [label for label in a.task.labels if any(pair.label == label for pair in a.gold)]
    gold = np.array([labels.index(pair.label) for pair in a.gold], float)
    found = np.array([labels.index(p.label) if p and p.label in labels else -1 for p in a.predictions], float)
    classes = range(len(labels))
    exact = partial(f1_score, labels=list(classes), average="macro", zero_division=0)
    return Measure(exact, partial(f1, classes=classes), (gold, found), a.groups, note=a.note)


def binary_f1(a: Answered) -> Measure:
    """F1 of the second of two labels; a missing prediction is the wrong one of the two."""
    from sklearn.metrics import f1_score

    labels = a.task.labels
    gold = np.array([labels.index(pair.label) for pair in a.gold])
    found = [labels.index(p.label) if p and p.label in labels else 1 - k for p, k in zip(a.predictions, gold)]
    exact = partial(f1_score, pos_label=1, zero_division=0)
    return Measure(exact, partial(f1, classes=range(1, 2)), (gold, np.array(found)), a.groups, note=a.note)


def pearson(a: Answered) -> Measure:
    from scipy.stats import pearsonr

    columns = _scores(a)
    exact = lambda x, y: pearsonr(x, y).statistic  # noqa: E731
    return Measure(exact, correlation, columns, a.groups, reason=_constant(*columns), note=a.note)


def spearman(a: Answered) -> Measure:
    from scipy.stats import spearmanr

    columns = _scores(a)
    exact = lambda x, y: spearmanr(x, y).statistic  # noqa: E731
    return Measure(exact, rank_correlation, columns, a.groups, reason=_constant(*columns), note=a.note)


def mse(a: Answered) -> Measure:
    gold, found = _scores(a)
    return Measure(np.mean, mean, ((gold - found) ** 2,), a.groups, note=a.note)


def mean_f1_pearson(a: Answered) -> Measure:
    """The mean of macro-F1 and Pearson's r: no official metric, it chooses a model with two heads."""
    f, r = macro_f1(a), pearson(a)
    weighted_f1 = f.weighted
    assert weighted_f1 is not None
    return Measure(
        lambda gold, found, x, y: (f.exact(gold, found) + r.exact(x, y)) / 2,
        lambda w, gold, found, x, y: (weighted_f1(w, gold, found) + correlation(w, x, y)) / 2,
        (*f.columns, *r.columns),
        a.groups,
        reason=r.reason,
        note=a.note,
    )


def _scores(a: Answered) -> tuple[Array, Array]:
    """Gold and predicted scores. A missing one is 0, as ASSIN's script has it; where 0 may be right, the far end."""
    assert a.task.range is not None, f"{a.task.name} has scores and no range"
    low, high = a.task.range
    gold = np.array([pair.score for pair in a.gold], float)
    wrong = np.where(low > 0, 0.0, np.where(gold - low > high - gold, low, high))
    found = np.array([p.score if p and p.score is not None else np.nan for p in a.predictions], float)
    return gold, np.where(np.isfinite(found), found, wrong)


def _constant(gold: Array, found: Array) -> str:
    constant = next((what for what, v in (("gold scores", gold), ("predictions", found)) if np.ptp(v) == 0), "")
    return f"the {constant} are constant, so there is no correlation" if constant else ""


# Multiple choice, as lm-eval has it.


def acc(a: Answered) -> Measure:
    """The choice with the highest log-likelihood."""
    return a.share([p is not None and np.argmax(p.log_likelihoods) == e.answer for e, p in zip(a.gold, a.predictions)])


def acc_norm(a: Answered) -> Measure:
    """The choice with the highest log-likelihood per character, the space before it not counted."""
    right = []
    for example, prediction in zip(a.gold, a.predictions):
        lengths = np.array([len(choice) for choice in example.choices], float)
        right.append(
            prediction is not None and np.argmax(np.array(prediction.log_likelihoods) / lengths) == example.answer
        )
    return a.share(right)


# Last words.


def word_match(a: Answered) -> Measure:
    """The first word that the model wrote is the gold word, as the rule compares them."""
    rule = RULES[a.rule]
    words = [(rule.compared(e.word), rule.word(p.text or "") if p else "") for e, p in zip(a.gold, a.predictions)]
    return a.share([gold == found != "" for gold, found in words])


def word_greedy(a: Answered) -> Measure:
    """Every token of the gold word is the most likely one."""
    return a.share([p is not None and p.greedy is True for p in a.predictions])


def word_perplexity(a: Answered) -> Measure:
    """The exponential of minus the mean log-likelihood a word; an empty gold word is left out."""
    rows = np.array([bool(example.word.strip()) for example in a.gold])
    values = [p.log_likelihood if p else None for p, there in zip(a.predictions, rows) if there]
    lacking = sum(value is None for value in values)
    reason = f"{lacking} of {len(values)} words have no log-likelihood" if lacking else ""
    column = np.array([np.nan if value is None else value for value in values], float)
    exact, weighted = lambda v: np.exp(-np.mean(v)), lambda w, v: np.exp(-mean(w, v))
    return Measure(exact, weighted, (column,), _renumbered(a.groups[rows]), reason=reason, note=a.note)


# Spans, as SQuAD's scripts have them.


def normalise(text: str, articles: re.Pattern[str] = ENGLISH) -> str:
    """SQuAD's: lower case, no ASCII punctuation, no articles, single spaces."""
    return " ".join(articles.sub(" ", text.lower().translate(PUNCTUATION)).split())


def span_scores(golds: Sequence[str], answer: str, articles: re.Pattern[str], *, version2: bool) -> tuple[float, float]:
    """(exact match, F1), the best over the golds. In version 2, F1 against nothing is whether both are nothing."""
    found = normalise(answer, articles)
    best_exact = best_f1 = 0.0
    for gold in (normalise(text, articles) for text in golds):
        best_exact = max(best_exact, float(gold == found))
        tokens = (gold.split(), found.split())
        common = sum((Counter(tokens[0]) & Counter(tokens[1])).values())
        overlap = 2 * common / (len(tokens[0]) + len(tokens[1])) if common else 0.0
        best_f1 = max(best_f1, float(gold == found) if version2 and not all(tokens) else overlap)
    return best_exact, best_f1


def span_metric(a: Answered, column: int, articles: re.Pattern[str] = ENGLISH, has: bool | None = None) -> Measure:
    """Exact match (column 0) or F1 (1) of the questions with an answer (`has`), without one, or of all (None)."""
    rows = np.full(len(a.gold), True) if has is None else _has_answer(a) == has
    reason = "" if rows.any() else f"the split has no question {'with' if has else 'without'} an answer"
    return a.share(_span_table(a, articles, False)[rows, column], rows, reason)


def span_oracle(a: Answered, column: int) -> Measure:
    """SQuAD 2.0's best threshold: the highest score that any cut of `no_answer` gives on these very answers."""
    raw, has = _span_table(a, ENGLISH, True)[:, column], _has_answer(a)
    cut = np.array([p.no_answer if p else np.inf for p in a.predictions])
    order = np.argsort(cut, kind="stable")
    text = np.array([bool(p and p.text) for p in a.predictions])
    gains = np.where(has, raw, -text.astype(float))[order]
    totals = np.concatenate([[0.0], np.cumsum(gains)]) + (~has).sum()
    best = int(np.argmax(totals))
    where = f"oracle: threshold {cut[order][best - 1]:g}" if best else "oracle: no answer to any question"
    value = float(totals[best] / len(raw))
    return Measure(lambda _: value, None, (raw,), a.groups, note="; ".join(filter(None, (where, a.note))))


def _has_answer(a: Answered) -> NDArray[np.bool_]:
    return np.array([bool(span.answers) for span in a.gold])


@lru_cache(maxsize=3)  # the metrics of one set share them
def _span_table(a: Answered, articles: re.Pattern[str], raw: bool) -> Array:
    """Exact match and F1 of each question, (n, 2); `raw`: of the text, also where no answer is the better one."""
    version2 = "no_answer_exact" in a.task.metrics
    rows = []
    for span, p in zip(a.gold, a.predictions):
        texts = [text for text, _ in span.answers if normalise(text, articles) or not version2] or [""]
        found = span_scores(texts, p.text if raw else p.answer, articles, version2=version2) if p else (0.0, 0.0)
        rows.append(found)
    return np.array(rows)
