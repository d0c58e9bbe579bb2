"""The quality rules of BLOOM / ROOTS (Laurençon et al. 2022, appendix), which datatrove has not."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Sequence

from gloria.data.refine.config import Limits

_ADDRESS = re.compile(r"https?:|www\.|\.com|href|//", re.IGNORECASE)
CHARACTERS, WORDS = 10, 5  # in a run
# Only words are compared with lists of words: what stands around them is no part of them.
_EDGES = "".join(map(chr, range(33, 48))) + ":;<=>?@[\\]^_`{|}~«»“”‘’…–—"


def character_repetition(text: str, run: int = CHARACTERS) -> float:
    """The share that the most frequent runs of characters have among all: of n different runs the sqrt(n) most frequent
    ones, but no run that is there once.
    """
    runs = Counter(text[start : start + run] for start in range(len(text) - run + 1))
    if not runs:
        return 0.0
    counts = sorted(runs.values(), reverse=True)
    frequent = min(int(math.sqrt(len(counts))), len(counts) - counts.count(1))
    return sum(counts[:frequent]) / sum(counts)


def word_repetition(words: Sequence[str], run: int = WORDS) -> float:
    """The share of runs of words that are there more than once."""
    runs = Counter(tuple(words[start : start + run]) for start in range(len(words) - run + 1))
    total = sum(runs.values())
    return sum(count for count in runs.values() if count > 1) / total if total else 0.0


def special_characters(text: str) -> float:
    """The share of characters that are neither letters nor single spaces: digits, punctuation, line ends, symbols."""
    return sum(not character.isalpha() and character != " " for character in text) / len(text)


def cut_long_words(text: str, most: int) -> str:
    """The text without web addresses and words of more than `most` characters; lines stay."""
    lines = (
        " ".join(w for w in line.split() if len(w) <= most and not _ADDRESS.search(w)) for line in text.split("\n")
    )
    return "\n".join(lines).strip()


class BloomRules:
    """`reason(text)` says which of the rules a text breaks, or is empty."""

    def __init__(self, limits: Limits) -> None:
        from spacy.lang.pt.stop_words import STOP_WORDS

        self.limits = limits
        # The list leaves out the most frequent word of all, which BLOOM's has.
        self.stop_words = STOP_WORDS | {"a", "o", "e", "as", "os", "um", "uma", "é", "em", "no", "na"}
        self.flagged = {word.lower() for word in limits.flagged_words or ()}

    def reason(self, text: str) -> str:
        limits = self.limits
        words = [word for word in (word.strip(_EDGES) for word in text.lower().split()) if word]
        if not words:
            return "no word"
        # (rule, value, least, most)
        checks = (
            ("stop_word_ratio", lambda: self._share(words, self.stop_words), limits.min_stop_word_ratio, None),
            (
                "flagged_ratio",
                lambda: self._share(words, self.flagged),
                None,
                self.flagged and limits.max_flagged_ratio,
            ),
            ("special_characters", lambda: special_characters(text), None, limits.max_special_characters),
            ("word_repetition", lambda: word_repetition(words), None, limits.max_word_repetition),
            ("char_repetition", lambda: character_repetition(text), None, limits.max_char_repetition),
        )
        for name, measure, least, most in checks:
            if (least and measure() < least) or (most and measure() > most):
                return name
        return ""

    @staticmethod
    def _share(words: Sequence[str], listed: set[str]) -> float:
        return sum(word in listed for word in words) / len(words)
