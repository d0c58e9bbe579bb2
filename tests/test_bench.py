"""Prevents: a measurement that does not run any more, because what it imports was renamed."""

from __future__ import annotations

import subprocess
import sys

from tests.conftest import REPOSITORY


def test_every_script_of_bench_can_be_imported():
    names = sorted(f"bench.{path.stem}" for path in (REPOSITORY / "bench").glob("*.py"))
    assert "bench.quick" in names
    code = "import importlib, sys\nfor name in sys.argv[1:]: importlib.import_module(name)"
    done = subprocess.run([sys.executable, "-c", code, *names], cwd=REPOSITORY, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
