"""Reading task files: finding them, lines and tables as they are published, and problems with their place."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gloria.errors import UserError
from gloria.tasks.examples import Example


@dataclass(frozen=True)
class Loaded:
    """Examples, and counts of what their file is like, named as results.json has them."""

    examples: list[Example]
    counts: dict[str, int]
    unlabelled: str = ""  # why no example is labelled, where the file shows it


@dataclass
class Problems:
    """What is wrong with a file, reported at once (the first ten)."""

    path: Path
    lines: list[str] = field(default_factory=list)

    def add(self, where: int | str, what: str) -> None:
        """`where` is a line of the file, or what names the place in a file that has none."""
        self.lines.append(f"{self.path}:{where}: {what}" if isinstance(where, int) else f"{self.path}: {where}: {what}")

    def report(self) -> None:
        """Raises `UserError` if there is any problem."""
        more = [f"{self.path}: and {len(self.lines) - 10} more problems"] if len(self.lines) > 10 else []
        if self.lines:
            raise UserError(*self.lines[:10], *more)


def find_file(folder: Path, names: Sequence[str], what: str) -> Path:
    """The one file of `names` in the folder; `what` says what it is. Raises `UserError` for none or several."""
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; give the folder that holds {what}")
    found = [folder / name for name in names if (folder / name).is_file()]
    if not found:
        raise UserError(f"{folder}: does not hold {what}; expected {' or '.join(names)}")
    if len(found) > 1:
        raise UserError(f"{folder}: {' and '.join(path.name for path in found)} are both {what}; keep one")
    return found[0]


def read_bytes(path: Path) -> bytes:
    """The whole file; an empty one is a `UserError`."""
    data = path.read_bytes()
    if not data.strip():
        raise UserError(f"{path}: is empty; get the file again")
    return data


def read_lines(path: Path) -> list[str]:
    """Lines without their ends. Only LF and CRLF end a line, as U+2028 and the like are ordinary characters."""
    try:
        text = read_bytes(path).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = error.object.count(b"\n", 0, error.start) + 1
        raise UserError(f"{path}:{line}: is not UTF-8; convert the file") from None
    lines = [line.removesuffix("\r") for line in text.split("\n")]
    return lines[:-1] if lines[-1] == "" else lines


def read_json(path: Path) -> Any:
    """A file that is one JSON value."""
    try:
        return json.loads("\n".join(read_lines(path)))
    except json.JSONDecodeError as error:
        raise UserError(f"{path}:{error.lineno}: is not JSON ({error.msg}); get the file again") from None


def json_rows(path: Path, problems: Problems) -> Iterator[tuple[int, dict[str, Any]]]:
    """(line, object) of a JSON lines file; blank lines are passed over."""
    for number, line in enumerate(read_lines(path), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            problems.add(number, f"is not JSON ({error.msg}); one object a line is expected")
            continue
        if isinstance(row, dict):
            yield number, row
        else:
            problems.add(number, "is no JSON object; one object a line is expected")


def tab_rows(path: Path, problems: Problems) -> Iterator[tuple[int, dict[str, str]]]:
    """(line, row) of a table with a header, cut at tabs; a quotation mark is an ordinary character, as GLUE has it."""
    header, *lines = read_lines(path)
    names = header.split("\t")
    for number, line in enumerate(lines, 2):
        cells = line.split("\t")
        if len(cells) == len(names):
            yield number, dict(zip(names, cells))
        else:
            problems.add(number, f"has {len(cells)} fields where the header has {len(names)}; cut at tabs, no quoting")


def check_unique(examples: Sequence[Example], places: Sequence[int | str], problems: Problems) -> None:
    """An id that comes twice is a problem: predictions are kept by id."""
    first: dict[str, int | str] = {}
    for example, place in zip(examples, places):
        if example.id in first:
            problems.add(place, f'id "{example.id}" is already at {first[example.id]}; ids must differ')
        first.setdefault(example.id, place)
