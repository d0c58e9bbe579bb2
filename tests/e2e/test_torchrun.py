"""Prevents: the command of the README failing where everything called from Python works."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from gloria.dist.run_lock import read_status
from tests.launch import SMALL, flags, losses

pytestmark = pytest.mark.torchrun


def torchrun(arguments: list[str], folder: Path, repository: Path, ranks: int = 2) -> subprocess.CompletedProcess[str]:
    """`torchrun --nproc_per_node RANKS -m gloria.pretrain ARGUMENTS` in `folder`."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
    environment = os.environ | {"PYTHONPATH": str(repository), "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [*command, "-m", "gloria.pretrain", *arguments],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
    )


def test_without_a_recipe_the_demo_runs_and_makes_its_corpus(tmp_path, repository):
    """In an empty folder: nothing but the package, as after an installation."""
    small = {key: value for key, value in SMALL.items() if not key.startswith("model.")}
    ended = torchrun(flags(small, train__steps=2), tmp_path, repository)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert "data/sample: not there yet; preparing it from sample.toml" in ended.stdout
    assert sorted(losses(tmp_path / "runs/demo")) == [1, 2]
    assert read_status(tmp_path / "runs/demo").status == "done"


def test_a_wrong_recipe_is_reported_once_and_before_torchruns_own_report(tmp_path, repository):
    ended = torchrun(["--train.stepz", "3", "--optim.lr", "fast"], tmp_path, repository)
    assert ended.returncode != 0
    ours = [line for line in ended.stderr.splitlines() if line.startswith("error:")]
    assert ours == [
        "error: --train.stepz: unknown flag; did you mean --train.steps?",
        'error: --optim.lr: must be a number, not "fast"; for example 0.1',
    ]
    assert "gloria/errors.py" not in ended.stderr
    assert not any(tmp_path.iterdir())
