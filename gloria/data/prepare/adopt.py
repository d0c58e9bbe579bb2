"""Token shards made elsewhere, read as documents: their tokens stay, their text says which are equal to others."""

from __future__ import annotations

import os
from collections.abc import Iterator

import numpy as np

from gloria.data.prepare.text import Document
from gloria.data.shards import dtype_for_vocab, map_tokens, read_index
from gloria.data.tokenizer import TextTokenizer
from gloria.errors import UserError, warn

PIECE_TOKENS = 2**25  # of a shard that a worker reads at a stretch
BATCH_TOKENS = 2**20  # decoded at a time


def cut_documents(prefix: str | os.PathLike[str]) -> list[int]:
    """Document numbers at which a shard is cut into pieces of about PIECE_TOKENS, from 0 to the number of documents."""
    return range_edges(read_index(prefix).document_offsets(), PIECE_TOKENS)


def read_shard(prefix: str | os.PathLike[str], tokenizer: TextTokenizer, first: int, last: int) -> Iterator[Document]:
    """Documents `first` up to `last` of a Megatron-LM shard, those of several sequences joined, by number from 1.

    The shard must have been made with `tokenizer`, each document ending with its EOS; `UserError` otherwise.
    """
    offsets = read_index(prefix).document_offsets()[first : last + 1]
    if offsets[0] == offsets[-1]:  # an empty .bin can't be mapped
        yield from (Document(number, "") for number in range(first + 1, last + 1))
        return
    tokens = map_tokens(prefix, in_order=True)
    dtype = dtype_for_vocab(tokenizer.vocab_size)
    inside = 0
    for start, end in zip((edges := range_edges(offsets, BATCH_TOKENS)), edges[1:]):
        documents = [tokens[a:b] for a, b in zip(offsets[start:end], offsets[start + 1 : end + 1])]
        for number, document in enumerate(documents, first + start + 1):
            inside += _has_eos_inside(f"{prefix}.bin: document {number}", document, tokenizer)
        texts = tokenizer.decode_batch([document[:-1] for document in documents])
        for number, (document, text) in enumerate(zip(documents, texts), first + start + 1):
            yield Document(number, text, tokens=document.astype(dtype).tobytes())
    if inside:
        warn(f"{prefix}.bin: {inside} documents from {first + 1} to {last} have EOS inside; these count as several")


def _has_eos_inside(place: str, document: np.ndarray, tokenizer: TextTokenizer) -> bool:
    """Whether the document at `place` has EOS inside; `UserError` where it can't be of this tokenizer."""
    if len(document) == 0:
        return False
    eos = tokenizer.eos_id
    lowest, highest = int(document.min()), int(document.max())
    if lowest < 0 or highest >= tokenizer.vocab_size:
        wrong = lowest if lowest < 0 else highest
        known = f"a vocabulary of {tokenizer.vocab_size}"
        raise UserError(f"{place} has token id {wrong} in {known}; name the tokenizer that made it")
    if document[-1] != eos:
        raise UserError(f"{place} does not end with EOS (id {eos}); make the shard again with --append-eod")
    return bool((document[:-1] == eos).any())


def range_edges(offsets: np.ndarray, size: int) -> list[int]:
    """Document numbers from 0 to the last that cut ranges of about `size`, from the documents' offsets (n + 1,)."""
    steps = (offsets[:-1] - offsets[0]) // size
    return [0, *(np.flatnonzero(np.diff(steps)) + 1).tolist(), len(offsets) - 1]
