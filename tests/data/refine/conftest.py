"""Recipes and launches for the tests of cleaning."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import pytest
import zstandard

from gloria import refine
from gloria.errors import run_command

SAMPLE = Path(__file__).parents[3] / "gloria/data/sample"


def sample_texts(source: str) -> list[str]:
    return [path.read_text() for path in sorted((SAMPLE / source).glob("*.txt"))]


def write_lines(path: Path, rows: Iterable[str | Mapping[str, Any]]) -> None:
    rows = [{"text": row} if isinstance(row, str) else row for row in rows]
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def write_recipe(folder: Path, sources: Mapping[str, str], sections: str = "") -> Path:
    """A recipe of one source a file NAME.jsonl; the values are further keys of the source."""
    lines = ["[tokenizer]", "vocab_size = 512", sections]
    for name, keys in sources.items():
        lines += ["[[source]]", f'name = "{name}"', f'paths = ["{name}.jsonl"]', keys]
    path = folder / "corpus.toml"
    path.write_text("\n".join(lines) + "\n")
    return path


class Cleaned:
    """A launch of gloria.refine in this process, and what it left."""

    def __init__(self, recipe: Path, out: Path, *flags: str) -> None:
        self.out = out
        workers = [] if "--workers" in flags else ["--workers", "1"]
        self.status = run_command(refine.main, [str(recipe), "--out", str(out), *workers, *flags])

    def texts(self, source: str) -> list[str]:
        return [row["text"] for row in self.rows(source)]

    def rows(self, source: str) -> list[dict[str, Any]]:
        rows = []
        for path in sorted((self.out / source).glob("*.zst")):
            with zstandard.open(path, "rt") as file:
                rows += [json.loads(line) for line in file]
        return rows

    @property
    def report(self) -> dict[str, Any]:
        return json.loads((self.out / "report.json").read_text())

    def dropped(self, source: str) -> dict[str, int]:
        steps = self.report["sources"][source]["steps"]
        return {f"{step}: {rule}": r["documents"] for step, f in steps.items() for rule, r in f["dropped"].items()}

    def bytes(self) -> dict[str, bytes]:
        """All that the folder holds but for the work that a later launch goes on from."""
        paths = [path for path in self.out.rglob("*") if path.is_file() and "work" not in path.parts]
        return {str(path.relative_to(self.out)): path.read_bytes() for path in paths}


@pytest.fixture(autouse=True)
def extra() -> None:
    pytest.importorskip("datatrove", reason='needs the extra "data"')
