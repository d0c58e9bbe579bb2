"""Prevents: a document with a command, a flag, a file or a link that is not there.

`make docs-check` runs the commands; here they are only read, in seconds.
"""

from __future__ import annotations

import ast
import importlib
import io
import re
import shlex
from contextlib import redirect_stdout
from functools import cache

import pytest

from tests.conftest import REPOSITORY
from tests.docs import blocks, missing_line, pages

PAGES = pages()


@cache
def help_of(verb: str) -> str:
    printed = io.StringIO()
    with redirect_stdout(printed), pytest.raises(SystemExit, match="0"):
        importlib.import_module(f"gloria.{verb}").main(["--help"])
    return printed.getvalue()


def commands(text: str) -> list[list[str]]:
    lines = re.sub(r"\\\n", " ", text).splitlines()
    return [shlex.split(line, comments=True) for line in lines if line.strip()]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_its_commands_and_flags_exist(page):
    for block in blocks(page):
        if block.language != "sh":
            continue
        for words in commands(block.text):
            named = [word for word in words if re.fullmatch(r"gloria\.\w+", word)]
            if not named:
                continue
            verb = named[0].removeprefix("gloria.")
            flags = [word.split("=")[0] for word in words[words.index(named[0]) :] if word.startswith("--")]
            for flag in flags:
                known = (
                    flag == "--help" or flag in help_of(verb) or re.sub(r"\.[\w-]+$", ".NAME", flag) in help_of(verb)
                )
                assert known, f"{page.name}:{block.line}: {verb} has no {flag}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_its_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)#\s]+)(?:#[\w-]+)?\)", page.read_text("utf-8")):
        if not re.match(r"https?://", target):
            assert (page.parent / target).exists(), target


def test_every_page_is_on_the_site():
    assert {page.name for page in PAGES[1:]} == {path.name for path in (REPOSITORY / "docs").glob("*.md")}


def test_a_line_that_is_not_printed_is_found():
    assert missing_line("a ... c\n...\nlast  line", "x\na b c\nlast line\n") is None
    assert missing_line("one\ntwo", "two\none\n") == "two"


def texts_of_the_code() -> list[str]:
    """Every string of gloria/, with `...` for what is filled in."""
    found = []
    for path in (REPOSITORY / "gloria").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(node.value)
            elif isinstance(node, ast.JoinedStr):
                found.append(
                    "".join(str(part.value) if isinstance(part, ast.Constant) else "..." for part in node.values)
                )
    return found


def test_the_messages_of_the_faq_are_those_of_the_code():
    code = texts_of_the_code()
    for message in re.findall(r"^\*\*.*?`(.+?)`\*\*$", (REPOSITORY / "docs/faq.md").read_text("utf-8"), re.MULTILINE):
        pieces = [piece.strip() for piece in message.split("...") if piece.strip()]
        pattern = re.compile(".*".join(map(re.escape, pieces)), re.DOTALL)
        assert any(pattern.search(text) for text in code), message
