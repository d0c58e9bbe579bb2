"""The corpus recipe: its sources, how they are read, its tokenizer."""

from __future__ import annotations

import dataclasses
import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from gloria.config.cli import from_mapping, option, read_toml, show_value, to_mapping
from gloria.data.prepare.filters import TextRules, filter_identity, load_filter, locate_filter
from gloria.data.prepare.text import FORMATS
from gloria.data.refine.config import (
    CLEANING_KEYS,
    SECTIONS,
    DecontaminateConfig,
    DedupConfig,
    ExecutorConfig,
    PiiConfig,
    RefineConfig,
    SourceCleaning,
    VarietyConfig,
    cleaning_of,
)
from gloria.data.refine.presets import find_preset
from gloria.data.tokenizer import TokenizerConfig
from gloria.errors import UserError

MEGATRON = "megatron"
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
ABOUT_KEYS = ("origin", "licence", "description")
_RESERVED = ("tokenizer", "manifest.json")  # the corpus folder's own


@dataclass(frozen=True, kw_only=True)
class SourceConfig(TextRules, SourceCleaning):
    """One source of text: where it is, how it is read, which documents it drops, its share of the mixture."""

    name: str = option(help="names the source in logs, weights and the corpus folder")
    paths: list[str] = option(
        help="files, folders, globs, relative to the recipe; ** crosses folders, {gloria} is this package"
    )
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
    # For the model card; they make no other corpus.
    origin: str = option("", "where the text comes from: an address, a collection, an agreement")
    licence: str = option("", "of the text, for example CC-BY-SA-4.0")
    description: str = option("", "what the text is, in a sentence or two")


@dataclass(frozen=True)
class Recipe:
    """A whole corpus. Sources that come first keep a text which several of them hold."""

    source: list[SourceConfig] = option(help="at least one [[source]] section")
    tokenizer: TokenizerConfig = option()
    out: str = option("data/corpus", "folder the corpus is made in, relative to where the command runs")
    seed: int = option(0, "key of the documents' hashes, hence of order and split", minimum=0, maximum=2**64 - 1)
    max_malformed: float = option(
        0.001,
        "share of a source's documents that may be malformed before that is an error",
        minimum=0,
        maximum=1,
    )
    shard_tokens: int = option(2**28, "tokens in a shard file at most, but for a longer document", minimum=1)
    refine: RefineConfig | None = None
    variety: VarietyConfig | None = None
    dedup: DedupConfig | None = None
    decontaminate: DecontaminateConfig | None = None
    pii: PiiConfig | None = None
    executor: ExecutorConfig | None = None


class SourceFile(NamedTuple):
    """One file of a source. For token shards `path` is the prefix that .bin and .idx share."""

    path: str
    format: str


def read_recipe(path: str) -> Recipe:
    """The recipe in a TOML file, its filters with absolute paths; every problem of it in one `UserError`."""
    recipe = from_mapping(Recipe, read_toml(path), path)
    problems = []
    if not recipe.source:
        problems.append(f"{path}: source: is empty; give at least one [[source]] section")
    elif not any(source.weight for source in recipe.source):
        problems.append(f"{path}: source: every weight is 0; give at least one source a weight above 0")
    if not recipe.refine:
        given = [key for key in SECTIONS if getattr(recipe, key) is not None]
        problems += [f"{path}: {key}: has no effect without a [refine] section; add it or remove this" for key in given]
    elif problem := _preset_problem(recipe.refine.preset):
        problems.append(f"{path}: refine.preset: {problem}")
    if recipe.dedup:
        wrong = [size for size in recipe.dedup.rehydrate if not size.isdecimal() or size == "0"]
        problems += [
            f'{path}: dedup.rehydrate: "{size}" is no size of a cluster; write for example {{2 = 1}}' for size in wrong
        ]
    seen = Counter[str]()
    sources = []
    for number, source in enumerate(recipe.source):
        place = f"{path}: source[{number}]"
        # Folders of some file systems don't distinguish capital letters from small ones.
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
                for key, default in (("text_field", "text"), ("documents", "file"))
                if getattr(source, key) != default
            ]
        problems += _cleaning_problems(recipe, source, place)
        if source.filter:
            source = dataclasses.replace(source, filter=locate_filter(source.filter, Path(path).parent))
            try:
                load_filter(source.filter)
            except UserError as error:
                problems += [f"{place}.{problem}" for problem in error.problems]
        sources.append(source)
    if problems:
        raise UserError(*problems)
    return dataclasses.replace(recipe, source=sources)


def _preset_problem(name: str | None) -> str:
    try:
        find_preset(name or "none")
    except UserError as error:
        return str(error)
    return ""


def _cleaning_problems(recipe: Recipe, source: SourceConfig, place: str) -> list[str]:
    """What is wrong with a source's keys of cleaning."""
    given = list(cleaning_of(source))
    if given and source.format == MEGATRON:
        return [f"{place}.{key}: has no effect on token shards; remove it" for key in given]
    if not recipe.refine:
        return [f"{place}.{key}: has no effect without a [refine] section; add it or remove this" for key in given]
    problems = []
    if problem := _preset_problem(source.preset):
        problems.append(f"{place}.preset: {problem}")
    if source.variety and not recipe.variety:
        problems.append(f"{place}.variety: needs a [variety] section, which names texts to learn from; add it")
    for key in ("top_n_grams", "dup_n_grams"):
        wrong = [n for n in getattr(source.limits, key) or () if not n.isdecimal() or n == "0"]
        problems += [
            f'{place}.limits.{key}: "{n}" is no number of words; write for example {{5 = 0.15}}' for n in wrong
        ]
    if source.domain and not source.url_field:
        problems.append(f"{place}.domain: needs url_field, the key or column that holds a page's address; add it")
    return problems


def tokenizer_place(recipe: Recipe, where: str) -> str:
    """`tokenizer.path` as meant: a folder relative to the recipe, or else a folder or name as it stands."""
    assert recipe.tokenizer.path is not None
    beside = Path(where).parent / recipe.tokenizer.path
    return str(beside) if beside.exists() else recipe.tokenizer.path


def about_sources(recipe: Recipe) -> dict[str, Any]:
    """Origin, licence and description of the sources that have any: what the manifest keeps beside the record."""
    found = {
        source.name: {key: value for key in ABOUT_KEYS if (value := getattr(source, key))} for source in recipe.source
    }
    return {"about": told} if (told := {name: about for name, about in found.items() if about}) else {}


def to_record(recipe: Recipe) -> dict[str, Any]:
    """What of a recipe makes the corpus what it is, as the manifest keeps it.

    Where things are (out, paths, the folders of an imported tokenizer and of filters) is left out: the same documents
    make the same corpus wherever and in whatever files they are, down to the last byte of the manifest.
    """
    record = to_mapping(recipe)
    del record["out"], record["max_malformed"]
    for key in ("refine", *SECTIONS):  # prepare reads cleaned text without asking how it was cleaned
        del record[key]
    for source in record["source"]:
        for key in ("paths", *CLEANING_KEYS, *ABOUT_KEYS):
            del source[key]
        located = source.pop("filter")
        if located:
            source["filter"] = filter_identity(located)
    if recipe.tokenizer.path:
        record["tokenizer"] = {"imported": True}
    return record
