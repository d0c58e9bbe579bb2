"""A run's values for an experiment tracker, Weights & Biases or Trackio: offline, beside metrics.jsonl, on rank 0.

A tracker is an extra view. Where it fails while the run goes on, the run says so once and goes on without it.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gloria.errors import warn

TRACKERS = ("none", "wandb", "trackio")


def tracker_problem(name: str) -> str:
    """What is wrong with `log.tracker` on this machine, or ""."""
    if name == "none" or importlib.util.find_spec(name):
        return ""
    return f"{name} is not installed; pip install 'gloria[{name}]', or set none"


@dataclass
class Tracker:
    """An open tracker; its methods never raise."""

    name: str
    module: Any = None
    failed: bool = False

    def log(self, values: Mapping[str, float], step: int) -> None:
        """Numbers by name after `step` steps."""
        self._attempt(lambda: self.module.log(dict(values), step=step))

    def close(self) -> None:
        """Have all of it on disk."""
        self._attempt(lambda: self.module.finish())

    def _attempt(self, action: Callable[[], object]) -> None:
        if self.failed:
            return
        try:
            action()
        except Exception as error:  # whatever a library of others raises must not end the run
            warn(f"log.tracker: {self.name} has failed ({type(error).__name__}: {error}); the run goes on without it")
            self.failed = True


def open_tracker(name: str, folder: Path, recipe: Mapping[str, Any]) -> Tracker | None:
    """Begin, or go on with, the tracker's record of the run in `folder`; None for "none".

    Nothing leaves the machine unless the user's environment says so (WANDB_MODE=online): wandb writes into
    `folder`/wandb, for `wandb sync`, and trackio into `folder`/trackio.
    """
    if name == "none":
        return None
    tracker = Tracker(name)
    # One record a run, however often it is started again.
    id = f"{folder.name}-{hashlib.sha256(str(folder.absolute()).encode()).hexdigest()[:8]}"

    def begin() -> None:
        about = {"project": "gloria", "name": folder.name, "config": dict(recipe), "resume": "allow"}
        if name == "wandb":
            mode = os.environ.get("WANDB_MODE", "offline")
            about |= {"id": id, "dir": str(folder), "mode": mode, "settings": {"console": "off"}}
        else:
            os.environ.setdefault("TRACKIO_DIR", str(folder.absolute() / "trackio"))
        tracker.module = module = importlib.import_module(name)
        module.init(**about)

    tracker._attempt(begin)
    return tracker
