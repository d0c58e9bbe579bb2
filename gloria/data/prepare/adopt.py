"""Token shards made elsewhere, taken over into a corpus."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import xxhash

from gloria.data.corpus import SPLITS, SourceEntry, SplitEntry
from gloria.data.prepare.split import candidates, validation_bound
from gloria.data.shards import SHARD_TOKENS, dtype_for_vocab, map_tokens, read_index, write_split
from gloria.data.tokenizer import TextTokenizer
from gloria.errors import UserError, warn

ADOPT_TOKENS = 2**22  # tokens in memory at a time


def adopt_megatron(
    folder: str | os.PathLike[str],
    name: str,
    prefixes: Sequence[str | os.PathLike[str]],
    tokenizer: TextTokenizer,
    *,
    weight: float = 1.0,
    seed: int = 0,
    shard_tokens: int = SHARD_TOKENS,
) -> SourceEntry:
    """Take over Megatron-LM shards (`prefixes`, in this order) as source `name` of the corpus in `folder`.

    The shards must have been made with `tokenizer`, each document ending with its EOS; `UserError` otherwise.
    They are written anew, not linked: validation documents have to leave them, and a corpus must not hang on
    files that are not its own. Documents keep their order, those of several sequences become one, empty ones
    go and equal ones stay (in the same split). They are split as other sources are, by a hash of their tokens
    keyed with `seed`. Words can't be counted in tokens and stay 0.
    """
    dtype = dtype_for_vocab(tokenizer.vocab_size)
    surveys = [_survey(prefix, tokenizer, seed) for prefix in prefixes]
    hashes = np.concatenate([survey.hashes for survey in surveys])
    sizes = np.concatenate([survey.sizes for survey in surveys])
    if len(hashes) == 0:
        raise UserError(f'source "{name}": there is no document in its shards; check its paths')
    order = candidates(np.zeros(len(hashes), np.int64), hashes, sizes)
    bound = validation_bound(hashes[order], sizes[order], len(hashes), int(sizes.sum()))
    valid = hashes < np.uint64(bound)
    ends = np.cumsum([len(survey.hashes) for survey in surveys])[:-1]
    splits = {}
    for split, mask in zip(SPLITS, (~valid, valid)):
        parts = zip(prefixes, np.split(mask, ends))
        chunks = (chunk for prefix, part in parts for chunk in _chosen_documents(prefix, part, dtype))
        shards = write_split(folder, f"{name}/{split}", dtype, chunks, shard_tokens)
        tokens = sum(shard.tokens for shard in shards)
        splits[split] = SplitEntry(int(mask.sum()), tokens, int(sizes[mask].sum()), 0, shards)
    read = sum(survey.documents for survey in surveys)
    counts = {"read": read, "kept": len(hashes), "empty": read - len(hashes)}
    return SourceEntry(name, weight, splits["train"], splits["valid"], counts)


@dataclass(frozen=True)
class _Survey:
    documents: int  # with the empty ones
    hashes: np.ndarray  # (documents that aren't empty,) uint64, of their tokens
    sizes: np.ndarray  # (same,) int64, bytes of text


def _survey(prefix: str | os.PathLike[str], tokenizer: TextTokenizer, seed: int) -> _Survey:
    """One pass over a shard made elsewhere: is it of this tokenizer, and what to split it by."""
    dtype, token_bytes = dtype_for_vocab(tokenizer.vocab_size), tokenizer.token_bytes()
    hashes: list[int] = []
    sizes = [np.empty(0, np.int64)]
    ended = ends = 0
    for tokens, offsets in _documents(prefix):
        lowest, highest = int(tokens.min()), int(tokens.max())
        if lowest < 0 or highest >= tokenizer.vocab_size:
            wrong = lowest if lowest < 0 else highest
            known = f"a vocabulary of {tokenizer.vocab_size}"
            raise UserError(f"{prefix}.bin: has token id {wrong} in {known}; name the tokenizer that made it")
        ended += np.count_nonzero(tokens[offsets[1:] - 1] == tokenizer.eos_id)
        ends += np.count_nonzero(tokens == tokenizer.eos_id)
        sizes.append(np.add.reduceat(token_bytes[tokens], offsets[:-1]))
        tokens = tokens.astype(dtype)  # the same tokens hash alike, in whatever dtype they came
        pairs = zip(offsets[:-1].tolist(), offsets[1:].tolist())
        hashes += [xxhash.xxh3_64_intdigest(tokens[start:end].data, seed) for start, end in pairs]
    if ended < len(hashes):
        what = f"{len(hashes) - ended} of {len(hashes)} documents don't end with EOS (id {tokenizer.eos_id})"
        raise UserError(f"{prefix}.bin: {what}; make it again with --append-eod")
    if ends > ended:
        warn(f"{prefix}.bin: EOS stands {ends - ended} times inside documents; there they will count as two")
    return _Survey(read_index(prefix).documents, np.array(hashes, np.uint64), np.concatenate(sizes))


def _documents(prefix: str | os.PathLike[str]) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """The documents of a shard that aren't empty, some at a time: (tokens,) and (documents + 1,) offsets."""
    # an empty document begins where the next one does
    offsets = np.unique(read_index(prefix).document_offsets())
    if len(offsets) == 1:
        return
    tokens = map_tokens(prefix, in_order=True)
    first = 0
    while first < len(offsets) - 1:
        end = int(np.searchsorted(offsets, offsets[first] + ADOPT_TOKENS, side="right")) - 1
        end = max(end, first + 1)
        yield tokens[offsets[first] : offsets[end]], offsets[first : end + 1] - offsets[first]
        first = end


def _chosen_documents(
    prefix: str | os.PathLike[str], chosen: np.ndarray, dtype: np.dtype
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """The documents of a shard that `chosen` (documents,) marks, as `write_split` takes them."""
    first = 0
    for tokens, offsets in _documents(prefix):
        lengths = np.diff(offsets)
        part = chosen[first : first + len(lengths)]
        first += len(lengths)
        if part.any():
            yield tokens[np.repeat(part, lengths)].astype(dtype), lengths[part]
