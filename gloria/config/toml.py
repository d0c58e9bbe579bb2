"""TOML files read with clear errors, and mappings written as TOML (which the standard library can't)."""

from __future__ import annotations

import json
import os
import re
import tomllib
from pathlib import Path
from typing import Any

from gloria.errors import UserError, is_first_rank

PACKAGE = Path(__file__).resolve().parents[1]
RECIPES = (PACKAGE / "launch").resolve()  # the repository's launch/, or its copy in an installed package
DEEPEST = 16  # tables and lists within each other: more than any recipe has, and safe for recursion


def parse_toml(text: str) -> dict[str, Any]:
    """The table in a TOML text; ValueError also for one that is nested too deeply or holds a giant number."""
    try:
        table = tomllib.loads(text)
    except tomllib.TOMLDecodeError:
        raise
    except ValueError:
        raise ValueError("a number has too many digits") from None
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    level: list[Any] = [table]
    for _ in range(DEEPEST):
        inner = [item for outer in level for item in (outer.values() if isinstance(outer, dict) else outer)]
        level = [item for item in inner if isinstance(item, dict | list)]
    if level:
        raise ValueError("it is nested too deeply")
    return table


def find_recipe(path: str) -> str:
    """The path of a recipe: `launch/NAME.toml` is the package's own where no such file is here."""
    file = Path(path)
    if file.parent != Path("launch") or file.exists() or not (RECIPES / file.name).exists():
        return path
    if is_first_rank():
        print(f"{path}: not here; reading {RECIPES / file.name}", flush=True)
    return str(RECIPES / file.name)


def read_toml(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The table in a TOML file; a file that is missing, no text or no TOML is a `UserError` with its line."""
    try:
        return parse_toml(Path(path).read_text(encoding="utf-8-sig"))
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; check the path") from None
    except OSError as error:
        raise UserError(f"{path}: can't be read ({error.strerror}); check the path") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: is not UTF-8 (byte {error.start}); save it as UTF-8") from None
    except ValueError as error:
        found = re.fullmatch(r"(.*) \(at (?:line (\d+), column (\d+)|end of document)\)", str(error), re.DOTALL)
        if not found:
            raise UserError(f"{path}: {error}; write it in plain TOML") from None
        place = f"line {found[2]}, column {found[3]}" if found[2] else "end of file"
        raise UserError(f"{path}: {place}: {found[1][:1].lower()}{found[1][1:]}; correct the TOML there") from None


def show_value(value: Any) -> str:
    """A value as TOML writes it, for recipes and error lines."""
    if isinstance(value, str | Path):
        return json.dumps(str(value), ensure_ascii=False).replace("\x7f", "\\u007f")
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(show_value(item) for item in value) + "]"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{_key(key)} = {show_value(item)}" for key, item in value.items()) + "}"
    if isinstance(value, int) and value.bit_length() > 64:  # Python writes no more than 4300 decimal digits
        return hex(value)
    return "not set" if value is None else str(value)


def write_toml(values: dict[str, Any], prefix: str = "") -> str:
    """A nested mapping as TOML text; a key whose value is None is left as a comment, for TOML has no null."""
    plain, tables = [], []
    for key, value in values.items():
        name = f"{prefix}{_key(key)}"
        if isinstance(value, dict):
            tables.append(f"\n[{name}]\n{write_toml(value, f'{name}.')}")
        elif isinstance(value, list) and value and all(isinstance(item, dict) for item in value):
            tables += [f"\n[[{name}]]\n{write_toml(item, f'{name}.')}" for item in value]
        else:
            plain.append(f"{'# ' if value is None else ''}{_key(key)} = {show_value(value)}\n")
    return "".join(plain + tables)


def _key(key: str) -> str:
    return key if re.fullmatch(r"[A-Za-z0-9_-]+", key) else show_value(key)
