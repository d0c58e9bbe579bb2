"""European or Brazilian Portuguese: a small classifier trained on text that the user names.

Delexicalised, after Sousa et al. 2025 (arXiv 2502.14394): names and numbers are masked, so that it learns how things
are spelled and said ("facto", "estou a fazer", "económico") and not what its training texts were about. Their masks
come from taggers; here a word with a capital letter is a name.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from datatrove.data import Document

from gloria.data.refine.records import Record

PORTUGAL, BRAZIL = "pt-PT", "pt-BR"
FEATURES = 1 << 18
READ = 20_000  # characters of a document that are looked at
PIECE = 1_500  # characters of a training example: long documents count as several
UNSURE = 0.1  # a probability so far from one half on either side is called mixed in reports
_TOKEN = re.compile(r"\w+(?:-\w+)*|[^\w\s]")


def features(text: str) -> Iterator[str]:
    """Words, pairs of words and runs of 3 and 4 letters at word ends and beginnings, without names and numbers."""
    before = "<"
    for token in _TOKEN.findall(text[:READ]):
        if token[0].isdigit():
            token = "0"
        elif token[0].isupper():
            token = "N"
        elif len(token) > 3:
            marked = f"<{token}>"
            for start in range(len(marked) - 3):
                yield f"4{marked[start : start + 4]}"
            yield f"3{marked[-3:]}"
        yield token
        yield f"{before} {token}"
        before = token


def _vectors(texts: Iterable[str]) -> Any:
    from sklearn.feature_extraction.text import HashingVectorizer

    return HashingVectorizer(analyzer=features, n_features=FEATURES, alternate_sign=False, binary=True).transform(texts)


def pieces(text: str) -> list[str]:
    """Training examples out of a document, cut at white space."""
    cut: list[list[str]] = [[]]
    size = 0
    for word in text.split():
        if size > PIECE:
            cut.append([])
            size = 0
        cut[-1].append(word)
        size += len(word) + 1
    return [" ".join(words) for words in cut if len(words) > 20 or len(cut) == 1]


def train(texts: Mapping[str, Iterable[str]], path: Path) -> tuple[int, float]:
    """Train on texts of both varieties and write the model.

    Gives the number of examples, and the share of held-out ones (every fifth) that a model of the others names rightly.
    """
    from sklearn.linear_model import LogisticRegression

    found = {name: [piece for text in texts[name] for piece in pieces(text)] for name in (PORTUGAL, BRAZIL)}
    examples = [(piece, name == PORTUGAL) for name, parts in found.items() for piece in parts]
    values = _vectors(piece for piece, _ in examples)
    labels = np.array([label for _, label in examples])
    held = np.arange(len(examples)) % 5 == 4

    def fit(rows: np.ndarray) -> Any:
        return LogisticRegression(C=20.0, class_weight="balanced", max_iter=2000).fit(values[rows], labels[rows])

    right = float(fit(~held).score(values[held], labels[held]))
    model = fit(np.ones(len(labels), bool))
    with path.open("wb") as file:
        np.savez(file, weights=model.coef_[0].astype(np.float32), bias=model.intercept_.astype(np.float32))
    return len(examples), right


def variety_of(path: Path) -> Callable[[str], float]:
    """The model's probability that a text is European Portuguese."""
    with np.load(path) as model:
        weights, bias = model["weights"], float(model["bias"][0])

    def probability(text: str) -> float:
        score = float(_vectors([text]).dot(weights)[0]) + bias
        return float(1 / (1 + np.exp(-np.clip(score, -30, 30))))

    return probability


def variety_filter(path: Path, keep: str | None, least: float, record: Record) -> Callable[[Document], str]:
    """Notes the variety of each document, and drops those that are less than so probably of the variety to keep."""
    probability = variety_of(path)

    def apply(document: Document) -> str:
        european = probability(document.text)
        name = "mixed" if abs(european - 0.5) < UNSURE else PORTUGAL if european > 0.5 else BRAZIL
        record.histograms["variety"][name] += 1
        document.metadata["notes"]["european"] = round(european, 3)
        wanted = {PORTUGAL: european, BRAZIL: 1 - european}
        return f"is {name}" if keep and wanted[keep] < least else ""

    return apply
