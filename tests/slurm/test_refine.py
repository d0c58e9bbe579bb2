"""Prevents: an array of Slurm jobs that cleans otherwise than one process, and a failure of a task that is not said."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.data.refine.conftest import Cleaned, write_lines
from tests.data.refine.test_refine import two_sources

pytest.importorskip("datatrove", reason='needs the extra "data"')
pytestmark = [pytest.mark.timeout(900), pytest.mark.slurm]


def test_two_nodes_make_the_files_of_one_process(cluster, tmp_path: Path, monkeypatch, capsys) -> None:
    for name, value in cluster.environment.items():
        monkeypatch.setenv(name, value)
    recipe = two_sources(tmp_path)
    local = Cleaned(recipe, tmp_path / "local")
    options = 'sbatch = {mem-per-cpu = "0"}'
    recipe.write_text(f'{recipe.read_text()}\n[executor]\nkind = "slurm"\npartition = "main"\ntime = "10"\n{options}\n')
    out = Cleaned(recipe, tmp_path / "slurm")
    assert out.status == 0
    assert out.bytes() == local.bytes()
    # A mistake in a task is the command's own line.
    write_lines(tmp_path / "um.jsonl", ["Um texto."])
    (tmp_path / "um.jsonl.gz").write_bytes(b"no gzip")
    recipe.write_text(recipe.read_text().replace('"um.jsonl"', '"um.jsonl.gz"'))
    capsys.readouterr()
    assert Cleaned(recipe, tmp_path / "slurm").status == 2
    assert f"error: {tmp_path}/um.jsonl.gz: is no whole .gz file" in capsys.readouterr().err


def test_ray_makes_the_files_of_one_process(tmp_path: Path, monkeypatch) -> None:
    pytest.importorskip("ray", reason="needs ray, which is in no extra")
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    recipe = two_sources(tmp_path)
    local = Cleaned(recipe, tmp_path / "local")
    recipe.write_text(f'{recipe.read_text()}\n[executor]\nkind = "ray"\nworkers = 1\nmemory_gb = 1\n')
    assert Cleaned(recipe, tmp_path / "ray").bytes() == local.bytes()
