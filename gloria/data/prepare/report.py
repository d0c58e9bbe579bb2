"""What a corpus holds, as a table: documents in and kept, tokens, weights, and the epochs a budget makes of it."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence

from gloria.data.corpus import Manifest, SourceEntry
from gloria.data.prepare.overlap import NEAR_SHARE, RUN_TOKENS
from gloria.data.prepare.split import MOST_BYTES, MOST_SHARE

NEAR = "valid_near_train"  # key of a source's counts: validation documents nearly equal to training text
FILTERED = "filter: "  # before a reason of the user's own among a source's counts
MOST_EPOCHS = 4.0  # repeating data up to about four times is as good as new data (Muennighoff et al. 2023)
HEADINGS = {"short": "too short", "duplicate_elsewhere": "in earlier source"}  # of keys that aren't plain by themselves
FIRST = ("read", "malformed", "empty", "short")
LAST = ("duplicate", "duplicate_elsewhere", "kept", NEAR)


def heading(key: str) -> str:
    """How a reason to drop documents, a key of a source's counts, is called in reports."""
    return HEADINGS.get(key, key.removeprefix(FILTERED))


def in_order(counts: Mapping[str, int]) -> dict[str, int]:
    """A source's counts as the manifest holds them: read, reasons to drop, kept."""
    others = sorted(set(counts) - {*FIRST, *LAST})
    return {key: counts.get(key, 0) for key in (*FIRST, *others, *LAST)}


def report(manifest: Manifest, budget_tokens: int | None = None) -> list[str]:
    """The table's lines, a row a source, and what is special about validation; with a budget (training tokens)
    also the epochs it makes of each source, and the weights that would keep every source at 4 epochs at most.
    """
    sources = manifest.sources
    total_counts = in_order(sum((Counter(source.counts) for source in sources), Counter()))
    reasons = [key for key, number in total_counts.items() if number and key not in ("read", "kept", NEAR)]
    headings = ["source", "read", *map(heading, reasons), "kept", "MB"]
    headings += ["tokens", "valid", "tokens/word", "weight", "share"]
    total = sum(source.weight for source in sources)
    rows = [_row(source, reasons, total) for source in sources]
    lines = []
    if budget_tokens is not None:
        headings += ["epochs", f"weight for {MOST_EPOCHS:g} epochs"]
        tokens = {source.name: source.train.tokens for source in sources}
        lowered = weights_within({source.name: source.weight for source in sources}, tokens, budget_tokens)
        for row, source in zip(rows, sources):
            epochs = budget_tokens * source.weight / total / max(source.train.tokens, 1)
            weight = source.weight if lowered is None else lowered[source.name]
            row += [f"{epochs:.2f}", _down(weight) if weight < source.weight else ""]
        if lowered is None:
            most = int(MOST_EPOCHS * sum(source.train.tokens for source in sources if source.weight))
            what = f"{budget_tokens:,} tokens are more than {MOST_EPOCHS:g} epochs of all, {most:,}"
            lines = [f"no weights keep every source at {MOST_EPOCHS:g} epochs: {what}"]
    return [*align([headings, *rows]), *(line for source in sources for line in _about_validation(source)), *lines]


def _about_validation(source: SourceEntry) -> Iterator[str]:
    """What a reader of validation losses has to know."""
    if source.train.documents and not source.valid.documents:
        limit = f"{MOST_SHARE:.0%} of its text and {MOST_BYTES / 1e6:g} MB"
        yield f'source "{source.name}" has no validation: each of its documents is more than {limit}'
    if near := source.counts.get(NEAR):
        share = f"{NEAR_SHARE:.0%} or more of their runs of {RUN_TOKENS} tokens with training text"
        yield f'source "{source.name}": {near:,} of {source.valid.documents:,} validation documents share {share}'


def _down(weight: float) -> str:
    """Four digits, rounded down: a weight that is not too much."""
    scale = 10.0 ** (3 - math.floor(math.log10(weight)))
    return f"{math.floor(weight * scale) / scale:.4g}"


def _row(source: SourceEntry, reasons: Sequence[str], total_weight: float) -> list[str]:
    splits = (source.train, source.valid)
    words = sum(split.words for split in splits)
    # EOS is no part of a word.
    tokens = sum(split.tokens - split.documents for split in splits)
    return [
        source.name,
        *(f"{source.counts.get(key, 0):,}" for key in ("read", *reasons, "kept")),
        f"{sum(split.bytes for split in splits) / 1e6:,.2f}",
        f"{source.train.tokens:,}",
        f"{source.valid.tokens:,}",
        f"{tokens / words:.3f}" if words else "-",
        f"{source.weight:g}",
        f"{source.weight / total_weight:.2%}",
    ]


def weights_within(weights: Mapping[str, float], tokens: Mapping[str, int], budget: int) -> dict[str, float] | None:
    """Weights with which a budget of training tokens makes at most MOST_EPOCHS of each source.

    Those of the sources above it are lowered, all others stay. None where no weights do, because all sources
    together are too small.
    """
    limits = {name: MOST_EPOCHS * tokens[name] / budget for name in weights}  # of a source's share
    lowered: set[str] = set()
    while True:
        share = sum(limits[name] for name in lowered)
        rest = sum(weight for name, weight in weights.items() if name not in lowered)
        if rest == 0 or share >= 1:
            return None if lowered else dict(weights)
        # What is lowered leaves its share to the rest, which may lift another source over its limit.
        scale = (1 - share) / rest
        above = {name for name in weights if name not in lowered and weights[name] * scale > limits[name]}
        if not above:
            return {name: limits[name] / scale if name in lowered else weight for name, weight in weights.items()}
        lowered |= above


def align(rows: Sequence[Sequence[str]]) -> list[str]:
    """A table as lines: the first column to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(*rows)]
    return ["  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]).rstrip() for row in rows]
