"""The corpus recipe: its sources, how they are read, its tokenizer; and the files its paths stand for."""

from __future__ import annotations

import glob
import os
import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from gloria.config.cli import from_mapping, option, read_toml, show_value, to_mapping
from gloria.data.prepare.text import FORMATS, SUFFIXES, format_of
from gloria.data.tokenizer import TokenizerConfig
from gloria.errors import UserError, warn

MEGATRON = "megatron"
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
_RESERVED = ("tokenizer", "manifest.json")  # the corpus folder's own


@dataclass(frozen=True)
class SourceConfig:
    """One source of text: where it lies, how it is read, its share of the mixture."""

    name: str = option(help="names the source in logs, weights and the corpus folder")
    paths: list[str] = option(help="files, folders and globs, relative to the recipe; ** crosses folders")
    weight: float = option(
        1.0, "share of training tokens, against the other sources' weights (any sum will do)", minimum=0
    )
    format: str = option(
        "auto",
        "auto goes by each file's name; megatron adopts token shards made elsewhere with tokenizer.path",
        choices=("auto", *FORMATS, MEGATRON),
    )
    text_field: str = option("text", "key (JSON lines) or column (Parquet) that holds the text")
    documents: str = option(
        "file",
        "what a document of a .txt is: the file, or a block between blank lines",
        choices=("file", "block"),
    )
    min_chars: int = option(1, "characters after cleaning; shorter documents teach little and are dropped", minimum=1)


@dataclass(frozen=True)
class Recipe:
    """A whole corpus. Sources that come first keep a text which several of them hold."""

    source: list[SourceConfig] = option(help="at least one [[source]] section")
    tokenizer: TokenizerConfig
    out: str = option("data/corpus", "folder the corpus is made in, relative to where the command runs")
    seed: int = option(0, "key of the documents' hashes, hence of order and split", minimum=0, maximum=2**64 - 1)
    max_malformed: float = option(
        0.001,
        "share of a source's documents that may be malformed before that is an error",
        minimum=0,
        maximum=1,
    )
    shard_tokens: int = option(2**28, "tokens in a shard file at most, but for a longer document", minimum=1)


class SourceFile(NamedTuple):
    """One file of a source. For token shards `path` is the prefix that .bin and .idx share."""

    path: str
    format: str


def read_recipe(path: str) -> Recipe:
    """The recipe in a TOML file; every problem of it in one `UserError`."""
    recipe = from_mapping(Recipe, read_toml(path), path)
    problems = []
    if not recipe.source:
        problems.append(f"{path}: source: is empty; give at least one [[source]] section")
    elif not any(source.weight for source in recipe.source):
        problems.append(f"{path}: source: every weight is 0; give at least one source a weight above 0")
    seen = Counter[str]()
    for number, source in enumerate(recipe.source):
        place = f"{path}: source[{number}]"
        # Folders of some file systems don't tell capital letters from small ones.
        seen[source.name.lower()] += 1
        if not _NAME.fullmatch(source.name):
            problems.append(
                f"{place}.name: {show_value(source.name)} can't name a folder; "
                "use letters without accents, digits, dots, dashes and underscores"
            )
        elif source.name.lower() in _RESERVED:
            problems.append(f'{place}.name: "{source.name}" is a name of the corpus\'s own; choose another')
        elif seen[source.name.lower()] == 2:
            problems.append(f'{place}.name: "{source.name}" is there twice; give each source its own name')
        if not source.paths:
            problems.append(f"{place}.paths: is empty; give files, folders or globs")
        if source.format == MEGATRON and not recipe.tokenizer.path:
            problems.append(f"{place}.format: token shards need the tokenizer that made them; set tokenizer.path")
        if source.format == MEGATRON:
            problems += [
                f"{place}.{key}: has no effect on token shards; remove it"
                for key, default in (("text_field", "text"), ("documents", "file"), ("min_chars", 1))
                if getattr(source, key) != default
            ]
    if problems:
        raise UserError(*problems)
    return recipe


def find_files(recipe: Recipe, where: str) -> list[list[SourceFile]]:
    """The files of each source in recipe order, each file once, sorted by path.

    `where` is the recipe's path: the sources' paths are relative to its folder. Paths that lead to nothing
    and files of no known format are problems, all told in one `UserError`. In a folder, files whose names
    tell no format are passed over with a warning.
    """
    base = Path(where).parent
    problems: list[str] = []
    files = []
    for number, source in enumerate(recipe.source):
        place = f"{where}: source[{number}].paths"
        found: dict[str, SourceFile] = {}
        for pattern in source.paths:
            matches = _matches(str(base / pattern), source.format)
            if not matches:
                problems.append(f"{place}: {show_value(pattern)} matches no file; mend the path")
            for path in matches:
                format = format_of(path) if source.format == "auto" else source.format
                if format is None:
                    suffixes = ", ".join(SUFFIXES)
                    problems.append(f"{place}: the name of {path} tells no format; set format, or name it {suffixes}")
                elif format == MEGATRON and not os.path.isfile(f"{path}.bin"):
                    problems.append(f"{place}: there is no {path}.bin; a shard is a .bin and an .idx")
                else:
                    found.setdefault(os.path.realpath(path), SourceFile(path, format))
        files.append(sorted(found.values(), key=lambda file: file.path))
    if problems:
        raise UserError(*problems)
    return files


def _matches(path: str, format: str) -> list[str]:
    if format == MEGATRON:
        found = [f"{path}.idx"] if os.path.isfile(f"{path}.idx") else _matches(path, "")
        return sorted({name[:-4] for name in found if name.endswith((".idx", ".bin"))})
    # A name may hold brackets: what is there as it stands is no pattern.
    names = [path] if os.path.exists(path) else sorted(glob.glob(path, recursive=True))
    files = [name for name in names if os.path.isfile(name)]
    for folder in (name for name in names if os.path.isdir(name)):
        inside = sorted(glob.glob(f"{glob.escape(folder)}/**/*", recursive=True))
        unknown = [name for name in inside if os.path.isfile(name) and format_of(name) is None]
        if format == "auto" and unknown:
            warn(f"{folder}: {len(unknown)} files of no known format are passed over; the first is {unknown[0]}")
        files += [name for name in inside if os.path.isfile(name) and (format != "auto" or format_of(name))]
    return files


def tokenizer_place(recipe: Recipe, where: str) -> str:
    """`tokenizer.path` as meant: a folder relative to the recipe, or else a folder or name as it stands."""
    assert recipe.tokenizer.path is not None
    beside = Path(where).parent / recipe.tokenizer.path
    return str(beside) if beside.exists() else recipe.tokenizer.path


def to_record(recipe: Recipe) -> dict[str, Any]:
    """What of a recipe makes the corpus what it is, as the manifest keeps it.

    Where things lie (out, paths, the folder of an imported tokenizer) is left out: the same documents make
    the same corpus wherever and in whatever files they are, down to the last byte of the manifest.
    """
    record = to_mapping(recipe)
    del record["out"], record["max_malformed"]
    for source in record["source"]:
        del source["paths"]
    if recipe.tokenizer.path:
        record["tokenizer"] = {"imported": True}
    return record
