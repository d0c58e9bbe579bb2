"""The tokenizer that a corpus trains: on a sample of its sources, drawn by weight."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np

from gloria.config.cli import to_mapping
from gloria.data.corpus import TOKENIZER
from gloria.data.prepare.buckets import Draft, draw, read_sample
from gloria.data.prepare.recipe import MEGATRON, Recipe
from gloria.data.prepare.reuse import VERSION
from gloria.data.prepare.split import Split
from gloria.data.prepare.text import clean
from gloria.data.prepare.units import hash_values
from gloria.data.prepare.workers import Workers
from gloria.data.tokenizer import TextTokenizer, load_tokenizer, train_tokenizer
from gloria.errors import warn


def make_tokenizer(draft: Draft, size: np.ndarray, split: Split, pool: Workers) -> TextTokenizer:
    """The tokenizer in the corpus folder, trained on a sample that is drawn by weight.

    Each source gives its share of `sample_bytes`, as documents of training, or all of them where it has less. An
    earlier launch's is taken if it was trained from the same documents.
    """
    folder = draft.folder / TOKENIZER
    config = draft.recipe.tokenizer
    weights = np.array([source.weight for source in draft.recipe.source])
    chances = config.sample_bytes * weights / weights.sum() / size
    documents = [draft.readings[number].keys for number in range(len(weights))]
    made = draft.work / f"tokenizer-{hash_values([VERSION, to_mapping(config), weights.tolist(), documents])}"
    if made.exists():
        print("tokenizer: was trained by an earlier launch", flush=True)
    else:
        sample = draft.work / "sample"
        shutil.rmtree(sample, ignore_errors=True)
        sample.mkdir()
        tasks = draft.tasks(split=split, chances=chances)
        tasks = [replace(task, out=str(sample / f"{task.number:05d}")) for task in tasks]
        drawn = sum(pool.map(draw, tasks, "drawing a sample"), np.zeros(len(weights), np.int64))
        parts = [f"{source.name} {size / 1e6:.2f}" for source, size in zip(draft.recipe.source, drawn.tolist())]
        print(f"tokenizer: training on {drawn.sum() / 1e6:.2f} MB drawn by weight ({', '.join(parts)})", flush=True)
        train_tokenizer(config, read_sample([task.out for task in tasks]), sample / TOKENIZER)
        (sample / TOKENIZER).rename(made)
        shutil.rmtree(sample)
    shutil.copytree(made, folder)
    return load_tokenizer(folder)


def warn_of_training(old: Path) -> None:
    """Say why nothing is taken over from the corpus `old`, and how it would be."""
    warn(
        "tokenizer: is trained from the text, which has changed, so every source is read and tokenised again; "
        f'with [tokenizer] path = "{old}/{TOKENIZER}" it stays, and only what has changed is'
    )


def warn_of_lossy(recipe: Recipe, tokenizer: TextTokenizer) -> None:
    """Warn where a document can be tokens in one source and text in another without being found to be equal."""
    probe = "Ação, «Ébano»: 12\n  dois"
    if len({source.format == MEGATRON for source in recipe.source}) > 1 and (
        clean(tokenizer.decode(tokenizer.encode(probe))) != probe
    ):
        warn("tokenizer: changes texts, so equal documents in token shards and in text sources may not be found")
