"""The sample corpus for a run that was given no recipe: prepared on first use, so that one command is enough."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

from gloria.data.corpus import MANIFEST
from gloria.dist.environment import read_environment
from gloria.errors import UserError
from gloria.train.config import DEMO, PretrainConfig, is_demo_to_prepare

SAMPLE = DEMO.with_name("sample.toml")
PATIENCE_SECONDS = 600  # the other ranks wait this long for a corpus that takes seconds


def prepare_demo_corpus(config: PretrainConfig) -> None:
    """Where `config` is the demo's own recipe and its corpus is not there yet, rank 0 makes it; the others wait."""
    if not is_demo_to_prepare(config):
        return
    manifest = Path(config.data.corpus, MANIFEST)
    if read_environment().rank == 0:
        print(f"{config.data.corpus}: not there yet; preparing it from {SAMPLE.name}", flush=True)
        command = [sys.executable, "-m", "gloria.prepare", str(SAMPLE), "--out", config.data.corpus]
        if subprocess.run(command).returncode:
            raise UserError(f"{config.data.corpus}: could not be prepared (see above); run {' '.join(command[1:])}")
        return
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not manifest.exists():
        if time.monotonic() > deadline:
            raise UserError(f"{manifest}: rank 0 has not prepared it in {PATIENCE_SECONDS} s; look at its output")
        time.sleep(0.2)
