"""Validation of pre-training: held-out windows of every source, and texts that were never in the corpus.

Always the same rows, whatever the number of ranks: each takes a part, in as many batches as the others.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch

from gloria.data.corpus import Corpus
from gloria.data.loader import validation_windows
from gloria.data.mixture import Mixture
from gloria.data.stream import TokenStream
from gloria.dist.sharding import all_reduce_sums
from gloria.dist.signals import ASKED
from gloria.train import windows
from gloria.train.config import PretrainConfig
from gloria.train.metrics import bits_per_byte, perplexity, weighted_mean
from gloria.train.run import TAKEN_OVER, Run, flags_of
from gloria.train.texts import Texts

# Copies some rows (n,) of what is validated into tokens (n, seq + 1).
Gather = Callable[[np.ndarray, np.ndarray], None]


@dataclass
class Validation:
    """What is validated, and how often."""

    every: int  # steps; 0: never
    streams: Mapping[str, tuple[TokenStream, np.ndarray]] = field(default_factory=dict)  # held out, windows (n,)
    weights: Mapping[str, float] = field(default_factory=dict)  # of sources in valid/loss; see `open_validation`
    bytes_per_token: Mapping[str, float] = field(default_factory=dict)  # of sources whose text was counted
    texts: Mapping[str, Texts] = field(default_factory=dict)


class Stopped(Exception):
    """A stop was requested, or the lock is lost, in the midst of a validation; the argument says which."""


def bytes_per_token(corpus: Corpus, split: str) -> dict[str, float]:
    """Bytes of text a token of each source's split; a source whose bytes were not counted is not in it."""
    entries = {entry.name: getattr(entry, split) for entry in corpus.manifest.sources}
    return {name: entry.bytes / entry.tokens for name, entry in entries.items() if entry.bytes and entry.tokens}


def open_validation(config: PretrainConfig, corpus: Corpus, mixture: Mixture, texts: Mapping[str, Texts]) -> Validation:
    """The held-out windows of every source that the run has ever drawn, also one whose weight is 0 by now, and `texts`.

    Weights in `valid/loss` are the shares the run began with: a re-weighting would change what the curve means.
    """
    length, found = mixture.sequence_length, {}
    held_out = {entry.name: entry.valid.tokens for entry in corpus.manifest.sources if config.valid.every}
    for name in mixture.names:
        if held_out.get(name, 0) > length:  # plan_run reports the others
            stream = corpus.stream(name, "valid")
            found[name] = (stream, validation_windows(stream, length, config.valid.windows))
    first = mixture.stages[0]
    weights = {name: quota / first.period for name, quota in zip(first.names, first.quotas)}
    every = config.valid.every if found or texts else 0
    return Validation(every, found, weights, bytes_per_token(corpus, "valid"), texts)


@torch.no_grad()
def validate(run: Run, validation: Validation) -> str:
    """The loss of every source on its held-out windows and of every text; why to stop, or ""."""
    run.model.eval()
    length = run.objective.mixture.sequence_length
    losses, texts = {}, {}
    try:
        for name, (stream, chosen) in validation.streams.items():
            total = _sum_of_losses(run, len(chosen), partial(_copy_windows, stream, chosen))
            losses[name] = total / (len(chosen) * length)
        for name, text in validation.texts.items():
            total = _sum_of_losses(run, len(text.tokens), partial(_copy_rows, text.tokens), text.scored)
            texts[name] = _describe_text(text, total / text.num_tokens)
    except Stopped as stopped:
        return str(stopped)
    finally:
        run.model.train()
    run.evaluated_step = run.step
    if run.log:
        run.log.valid(run.step, _values(validation, losses) | ({"texts": texts} if texts else {}))
    return ""


def _sum_of_losses(run: Run, count: int, gather: Gather, scored: np.ndarray | None = None) -> float:
    """The loss of `count` rows, summed over those labels of each that are `scored` (rows, 2), from first to end.

    The model's forward is a collective, so every rank takes the same number of batches: a rank that has no row left
    takes one whose labels are all masked. After each batch the ranks agree whether to go on.
    """
    process, size, length = run.process, run.config.train.filled_micro_batch, run.objective.mixture.sequence_length
    no_end = int(run.objective.plan.corpus.manifest.tokenizer.eos_id == 0)  # a missing row is one document
    own, total = np.arange(count)[process.rank :: process.world], 0.0
    for number in range(-(-count // (process.world * size))):
        run.watch.beat(run.step, "validation", slow=run.step == 0)
        rows = own[number * size : (number + 1) * size]
        tokens, counted = np.full((size, length + 1), no_end, np.int32), np.zeros((size, 2), np.int64)
        gather(rows, tokens[: len(rows)])
        counted[: len(rows)] = (0, length) if scored is None else scored[rows]
        (part,), there = windows.windows_on_device(run, tokens, {"counted": counted})
        place, (first, end) = torch.arange(length, device=process.device), there["counted"].T[..., None]
        labels = part.tokens[:, 1:].masked_fill((place < first) | (place >= end), -100)
        sums = torch.zeros(3, dtype=torch.float64, device=process.device)
        sums[0] = windows.window_losses(run, part, labels)[1].sum(dtype=torch.float64)
        flags = flags_of(run)
        sums[1:] = torch.tensor([flags.stop, flags.lock_lost])
        all_reduce_sums(sums)
        loss, stop_requests, locks_lost = sums.tolist()
        if stop_requests or locks_lost:
            raise Stopped(TAKEN_OVER if locks_lost else ASKED)
        total += loss
    return total


def _copy_windows(stream: TokenStream, chosen: np.ndarray, rows: np.ndarray, out: np.ndarray) -> None:
    stream.gather(chosen[rows], out.shape[1] - 1, out)


def _copy_rows(tokens: np.ndarray, rows: np.ndarray, out: np.ndarray) -> None:
    out[:] = tokens[rows]


def _values(validation: Validation, losses: Mapping[str, float]) -> dict[str, Any]:
    """The values of a line of the log; the loss of all sources is their mean by weight."""
    weights = {name: validation.weights.get(name, 0.0) for name in losses}
    mean, ratios = weighted_mean(losses, weights), validation.bytes_per_token
    loss = float("nan") if mean is None else mean
    bits = {name: bits_per_byte(loss, ratios[name]) for name, loss in losses.items() if name in ratios}
    whole = bits_per_byte(mean, weighted_mean(ratios, weights))
    values = {"loss": loss, "perplexity": perplexity(loss), "bits_per_byte": whole}
    return values | {"sources": dict(losses), "source_bits_per_byte": bits, "weights": weights}


def _describe_text(text: Texts, loss: float) -> dict[str, Any]:
    counts = {"documents": text.documents, "tokens": text.num_tokens, "bytes": text.num_bytes}
    bits = bits_per_byte(loss, text.bytes_per_token)
    return {"loss": loss, "perplexity": perplexity(loss), "bits_per_byte": bits, **counts}
