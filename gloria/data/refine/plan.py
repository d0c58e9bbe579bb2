"""Which documents each shard of cleaned text is made of, and the keys that say whether a shard is still that.

The plan depends on the recipe and on the files, never on workers. It needs nothing of datatrove, so that prepare can
check that cleaned text is of its recipe where the extra is not installed.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import xxhash

from gloria.config.cli import to_mapping
from gloria.data.prepare.filters import filter_identity
from gloria.data.prepare.inputs import find_files, text_bytes
from gloria.data.prepare.recipe import ABOUT_KEYS, MEGATRON, Recipe, SourceConfig, SourceFile
from gloria.data.prepare.scatter import Piece, cut_pieces, piece_bytes
from gloria.data.refine.config import DedupConfig, ExecutorConfig
from gloria.data.refine.presets import find_preset
from gloria.errors import UserError
from gloria.files import read_json_object

VERSION = 2  # of what cleaning does: another one makes all shards again
SHARD_BYTES = 64 << 20  # text of a shard, about
MANIFEST = "manifest.json"
AGAIN = "run python -m gloria.refine"


@dataclasses.dataclass(frozen=True)
class Shard:
    """One file of cleaned text, and the task that makes it: its number among all shards is the task's rank."""

    source: int  # its number in the recipe
    name: str  # SOURCE/00000, below the folder of cleaned text
    pieces: tuple[Piece, ...]
    key: str  # changes with everything that its documents depend on, up to deduplication
    config: SourceConfig
    base: str  # folder of the recipe, to which documents' names are relative


def make_plan(recipe: Recipe, files: Sequence[Sequence[SourceFile]], where: str) -> list[Shard]:
    """The shards of all sources in recipe order. Token shards made elsewhere have none: they are not cleaned."""
    assert recipe.refine is not None
    most = (recipe.executor or ExecutorConfig()).tasks
    base = str(Path(where).parent)
    varieties = [[_piece_record(Piece(0, file), base) for file in files] for files in variety_files(recipe, where)]
    shards = []
    for number, (source, found) in enumerate(zip(recipe.source, files)):
        if source.format == MEGATRON:
            continue
        pieces = [piece for file in found for piece in cut_pieces(number, file)]
        total = sum(map(text_bytes, found))
        count = max(1, min(most, len(pieces), -(-total // SHARD_BYTES)))
        record = [_source_record(recipe, source), varieties]
        for index, part in enumerate(_deal(pieces, count)):
            key = make_key([record, *(_piece_record(piece, base) for piece in part)])
            shards.append(Shard(number, f"{source.name}/{index:05d}", tuple(part), key, source, base))
    return shards


def variety_files(recipe: Recipe, where: str) -> list[list[SourceFile]]:
    """The files of European and of Brazilian text that the classifier learns from; none without [variety]."""
    if recipe.variety is None:
        return []
    named = {"european": recipe.variety.european, "brazilian": recipe.variety.brazilian}
    sources = [SourceConfig(name=f"variety.{name}", paths=paths) for name, paths in named.items()]
    try:
        return find_files(dataclasses.replace(recipe, source=sources), where)
    except UserError as error:
        names = {f"source[{number}].paths": f"variety.{name}" for number, name in enumerate(named)}
        problems = []
        for problem in error.problems:
            for place, name in names.items():
                problem = problem.replace(place, name)
            problems.append(problem)
        raise UserError(*problems) from None


def limits_of(recipe: Recipe, source: SourceConfig) -> Any:
    """The values of a source's quality rules."""
    assert recipe.refine is not None
    return source.limits.over(find_preset(source.preset or recipe.refine.preset))


def make_key(record: Any) -> str:
    """A hash of plain values."""
    text = json.dumps([VERSION, record], sort_keys=True, ensure_ascii=False)
    return xxhash.xxh3_128_hexdigest(text.encode("utf-8", "surrogatepass"))


def plan_key(recipe: Recipe, shards: Sequence[Shard]) -> str:
    """A hash of all that the cleaned text depends on."""
    sections = {key: getattr(recipe, key) and to_mapping(getattr(recipe, key)) for key in ("decontaminate", "pii")}
    return make_key([[shard.name, shard.key] for shard in shards] + [dedup_record(recipe.dedup), sections])


def dedup_record(config: DedupConfig | None) -> Any:
    return config and to_mapping(config)


def _source_record(recipe: Recipe, source: SourceConfig) -> dict[str, Any]:
    assert recipe.refine is not None
    record = to_mapping(source)
    for key in ("weight", "paths", "preset", "min_chars", *ABOUT_KEYS):
        del record[key]
    record["limits"] = to_mapping(limits_of(recipe, source))
    record["encoding"] = recipe.refine.encoding
    if source.filter:
        record["filter"] = filter_identity(source.filter)
    return record


def _piece_record(piece: Piece, base: str) -> list[Any]:
    # Nobody can set the time of a file's last change (ctime); its bytes are read once, by the task.
    state = os.stat(piece.file.path)
    return [os.path.relpath(piece.file.path, base), piece.start, piece.end, state.st_size, state.st_ctime_ns]


def _deal(pieces: Sequence[Piece], count: int) -> list[list[Piece]]:
    """Pieces in order into `count` parts of about the same size, none of them empty."""
    parts: list[list[Piece]] = [[]]
    total = sum(map(piece_bytes, pieces))
    done = 0
    for number, piece in enumerate(pieces):
        enough = done * count >= total * len(parts) or len(pieces) - number == count - len(parts)
        if parts[-1] and enough and len(parts) < count:
            parts.append([])
        parts[-1].append(piece)
        done += piece_bytes(piece)
    return parts


def read_refined(recipe: Recipe, shards: Sequence[Shard], where: str) -> dict[str, Any]:
    """The manifest of the cleaned text of a recipe; `UserError` unless it is whole and of this recipe and its files."""
    assert recipe.refine is not None
    path = Path(recipe.refine.out) / MANIFEST
    try:
        manifest = read_json_object(path, f"{AGAIN} {where} --force")
    except FileNotFoundError:
        raise UserError(f"{path.parent}: holds no cleaned text, and the recipe has [refine]; {AGAIN} {where}") from None
    if manifest.get("key") != plan_key(recipe, shards):
        raise UserError(f"{path.parent}: is of another recipe, or its sources have changed; {AGAIN} {where}")
    for source in manifest["sources"]:
        for shard in source["shards"]:
            file = path.parent / shard["path"]
            if not file.is_file() or file.stat().st_size != shard["size"]:
                raise UserError(f"{file}: is missing, or has another size than was written; {AGAIN} {where} --force")
    return manifest


def refined_recipe(recipe: Recipe, manifest: dict[str, Any]) -> Recipe:
    """The recipe as prepare reads it: cleaned text in place of the sources' files."""
    assert recipe.refine is not None
    folder = Path(recipe.refine.out).absolute()
    found = {
        source["name"]: [str(folder / shard["path"]) for shard in source["shards"]] for source in manifest["sources"]
    }
    sources = [
        dataclasses.replace(source, paths=found[source.name], format="jsonl.zst", text_field="text", filter=None)
        if source.name in found
        else source
        for source in recipe.source
    ]
    return dataclasses.replace(recipe, source=sources)
