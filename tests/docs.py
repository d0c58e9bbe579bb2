"""The commands of README.md and docs/, run as a reader would: `make docs-check`, or `python -m tests.docs PAGE...`.

Pages are read in the order of mkdocs.yml, in one copy of the repository, so a page may use what an earlier one made.
A block in the language `sh` is run as it stands, and must end with status 0. A comment before it changes that:

    <!-- instead: COMMAND -->    these lines run in its place, the same with smaller settings
    <!-- not run: REASON -->     needs what this machine has not

A block in the language `text` behind a block that ran is what it prints: each of its lines must be there, in this
order, with `...` for anything. Its comment `<!-- not compared: REASON -->` takes that back.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent
FENCE = re.compile(r"((?:^<!--(?:(?!-->).)*-->\n+)?)^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
COMMENT = re.compile(r"<!-- (instead|not run|not compared):\s+(.*?)\s*-->", re.DOTALL)
LONGEST = 1800  # seconds of a block


@dataclass
class Block:
    """A fenced block of a page."""

    language: str
    text: str
    line: int  # in the page, from 1
    mark: str = ""  # instead, not run, not compared
    note: str = ""  # what the mark says


def pages() -> list[Path]:
    """README.md, then the pages of docs/ in the order of the site."""
    named = re.findall(r"^ +- .*?([\w-]+\.md)$", (REPOSITORY / "mkdocs.yml").read_text("utf-8"), re.MULTILINE)
    return [REPOSITORY / "README.md", *(REPOSITORY / "docs" / name for name in named)]


def blocks(page: Path) -> Iterator[Block]:
    text = page.read_text("utf-8")
    for found in FENCE.finditer(text):
        comment = COMMENT.search(found[1])
        mark, note = (comment[1], comment[2]) if comment else ("", "")
        yield Block(found[2], found[3], text.count("\n", 0, found.start(2)) + 1, mark, note.strip())


def missing_line(expected: str, printed: str) -> str | None:
    """The first line of `expected` that `printed` has not, in their order; `...` stands for anything."""
    lines = iter(" ".join(line.split()) for line in printed.splitlines())
    for line in filter(str.strip, expected.splitlines()):
        pattern = ".*".join(map(re.escape, " ".join(line.split()).split("...")))
        if line.strip() != "..." and not any(re.fullmatch(pattern, there) for there in lines):
            return line
    return None


def check(page: Path, folder: Path, environment: dict[str, str]) -> list[str]:
    """Run the blocks of a page in `folder`; a line for each that fails."""
    problems: list[str] = []
    printed: str | None = None
    for block in blocks(page):
        where = f"{page.name}:{block.line}"
        compared = block.language == "text" and block.mark != "not compared"
        if compared and printed is not None and (line := missing_line(block.text, printed)) is not None:
            problems.append(f"{where}: is not printed: {line}")
        printed = None if compared else printed
        if block.language != "sh":
            continue
        printed = None
        if block.mark == "not run":
            print(f"{where}: not run: {block.note}", flush=True)
            continue
        commands = block.note if block.mark == "instead" else block.text
        started = time.monotonic()
        done = subprocess.run(
            ["bash", "-euo", "pipefail", "-c", commands],
            cwd=folder,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=LONGEST,
        )
        printed = done.stdout
        print(f"{where}: {time.monotonic() - started:.0f} s, status {done.returncode}", flush=True)
        if done.returncode:
            problems.append(f"{where}: status {done.returncode}: {commands.strip()}\n{done.stdout[-2000:]}")
            printed = None
    return problems


def copy_repository(folder: Path) -> None:
    """What git tracks; times are kept, so that `make` installs nothing again."""
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=REPOSITORY, capture_output=True, text=True, check=True)
    for name in filter(None, listed.stdout.split("\0")):
        if (REPOSITORY / name).exists():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(REPOSITORY / name, folder / name, follow_symlinks=False)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("page", nargs="*", help="names such as README.md; default: all")
    parser.add_argument("--folder", type=Path, help="go on in the folder that an earlier check has left")
    options = parser.parse_args()
    chosen = [page for page in pages() if not options.page or page.name in options.page]
    folder = options.folder or Path(tempfile.mkdtemp(prefix="gloria-docs-"))
    if not options.folder:
        copy_repository(folder)
    print(f"in {folder}", flush=True)
    venv = Path(sys.prefix)
    environment = os.environ | {
        "VIRTUAL_ENV": str(venv),
        "PATH": f"{venv / 'bin'}:{os.environ['PATH']}",
        "PYTHONPATH": str(folder),
        "OMP_NUM_THREADS": "1",
    }
    problems = [problem for page in chosen for problem in check(page, folder, environment)]
    print(*problems, f"{len(chosen)} pages, {len(problems)} problems", sep="\n")
    return int(bool(problems))


if __name__ == "__main__":
    sys.exit(main())
