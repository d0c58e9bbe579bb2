"""Dataclasses as sections of a recipe: what keys there are, and a check that reports every problem at once."""

from __future__ import annotations

import copy
import dataclasses
import difflib
import math
import types
import typing
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import MISSING, dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar, Union

from gloria.config.toml import show_value
from gloria.errors import UserError

C = TypeVar("C")

NO_KEY = {"no_key": True}  # metadata of a field that no recipe sets
_BAD = object()  # a value whose problem is reported: its field falls back to the default and checking continues
_EXAMPLES = {int: "1000", float: "0.1", bool: "true", str: '"text"', Path: '"folder"'}
_NAMES = {int: "a whole number", float: "a number", bool: "true or false", str: "a string", Path: "a path"}
_LARGEST_INT = 2**63 - 1  # what numpy, torch and safetensors hold; an option may say otherwise
_KEYS: dict[type, Mapping[str, tuple[dataclasses.Field, Any]]] = {}  # of `keys`: manifests repeat a section
_SHOWN = 80  # characters of a wrong value in an error line


def option(
    default: Any = MISSING,
    help: str = "",
    *,
    choices: Sequence[Any] = (),
    minimum: float | None = None,
    above: float | None = None,
    maximum: float | None = None,
    positional: str = "",
    other_names: Sequence[str] = (),
) -> Any:
    """An option, or a key of a recipe: its default (without one it must be given), unit, reason and possible values.

    Bounds and choices hold for each element of a list or a table; `above` excludes the bound itself. A `positional`
    one may be given without its flag, and is named so in the help. `other_names` are what other frameworks call it.
    """
    metadata = {"help": help, "choices": choices, "minimum": minimum, "above": above, "maximum": maximum}
    metadata |= {"other_names": other_names} | ({"positional": positional} if positional else {})
    if isinstance(default, list | dict):
        return field(default_factory=lambda: copy.deepcopy(default), metadata=metadata)
    return field(default=default, metadata=metadata)


def from_mapping(cls: type[C], values: dict[str, Any], where: str) -> C:
    """An instance of the dataclass `cls` from a nested mapping, as TOML or JSON give it.

    Raises `UserError` with a line for each problem: unknown keys, wrong types, bounds, choices, missing keys.
    """
    report = Report(where, everywhere=leaves(cls))
    instance = build(cls, values, "", report)
    if report.problems:
        raise UserError(*report.problems)
    return instance


def to_mapping(instance: Any) -> dict[str, Any]:
    """A dataclass tree as plain nested dicts and lists under the recipe's key names (JSON keeps it whole)."""
    return {key: _plain(getattr(instance, item.name)) for key, (item, _) in keys(type(instance)).items()}


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """A nested mapping, as `to_mapping` gives it, with dotted keys: `train.steps`."""
    found: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping):
            found |= flatten(value, f"{prefix}{key}.")
        else:
            found[f"{prefix}{key}"] = value
    return found


def suggest(name: str, names: Iterable[str]) -> str:
    """The remedy for an unknown name: the known ones it begins, the nearest one, or all of them where none is near."""
    names = [str(known) for known in names]
    near = [known for known in names if known.startswith((f"{name}-", f"{name}_", f"{name}."))]
    near = near or difflib.get_close_matches(name, names, n=1)
    if near:
        return f"did you mean {' or '.join(map(show_value, near))}?"
    return f"known: {', '.join(names)}" if names else "there are none"


def nearest_key(name: str, known: Iterable[str], leaves: Mapping[str, dataclasses.Field]) -> str:
    """The dotted key that an unknown one may have meant, or "".

    It is near in the same section, or has this name in another section or in other frameworks.
    """
    known = list(known)
    section, _, last = name.rpartition(".")
    here = [key.rpartition(".")[2] for key in known if key.rpartition(".")[0] == section]
    if near := difflib.get_close_matches(last, here, n=1):
        return f"{section}.{near[0]}".removeprefix(".")
    same = [key for key in known if key.rpartition(".")[2] == last]
    same += [key for key, item in leaves.items() if last in item.metadata.get("other_names", ())]
    if not here:  # the section is unknown, too
        same = difflib.get_close_matches(name, known, n=1) or same
    return same[0] if same else ""


@dataclass
class Report:
    """The problems found so far, and the flags that gave a key; the others are the file's."""

    where: str
    given: dict[str, str] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    everywhere: Mapping[str, dataclasses.Field] = field(default_factory=dict)  # `leaves` of the whole tree
    bad: list[str] = field(default_factory=list)  # keys already reported

    def add(self, key: str, what: str) -> Any:
        self.bad.append(key)
        self.problems.append(f"{label(key, self.where, self.given)}: {what}")
        return _BAD


def label(key: str, where: str, given: dict[str, str]) -> str:
    """How a line about `key` begins: `--flag`, or `file: key`; without a file, the flag that would give it."""
    given_key = key
    while given_key:
        if place := given.get(given_key):
            return place if given_key == key else f"{place}: {key}"
        # One flag may give a whole table or list: --data.weights '{a = 1}', --optim.betas '[0.9, 0.95]'.
        given_key = given_key[: max(given_key.rfind("."), given_key.rfind("["), 0)]
    return f"{where}: {key}" if where else flag_name(key)


def flag_name(key: str) -> str:
    """A key as a flag: `--max-new-tokens`, and within a section as the file has it: `--train.global_batch`."""
    return f"--{key if '.' in key else key.replace('_', '-')}"


def keys(cls: type) -> Mapping[str, tuple[dataclasses.Field, Any]]:
    """Key -> (field, type) of a section; the field of `from`, a word that Python reserves, is `from_`."""
    if cls not in _KEYS:
        hints = typing.get_type_hints(cls)
        items = [item for item in dataclasses.fields(cls) if "no_key" not in item.metadata]
        _KEYS[cls] = {item.name.removesuffix("_"): (item, hints[item.name]) for item in items}
    return _KEYS[cls]


def leaves(cls: type, prefix: str = "") -> dict[str, dataclasses.Field]:
    """The field of every key of a dataclass tree, by its name with its sections: `train.steps`."""
    found: dict[str, dataclasses.Field] = {}
    for key, (item, kind) in keys(cls).items():
        inner = members(kind)[0]
        found |= leaves(inner, f"{prefix}{key}.") if is_section(inner) else {prefix + key: item}
    return found


def is_section(kind: Any) -> bool:
    """Whether a type is a dataclass: a section, or a whole recipe."""
    return dataclasses.is_dataclass(kind)


def required(item: dataclasses.Field) -> bool:
    """Whether a field has no default."""
    return item.default is MISSING and item.default_factory is MISSING


def default_of(item: dataclasses.Field) -> Any:
    """A field's default, or None where it has none."""
    if item.default_factory is not MISSING:
        return item.default_factory()
    return None if item.default is MISSING else item.default


def members(kind: Any) -> tuple[Any, ...]:
    """The types a value may have: those of a union without None, or the type itself."""
    if typing.get_origin(kind) in (Union, types.UnionType):
        return tuple(member for member in typing.get_args(kind) if member is not types.NoneType)
    return (kind,)


def type_name(kind: Any) -> str:
    """A type in words, for error lines and help."""
    names = []
    for member in members(kind):
        origin = typing.get_origin(member)
        if origin is Literal:
            names += [show_value(choice) for choice in typing.get_args(member)]
        elif origin in (list, tuple):
            names.append("a list")
        else:
            names.append("a table" if origin is dict else _NAMES.get(member, "a section"))
    return " or ".join(names)


def build(cls: type[C], values: dict[str, Any], prefix: str, report: Report) -> C:
    """An instance of `cls`; a wrong or missing value is reported and is its default instead (or None)."""
    known = keys(cls)
    for key, value in values.items():
        if key not in known:
            noun = "section" if isinstance(value, dict) else "key"
            here = [f"{prefix}{name}" for name in known]
            near = nearest_key(f"{prefix}{key}", [*here, *report.everywhere], report.everywhere)
            remedy = f'did you mean "{near.removeprefix(prefix)}"?' if near else suggest(key, known)
            report.add(f"{prefix}{key}", f"unknown {noun}; {remedy}")
    arguments = {}
    for key, (item, kind) in known.items():
        path, value = f"{prefix}{key}", _BAD
        if key in values:
            value = _value(values[key], kind, item.metadata, path, report)
        elif is_section(kind):
            value = build(kind, {}, f"{path}.", report)
        elif required(item):
            reason = item.metadata.get("help", "")
            report.add(path, f"missing; give it{f' ({reason})' if reason else ''}")
        arguments[item.name] = default_of(item) if value is _BAD else value
    return cls(**arguments)


def _value(value: Any, kind: Any, metadata: Any, path: str, report: Report) -> Any:
    possible = members(kind)
    if value is None and possible != (kind,):
        return None
    if len(possible) > 1:
        for member in possible:
            attempt = Report("")
            result = _value(value, member, metadata, path, attempt)
            if not attempt.problems:
                return result
        return report.add(path, f"must be {type_name(kind)}, not {_brief(value)}; change it")
    kind = possible[0]
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if is_section(kind):
        if not isinstance(value, dict):
            return report.add(path, f"must be a section, not {_brief(value)}; write it as [{path}]")
        return build(kind, value, f"{path}.", report)
    if origin is dict:
        if not isinstance(value, dict):
            return report.add(path, f"must be a table, not {_brief(value)}; write it as [{path}]")
        items = {key: _value(item, arguments[1], metadata, f"{path}.{key}", report) for key, item in value.items()}
        return _BAD if _BAD in items.values() else items
    if origin in (list, tuple):
        return _sequence(value, origin, arguments, metadata, path, report)
    return _scalar(value, kind, metadata, path, report)


def _sequence(value: Any, origin: type, arguments: Any, metadata: Any, path: str, report: Report) -> Any:
    fixed = origin is tuple and arguments[-1] is not Ellipsis
    example = ", ".join(_EXAMPLES.get(item, "...") for item in arguments if item is not Ellipsis)
    if origin is list and type(value) in arguments:
        value = [value]  # --run.seeds 1
    if not isinstance(value, list | tuple):
        return report.add(path, f"must be a list, not {_brief(value)}; for example [{example}]")
    if fixed and len(value) != len(arguments):
        return report.add(path, f"must have {len(arguments)} values, not {len(value)}; for example [{example}]")
    kinds = arguments if fixed else arguments[:1] * len(value)
    items = [
        _value(item, kind, metadata, f"{path}[{number}]", report)
        for number, (item, kind) in enumerate(zip(value, kinds))
    ]
    return _BAD if any(item is _BAD for item in items) else origin(items)


def _scalar(value: Any, kind: Any, metadata: Any, path: str, report: Report) -> Any:
    choices = metadata.get("choices", ())
    if isinstance(value, str) and "\0" in value:
        return report.add(path, "has a NUL character, which no path or text here can hold; remove it")
    if kind is Path and isinstance(value, str):
        return Path(value)
    if typing.get_origin(kind) is Literal:
        choices = typing.get_args(kind)
    elif type(value) is not kind and not (kind is float and type(value) is int):
        what = f"must be {type_name(kind)}, not {_brief(value)}"
        return report.add(path, f"{what}; for example {_EXAMPLES[kind]}")
    if choices:
        if any(type(choice) is type(value) and choice == value for choice in choices):
            return value
        words = [choice for choice in choices if isinstance(choice, str)]
        near = difflib.get_close_matches(str(value), words, n=1)
        remedy = f'did you mean "{near[0]}"? One of' if near else "one of"
        allowed = ", ".join(map(show_value, choices))
        return report.add(path, f"unknown value {_brief(value)}; {remedy} {allowed}")
    minimum, above, maximum = (metadata.get(name) for name in ("minimum", "above", "maximum"))
    if kind is float:
        try:
            value = float(value)
        except OverflowError:
            value = math.inf
        if not math.isfinite(value):
            return report.add(path, f"must be finite, not {value}; for example 0.1")
    elif kind is int:
        minimum = ~_LARGEST_INT if minimum is None else minimum
        maximum = _LARGEST_INT if maximum is None else maximum
    if minimum is not None and value < minimum:
        return report.add(path, f"{_brief(value)} is too small; give at least {minimum}")
    if above is not None and value <= above:
        return report.add(path, f"{_brief(value)} is too small; give more than {above}")
    if maximum is not None and value > maximum:
        return report.add(path, f"{_brief(value)} is too large; give at most {maximum}")
    return value


def _brief(value: Any) -> str:
    """A wrong value as an error line shows it."""
    text = show_value(value)
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."


def _plain(value: Any) -> Any:
    if is_section(value):
        return to_mapping(value)
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return {key: _plain(item) for key, item in value.items()} if isinstance(value, dict) else value
