"""What the steps since the last line of the log were like, in sums that are equal on all ranks."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from gloria.config.schema import option
from gloria.dist.gpus import card_of_cuda_name
from gloria.dist.step_sums import StepSums


def peak_flops(card: str, precision: str) -> float | None:
    """The dense peak, in FLOP/s, of a card by CUDA's name for it; None for an unknown card."""
    known = card_of_cuda_name(card)
    return known.peak(precision) if known else None


def peak_memory(device_type: str) -> int:
    """Bytes this process has held at most: allocated on its GPU, or resident on CPU."""
    if device_type == "cuda":
        import torch

        return torch.cuda.max_memory_allocated()
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


@dataclass(frozen=True)
class SavedMeter:
    """What a checkpoint remembers of the meter: `Meter.state_dict`."""

    steps: int = option(help="since the last line of the log", minimum=0)
    skipped: int = option(help="of them", minimum=0)
    grad_norm: float | None = option(help="of the last step that was applied", minimum=0)
    loss: dict[str, float] = option(help="sums by group")
    rows: dict[str, int] = option(help="counts by group", minimum=0)
    overflows: int = option(0, "of the loss scale", minimum=0)
    metrics: dict[str, float] = option({}, "sums by name")


@dataclass
class Meter:
    """Sums over the steps since the last line of the log. A metric that an objective sums is in it by its name."""

    groups: tuple[str, ...]  # names that losses are reported under
    row_targets: int = 1  # what a row's loss sums over: the tokens of a window, or the row itself

    def __post_init__(self) -> None:
        self._reset()

    def _reset(self) -> None:
        self.steps = self.skipped = self.overflows = 0  # overflows of the loss scale are no skips
        self.loss = np.zeros(len(self.groups))
        self.rows = np.zeros(len(self.groups), dtype=np.int64)
        self.metrics: dict[str, float] = {}
        self.grad_norm = math.nan  # of the last step that was applied
        # Of this launch alone, which the clock has seen:
        self.timed_steps = self.timed_rows = self.timed_tokens = 0
        self.seconds = self.data_seconds = 0.0

    def add(self, sums: StepSums, tokens: int, seconds: float, data_seconds: float) -> None:
        """Count a step of `tokens`; one whose update was left out counts in time and not in the loss."""
        self.steps += 1
        self.timed_steps += 1
        self.timed_rows += int(sums.group_rows.sum())
        self.timed_tokens += tokens
        self.seconds += seconds
        self.data_seconds += data_seconds
        if sums.applied:
            self.loss += sums.group_loss
            self.rows += sums.group_rows
            self.grad_norm = sums.grad_norm
            for name, value in sums.metrics.items():
                self.metrics[name] = self.metrics.get(name, 0.0) + value
        elif sums.overflow:
            self.overflows += 1
        else:
            self.skipped += 1

    def read(self) -> tuple[dict[str, Any], dict[str, float | None]]:
        """Values for a line of the log, and the loss by group (None: no row of it); then the meter starts anew.

        `loss` and metrics are means over tokens (fine-tuning: rows), `step_s` and `data_s` over steps; speeds are of
        all ranks together.
        """
        targets = int(self.rows.sum()) * self.row_targets
        values = {
            "loss": float(self.loss.sum()) / targets if targets else math.nan,
            "grad_norm": self.grad_norm,
            "tokens_per_s": self.timed_tokens / self.seconds if self.seconds else math.nan,
            "step_s": self.seconds / max(self.timed_steps, 1),
            "data_s": self.data_seconds / max(self.timed_steps, 1),
            "skipped": self.skipped,
            "overflows": self.overflows,
            **{name: value / targets if targets else math.nan for name, value in self.metrics.items()},
        }
        if self.row_targets == 1:
            values["rows_per_s"] = self.timed_rows / self.seconds if self.seconds else math.nan
        losses = {
            name: float(total) / (int(rows) * self.row_targets) if rows else None
            for name, total, rows in zip(self.groups, self.loss, self.rows)
        }
        self._reset()
        return values, losses

    def state_dict(self) -> dict[str, Any]:
        """The sums as plain JSON, so that the line after a resume has the losses of an unbroken run."""
        return {
            "steps": self.steps,
            "skipped": self.skipped,
            "overflows": self.overflows,
            "grad_norm": self.grad_norm if math.isfinite(self.grad_norm) else None,
            "loss": dict(zip(self.groups, self.loss.tolist())),
            "rows": dict(zip(self.groups, self.rows.tolist())),
            "metrics": self.metrics,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take up the sums of `state_dict`; groups are found by name, for there may be others now."""
        self._reset()
        self.steps, self.skipped, self.overflows = state["steps"], state["skipped"], state.get("overflows", 0)
        self.grad_norm = math.nan if state["grad_norm"] is None else state["grad_norm"]
        self.loss = np.array([state["loss"].get(name, 0.0) for name in self.groups])
        self.rows = np.array([state["rows"].get(name, 0) for name in self.groups], dtype=np.int64)
        self.metrics = dict(state.get("metrics", {}))
