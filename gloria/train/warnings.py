"""What a user should know of a run's sources before the hours are spent. Imports no torch."""

from __future__ import annotations

from gloria.data.corpus import Corpus
from gloria.data.mixture import Mixture
from gloria.data.prepare.report import MOST_EPOCHS, weights_within


def warn_of_repeats(mixture: Mixture, samples: int) -> list[str]:
    """A line for each source in use that a run of so many samples repeats too often, with the weight to set instead."""
    passes, shares = mixture.epochs_at(samples), mixture.shares
    over = {name: count for name, count in passes.items() if count > MOST_EPOCHS and shares[name]}
    if not over:
        return []
    if len(mixture.stages) > 1:  # no one weight would have avoided it
        return [f'source "{name}": {count:.1f} epochs (above 4 they teach little)' for name, count in over.items()]
    windows = {name: mixture.sources[name].windows(mixture.sequence_length) for name in mixture.names}
    weights = weights_within(dict(zip(mixture.names, mixture.stages[-1].weights)), windows, samples)
    if weights is None:
        name = max(over, key=over.__getitem__)
        return [
            f'up to {over[name]:.1f} epochs (source "{name}"): the run needs {samples:,} windows, there are '
            f"{sum(windows.values()):,}; reweighting can't help: shorten the run or find more text"
        ]
    return [
        f'source "{name}": {count:.1f} epochs (above 4 they teach little); set data.weights.{name} to '
        f"{weights[name]:.4g} to avoid it"
        for name, count in over.items()
    ]


def warn_of_no_validation(corpus: Corpus, mixture: Mixture) -> list[str]:
    """A line for each source whose held-out part holds no window."""
    length, there = mixture.sequence_length, [name for name in mixture.names if name in corpus.names]
    held_out = {name: corpus.source(name).valid.tokens for name in there}
    return [
        f'source "{name}" has no validation: its {tokens} held-out tokens hold no window of {length} + 1'
        for name, tokens in held_out.items()
        if tokens <= length
    ]


def warn_of_no_bytes(corpus: Corpus, mixture: Mixture) -> list[str]:
    """A line for the sources whose manifest does not say how many bytes of text their tokens are."""
    entries = (corpus.source(name) for name in mixture.names if name in corpus.names)
    names = ", ".join(f'"{entry.name}"' for entry in entries if not entry.train.bytes)
    return [f"no bits per byte of source {names}, whose bytes of text were not counted"] if names else []
