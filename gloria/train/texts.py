"""Texts that were never in the corpus, as rows for validation. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import xxhash

from gloria.data.loader import text_windows
from gloria.data.prepare.inputs import source_files
from gloria.data.prepare.recipe import SourceConfig
from gloria.data.prepare.text import clean, read_documents
from gloria.data.tokenizer import TextTokenizer
from gloria.errors import UserError


@dataclass(frozen=True)
class Texts:
    """The documents of some files, cut into windows.

    Each document stands alone. It begins behind an EOS, as in a corpus, and its every token is predicted once: in
    windows of the run's sequence length, of which each but the first predicts its last half, given the half before.
    That is what `gloria.evaluate --task perplexity` does with the same length.
    """

    tokens: np.ndarray  # (windows, seq + 1), short ones filled up
    scored: np.ndarray  # int64 (windows, 2): of the seq labels the first that counts, and the end
    documents: int
    num_tokens: int  # that are predicted
    num_bytes: int  # of the cleaned text, UTF-8

    @property
    def bytes_per_token(self) -> float:
        return self.num_bytes / self.num_tokens

    def describe(self) -> str:
        """What there is, for the first lines of a run."""
        counts = f"{self.documents:,} documents, {self.num_bytes:,} bytes, {self.num_tokens:,} tokens"
        return f"{counts} in {len(self.tokens):,} windows"

    @property
    def fingerprint(self) -> str:
        """Of all rows: the same on every rank, or validation would mean something else on one of them."""
        return xxhash.xxh3_128_hexdigest(self.tokens.tobytes() + self.scored.tobytes())


def read_all_texts(paths: Mapping[str, str], field: str, tokenizer: TextTokenizer, length: int) -> dict[str, Texts]:
    """The texts of `valid.paths` by name, read as `gloria.prepare` reads a source; `UserError` has every problem."""
    found: dict[str, Texts] = {}
    problems: list[str] = []
    for name, path in paths.items():
        try:
            found[name] = _read_texts(name, path, field, tokenizer, length)
        except UserError as error:
            problems += error.problems
    if problems:
        raise UserError(*problems)
    return found


def _read_texts(name: str, path: str, field: str, tokenizer: TextTokenizer, length: int) -> Texts:
    place = f"valid.paths.{name}"
    problems: list[str] = []
    source = SourceConfig(name=name, paths=[path], text_field=field)
    files = source_files(source, Path(), place, problems)
    texts = []
    for file in files:
        for document in read_documents(file.path, file.format, text_field=field):
            if document.problem:
                problems.append(f"{place}: {file.path}:{document.line}: {document.problem}; correct it")
                break
            if text := clean(document.text):
                texts.append(text)
    if not problems and not texts:
        problems.append(f"{place}: there is no text in {path}; name another file")
    if problems:
        raise UserError(*problems)
    encoded = [np.concatenate([[tokenizer.eos_id], ids]) for ids in tokenizer.encode_batch(texts)]
    cut = [(ids, *window) for ids in encoded for window in text_windows(len(ids), length, max(length // 2, 1))]
    tokens = np.full((len(cut), length + 1), int(tokenizer.eos_id == 0), np.int32)  # what fills up is no EOS
    scored = np.zeros((len(cut), 2), np.int64)
    for row, (ids, begin, end, count) in enumerate(cut):
        tokens[row, : end - begin] = ids[begin:end]
        scored[row] = end - begin - 1 - count, end - begin - 1
    num_tokens = sum(len(ids) - 1 for ids in encoded)
    return Texts(tokens, scored, len(texts), num_tokens, sum(len(text.encode()) for text in texts))
