"""What a task is made of, one dataclass a family, and what a model says about it. Plain values, no torch."""

from __future__ import annotations

from dataclasses import dataclass

NOT_FOUND = -1


@dataclass(frozen=True)
class Pair:
    """Two sentences (or one: `second` is "") with a label, a score or both; None where the file has none."""

    id: str
    first: str
    second: str
    label: str | None = None
    score: float | None = None


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
    group: str = ""  # one a context: what a bootstrap draws


def unlabelled(span: Span) -> bool:
    """The file does not say what the answer is, nor that there is none."""
    return not span.answers and not span.impossible


@dataclass(frozen=True)
class LastWord:
    """A context as published and the word that ends it; None where the file has none. `prompt()` strips the context."""

    id: str
    context: str
    word: str | None
    group: str = ""


@dataclass(frozen=True)
class Choice:
    """A question, its choices and the index of the right one; None where it is not known, or no choice is given."""

    id: str
    prompt: str
    choices: tuple[str, ...]
    answer: int | None
    group: str = ""  # one a Winograd schema: what a bootstrap draws


Example = Pair | Span | LastWord | Choice


@dataclass(frozen=True)
class PairPrediction:
    """A label, a score or both, as the task's targets ask; None is a missing prediction."""

    label: str | None = None
    score: float | None = None


@dataclass(frozen=True)
class SpanPrediction:
    """The best span that is not empty, and by how much (any unit) no answer is better than it: above 0 means none."""

    text: str
    no_answer: float = float("-inf")

    @property
    def said(self) -> str:
        return "" if self.no_answer > 0 else self.text


@dataclass(frozen=True)
class WordPrediction:
    """What a model wrote after the context, or what it thinks of the gold word, in nats over its tokens."""

    text: str | None = None
    log_likelihood: float | None = None
    greedy: bool | None = None  # every token of the gold word was the most likely one


@dataclass(frozen=True)
class ChoicePrediction:
    """The index of a choice."""

    choice: int | None


Prediction = PairPrediction | SpanPrediction | WordPrediction | ChoicePrediction
