"""Units of work that stay finished: a launch that goes on where another died does not do them again."""

from __future__ import annotations

import functools
import glob
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, NamedTuple, TypeVar

import xxhash

from gloria.data.prepare.workers import Workers
from gloria.errors import UserError
from gloria.files import hash_file, parse_json_object, write_whole

T = TypeVar("T")


@dataclass(frozen=True)
class Unit(Generic[T]):
    """A task that writes files `out.*`; its result, plain JSON values, is kept beside them in `out.json`."""

    task: T
    out: str
    key: str  # `hash_values` of all that the result depends on


class Result(NamedTuple):
    """What a unit's function returned, as JSON has it: tuples are lists."""

    value: Any
    is_kept: bool  # from an earlier launch


def hash_values(values: Any) -> str:
    """xxh3-128 of plain values, in hexadecimal."""
    text = json.dumps(values, sort_keys=True, ensure_ascii=False)
    return xxhash.xxh3_128_hexdigest(text.encode("utf-8", "surrogatepass"))


def run_units(
    function: Callable[[T], Any], units: Sequence[Unit[T]], pool: Workers, label: str
) -> Iterator[tuple[Unit[T], Result]]:
    """Each unit with its result, in order; a line says how many an earlier launch had finished."""
    kept = 0
    for unit, result in zip(units, pool.map(functools.partial(run_unit, function), units, label)):
        kept += result.is_kept
        yield unit, result
    if kept:
        print(f"{label}: {kept} of {len(units)} parts were finished by an earlier launch", flush=True)


def run_unit(function: Callable[[T], Any], unit: Unit[T]) -> Result:
    """The unit's result, from its mark where that has this key and the files are those that were written.

    The mark holds the files' hashes: after a loss of power a mark may be there whose files are not.
    """
    mark = Path(f"{unit.out}.json")
    try:
        kept = parse_json_object(mark.read_bytes(), mark)
        if kept["key"] == unit.key and kept["files"] == _hash_files(unit.out):
            return Result(kept["value"], True)
    except (FileNotFoundError, UserError, KeyError):
        pass
    for path in _files(unit.out):
        path.unlink()
    value = function(unit.task)
    values = {"key": unit.key, "files": _hash_files(unit.out), "value": value}
    write_whole(mark, json.dumps(values).encode(), durable=False)
    return Result(json.loads(json.dumps(value)), False)


def _files(out: str) -> list[Path]:
    return sorted(map(Path, glob.glob(f"{glob.escape(out)}.*")))


def _hash_files(out: str) -> dict[str, str]:
    return {path.name: hash_file(path) for path in _files(out) if path.suffix != ".json"}
