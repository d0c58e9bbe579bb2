"""Prevents: a rank whose last words are nowhere, and a console where a thousand ranks talk at once."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

SCRIPT = """
import sys
from pathlib import Path
from gloria.dist.rank_log import open_rank_log
from gloria.errors import warn
open_rank_log(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
print("a line")
warn("something")
sys.exit("the end") if len(sys.argv) == 4 else __import__("os").abort()
"""


def start(*arguments: object) -> subprocess.CompletedProcess:
    command = [sys.executable, "-c", SCRIPT, *map(str, arguments)]
    root = Path(__file__).resolve().parents[2]
    return subprocess.run(command, capture_output=True, text=True, cwd=root)


def test_rank_0_is_on_the_console_and_in_its_log(tmp_path):
    done = start(tmp_path, 0, 2)
    assert (done.stdout, done.stderr) == ("a line\n", "warning: something\nthe end\n")
    head, *lines = (tmp_path / "logs/rank-00000.log").read_text().splitlines()
    assert re.fullmatch(rf"== \S+ \S+ rank 0 of 2, {os.uname().nodename}, process \d+", head)
    assert lines == ["a line", "warning: something", "the end"]


def test_another_rank_is_on_the_console_with_what_goes_wrong(tmp_path):
    start(tmp_path, 1, 2)
    done = start(tmp_path, 1, 2)
    assert (done.stdout, done.stderr) == ("", "warning: something\nthe end\n")
    lines = (tmp_path / "logs/rank-00001.log").read_text().splitlines()
    assert [line for line in lines if not line.startswith("==")] == ["a line", "warning: something", "the end"] * 2


def test_a_crash_leaves_its_stack(tmp_path):
    assert start(tmp_path, 1, 2, "crash").returncode < 0
    assert "Fatal Python error: Aborted" in (tmp_path / "logs/rank-00001.log").read_text()


def test_one_process_has_its_console(tmp_path):
    assert start(tmp_path, 0, 1).stdout == "a line\n"
    assert list(tmp_path.iterdir()) == []
