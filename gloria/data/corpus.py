"""A corpus folder: token shards by source, the tokenizer, and a manifest that vouches for all of them.

`manifest.json` is written last and lists every file with its size and hash. A folder without one, or whose
files disagree with it, is refused by the name of the file: a corpus is whole or it is not there.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path, PurePosixPath

import numpy as np
import xxhash

from gloria.config.cli import from_mapping, option
from gloria.data.shards import (
    ShardEntry,
    map_tokens,
)
from gloria.data.stream import TokenStream
from gloria.data.tokenizer import tokenizer_fingerprint
from gloria.errors import UserError
from gloria.files import hash_file, read_json_object, write_whole

FORMAT = 1
MANIFEST = "manifest.json"
TOKENIZER = "tokenizer"
SPLITS = ("train", "valid")
AGAIN = "prepare the corpus again"
MAKE = "make one with python -m gloria.prepare"


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
