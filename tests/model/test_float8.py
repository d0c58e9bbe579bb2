"""Prevents: float8 that is requested where it cannot work and fails with the first kernel, or that changes the names or
the precision of what a checkpoint holds. CUDA's answers are made up; the layers are torchao's where it is installed."""

from __future__ import annotations

import dataclasses
import sys

import pytest
import torch

from gloria.errors import UserError
from gloria.model.config import PRESETS
from gloria.model.float8 import check_float8, to_float8
from gloria.model.transformer import Transformer

SHAPE = PRESETS["demo"]
CUDA = torch.device("cuda", 0)


@pytest.mark.parametrize(
    ("device", "capability", "precision", "size", "line"),
    [
        (torch.device("cpu"), (9, 0), "bf16", 64, "float8 is for GPUs, and this run is on CPU; leave it out"),
        (
            CUDA,
            (8, 0),
            "bf16",
            64,
            "A100 (sm_80) has no float8, which begins with sm_89 (L4, RTX 4090, H100)",
        ),
        (CUDA, (9, 0), "fp32", 64, "goes with train.precision bf16, not fp32; set that, or leave it out"),
        (CUDA, (9, 0), "bf16", 72, "sizes must be multiples of 16, and the model has 72; leave it out"),
        (CUDA, (8, 9), "bf16", 64, "needs torchao ("),
    ],
)
def test_float8_is_refused_in_one_line(monkeypatch, device, capability, precision, size, line) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "A100")
    monkeypatch.setitem(sys.modules, "torchao", None)  # not installed
    monkeypatch.delitem(sys.modules, "torchao.float8", raising=False)
    shape = dataclasses.replace(SHAPE, hidden_size=size, num_heads=4, intermediate_size=4 * size)
    with pytest.raises(UserError) as caught:
        check_float8(shape, device, precision)
    (problem,) = caught.value.problems
    assert problem.startswith(f"train.fp8: {line}")
    assert problem.endswith("leave it out")


def test_the_blocks_layers_alone_change_and_no_name_does() -> None:
    pytest.importorskip("torchao.float8", reason="torchao is not installed: the extra fp8")
    with torch.device("meta"):
        model = Transformer(SHAPE)
    before = {name: (tensor.dtype, tensor.shape) for name, tensor in model.state_dict().items()}
    to_float8(model.transformer.h)
    assert {name: (tensor.dtype, tensor.shape) for name, tensor in model.state_dict().items()} == before
    kinds = {type(module).__name__ for module in model.modules() if isinstance(module, torch.nn.Linear)}
    assert kinds == {"Float8Linear"}
