"""Prevents: a filter of the user's own that is not applied, not counted, not noticed when it changes, or whose mistakes
end in a traceback."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from gloria import prepare
from gloria.data.corpus import open_corpus
from gloria.errors import run_command

FILTER = """
def keep_news(text, metadata):
    if metadata.get("kind") == "advert":
        return "advert"
    return f"{len(text) // 1000} thousand  characters" if len(text) > 2000 else None
"""


def run(folder: Path, filter: str, code: str = FILTER, *flags: str) -> int:
    """The exit status for one source of 30 documents, ten of which are adverts and two long."""
    lines = [{"text": f"Notícia {number}.", "kind": "advert" if number % 3 else "news"} for number in range(15)]
    lines += [{"text": f"{number} " * 1500, "kind": "news"} for number in range(2)]
    (folder / "a.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "rules").mkdir(exist_ok=True)
    (folder / "rules/mine.py").write_text(code)
    recipe = f'[tokenizer]\nvocab_size = 512\n[[source]]\nname = "um"\npaths = ["a.jsonl"]\nfilter = "{filter}"\n'
    (folder / "corpus.toml").write_text(recipe)
    return run_command(prepare.main, [str(folder / "corpus.toml"), "--out", str(folder / "out"), *flags])


def test_documents_are_dropped_and_counted_by_reason(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(tmp_path, "rules/mine.py:keep_news", FILTER, "--workers", "2") == 0
    counts = open_corpus(tmp_path / "out").source("um").counts
    kept = {"read": 17, "filter: 2 thousand characters": 2, "filter: advert": 10, "kept": 5}
    assert {key: count for key, count in counts.items() if count} == kept
    heading = capsys.readouterr().out.splitlines()[-3]
    assert heading.split()[1:6] == ["read", "2", "thousand", "characters", "advert"]
    # The same function makes the same corpus, another one is another recipe.
    assert run(tmp_path, "rules/mine.py:keep_news") == 0
    assert "is already whole" in capsys.readouterr().out
    assert run(tmp_path, "rules/mine.py:keep_news", FILTER.replace("2000", "3000")) == 2
    assert "was made by another recipe (it differs in source)" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("filter", "code", "what"),
    [
        ("rules/none.py:f", "", 'source[0].filter: "FOLDER/rules/none.py:f" names no file; write FILE.py:FUNCTION'),
        ("rules/mine.py", "", 'source[0].filter: "FOLDER:rules/mine.py" names no file; write FILE.py:FUNCTION'),
        ("rules/mine.py:g", "", 'source[0].filter: FOLDER/rules/mine.py has no function "g"; write FILE.py:FUNCTION'),
        (
            "rules/mine.py:g",
            "import nada",
            "source[0].filter: FOLDER/rules/mine.py can't be run "
            "(ModuleNotFoundError(\"No module named 'nada'\")); correct it",
        ),
        (
            "rules/mine.py:g",
            "def g(text, metadata):\n  metadata['x']",
            "filter: FOLDER/rules/mine.py:g raised KeyError('x') at FOLDER/a.jsonl:1; correct it",
        ),
        (
            "rules/mine.py:g",
            "def g(text, metadata):\n  return True",
            "filter: FOLDER/rules/mine.py:g returned True at FOLDER/a.jsonl:1; return None or a reason",
        ),
    ],
)
def test_mistakes(tmp_path: Path, capsys: pytest.CaptureFixture[str], filter: str, code: str, what: str) -> None:
    assert run(tmp_path, filter, code, "--workers", "1") == 2
    place = f"{tmp_path}/corpus.toml: " if what.startswith("source") else ""
    assert capsys.readouterr().err == f"error: {place}{what.replace('FOLDER', str(tmp_path))}\n"
    assert not (tmp_path / "out").exists()
