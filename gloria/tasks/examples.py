"""The examples of tasks and the predictions of models, a dataclass a family. Plain values, no torch.

An example has an `id`, says whether its file has the right answer (`labelled`), and may have a `group`: examples that
depend on each other, which a bootstrap draws together. `targets` are the heads of a pair's task.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TypeVar

NOT_FOUND = -1
T = TypeVar("T")


@dataclass(frozen=True)
class Pair:
    """Two sentences (or one: `second` is "") with a label, a score or both; None where the file has none."""

    id: str
    first: str
    second: str
    label: str | None = None
    score: float | None = None

    def labelled(self, targets: Sequence[str]) -> bool:
        gold = {"entailment": self.label, "similarity": self.score}
        return all(gold[target] is not None for target in targets)


@dataclass(frozen=True)
class Span:
    """A question on a context. `answers` are (text, start); start is `NOT_FOUND` where the text is not at its offset.

    `impossible` says that the context holds no answer; without it and without answers the question is unlabelled.
    """

    id: str
    question: str
    context: str
    answers: tuple[tuple[str, int], ...] = ()
    impossible: bool = False
    group: str = ""  # one a context

    def labelled(self, targets: Sequence[str] = ()) -> bool:
        return bool(self.answers) or self.impossible


@dataclass(frozen=True)
class LastWord:
    """A context as published, white space at its end included, and the word that ends it; None where there is none."""

    id: str
    context: str
    word: str | None

    def labelled(self, targets: Sequence[str] = ()) -> bool:
        return self.word is not None


@dataclass(frozen=True)
class Choice:
    """A question, its choices and the index of the right one; None where it is not known, or no choice is given."""

    id: str
    prompt: str
    choices: tuple[str, ...]
    answer: int | None
    group: str = ""  # one a Winograd schema

    def labelled(self, targets: Sequence[str] = ()) -> bool:
        return self.answer is not None


Example = Pair | Span | LastWord | Choice


@dataclass(frozen=True)
class PairPrediction:
    """A label, a score or both, as the task's targets ask; None is a missing prediction."""

    label: str | None = None
    score: float | None = None

    def missing(self, targets: Sequence[str]) -> bool:
        values = {"entailment": self.label, "similarity": self.score}
        return any(values[target] is None for target in targets) or not math.isfinite(self.score or 0)


@dataclass(frozen=True)
class SpanPrediction:
    """The best span that is not empty, and the score of "no answer" less its own: above 0 means no answer."""

    text: str
    no_answer: float = float("-inf")

    @property
    def answer(self) -> str:
        """The span, or "" for no answer."""
        return "" if self.no_answer > 0 else self.text

    def missing(self, targets: Sequence[str]) -> bool:
        return math.isnan(self.no_answer)


@dataclass(frozen=True)
class WordPrediction:
    """What a model wrote after the context, or the log-likelihood of the gold word, in nats over its tokens."""

    text: str | None = None
    log_likelihood: float | None = None
    greedy: bool | None = None  # every token of the gold word was the most likely one

    def missing(self, targets: Sequence[str]) -> bool:
        return self.text is None and not math.isfinite(math.nan if self.log_likelihood is None else self.log_likelihood)


@dataclass(frozen=True)
class ChoicePrediction:
    """The log-likelihood of each choice, in nats over its tokens; none: a missing prediction."""

    log_likelihoods: tuple[float, ...] = ()

    def missing(self, targets: Sequence[str]) -> bool:
        return not self.log_likelihoods or any(map(math.isnan, self.log_likelihoods))


Prediction = PairPrediction | SpanPrediction | WordPrediction | ChoicePrediction


def all_of(kind: type[T], values: Iterable[object]) -> list[T]:
    """The examples or predictions, all of which are of one kind, as those of a task's family are."""
    found = []
    for value in values:
        assert isinstance(value, kind), f"{value} is no {kind.__name__}"
        found.append(value)
    return found
