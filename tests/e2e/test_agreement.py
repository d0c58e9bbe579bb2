"""Prevents: ranks that mean different runs, read different corpora or write to different disks, and hang."""

from __future__ import annotations

import os
import re
import shutil
import socket
from pathlib import Path
from typing import Any

import pytest

from tests.launch import SMALL, flags, start

NODE = socket.gethostname()
REMEDY = "start all ranks with the same recipe, flags, corpus and environment"


@pytest.fixture
def recipe(sample_corpus: Path, repository: Path, tmp_path: Path) -> dict[str, Any]:
    """Corpus and run folder are relative paths, which rank 1 may find elsewhere."""
    (tmp_path / "here").mkdir()
    shutil.copytree(sample_corpus, tmp_path / "here" / "corpus")
    shutil.copytree(tmp_path / "here", tmp_path / "there")
    return {"config": repository / "launch/demo.toml", **SMALL, "data.corpus": "corpus", "run.dir": "run"}


def ends(recipe: dict[str, Any], folder: Path, prepare) -> list[str]:
    """Exit statuses must be 2; the lines that begin with `error:`."""
    before = os.getcwd()
    os.chdir(folder / "here")
    try:
        launch = start(flags(recipe), 2, folder, prepare)
        assert launch.wait(60) == [2, 2], launch.text()
    finally:
        os.chdir(before)
    assert "Traceback" not in launch.text()
    assert not (folder / "here" / "run" / "lock").exists()
    return [line for line in launch.text().splitlines() if line.startswith("error:")]


def other_flags_on_rank_1() -> None:
    import gloria.pretrain as pretrain

    read = pretrain.read_pretrain_config
    if os.environ["RANK"] == "1":
        changed = {"--train.steps=12": "--train.steps=13", "--log.every=1": "--log.every=2"}
        pretrain.read_pretrain_config = lambda argv: read([changed.get(word, word) for word in argv])


def test_ranks_that_disagree_on_the_recipe(recipe, tmp_path):
    assert ends(recipe, tmp_path, other_flags_on_rank_1) == [
        f"error: log.every: 1 on {NODE} (rank 0) and 2 on {NODE} (rank 1); {REMEDY}",
        f"error: train.steps: 12 on {NODE} (rank 0) and 13 on {NODE} (rank 1); {REMEDY}",
    ]
    assert not (tmp_path / "here" / "run").exists()


def rank_1_is_elsewhere() -> None:
    import gloria.dist.agreement as agreement

    agreement.SHARED_SECONDS = 0.5
    if os.environ["RANK"] == "1":
        os.chdir("../there")


def test_ranks_that_see_another_corpus_under_the_same_name(recipe, tmp_path):
    manifest = tmp_path / "there" / "corpus" / "manifest.json"
    text = manifest.read_text()
    first = text.index('"bin_hash": "') + len('"bin_hash": "')
    text = text[:first] + ("0" if text[first] != "0" else "1") + text[first + 1 :]
    manifest.write_text(re.sub(r'"seal": "\w+"', '"seal": ""', text))  # as an older version made it
    (line,) = ends(recipe, tmp_path, rank_1_is_elsewhere)
    assert line.startswith("error: data.corpus: source enciclopedia: ")
    assert line.endswith(f" on {NODE} (rank 1); {REMEDY}")


def test_a_run_folder_that_is_not_shared(recipe, tmp_path):
    assert ends(recipe, tmp_path, rank_1_is_elsewhere) == [
        f"error: run.dir: run: what {NODE} writes there is not seen on {NODE}; "
        "choose a folder on a file system that all nodes share"
    ]
