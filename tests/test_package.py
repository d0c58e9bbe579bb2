"""Prevents: an installed package without its recipes and samples, a list of packages that differs from another, and a
command that is missing from `gloria --help`."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

from gloria.__main__ import COMMANDS
from tests.conftest import REPOSITORY


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel that this tree makes, unpacked as pip unpacks it."""
    folder = tmp_path_factory.mktemp("package")
    ignore = shutil.ignore_patterns("__pycache__")
    for name in ("gloria", "launch"):
        shutil.copytree(REPOSITORY / name, folder / "tree" / name, symlinks=True, ignore=ignore)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(REPOSITORY / name, folder / "tree")
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-index", "--no-build-isolation"]
    subprocess.run([*command, "--wheel-dir", str(folder), str(folder / "tree")], check=True)
    (wheel,) = folder.glob("gloria-*.whl")
    zipfile.ZipFile(wheel).extractall(folder / "site")
    return folder / "site"


def run(installed: Path, folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    """`python -m ...` on the installed package alone, in a folder of its own."""
    command = [sys.executable, "-m", "gloria", *words]
    environment = {**os.environ, "PYTHONPATH": str(installed)}
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)


def test_the_installed_package_has_every_file_that_a_command_reads(installed: Path):
    own = {path.relative_to(REPOSITORY) for path in (REPOSITORY / "gloria").rglob("*") if path.is_file()}
    own |= {Path("gloria/launch") / path.name for path in (REPOSITORY / "launch").glob("*.toml")}
    own = {path for path in own if path.suffix not in (".pyc", ".sbatch", ".sh") and path.name != "README.md"}
    there = {path.relative_to(installed) for path in installed.rglob("*") if path.is_file()}
    assert own - there == set()
    (scripts,) = installed.glob("*.dist-info/entry_points.txt")
    assert "gloria = gloria.__main__:console" in scripts.read_text()


def test_the_demo_runs_from_the_installed_package(installed: Path, tmp_path: Path):
    done = run(installed, tmp_path, "pretrain", "--dry-run")
    assert done.returncode == 0, done.stderr
    assert "data/sample: not there yet; preparing it from sample.toml" in done.stdout
    assert 'dir = "runs/demo"' in done.stdout
    done = run(installed, tmp_path, "plan", "--config", "launch/gpt2-124m.toml", "--gpus", "1xA100-80GB")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("launch/gpt2-124m.toml: not here; reading ")
    done = run(installed, tmp_path, "prepare", "launch/sample.toml")
    assert "data/sample: is already whole" in done.stdout, done.stdout + done.stderr
    done = run(installed, tmp_path, "finetune", "--task", "assin2", "--run.dir", "x", "--train.steps=x")
    assert done.stderr == 'error: --train.steps: must be a whole number, not "x"; for example 1000\n'


def test_every_command_is_listed_and_in_the_readme(capsys: pytest.CaptureFixture[str]):
    own = {path.stem for path in (REPOSITORY / "gloria").glob("*.py") if "run_command(" in path.read_text()}
    assert own - {"errors", "__main__"} == set(COMMANDS)
    done = subprocess.run([sys.executable, "-m", "gloria"], cwd=REPOSITORY, capture_output=True, text=True)
    assert re.findall(r"^  (\w+) ", done.stdout, re.M) == list(COMMANDS)
    assert all(f"`{name}`" in (REPOSITORY / "README.md").read_text() for name in COMMANDS)


def test_the_lists_of_packages_agree():
    def names(lines: list[str]) -> dict[str, str]:
        found = (re.match(r"([A-Za-z0-9_-]+)(.*)", line) for line in lines if line[:1].isalpha())
        return {match[1].lower().replace("_", "-"): match[2] for match in found if match}

    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    bounds = names(project["dependencies"])
    pinned = names((REPOSITORY / "requirements.txt").read_text().splitlines())
    assert pinned == bounds | {"torch": pinned["torch"]}
    tested = names((REPOSITORY / "constraints.txt").read_text().splitlines())
    assert tested["torch"] == pinned["torch"]
    assert bounds.keys() <= tested.keys()
