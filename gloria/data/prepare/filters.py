"""Which documents a source leaves out: our own rules, and a function of the user's.

A new rule of ours is a field of `TextRules` (a key of the recipe) and its lines in `why_dropped`; reports take the
reason as it is.
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import xxhash

from gloria.config.cli import option
from gloria.errors import UserError

UserFilter = Callable[[str, Mapping[str, Any]], str | None]


@dataclass(frozen=True, kw_only=True)
class TextRules:
    """What a document's text has to be."""

    min_chars: int = option(1, "characters after cleaning; shorter documents teach little and are dropped", minimum=1)
    filter: str | None = option(
        None,
        "FILE.py:FUNCTION, the file relative to the recipe: the function takes (text, metadata) and returns None, or "
        "the reason to drop the document; it must depend on nothing else. Metadata are the JSON line's other fields "
        "or the Parquet row's other columns",
    )

    def why_dropped(self, text: str) -> str:
        """The reason to drop a cleaned text, an empty string where it is kept."""
        if not text:
            return "empty"
        if len(text) < self.min_chars:
            return "short"
        return ""


def locate_filter(spec: str, folder: Path) -> str:
    """The user's filter with its file below `folder` (the recipe's) as an absolute path."""
    file, _, function = spec.rpartition(":")
    return f"{(folder / file).absolute()}:{function}"


def filter_identity(located: str) -> str:
    """What a filter is, wherever its file is: the function's name and the file's hash."""
    file, _, function = located.rpartition(":")
    return f"{function} in {xxhash.xxh3_128_hexdigest(Path(file).read_bytes())}"


@functools.lru_cache
def load_filter(located: str) -> UserFilter:
    """The user's function; `UserError` where the file or the function isn't there or the file can't be run."""
    file, _, name = located.rpartition(":")
    if not file.endswith(".py") or not Path(file).is_file():
        raise UserError(f'filter: "{located}" names no file; write FILE.py:FUNCTION')
    spec = importlib.util.spec_from_file_location(f"filter_{Path(file).stem}", file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except Exception as error:  # whatever the user's file raises
        raise UserError(f"filter: {file} can't be run ({error!r}); correct it") from None
    function = getattr(module, name, None)
    if not callable(function):
        raise UserError(f'filter: {file} has no function "{name}"; write FILE.py:FUNCTION')
    return function


def ask_filter(located: str, text: str, metadata: Mapping[str, Any], place: str) -> str:
    """The user's reason to drop the document read at `place`, an empty string where it is kept."""
    try:
        reason = load_filter(located)(text, metadata)
    except UserError:
        raise
    except Exception as error:  # whatever the user's function raises
        raise UserError(f"filter: {located} raised {error!r} at {place}; correct it") from None
    if reason is not None and (not isinstance(reason, str) or not reason.strip()):
        raise UserError(f"filter: {located} returned {reason!r} at {place}; return None or a reason")
    return " ".join(reason.split()) if reason else ""
