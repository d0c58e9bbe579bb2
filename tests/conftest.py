"""Settings every test shares."""

from __future__ import annotations

import os
import random
import signal
import threading
from pathlib import Path

import pytest

# Two pytest workers share two cores: more threads a process only make them wait for each other.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# A test that reaches for a hub must fail at once, not wait for the network.
os.environ["HF_HUB_OFFLINE"] = "1"

# A suite that runs in the background of a shell inherits ignored signals, and so would the processes that tests start.
if threading.current_thread() is threading.main_thread():
    for number, action in ((signal.SIGHUP, signal.SIG_DFL), (signal.SIGINT, signal.default_int_handler)):
        if signal.getsignal(number) is signal.SIG_IGN:
            signal.signal(number, action)

REPOSITORY = Path(__file__).resolve().parent.parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """GLORIA_TEST_ORDER=7 runs the tests in the seventh of many random orders."""
    if order := os.environ.get("GLORIA_TEST_ORDER"):
        random.Random(order).shuffle(items)


@pytest.fixture
def repository() -> Path:
    """The repository's root folder, where `launch/` lies."""
    return REPOSITORY


@pytest.fixture(scope="session")
def sample_corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The sample corpus of the package, prepared once a pytest process."""
    from gloria.prepare import main

    out = tmp_path_factory.mktemp("corpus") / "sample"
    assert main([str(REPOSITORY / "launch" / "sample.toml"), "--out", str(out), "--workers", "1"]) in (0, None)
    return out
