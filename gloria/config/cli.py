"""Recipes (TOML) and flags in one tree, one checker and one error format.

`parse` reads a TOML file into a dataclass tree and lays flags over it (`--train.steps 200`,
`--data.weights.ptwiki 0.2`). Problems are lines `FILE: key: what; remedy` or `--flag: what; remedy`, all at
once. Imports no torch, so that a recipe is checked in a blink.
"""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import os
import re
import textwrap
import tomllib
import typing
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, NoReturn, TypeVar

from gloria.config.schema import (
    Report,
    build,
    default_of,
    dotted_keys,
    flatten,
    from_mapping,
    keys,
    members,
    option,
    required,
    suggest,
    to_mapping,
    type_name,
)
from gloria.config.toml import read_toml, show_value, write_toml
from gloria.errors import UserError

__all__ = [
    "Parsed",
    "argument_parser",
    "from_mapping",
    "option",
    "parse",
    "read_toml",
    "show_value",
    "suggest",
    "to_mapping",
    "to_toml",
]

C = TypeVar("C")

CONFIG_FLAG = "--config"


@dataclass(frozen=True)
class Parsed(Generic[C]):
    """What `parse` read: the checked recipe, and where each key was given."""

    config: C
    where: str  # the file as the user named it
    given: dict[str, str]  # "train.steps" -> "--train.steps" (a flag) or the file's name


def parse(
    cls: type[C],
    argv: Sequence[str],
    *,
    prog: str,
    description: str = "",
    default_config: str | os.PathLike[str] | None = None,
    rivals: Sequence[tuple[str, str]] = (),
    check: Callable[[C], Iterable[tuple[Sequence[str], str]]] = lambda config: (),
) -> Parsed[C]:
    """The recipe in `--config FILE` (or `default_config`) with flags laid over it, checked as one.

    `rivals` are pairs of keys of which one as a flag clears the other of the file. `check` yields impossible
    combinations as (keys, what): told at the first key, unless one of them is reported already. In what it
    sees, a wrong value stands at its default, or at None where it has none. `--help` prints every field and
    exits.
    """
    flags = _read_flags(cls, argv)
    if flags.help:
        print(_help_text(cls, prog, description, default_config))
        raise SystemExit(0)
    path = flags.config if flags.config is not None else default_config
    where = str(path) if path is not None else prog
    try:
        values = read_toml(path) if path is not None else {}
    except UserError as error:
        raise UserError(*flags.problems, *error.problems) from None
    for key, rival in [pair for a, b in rivals for pair in ((a, b), (b, a))]:
        if key in flags.given and rival not in flags.given:
            _remove(values, rival.split("."))
    given = dict.fromkeys(flatten(values), where)
    for key, (parts, value) in flags.overrides.items():
        _put(values, parts, value)
        given = {old: place for old, place in given.items() if not old.startswith(f"{key}.")}
    given |= flags.given
    report = Report(where, given, flags.problems, dotted_keys(cls))
    config = build(cls, values, "", report)
    for involved, what in check(config):
        if not any(bad == key or bad.startswith(f"{key}.") for bad in report.bad for key in involved):
            report.add(involved[0], what)
    if report.problems:
        raise UserError(*report.problems)
    return Parsed(config, where, given)


def to_toml(instance: Any) -> str:
    """A dataclass tree as TOML that reads back to the same tree; a key that is not set is a comment."""
    return write_toml(to_mapping(instance)).strip() + "\n"


def argument_parser(prog: str, description: str) -> argparse.ArgumentParser:
    """An `argparse` parser for a command without a recipe; its complaints are `UserError`s in our format."""
    formatter = argparse.ArgumentDefaultsHelpFormatter
    return _Parser(prog=prog, description=description, allow_abbrev=False, formatter_class=formatter)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        if message.startswith("argument "):
            raise UserError(f"{message.removeprefix('argument ')}; see --help")
        unknown = re.match(r"unrecognized arguments: (--[^\s=]+)", message)
        if unknown:
            known = [name for name in self._option_string_actions if name.startswith("--")]
            raise UserError(f"{unknown[1]}: unknown flag; {suggest(unknown[1], known)}")
        raise UserError(f"{self.prog}: {message}; see --help")


@dataclass
class _Flags:
    config: str | None = None
    help: bool = False
    given: dict[str, str] = field(default_factory=dict)  # key -> flag
    overrides: dict[str, tuple[list[str], Any]] = field(default_factory=dict)  # key -> (its path, value)
    problems: list[str] = field(default_factory=list)


def _read_flags(cls: type, argv: Sequence[str]) -> _Flags:
    flags = _Flags()
    words = list(argv)
    while words:
        flag, has_value, text = words.pop(0).partition("=")
        if flag in ("--help", "-h"):
            flags.help = True
            continue
        if not flag.startswith("--"):
            flags.problems.append(f"{flag}{has_value}{text}: is no flag; flags begin with --")
            continue
        name = flag.removeprefix("--")
        parts, kind = ([CONFIG_FLAG], str) if flag == CONFIG_FLAG else _locate(cls, name)
        if not has_value and kind is bool and words[:1] not in (["true"], ["false"]):
            text = "true"
        elif not has_value and words and not words[0].startswith("--"):
            text = words.pop(0)
        elif not has_value and kind is not None:
            flags.problems.append(f"{flag}: needs a value; write {flag} VALUE")
            continue
        key = ".".join(parts)
        if kind is None:
            flags.problems.append(f"{flag}: {_unknown_flag(cls, name)}")
        elif key in flags.given:
            flags.problems.append(f"{flag}: given twice; give it once")
        elif flag == CONFIG_FLAG:
            flags.config = text
        else:
            flags.overrides[key] = (parts, _flag_value(text, kind))
        if kind is not None:
            flags.given[key] = flag
    flags.given.pop(CONFIG_FLAG, None)
    return flags


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
        found = keys(kind).get(parts[-1]) if dataclasses.is_dataclass(kind) else None
        if found is None:
            return parts, None
        possible = members(found[1])
        kind = possible[0] if len(possible) == 1 else found[1]
    return parts, None if dataclasses.is_dataclass(kind) else kind


def _unknown_flag(cls: type, name: str) -> str:
    known = [CONFIG_FLAG.removeprefix("--"), *dotted_keys(cls)]
    if any(flag.startswith(f"{name}.") for flag in known):
        return f"is a section; set one of its keys, --{name}.KEY VALUE"
    same_key = [flag for flag in known if flag.split(".")[-1] == name.split(".")[-1].replace("-", "_")]
    near = same_key or difflib.get_close_matches(name, known, n=1)
    return f"unknown flag; did you mean --{near[0]}?" if near else "unknown flag; see --help"


def _flag_value(text: str, kind: Any) -> Any:
    """A flag's text read as TOML; what is no TOML value is a string, as all is for a field of strings."""
    try:
        table = tomllib.loads(f"value = {text}")
    except tomllib.TOMLDecodeError:
        return text
    value = table["value"] if len(table) == 1 else text
    return text if members(kind) == (str,) and not isinstance(value, str) else value


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


def _help_text(cls: type, prog: str, description: str, default: Any) -> str:
    lines = [f"usage: {prog} [{CONFIG_FLAG} FILE] [--section.key VALUE ...]", ""]
    lines += [*textwrap.wrap(description, 100), ""] if description else []
    lines += [f"  {CONFIG_FLAG} FILE", f"      the recipe, in TOML{f' (default {default})' if default else ''}"]
    lines += ["", "Each key of the recipe is also a flag, and a flag wins over the file:"]
    return "\n".join([*lines, *_help_lines(cls, "")])


def _help_lines(cls: type, prefix: str, *, in_file_only: bool = False) -> list[str]:
    plain: list[str] = []
    sections: list[str] = []
    for key, (item, kind) in keys(cls).items():
        inner, path = members(kind)[0], f"{prefix}{key}"
        origin, arguments = typing.get_origin(inner), typing.get_args(inner)
        if dataclasses.is_dataclass(inner):
            sections += ["", f"[{path}] {_first_line(inner)}", *_help_lines(inner, f"{path}.")]
            continue
        if origin is list and dataclasses.is_dataclass(arguments[0]):
            sections += ["", f"[[{path}]] {_first_line(arguments[0])} (in the file only)"]
            sections += _help_lines(arguments[0], "", in_file_only=True)
            continue
        name, shown = (f"{path}.NAME", arguments[1]) if origin is dict else (path, kind)
        choices = ", ".join(map(show_value, item.metadata.get("choices", ())))
        default = "required" if required(item) else f"default {show_value(default_of(item))}"
        plain.append(f"  {'' if in_file_only else '--'}{name}  ({choices or type_name(shown)}; {default})")
        indent = " " * 6
        plain += textwrap.wrap(item.metadata.get("help", ""), 100, initial_indent=indent, subsequent_indent=indent)
    return plain + sections


def _first_line(cls: type) -> str:
    return (cls.__doc__ or "").strip().partition("\n")[0]
