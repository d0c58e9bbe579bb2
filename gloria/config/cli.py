"""One command line for all commands: a dataclass of options, a recipe in TOML where there is one, flags over it.

`parse` reads a TOML file into a dataclass tree and lays flags over it (`--train.steps 200`,
`--data.weights.ptwiki 0.2`). Flags are written in kebab or snake case. Problems are lines `FILE: key: what; remedy`
or `--flag: what; remedy`, all at once. Imports no torch, so that a recipe is checked at once.
"""

from __future__ import annotations

import os
import textwrap
import typing
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, TypeVar

from gloria.config.schema import (
    Report,
    build,
    default_of,
    flag_name,
    from_mapping,
    is_section,
    keys,
    leaves,
    members,
    nearest_key,
    option,
    required,
    suggest,
    to_mapping,
    type_name,
)
from gloria.config.toml import find_recipe, parse_toml, read_toml, show_value, write_toml
from gloria.errors import UserError

__all__ = ["Parsed", "from_mapping", "option", "parse", "read_toml", "show_value", "suggest", "to_mapping", "to_toml"]

C = TypeVar("C")
Problems = Iterable[tuple[Sequence[str], str]]  # (the keys involved, what is wrong and what to do)

CONFIG_FLAG = "--config"
_TEXT = {str, Path}
_PLACEHOLDERS = {Path: "PATH", int: "N", str: "TEXT"}


@dataclass(frozen=True)
class Parsed(Generic[C]):
    """What `parse` read: the checked options, and where each key was given."""

    config: C
    where: str  # the recipe's file as the user named it; empty for a command without recipe
    given: dict[str, str]  # "train.steps" -> "--train.steps", for the keys that a flag gave


def parse(
    cls: type[C],
    argv: Sequence[str] | None,
    *,
    prog: str,
    description: str = "",
    recipe: bool = True,
    default_config: str | os.PathLike[str] | None = None,
    file_keys: type | None = None,
    rivals: Sequence[tuple[str, str]] = (),
    check: Callable[[C], Problems] = lambda config: (),
    later: Callable[[Parsed[C]], object] = lambda parsed: None,
) -> Parsed[C]:
    """The recipe in `--config FILE` (or `default_config`) with flags laid over it, checked as one.

    Without `recipe` there are only flags, and words without a flag for the `positional` options. `rivals` are pairs of
    keys of which one as a flag clears the other of the file. `check` yields impossible combinations as (keys, what):
    reported at the first key, unless one of them is reported already. `later` is what the command does next with the
    options: where something is wrong, it is tried as well and the problems of its `UserError` are added. Both
    get the default, or None, in the place of a wrong value. `--help` prints every option (and the keys
    of a file that the command reads, `file_keys`) and exits.
    """
    flags = _read_flags(cls, list(argv or ()), recipe)
    if flags.help:
        print(_help_text(cls, prog, description, recipe, default_config, file_keys))
        raise SystemExit(0)
    path = find_recipe(str(flags.config)) if flags.config is not None else default_config
    where = str(path) if path is not None else prog if recipe else ""
    try:
        values = read_toml(path) if path is not None else {}
    except UserError as error:
        raise UserError(*flags.problems, *error.problems) from None
    for key, rival in [pair for a, b in rivals for pair in ((a, b), (b, a))]:
        if key in flags.given and rival not in flags.given:
            _remove(values, rival.split("."))
    for parts, value in flags.overrides.values():
        _put(values, parts, value)
    report = Report(where, flags.given, flags.problems, leaves(cls))
    config = build(cls, values, "", report)
    for involved, what in check(config):
        if not any(bad == key or bad.startswith(f"{key}.") for bad in report.bad for key in involved):
            report.add(involved[0], what)
    parsed = Parsed(config, where, flags.given)
    if report.problems:
        raise UserError(*report.problems, *_problems_beside(report.bad, lambda: later(parsed)))
    return parsed


def _problems_beside(bad: Sequence[str], action: Callable[[], object]) -> list[str]:
    """The problems that `action` meets, without those that come from a value already known to be wrong."""
    try:
        action()
    except UserError as error:
        return [line for line in error.problems if not any(key in line or flag_name(key) in line for key in bad)]
    return []


def to_toml(instance: Any) -> str:
    """A dataclass tree as TOML that reads back to the same tree; a key that is not set is a comment."""
    return write_toml(to_mapping(instance)).strip() + "\n"


@dataclass
class _Flags:
    """The command line as it was read."""

    config: str | None = None
    help: bool = False
    given: dict[str, str] = field(default_factory=dict)  # key -> flag
    overrides: dict[str, tuple[list[str], Any]] = field(default_factory=dict)  # key -> (its path, value)
    problems: list[str] = field(default_factory=list)


def _read_flags(cls: type, words: list[str], recipe: bool) -> _Flags:
    flags = _Flags()
    places = [
        (key, item.metadata["positional"]) for key, (item, _) in keys(cls).items() if "positional" in item.metadata
    ]
    while words:
        word = words.pop(0)
        flag, has_value, text = word.partition("=")
        if flag in ("--help", "-h"):
            flags.help = True
        elif not flag.startswith("--") and places:
            key, name = places[0]
            flags.given[key] = name
            if typing.get_origin(keys(cls)[key][1]) is list:  # it takes all such words
                flags.overrides.setdefault(key, ([key], []))[1].append(word)
            else:
                flags.overrides[key] = ([places.pop(0)[0]], word)
        elif not flag.startswith("--"):
            flags.problems.append(f"{word}: is no flag; flags begin with --")
        else:
            _read_flag(cls, flag, text if has_value else None, words, flags, recipe)
    flags.given.pop(CONFIG_FLAG, None)
    return flags


def _read_flag(cls: type, flag: str, text: str | None, words: list[str], flags: _Flags, recipe: bool) -> None:
    """One flag: its value is `text` (--flag=text) or else taken from the front of `words`."""
    is_config = recipe and flag == CONFIG_FLAG
    parts, kind = ([CONFIG_FLAG], str) if is_config else _locate(cls, flag.removeprefix("--"))
    key, texts = ".".join(parts), [] if text is None else [text]
    # A pair of paths is two words; other lists are one, in TOML or with commas.
    items = typing.get_args(kind) if typing.get_origin(kind) is tuple else ()
    takes = len(items) if items and _TEXT.issuperset(items) and text is None else 1
    if text is None:
        if kind is bool and words[:1] not in (["true"], ["false"]):
            texts = ["true"]
        while words and not words[0].startswith("--") and len(texts) < takes:
            texts.append(words.pop(0))
    if kind is None:
        flags.problems.append(f"{flag}: {_unknown_flag(cls, flag.removeprefix('--'), recipe)}")
    elif not texts:
        flags.problems.append(f"{flag}: needs a value; write {flag} VALUE")
    elif key in flags.given:
        flags.problems.append(f"{flag}: given twice; give it once")
    elif is_config:
        flags.config = texts[0]
    else:
        flags.overrides[key] = (parts, texts if takes > 1 else _flag_value(texts[0], kind))
    if kind is not None:
        flags.given[key] = flag


def _locate(cls: type, name: str) -> tuple[list[str], Any]:
    """The path of a dotted flag in the tree and its type, which is None where there is no such key.

    A dash in a flag stands for the underscore of a field; the key of a table is taken as it is, dots and all.
    """
    parts: list[str] = []
    kind: Any = cls
    rest = name
    while rest:
        if typing.get_origin(kind) is dict:
            return [*parts, rest], typing.get_args(kind)[1]
        head, _, rest = rest.partition(".")
        parts.append(head.replace("-", "_"))
        found = keys(kind).get(parts[-1]) if is_section(kind) else None
        if found is None:
            return parts, None
        possible = members(found[1])
        kind = possible[0] if len(possible) == 1 else found[1]
    return parts, None if is_section(kind) else kind


def _unknown_flag(cls: type, name: str, recipe: bool) -> str:
    known = leaves(cls)
    if any(key.startswith(f"{name}.") for key in known):
        return f"is a section; set one of its keys, --{name}.KEY VALUE"
    near = nearest_key(name.replace("-", "_"), [*known, *([CONFIG_FLAG.removeprefix("--")] if recipe else [])], known)
    return f"unknown flag; did you mean {flag_name(near)}?" if near else "unknown flag; see --help"


def _flag_value(text: str, kind: Any) -> Any:
    """A flag's text read as TOML, except for a field of text; what is no TOML value is a string.

    `1e9` is a whole number too, and a list may be given without its brackets.
    """
    possible = members(kind)
    if _TEXT.issuperset(possible):
        return text
    bare_list = typing.get_origin(possible[0]) in (list, tuple) and not text.startswith("[")
    try:
        table = parse_toml(f"value = [{text}]" if bare_list else f"value = {text}")
    except ValueError:
        return text
    value = table["value"] if len(table) == 1 else text
    if isinstance(value, float) and value.is_integer() and int in possible and float not in possible:
        return int(value)
    return value


def _put(values: dict[str, Any], parts: list[str], value: Any) -> None:
    for part in parts[:-1]:
        values = values.setdefault(part, {})
        if not isinstance(values, dict):  # the file has a plain value for a section: reported when it is checked
            return
    values[parts[-1]] = value


def _remove(values: dict[str, Any], parts: list[str]) -> None:
    for part in parts[:-1]:
        values = values.get(part, {})
        if not isinstance(values, dict):
            return
    values.pop(parts[-1], None)


def _help_text(cls: type, prog: str, description: str, recipe: bool, default: Any, file_keys: type | None) -> str:
    usage = [
        item.metadata.get("positional") or f"{flag_name(key)} {_PLACEHOLDERS.get(kind, 'VALUE')}"
        for key, (item, kind) in keys(cls).items()
        if required(item) and not is_section(kind)
    ]
    usage += [f"[{CONFIG_FLAG} FILE] [--section.key VALUE ...]" if recipe else "[--flag VALUE ...]"]
    lines = [f"usage: {prog} {' '.join(usage)}", ""]
    lines += [*textwrap.wrap(description, 100), ""] if description else []
    if recipe:
        lines += [f"  {CONFIG_FLAG} FILE", f"      the recipe, in TOML{f' (default {default})' if default else ''}"]
        lines += ["", "Each key of the recipe is also a flag, and a flag wins over the file:"]
    lines += _help_lines(cls, "")
    if file_keys:
        lines += ["", "Keys of the file:", *_help_lines(file_keys, "", in_file_only=True)]
    return "\n".join(lines)


def _help_lines(cls: type, prefix: str, *, in_file_only: bool = False) -> list[str]:
    plain: list[str] = []
    sections: list[str] = []
    for key, (item, kind) in keys(cls).items():
        inner, path = members(kind)[0], f"{prefix}{key}"
        origin, arguments = typing.get_origin(inner), typing.get_args(inner)
        if is_section(inner):
            sections += ["", f"[{path}] {_first_line(inner)}"]
            sections += _help_lines(inner, "" if in_file_only else f"{path}.", in_file_only=in_file_only)
            continue
        if origin is list and is_section(arguments[0]):
            sections += ["", f"[[{path}]] {_first_line(arguments[0])} (in the file only)"]
            sections += _help_lines(arguments[0], "", in_file_only=True)
            continue
        name, shown = (f"{path}.NAME", arguments[1]) if origin is dict else (path, kind)
        choices = ", ".join(map(show_value, item.metadata.get("choices", ())))
        default = default_of(item)
        state = "required" if required(item) else "optional" if default is None else f"default {show_value(default)}"
        name = item.metadata.get("positional") or (name if in_file_only else flag_name(name))
        plain.append(f"  {name}  ({choices or type_name(shown)}; {state})")
        indent = " " * 6
        plain += textwrap.wrap(item.metadata.get("help", ""), 100, initial_indent=indent, subsequent_indent=indent)
    return plain + sections


def _first_line(cls: type) -> str:
    return (cls.__doc__ or "").strip().partition("\n")[0]
