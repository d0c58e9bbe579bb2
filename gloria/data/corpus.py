"""A corpus folder: token shards by source, the tokenizer, and a manifest that lists every file with size and hash.

`manifest.json` is written last. A folder without one, or whose files disagree with it, is refused with the
name of the file. The checks of an opened corpus:

    manifest.json     every byte, by the hash in its "seal"
    tokenizer/        every byte of each file; symbolic links, pipes and the like are refused
    *.bin, *.idx      presence and size (symbolic links are followed: shards may lie on another disk)
    *.bin             16 blocks of 64 KB, evenly spread: finds a shard that is zeroed or exchanged, and damage to any
                      fifteenth of it; one flipped bit in a large shard is found with `verify` alone
    with verify       every byte of every file

A token id outside the vocabulary is found when its window is read (gloria/data/stream.py). Manifests that were made
before there was a seal, or hashes of blocks and of all of the tokenizer's files, are read without these checks, and
`Corpus.warnings` reports it.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import xxhash

from gloria.config.cli import from_mapping, option
from gloria.data.shards import ShardEntry, hash_sample, map_tokens
from gloria.data.stream import TokenStream
from gloria.errors import UserError
from gloria.files import hash_file, open_plain, parse_json_object, read_bounded, to_json, write_whole

FORMAT = 1
MANIFEST = "manifest.json"
TOKENIZER = "tokenizer"
SPLITS = ("train", "valid")
AGAIN = "prepare the corpus again"
MAX_TOKENIZER_BYTES = 1 << 28  # the largest published ones have 35 MB
MAKE = "make one with python -m gloria.prepare"


@dataclass(frozen=True)
class SplitEntry:
    """The documents of one split of a source; `bytes` and `words` are of the text, 0 words if not counted."""

    documents: int = option(minimum=0)
    tokens: int = option(minimum=0)
    bytes: int = option(minimum=0)
    words: int = option(minimum=0)
    shards: list[ShardEntry] = option()


@dataclass(frozen=True)
class SourceEntry:
    """One source of the recipe; `weight` is its share of training tokens before normalisation."""

    name: str
    weight: float = option(minimum=0)
    train: SplitEntry = option()
    valid: SplitEntry = option()
    counts: dict[str, int] = option()  # documents read, kept, and dropped by reason


@dataclass(frozen=True)
class TokenizerEntry:
    """The tokenizer of all sources; `vocab_size` is the highest id + 1."""

    fingerprint: str
    vocab_size: int = option(minimum=1, maximum=2**31 - 1)
    eos_id: int = option(minimum=0)
    pad_id: int | None = option(None, minimum=0)


@dataclass(frozen=True)
class Manifest:
    """What `manifest.json` holds; sources in the recipe's order."""

    format: int
    tokenizer: TokenizerEntry
    sources: list[SourceEntry]
    recipe: dict  # what the corpus was made by, as plain JSON
    tokenizer_files: dict[str, str] = option({})  # xxh3-128 of each file in tokenizer/; manifests of old have none
    seal: str = option("")  # xxh3-128 of this file with an empty seal; manifests of old have none


@dataclass(frozen=True)
class Corpus:
    """A corpus that `open_corpus` has checked."""

    folder: Path
    manifest: Manifest

    @property
    def names(self) -> list[str]:
        return [source.name for source in self.manifest.sources]

    @property
    def weights(self) -> dict[str, float]:
        return {source.name: source.weight for source in self.manifest.sources}

    @property
    def warnings(self) -> list[str]:
        """A line about what could not be checked, for a corpus that an older version made."""
        if self.manifest.seal:
            return []
        unseen = f"damage to {MANIFEST}, {TOKENIZER}/ and shards of the right size"
        return [f"{self.folder}: an older version made it, so {unseen} may not be noticed; {AGAIN} to have it sealed"]

    @property
    def tokenizer_folder(self) -> Path:
        return self.folder / TOKENIZER

    def copy_tokenizer(self, folder: Path) -> None:
        """Put the tokenizer's files into `folder`; one that is there, even as a symbolic link, is replaced."""
        if os.path.lexists(folder) and (folder.is_symlink() or not folder.is_dir()):
            raise UserError(f"{folder}: is not a folder, and the tokenizer is written there; move it away")
        folder.mkdir(exist_ok=True)
        for name in self.manifest.tokenizer_files or sorted(os.listdir(self.tokenizer_folder)):
            write_whole(folder / name, read_bounded(self.tokenizer_folder / name, MAX_TOKENIZER_BYTES))

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
        places = [f'{self.folder / shard.path}.bin: source "{name}"' for shard in entry.shards]
        shards = [_map_shard(self.folder, shard) for shard in entry.shards]
        return TokenStream(shards, _fingerprint(entry), self.manifest.tokenizer.vocab_size, places)


def source_fingerprint(entry: SourceEntry) -> str:
    """xxh3-128 over the training shards, in hexadecimal: it changes with any token and with their order."""
    return _fingerprint(entry.train)


def write_manifest(folder: str | os.PathLike[str], manifest: Manifest) -> None:
    """Hash the tokenizer's files and write `manifest.json`, sealed, durable and by rename: whole or not at all."""
    folder = Path(folder)
    files = {path.name: hash_file(path) for path in sorted((folder / TOKENIZER).iterdir())}
    data = to_json(asdict(replace(manifest, tokenizer_files=files, seal="")))
    write_whole(folder / MANIFEST, data.replace(_seal_line(""), _seal_line(xxhash.xxh3_128_hexdigest(data))))


def read_manifest(folder: str | os.PathLike[str]) -> Manifest:
    """The checked manifest of a corpus; `UserError` has every problem, each with its place in the file."""
    path = Path(folder) / MANIFEST
    if not os.path.lexists(path):
        raise UserError(_why_missing(Path(folder)))
    try:
        data = read_bounded(path)
        values = parse_json_object(data, path)
    except UserError as error:
        raise UserError(f"{error}; {AGAIN}") from None
    if values.get("format") != FORMAT:
        raise UserError(f"{path}: format is {values.get('format')}, and this version reads {FORMAT}; {AGAIN}")
    manifest = from_mapping(Manifest, values, str(path))
    if (seal := manifest.seal) and xxhash.xxh3_128_hexdigest(data.replace(_seal_line(seal), _seal_line(""))) != seal:
        raise UserError(f"{path}: has changed since it was made; copy it again from where it was made, or {AGAIN}")
    problems = [f"{path}: {problem}; {AGAIN}" for problem in _contradictions(manifest)]
    if problems:
        raise UserError(*problems)
    return manifest


def open_corpus(folder: str | os.PathLike[str], *, verify: bool = False) -> Corpus:
    """A corpus that has passed the checks above; `UserError` has one line for each broken file."""
    folder = Path(folder)
    manifest = read_manifest(folder)
    problems = []
    tokenizer_files = {"tokenizer.json": manifest.tokenizer.fingerprint, **manifest.tokenizer_files}
    for name, listed in tokenizer_files.items():
        path = folder / TOKENIZER / name
        try:
            found = hash_file(open_plain(path))
        except UserError as error:
            problems.append(f"{error}; {AGAIN}")
            continue
        if found != listed:
            problems.append(f"{path}: its hash is {found}, and {MANIFEST} says {listed}; {AGAIN}")
    for shard in _shards(manifest):
        for suffix, size, whole, sample in (
            (".bin", shard.bin_size, shard.bin_hash, shard.bin_sample),
            (".idx", shard.idx_size, shard.idx_hash, ""),
        ):
            path = folder / f"{shard.path}{suffix}"
            hash_content, listed = (hash_file, whole) if verify else (hash_sample, sample)
            if not path.is_file():
                problems.append(f"{path}: no such file, but {MANIFEST} lists it; {AGAIN}")
            elif (found_size := path.stat().st_size) != size:
                problems.append(f"{path}: is {found_size} bytes, and {MANIFEST} says {size}; {AGAIN}")
            elif listed and (found := hash_content(path)) != listed:
                which = "hash" if verify else "sample's hash"
                problems.append(f"{path}: its {which} is {found}, and {MANIFEST} says {listed}; {AGAIN}")
    if problems:
        raise UserError(*problems)
    return Corpus(folder, manifest)


def _seal_line(seal: str) -> bytes:
    """The line of `manifest.json` that holds the seal; keys of one space belong to the outermost object."""
    return f'\n "seal": "{seal}",\n'.encode(errors="replace")


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
        what = "is unfinished" if ".partial-" in folder.name else "is not a corpus"
        return f"{folder}: {what}: it has no {MANIFEST}; {MAKE}"
    if unfinished:
        return f"{folder}: no such folder, only an unfinished {unfinished[0].name}; {MAKE}"
    return f"{folder}: no such folder; {MAKE}"


def _contradictions(manifest: Manifest) -> Iterator[str]:
    """What the types of a manifest can't say: known keys, unique names, paths inside the folder, sums."""
    if manifest.tokenizer.eos_id >= manifest.tokenizer.vocab_size:
        yield "tokenizer.eos_id: must be below vocab_size"
    for name in manifest.tokenizer_files:
        if "/" in name or name in ("", ".", "..") or not name.isprintable():
            yield f"tokenizer_files: {name!r} is not a file name"
    if not manifest.sources:
        yield "sources: there are none"
    names = [source.name for source in manifest.sources]
    for name in sorted(set(names)):
        if names.count(name) > 1:
            yield f'sources: "{name}" is listed twice'
        if not name.isprintable():  # half of a surrogate pair can neither be printed nor hashed
            yield f"sources: {name!r} is not a source name"
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
                if path.is_absolute() or ".." in path.parts or "\\" in shard.path or not shard.path.isprintable():
                    yield f"{place}: the path {shard.path!r} leaves the corpus folder"
                if shard.bin_size != shard.tokens * np.dtype(shard.dtype).itemsize:
                    yield f'{place}: "{shard.path}.bin" can\'t be {shard.bin_size} bytes'


def describe_contamination(trainer: Mapping[str, Any], tasks: Sequence[str] | None = None) -> list[str]:
    """What `gloria.refine` found of evaluation data in the text that a checkpoint was trained on, a line a task.

    `trainer` is the checkpoint's state, which names the corpus. Without `tasks`, all tasks that were looked for. No
    line where the corpus is not here any more, or its text was not checked.
    """
    folder = trainer.get("recipe", {}).get("data", {}).get("corpus")
    if not folder or not (Path(folder) / MANIFEST).exists():
        return []
    found = read_manifest(folder).recipe.get("contamination", {})
    lines = []
    for task in tasks if tasks is not None else found:
        if task in found:
            count = found[task]
            what = f"{count['documents']:,} documents with one of its {count['texts']:,} texts were left out"
            lines.append(f"training   {task}: {what}")
        elif found:
            lines.append(f"training   {task}: its texts were not looked for in the training text")
    return lines
