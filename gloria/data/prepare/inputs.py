"""The files that a recipe's paths stand for, and whether they are still those that a corpus was made from."""

from __future__ import annotations

import fnmatch
import glob
import json
import os
import stat
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from gloria.config.cli import show_value
from gloria.config.toml import PACKAGE
from gloria.data.prepare.recipe import MEGATRON, Recipe, SourceConfig, SourceFile
from gloria.data.prepare.text import SUFFIXES, TEXT_PER_BYTE, format_of
from gloria.data.prepare.workers import Workers
from gloria.errors import UserError, warn
from gloria.files import hash_file, read_json_object, write_whole

INPUTS = "inputs.json"  # in the corpus folder
MOST_BYTES = 1 << 30  # of it: a line a file of the sources
SHOWN = 3


@dataclass
class Search:
    """What a search of one source's paths met beside the files it gave."""

    unreadable: list[str] = field(default_factory=list)  # "PATH: why"
    hidden: set[str] = field(default_factory=set)
    special: set[str] = field(default_factory=set)  # pipes, sockets, devices
    unknown: set[str] = field(default_factory=set)  # in folders: of no known format
    visited: set[tuple[str, ...]] = field(default_factory=set)  # folders and the pattern searched for in them


def find_files(recipe: Recipe, where: str) -> list[list[SourceFile]]:
    """The files of each source in recipe order, each file once, sorted by path.

    `where` is the recipe's path: the sources' paths are relative to its folder. Paths that lead to nothing, folders
    that can't be read, links to nothing and files of no known format are problems, all in one `UserError`. Hidden
    files, pipes and the like, and in folders files whose names have no known format are left out with a warning.
    """
    base, problems = Path(where).parent, list[str]()
    files = [
        source_files(source, base, f"{where}: source[{number}].paths", problems)
        for number, source in enumerate(recipe.source)
    ]
    if problems:
        raise UserError(*problems)
    return files


def source_files(source: SourceConfig, base: Path, place: str, problems: list[str]) -> list[SourceFile]:
    """`find_files` of one source, its paths relative to `base`; what is wrong goes to `problems`, behind `place`."""
    found: dict[str, SourceFile] = {}
    search = Search()
    for pattern in source.paths:
        matches = _matches(base / pattern.replace("{gloria}", str(PACKAGE)), source.format, search)
        if not matches and not search.unreadable:
            problems.append(f"{place}: {show_value(pattern)} matches no file; correct the path")
        for path in matches:
            format = format_of(path) if source.format == "auto" else source.format
            if format is None:
                remedy = f"set format, or name it {', '.join(end for end in SUFFIXES if end.count('.') == 1)}"
                problems.append(f"{place}: the name of {path} has no known format; {remedy}")
            elif format == MEGATRON and not os.path.isfile(f"{path}.bin"):
                problems.append(f"{place}: there is no {path}.bin; a shard is a .bin and an .idx")
            else:
                found.setdefault(os.path.realpath(path), SourceFile(path, format))
    problems += [f"{place}: {problem}" for problem in sorted(set(search.unreadable))]
    for paths, what in (
        (search.hidden, "hidden files or folders"),
        (search.special, "pipes, sockets or devices"),
        (search.unknown, "files of no known format"),
    ):
        if paths:
            warn(f'source "{source.name}": left out {len(paths)} {what}; the first is {min(paths)}')
    return sorted(found.values(), key=lambda file: file.path)


def _matches(pattern: Path, format: str, search: Search) -> list[str]:
    if format == MEGATRON and os.path.isfile(f"{pattern}.idx"):
        return [str(pattern)]
    files = []
    start, parts = pattern.anchor, pattern.relative_to(pattern.anchor).parts
    if os.path.lexists(pattern):  # a name may hold brackets: what is there as it stands is no pattern
        start, parts = str(pattern), ()
    for path, is_inside in _walk(start, parts, search):
        is_known = path.endswith((".idx", ".bin")) if format == MEGATRON else format != "auto" or bool(format_of(path))
        if is_known or (not is_inside and format != MEGATRON):
            files.append(path)
        else:
            search.unknown.add(path)
    return sorted({path[:-4] for path in files}) if format == MEGATRON else sorted(set(files))


def _walk(start: str, parts: Sequence[str], search: Search, is_inside: bool = False) -> Iterator[tuple[str, bool]]:
    """The files that `parts` of a pattern match from `start` on, and all files in the folders they match (those are
    inside). As a shell does it: `*` matches no hidden name, `**` any number of folders.
    """
    if not parts:
        mode = _mode(start, os.stat, search)
        if mode is None:
            search.unreadable.append(f"{start} is a link to nothing; remove it, or bring back its file")
        elif stat.S_ISDIR(mode):
            yield from _walk(start, ("**", "*"), search, True)
        elif stat.S_ISREG(mode):
            yield start, is_inside
        elif mode:
            search.special.add(start)
        return
    part, rest = parts[0], parts[1:]
    if not glob.has_magic(part):
        if _mode(os.path.join(start, part), os.lstat, search):
            yield from _walk(os.path.join(start, part), rest, search, is_inside)
        return
    key = (os.path.realpath(start), *parts)
    if key in search.visited:  # by a link, which may lead round in a circle
        return
    search.visited.add(key)
    if part == "**":
        yield from _walk(start, rest or ("*",), search, is_inside)
    try:
        names = sorted(os.listdir(start or "."))
    except NotADirectoryError:
        return
    except OSError as error:
        search.unreadable.append(f"{start} can't be read ({error.strerror}); make it readable, or leave it out")
        return
    for name in names:
        path = os.path.join(start, name)
        if part == "**" and not os.path.isdir(path):
            continue
        if part == "**" or fnmatch.fnmatchcase(name, part):
            if name.startswith(".") and not part.startswith("."):
                search.hidden.add(path)
            else:
                yield from _walk(path, parts if part == "**" else rest, search, is_inside)


def _mode(path: str, look: Callable[[str], os.stat_result], search: Search) -> int | None:
    """What kind of file is at `path`; None where nothing is, 0 where that can't be seen."""
    try:
        return look(path).st_mode
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        search.unreadable.append(f"{path} can't be read ({error.strerror}); make it readable, or leave it out")
        return 0


def input_paths(file: SourceFile) -> list[str]:
    """The paths of a source's file: two for token shards."""
    return [f"{file.path}.bin", f"{file.path}.idx"] if file.format == MEGATRON else [file.path]


def text_bytes(file: SourceFile) -> int:
    """About how many bytes of text a file holds: it may be compressed, or tokens."""
    size = os.path.getsize(input_paths(file)[0])
    return size * TEXT_PER_BYTE.get(file.format.rpartition(".")[2], 1)


class InputState(NamedTuple):
    """What a file was when it was read. Nobody can set the time of a file's last change (ctime)."""

    size: int
    changed: int  # ns
    hash: str  # xxh3-128 of its bytes


class SourceRecord(NamedTuple):
    """What the corpus before says of a source, so that the next one can take it over."""

    key: str  # of what its documents depend on
    counts: dict[str, int]  # of its documents as they were read
    documents: str  # xxh3-128 of its list of documents
    kept: list[int]  # `Survey.identity`: which of them no source before it holds


def input_state(path: str) -> InputState:
    """The state of the file at `path`."""
    before = os.stat(path)
    try:
        return InputState(before.st_size, before.st_ctime_ns, hash_file(path))
    except OSError as error:
        raise UserError(f"{path}: can't be read ({error.strerror}); check the file") from None


def read_states(
    files: Sequence[Sequence[SourceFile]], where: str, pool: Workers, recorded: Mapping[str, InputState]
) -> dict[str, InputState]:
    """The state of every file by its key of `input_keys`. Those are not read again that are as `recorded`."""
    keys = input_keys(files, where)
    unknown = [key for key, path in keys.items() if not _is_as_recorded(path, recorded.get(key))]
    read = dict(zip(unknown, pool.map(input_state, [keys[key] for key in unknown], "hashing sources")))
    return {key: read[key] if key in read else recorded[key] for key in keys}


def _is_as_recorded(path: str, state: InputState | None) -> bool:
    found = os.stat(path)
    return state is not None and (found.st_size, found.st_ctime_ns) == (state.size, state.changed)


def input_keys(files: Sequence[Sequence[SourceFile]], where: str) -> dict[str, str]:
    """The paths of all files by source and path relative to the recipe, which stay when its folder is moved."""
    base = Path(where).parent
    return {
        f"{number} {os.path.relpath(path, base)}": path
        for number, source in enumerate(files)
        for file in source
        for path in input_paths(file)
    }


def differences(recorded: Mapping[str, InputState], files: Sequence[Sequence[SourceFile]], where: str) -> list[str]:
    """What has become of the files since: `PATH is new`, `is gone` or `has changed`.

    A file's bytes are read again only if its time of change is another.
    """
    found = input_keys(files, where)
    lines = [f"{found[key]} is new" for key in found if key not in recorded]
    for key, state in recorded.items():
        if key not in found or not os.path.exists(found[key]):
            lines.append(f"{key.partition(' ')[2]} is gone")
        elif os.stat(found[key]).st_ctime_ns != state.changed and (
            os.path.getsize(found[key]) != state.size or hash_file(found[key]) != state.hash
        ):
            lines.append(f"{found[key]} has changed")
    return lines


def shorten(lines: Sequence[str]) -> str:
    """The first of many in one line."""
    return ", ".join(lines[:SHOWN]) + (f" and {len(lines) - SHOWN} more" if len(lines) > SHOWN else "")


def write_inputs(path: Path, states: Mapping[str, InputState], sources: Mapping[str, SourceRecord]) -> None:
    """Write `inputs.json`. It depends on paths and times; the manifest beside it depends on documents only."""
    values = {
        "files": {key: list(state) for key, state in states.items()},
        "sources": {name: record._asdict() for name, record in sources.items()},
    }
    write_whole(path, (json.dumps(values, indent=0) + "\n").encode(), durable=False)


def read_inputs(folder: Path) -> tuple[dict[str, InputState], dict[str, SourceRecord]] | None:
    """What `write_inputs` wrote in a folder, None where it is missing. Files of old hold no records of sources."""
    path = folder / INPUTS
    remedy = "remove it, or --force to make the corpus again"
    try:
        values = read_json_object(path, remedy, MOST_BYTES)
        files = values.get("files", {} if "sources" in values else values)
        return (
            {key: InputState(*state) for key, state in files.items()},
            {name: SourceRecord(**record) for name, record in values.get("sources", {}).items()},
        )
    except FileNotFoundError:
        return None
    except (TypeError, AttributeError):
        raise UserError(f"{path}: is not the list that was written; {remedy}") from None
