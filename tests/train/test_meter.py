"""Prevents: a mean over steps of unequal size, a skipped step that counts in the loss, losses that a resume forgets,
another card's MFU, a metric of one's own that needs more than its sum."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch

from gloria.dist.step_sums import Flags, StepSums, decide_update, pack_sums, unpack_sums
from gloria.train.meter import Meter, peak_flops, peak_memory


def new_meter(groups: tuple[str, ...] = ("ptwiki", "oscar")) -> Meter:
    return Meter(groups, row_targets=10)


def add_step(meter: Meter, losses: list[float], rows: list[int], norm: float = 1.0, finite: bool = True) -> None:
    sums = StepSums(norm, finite, False, False, 0.0, np.array(losses), np.array(rows), 0, 0, 0, 0)
    meter.add(sums, tokens=10 * sum(rows), seconds=0.5, data_seconds=0.05)


def test_a_meter_gives_means_over_tokens_and_starts_anew() -> None:
    meter = new_meter()
    add_step(meter, [20.0, 60.0], [1, 3], norm=2.0)
    add_step(meter, [40.0, 80.0], [1, 3], norm=3.0)
    values, losses = meter.read()
    assert values == {
        "loss": 200 / 80,
        "grad_norm": 3.0,
        "tokens_per_s": 80.0,
        "step_s": 0.5,
        "data_s": 0.05,
        "skipped": 0,
        "overflows": 0,
    }
    assert losses == {"ptwiki": 3.0, "oscar": 140 / 60}
    add_step(meter, [10.0, 0.0], [1, 0])
    values, losses = meter.read()
    assert (values["loss"], losses) == (1.0, {"ptwiki": 1.0, "oscar": None}), "nothing is left of the steps before"


def test_a_skipped_step_counts_in_time_and_not_in_the_loss() -> None:
    meter = new_meter()
    add_step(meter, [20.0, 60.0], [1, 3], norm=2.0)
    add_step(meter, [math.nan, 60.0], [1, 3], norm=math.nan, finite=False)
    values, _ = meter.read()
    assert (values["loss"], values["grad_norm"], values["skipped"]) == (2.0, 2.0, 1)
    assert values["tokens_per_s"] == 80.0


def test_a_resumed_meter_has_the_losses_of_an_unbroken_one() -> None:
    unbroken, before = new_meter(), new_meter()
    for meter in (unbroken, before):
        add_step(meter, [0.1, 0.2], [1, 3])
    state = json.loads(json.dumps(before.state_dict()))
    after = new_meter(("new", "oscar", "ptwiki"))
    after.load_state_dict(state)
    add_step(unbroken, [0.7, 0.3], [2, 2])
    add_step(after, [0.0, 0.3, 0.7], [0, 2, 2])
    (one, losses), (other, others) = unbroken.read(), after.read()
    assert (one["loss"], losses) == (other["loss"], {name: others[name] for name in losses})
    assert other["tokens_per_s"] == 80.0, "speed is that of this launch's steps"


def test_a_metric_of_ones_own_is_a_sum_with_a_name() -> None:
    """What an objective's `losses` returns beside the losses comes out of the all-reduce as a mean in the log."""
    meter, own = Meter(("task",)), {"accuracy": torch.tensor(3.0), "z_loss": torch.tensor(0.5)}
    for _ in range(2):
        sums = pack_sums(torch.tensor(4.0), torch.ones(4), torch.zeros(4, dtype=torch.int64), 1, Flags(), own.values())
        decide_update(sums, 1)
        meter.add(unpack_sums(sums.numpy(), 1, tuple(own)), 12, 1.0, 0.0)
    resumed = Meter(("task",))
    resumed.load_state_dict(json.loads(json.dumps(meter.state_dict())))
    for one in (meter, resumed):
        values, _ = one.read()
        assert (values["accuracy"], values["z_loss"], values["loss"]) == (0.75, 0.125, 1.0)


@pytest.mark.parametrize(
    ("card", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA H200", 989e12),
        ("NVIDIA A100-SXM4-40GB", 312e12),
        ("NVIDIA A100-PCIE-40GB", 312e12),
        ("NVIDIA A100 80GB PCIe", 312e12),
        ("NVIDIA L40S", 362e12),
        ("NVIDIA A10", 125e12),
        ("Tesla V100-SXM2-32GB", 125e12),
        ("Tesla T4", 65e12),
        ("NVIDIA GeForce RTX 4090", 165.2e12),
        ("NVIDIA GeForce RTX 3090", 71e12),
        # Near names of other cards, and slices of known ones.
        ("NVIDIA A10G", None),
        ("NVIDIA A100-SXM4-40GB MIG 1g.5gb", None),
        ("NVIDIA H100 80GB HBM3 MIG 3g.40gb", None),
        ("NVIDIA L40", None),
        ("NVIDIA GeForce RTX 3090 Ti", None),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None),
        ("Some GPU", None),
    ],
)
def test_a_card_has_its_own_peak_or_none(card: str, peak: float | None) -> None:
    assert peak_flops(card, "bf16") == peak_flops(card, "fp16") == peak
    if peak:
        assert peak_flops(card, "fp32") < peak


def test_memory_is_in_bytes() -> None:
    assert peak_memory("cpu") > 2**20
