"""A corpus folder: token shards by source, the tokenizer, and a manifest that vouches for all of them.

`manifest.json` is written last and lists every file with its size and hash. A folder without one, or whose
files disagree with it, is refused by the name of the file: a corpus is whole or it is not there.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path, PurePosixPath

import numpy as np
import xxhash

from gloria.data.shards import (
    SHARD_TOKENS,
    ShardEntry,
    dtype_for_vocab,
    map_tokens,
    read_index,
    write_split,
)
from gloria.data.split import candidates, validation_bound
from gloria.data.stream import TokenStream
from gloria.data.tokenizer import TextTokenizer, tokenizer_fingerprint
from gloria.errors import UserError, warn
from gloria.files import hash_file, read_json_object, write_whole
from gloria.options import from_mapping, option

FORMAT = 1
MANIFEST = "manifest.json"
TOKENIZER = "tokenizer"
SPLITS = ("train", "valid")
AGAIN = "prepare the corpus again"
MAKE = "make one with python -m gloria.prepare"
ADOPT_TOKENS = 2**22  # tokens in memory at a time when shards are adopted


@dataclass(frozen=True)
class SplitEntry:
    """The documents of one split of a source; `bytes` and `words` are of the text, 0 words if not counted."""

    documents: int = option(minimum=0)
    tokens: int = option(minimum=0)
    bytes: int = option(minimum=0)
    words: int = option(minimum=0)
    shards: list[ShardEntry]


@dataclass(frozen=True)
class SourceEntry:
    """One source of the recipe; `weight` is its share of training tokens before normalisation."""

    name: str
    weight: float = option(minimum=0)
    train: SplitEntry
    valid: SplitEntry
    counts: dict[str, int]  # documents read, kept, and dropped by reason


@dataclass(frozen=True)
class Manifest:
    """What `manifest.json` holds; sources in the recipe's order."""

    format: int
    tokenizer: dict[str, int | str | None]  # fingerprint, vocab_size, eos_id, pad_id
    sources: list[SourceEntry]
    recipe: dict  # what the corpus was made by, as plain JSON


@dataclass(frozen=True)
class Corpus:
    """An opened corpus: its files are there, of the right size (and content, if that was asked for)."""

    folder: Path
    manifest: Manifest

    @property
    def names(self) -> list[str]:
        return [source.name for source in self.manifest.sources]

    @property
    def weights(self) -> dict[str, float]:
        return {source.name: source.weight for source in self.manifest.sources}

    @property
    def tokenizer_folder(self) -> Path:
        return self.folder / TOKENIZER

    def source(self, name: str) -> SourceEntry:
        """The entry of a source, or a `UserError` that names those there are."""
        for source in self.manifest.sources:
            if source.name == name:
                return source
        raise UserError(f'{self.folder}: has no source "{name}"; it has {", ".join(self.names)}')

    def stream(self, name: str, split: str = "train") -> TokenStream:
        """The tokens of one split of a source, mapped; `UserError` where it has none."""
        entry: SplitEntry = getattr(self.source(name), split)
        if not entry.shards:
            raise UserError(f'{self.folder}: source "{name}" has no {split} tokens; give it more documents')
        return TokenStream([_map_shard(self.folder, shard) for shard in entry.shards], _fingerprint(entry))


def source_fingerprint(entry: SourceEntry) -> str:
    """xxh3-128 over the training shards, in hexadecimal: it changes with any token and with their order."""
    return _fingerprint(entry.train)


def write_manifest(folder: str | os.PathLike[str], manifest: Manifest) -> None:
    """Write `manifest.json`, durable and by rename: it is there whole or not at all."""
    write_whole(Path(folder) / MANIFEST, json.dumps(asdict(manifest), ensure_ascii=False, indent=1).encode() + b"\n")


def read_manifest(folder: str | os.PathLike[str]) -> Manifest:
    """The checked manifest of a corpus; `UserError` has every problem, each with its place in the file."""
    path = Path(folder) / MANIFEST
    try:
        values = read_json_object(path, AGAIN)
    except FileNotFoundError:
        raise UserError(_why_missing(Path(folder))) from None
    if values.get("format") != FORMAT:
        raise UserError(f"{path}: format is {values.get('format')}, and this version reads {FORMAT}; {AGAIN}")
    manifest = from_mapping(Manifest, values, str(path))
    problems = [f"{path}: {problem}; {AGAIN}" for problem in _contradictions(manifest)]
    if problems:
        raise UserError(*problems)
    return manifest


def open_corpus(folder: str | os.PathLike[str], *, verify: bool = False) -> Corpus:
    """A corpus whose files are all there with their sizes, and with `verify` their hashes too.

    `UserError` has one line for each broken file.
    """
    folder = Path(folder)
    manifest = read_manifest(folder)
    problems = []
    found = tokenizer_fingerprint(folder / TOKENIZER)
    if found != (listed := manifest.tokenizer["fingerprint"]):
        place = folder / TOKENIZER / "tokenizer.json"
        problems.append(f"{place}: its fingerprint is {found}, and the shards were made with {listed}; {AGAIN}")
    for shard in _shards(manifest):
        for suffix, size, digest in (
            (".bin", shard.bin_size, shard.bin_hash),
            (".idx", shard.idx_size, shard.idx_hash),
        ):
            path = folder / f"{shard.path}{suffix}"
            if not path.is_file():
                problems.append(f"{path}: no such file, but {MANIFEST} lists it; {AGAIN}")
            elif (found_size := path.stat().st_size) != size:
                problems.append(f"{path}: is {found_size} bytes, and {MANIFEST} says {size}; {AGAIN}")
            elif verify and (found := hash_file(path)) != digest:
                problems.append(f"{path}: its hash is {found}, and {MANIFEST} says {digest}; {AGAIN}")
    if problems:
        raise UserError(*problems)
    return Corpus(folder, manifest)


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


def _fingerprint(split: SplitEntry) -> str:
    digest = xxhash.xxh3_128()
    for shard in split.shards:
        digest.update(f"{shard.dtype} {shard.tokens} {shard.bin_hash}\n".encode())
    return digest.hexdigest()


def _shards(manifest: Manifest) -> Iterator[ShardEntry]:
    for source in manifest.sources:
        yield from source.train.shards
        yield from source.valid.shards


def _map_shard(folder: Path, shard: ShardEntry) -> np.ndarray:
    tokens = map_tokens(folder / shard.path)
    if tokens.dtype.name != shard.dtype or len(tokens) != shard.tokens:
        found = f"{len(tokens)} tokens of {tokens.dtype.name}"
        listed = f"{shard.tokens} of {shard.dtype}"
        raise UserError(f"{folder / shard.path}.idx: has {found}, and {MANIFEST} says {listed}; {AGAIN}")
    return tokens


def _why_missing(folder: Path) -> str:
    unfinished = sorted(folder.parent.glob(f"{folder.name}.partial-*"))
    if folder.is_dir():
        what = "is unfinished" if ".partial-" in folder.name else "is no corpus"
        return f"{folder}: {what}, it has no {MANIFEST}; {MAKE}"
    if unfinished:
        return f"{folder}: no such folder, only an unfinished {unfinished[0].name}; {MAKE}"
    return f"{folder}: no such folder; {MAKE}"


def _contradictions(manifest: Manifest) -> Iterator[str]:
    """What the types of a manifest can't say: known keys, unique names, paths inside the folder, sums."""
    for key, kind in (("fingerprint", str), ("vocab_size", int), ("eos_id", int)):
        if not isinstance(manifest.tokenizer.get(key), kind):
            yield f"tokenizer.{key}: must be {'a string' if kind is str else 'a whole number'}"
    if not manifest.sources:
        yield "sources: there are none"
    names = [source.name for source in manifest.sources]
    for name in sorted({name for name in names if names.count(name) > 1}):
        yield f'sources: "{name}" is listed twice'
    for number, source in enumerate(manifest.sources):
        for split in SPLITS:
            entry: SplitEntry = getattr(source, split)
            place = f"sources[{number}].{split}"
            for key in ("documents", "tokens"):
                total = sum(getattr(shard, key) for shard in entry.shards)
                if total != getattr(entry, key):
                    yield f"{place}.{key}: is {getattr(entry, key)}, and its shards have {total}"
            for shard in entry.shards:
                path = PurePosixPath(shard.path)
                if path.is_absolute() or ".." in path.parts or "\\" in shard.path:
                    yield f'{place}: the path "{shard.path}" leaves the corpus folder'
                if shard.bin_size != shard.tokens * np.dtype(shard.dtype).itemsize:
                    yield f'{place}: "{shard.path}.bin" can\'t be {shard.bin_size} bytes'
