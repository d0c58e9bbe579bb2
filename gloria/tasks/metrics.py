"""Official metrics of each family, on a whole set: what ASSIN's, GLUE's and SQuAD's own scripts compute."""

from __future__ import annotations

import math
import re
import string
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from gloria.config.cli import suggest
from gloria.errors import UserError
from gloria.tasks.examples import (
    Choice,
    ChoicePrediction,
    Example,
    LastWord,
    Pair,
    PairPrediction,
    Prediction,
    Span,
    SpanPrediction,
    WordPrediction,
)
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

    `value` is None where the metric has none, and `reason` says why; with a value, `reason` says what to know of it.
    """

    value: float | None
    low: float | None
    high: float | None
    n: int
    reason: str = ""


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
    """Metric -> what model A has more than model B on the same examples, with a paired test."""
    of_a, of_b = measures(task, examples, a, rule), measures(task, examples, b, rule)
    return {name: difference(of_a[name], of_b[name], resamples, seed) for name in of_a}


def measures(
    task: Task, examples: Sequence[Example], predictions: Mapping[str, Prediction], rule: str = ""
) -> dict[str, Measure]:
    """Each metric of the task with the columns it is computed from."""
    assert predictions.keys() <= {example.id for example in examples}, "predictions of other examples"
    names = [name for name in task.metrics if name.partition(":")[2] == rule]
    if not names:
        rules = dict.fromkeys(name.partition(":")[2] for name in task.metrics if ":" in name)
        what = f'unknown rule "{rule}"' if rule else "needs a rule"
        raise UserError(f"{task.name}: {what}; {suggest(rule, rules)}")
    gold = [example for example in examples if task.labelled(example)]
    if not gold:
        none = Measure(np.mean, mean, (np.zeros(0),), np.zeros(0, int), reason="not scored: no example is labelled")
        return dict.fromkeys(names, none)
    _, groups = np.unique([getattr(e, "group", "") or f"example {e.id}" for e in gold], return_inverse=True)
    guesses = [predictions.get(example.id) for example in gold]
    missing, hidden = sum(_missing(task, guess) for guess in guesses), len(examples) - len(gold)
    notes = [f"{missing} predictions are missing and count as wrong"] if missing else []
    notes += [f"{hidden} of {len(examples)} are not labelled and not scored"] if hidden else []
    build = {"pair": _pairs, "span": _spans, "last_word": _words, "choice": _choices}[task.family]
    made = build(task, gold, guesses, groups, "; ".join(notes))
    return {name: made(name) for name in names}


def _missing(task: Task, guess: Prediction | None) -> bool:
    if isinstance(guess, PairPrediction):
        said = {"entailment": guess.label, "similarity": guess.score}
        return any(said[target] is None for target in task.targets) or not math.isfinite(guess.score or 0)
    return guess in (None, WordPrediction(), ChoicePrediction(None))


def _share(right: Sequence[bool], groups: Any, note: str) -> Measure:
    return Measure(np.mean, mean, (np.array(right, float),), groups, wilson=True, note=note)


def _pairs(
    task: Task, gold: list[Pair], guesses: list[PairPrediction | None], groups: Any, note: str
) -> Callable[[str], Measure]:
    # Here, as they take a second to import and most commands score nothing.
    from scipy.stats import pearsonr, spearmanr
    from sklearn.metrics import f1_score

    labels = [label for label in task.labels if any(pair.label == label for pair in gold)]
    label = np.array([labels.index(pair.label) for pair in gold] if labels else [], float)
    # A label that the gold file does not have, or none, is -1: wrong, and no class of its own.
    guess = np.array([labels.index(g.label) if g and g.label in labels else -1 for g in guesses], float)
    x, y = _scores(task, gold, guesses) if "similarity" in task.targets else (np.zeros(1), np.zeros(1))
    constant = next((what for what, v in (("gold scores", x), ("predictions", y)) if np.ptp(v) == 0), "")
    reason = f"the {constant} are constant, which has no correlation with anything" if constant else ""
    classes = range(len(labels))
    macro = partial(f1_score, labels=list(classes), average="macro", zero_division=0)

    def made(name: str) -> Measure:
        if name == "accuracy":
            return _share(label == guess, groups, note)
        if name == "macro_f1":
            return Measure(macro, partial(f1, classes=classes), (label, guess), groups, note=note)
        if name == "f1":  # of the second label; a missing prediction is the wrong one of two
            known = np.array([task.labels.index(pair.label) for pair in gold])
            said = np.array(
                [task.labels.index(g.label) if g and g.label in task.labels else 1 - k for g, k in zip(guesses, known)]
            )
            binary = partial(f1_score, pos_label=1, zero_division=0)
            return Measure(binary, partial(f1, classes=range(1, 2)), (known, said), groups, note=note)
        if name == "mse":
            return Measure(np.mean, mean, ((x - y) ** 2,), groups, note=note)
        columns, exact, weighted = (x, y), lambda x, y: pearsonr(x, y).statistic, correlation
        if name == "spearman":
            exact, weighted = lambda x, y: spearmanr(x, y).statistic, rank_correlation
        if name == "mean_f1_pearson":
            columns = (label, guess, x, y)
            exact, weighted = (
                lambda a, b, x, y: (macro(a, b) + pearsonr(x, y).statistic) / 2,
                lambda w, a, b, x, y: (f1(w, a, b, classes) + correlation(w, x, y)) / 2,
            )
        return Measure(exact, weighted, columns, groups, reason=reason, note=note)

    return made


def _scores(task: Task, gold: list[Pair], guesses: list[PairPrediction | None]) -> tuple[Array, Array]:
    """Gold and predicted scores. A missing one is 0, as ASSIN's script has it; where 0 may be right, the far end."""
    low, high = task.range
    known = np.array([pair.score for pair in gold], float)
    wrong = np.where(low > 0, 0.0, np.where(known - low > high - known, low, high))
    said = np.array([g.score if g and g.score is not None else np.nan for g in guesses], float)
    return known, np.where(np.isfinite(said), said, wrong)


def _choices(
    task: Task, gold: list[Choice], guesses: list[ChoicePrediction | None], groups: Any, note: str
) -> Callable[[str], Measure]:
    return lambda name: _share([g is not None and g.choice == e.answer for e, g in zip(gold, guesses)], groups, note)


def _words(
    task: Task, gold: list[LastWord], guesses: list[WordPrediction | None], groups: Any, note: str
) -> Callable[[str], Measure]:
    def made(name: str) -> Measure:
        metric, rule = name.split(":")
        if metric == "exact_match":
            words = [
                (RULES[rule].compared(e.word), RULES[rule].word(g.text or "") if g else "")
                for e, g in zip(gold, guesses)
            ]
            return _share([word == said != "" for word, said in words], groups, note)
        if metric == "accuracy":
            return _share([g is not None and g.greedy is True for g in guesses], groups, note)
        here = [bool(example.word.strip()) for example in gold]
        values = [g.log_likelihood if g else None for g, there in zip(guesses, here) if there]
        lacking = sum(value is None for value in values)
        reason = f"{lacking} of {len(values)} words have no log-likelihood" if lacking else ""
        column = np.array([np.nan if value is None else value for value in values], float)

        def perplexity(w: Array, values: Array) -> Array:
            return np.exp(-mean(w, values))

        # Groups are renumbered, as a word that is empty has no perplexity and is left out.
        _, kept = np.unique(groups[here], return_inverse=True)
        return Measure(lambda v: np.exp(-np.mean(v)), perplexity, (column,), kept, reason=reason, note=note)

    return made


def normalise(text: str, articles: re.Pattern[str] = ENGLISH) -> str:
    """SQuAD's: lower case, no ASCII punctuation, no articles, single spaces."""
    return " ".join(articles.sub(" ", text.lower().translate(PUNCTUATION)).split())


def span_scores(golds: Sequence[str], said: str, articles: re.Pattern[str], *, version2: bool) -> tuple[float, float]:
    """(exact match, F1), the best over the golds. In version 2, F1 against nothing is whether both are nothing."""
    guess = normalise(said, articles)
    best_exact = best_f1 = 0.0
    for gold in (normalise(text, articles) for text in golds):
        best_exact = max(best_exact, float(gold == guess))
        tokens = (gold.split(), guess.split())
        common = sum((Counter(tokens[0]) & Counter(tokens[1])).values())
        overlap = 2 * common / (len(tokens[0]) + len(tokens[1])) if common else 0.0
        best_f1 = max(best_f1, float(gold == guess) if version2 and not all(tokens) else overlap)
    return best_exact, best_f1


def _spans(
    task: Task, gold: list[Span], guesses: list[SpanPrediction | None], groups: Any, note: str
) -> Callable[[str], Measure]:
    version2 = "no_answer_exact" in task.metrics
    has = np.array([bool(span.answers) for span in gold])

    def table(articles: re.Pattern[str], said: Callable[[SpanPrediction], str]) -> Array:
        rows = []
        for span, guess in zip(gold, guesses):
            texts = [text for text, _ in span.answers if normalise(text, articles) or not version2] or [""]
            rows.append(span_scores(texts, said(guess), articles, version2=version2) if guess else (0.0, 0.0))
        return np.array(rows)  # (n, 2): exact, F1

    columns = {articles: table(articles, lambda guess: guess.said) for articles in (ENGLISH, PORTUGUESE)}

    def made(name: str) -> Measure:
        column = int("f1" in name)
        if name.endswith("oracle"):
            return _oracle(table(ENGLISH, lambda guess: guess.text)[:, column], has, guesses, groups, note)
        rows = (
            np.full(len(gold), True)
            if name in ("exact_match", "f1") or name.endswith("_pt")
            else has == ("has" in name)
        )
        values = columns[PORTUGUESE if name.endswith("_pt") else ENGLISH][rows, column]
        _, kept = np.unique(groups[rows], return_inverse=True)
        reason = "" if len(values) else f"the split has no question {'with' if 'has' in name else 'without'} an answer"
        return Measure(np.mean, mean, (values,), kept, reason=reason, note=note)

    return made


def _oracle(raw: Array, has: Array, guesses: list[SpanPrediction | None], groups: Any, note: str) -> Measure:
    """SQuAD 2.0's best threshold: the highest score that any cut of `no_answer` gives on these very answers."""
    cut = np.array([guess.no_answer if guess else np.inf for guess in guesses])
    order = np.argsort(cut, kind="stable")
    text = np.array([bool(guess and guess.text) for guess in guesses])
    gains = np.where(has, raw, -text.astype(float))[order]
    totals = np.concatenate([[0.0], np.cumsum(gains)]) + (~has).sum()
    best = int(np.argmax(totals))
    where = f"oracle: threshold {cut[order][best - 1]:g}" if best else "oracle: no answer to any question"
    value = float(totals[best] / len(raw))
    return Measure(lambda _: value, None, (raw,), groups, note="; ".join(filter(None, (where, note))))
