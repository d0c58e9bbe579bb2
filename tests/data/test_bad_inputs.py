"""Prevents: a traceback, a run out of memory or lost work where a file can't be read, the disk is full, or a line is a
gigabyte: one line each, and what was finished before is kept.
"""

from __future__ import annotations

import ctypes
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from gloria import prepare
from gloria.data.corpus import open_corpus
from gloria.data.prepare import scatter, text
from gloria.data.tokenizer import TokenizerConfig, train_tokenizer
from tests.data.prepare.test_prepare import make_texts, write_lines

COMMANDS = {
    "prepare": ("", "out.partial-kept"),
    "refine": ('[refine]\npreset = "none"\nout = "unused"\n', "out"),
}
PR_CAPBSET_DROP, CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH = 24, 1, 2


def obey_permissions() -> None:
    """In a child before it starts: root, too, is refused what the mode of a file refuses its owner."""
    library = ctypes.CDLL(None)
    for capability in (CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH):  # EPERM for those who have none to give up
        library.prctl(PR_CAPBSET_DROP, capability, 0, 0, 0)


def launch(command: str, recipe: Path, out: Path) -> subprocess.CompletedProcess[str]:
    arguments = [sys.executable, "-m", f"gloria.{command}", str(recipe), "--out", str(out), "--workers", "1"]
    return subprocess.run(arguments, capture_output=True, text=True, check=False, preexec_fn=obey_permissions)


def write_recipe(folder: Path, command: str, extra: str = "") -> Path:
    """Two sources; the tokenizer is there already."""
    for name in ("um", "dois"):
        write_lines(folder / name / "a.jsonl", make_texts(name, 30))
    train_tokenizer(TokenizerConfig(vocab_size=600), make_texts("tokenizer", 100), folder / "tokenizer")
    lines = [extra, f'[tokenizer]\npath = "tokenizer"\n{COMMANDS[command][0]}']
    lines += [f'[[source]]\nname = "{name}"\npaths = ["{name}"]' for name in ("um", "dois")]
    (folder / "corpus.toml").write_text("\n".join(lines))
    return folder / "corpus.toml"


@pytest.mark.parametrize("command", COMMANDS)
def test_a_file_without_permission_is_one_line(tmp_path: Path, command: str) -> None:
    recipe, closed = write_recipe(tmp_path, command), tmp_path / "dois" / "a.jsonl"
    closed.chmod(0)
    done = launch(command, recipe, tmp_path / "out")
    kept = f"{tmp_path}/out: holds what is finished; the same command goes on"
    error = f"error: {closed}: can't be read (Permission denied); check the file"
    assert (done.returncode, done.stderr.splitlines()) == (2, [kept, error] if command == "refine" else [error])
    closed.chmod(0o600)
    assert launch(command, recipe, tmp_path / "out").returncode == 0


@pytest.mark.parametrize("command", COMMANDS)
def test_a_place_without_permission_is_one_line(tmp_path: Path, command: str) -> None:
    recipe, closed = write_recipe(tmp_path, command), tmp_path / "closed"
    closed.mkdir(mode=0o500)
    done = launch(command, recipe, closed / "out")
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"error: {closed}/out: ")
    assert "Permission denied" in line
    assert not list(closed.iterdir())


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 1 MB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", disk], capture_output=True, check=False)
    if mounted.returncode:
        pytest.skip("no small disk can be mounted here: that takes root, and a container that lets it")
    yield disk
    subprocess.run(["umount", disk], check=True)


@pytest.mark.parametrize("command", COMMANDS)
def test_a_disk_that_gets_full_is_one_line_and_the_launch_after_goes_on(small_disk: Path, command: str) -> None:
    folder = small_disk.parent
    recipe = write_recipe(folder, command)
    ballast = small_disk / "ballast"
    ballast.write_bytes(b"a" * 1_000_000)
    done = launch(command, recipe, small_disk / "out")
    assert done.returncode == 2
    error = done.stderr.splitlines()[-1]
    assert error.startswith("error: ")
    assert "the disk got full; free some, " in error
    assert "Traceback" not in done.stderr
    ballast.unlink()
    assert launch(command, recipe, small_disk / "out").returncode == 0


def test_a_line_of_a_gigabyte_is_malformed_and_never_held(tmp_path: Path) -> None:
    """The file is sparse: a gigabyte of zeros takes no disk."""
    path = tmp_path / "a.jsonl"
    good = json.dumps({"text": "antes e depois"}).encode() + b"\n"
    path.write_bytes(good + b'{"text": "')
    os.truncate(path, 1 << 30)
    with open(path, "ab") as file:
        file.write(b'"}\n' + good)
    # Not ru_maxrss, which begins at what the parent held.
    script = (
        "import re, sys; from gloria.data.prepare.text import read_documents;"
        "print([(found.line, found.text, found.problem) for found in read_documents(sys.argv[1], 'jsonl')]);"
        "print(re.search(r'VmHWM:\\s+(\\d+)', open('/proc/self/status').read())[1])"
    )
    done = subprocess.run([sys.executable, "-c", script, str(path)], capture_output=True, text=True, check=True)
    found, peak = done.stdout.splitlines()
    assert found == str([(1, "antes e depois", ""), (2, "", "longer than 134 MB"), (3, "antes e depois", "")])
    assert int(peak) * 1024 < 4 * text.MOST_BYTES


@pytest.mark.parametrize("piece", [100, 700, 5000])
def test_a_line_that_is_too_long_is_counted_once_however_its_file_is_cut(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], piece: int
) -> None:
    monkeypatch.setattr(text, "MOST_BYTES", 1000)
    monkeypatch.setattr(scatter, "PIECE_BYTES", piece)
    recipe = write_recipe(tmp_path, "prepare", "max_malformed = 0.5")
    path = tmp_path / "um" / "a.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    long = json.dumps({"text": "mar " * 1000}).encode() + b"\n"
    path.write_bytes(b"".join([*lines[:10], long, *lines[10:]]))
    assert prepare.main([str(recipe), "--out", str(tmp_path / "out"), "--workers", "1"]) == 0
    assert f"1 malformed documents are left out: {path}:11 (longer than 134 MB)\n" in capsys.readouterr().err
    counts = open_corpus(tmp_path / "out").source("um").counts
    assert (counts["read"], counts["malformed"], counts["kept"]) == (31, 1, 30)
