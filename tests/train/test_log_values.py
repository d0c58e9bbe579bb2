"""Prevents: shares in the log that are counted from a stage which lies ahead, minus 4600 % of it."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from gloria.train.pretraining import Pretraining
from tests.data.test_mixture import WEIGHTS, WINDOWS, mixture_of


def test_the_achieved_share_is_of_the_stage_that_the_step_lies_in() -> None:
    mixture: Any = mixture_of(WINDOWS, WEIGHTS)
    mixture.leave_out(range(4800, 4900))
    parts = {"mixture": mixture, "plan": SimpleNamespace(flops_per_token=1.0), "bytes_per_token": {}, "peak": None}
    run: Any = SimpleNamespace(process=SimpleNamespace(world=1))
    batch = mixture.batches[0].batch
    for step in (960 // batch, 4800 // batch, 9600 // batch):  # before the gap, up to it, and behind it
        values = {"tokens_per_s": 1.0, "loss": 1.0}
        objective: Any = SimpleNamespace(**parts)
        found = Pretraining.log_values(objective, run, step, values, dict.fromkeys(WINDOWS, 1.0))
        for name, source in found["sources"].items():
            assert abs(source["share"] - source["asked"]) < 0.02, (step, name, source)
