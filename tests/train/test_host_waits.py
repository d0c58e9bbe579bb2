"""Prevents: a step in which the host waits for the device, be it for one number. There is no GPU here, so a real step
is taken on CPU, and calls are counted for which a GPU's host would wait: those that read a number of a tensor, whose
size depends on numbers, or that make a tensor of a Python list, in memory that is not page-locked."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import gloria.pretrain as pretrain
from gloria.config.toml import RECIPES
from gloria.train import loop
from gloria.train.group import process_group
from gloria.train.pretraining import open_pretraining
from gloria.train.run import close_run

READS = {f"aten.{name}" for name in ("_local_scalar_dense", "nonzero", "masked_select", "_unique2", "bincount")}
INDEXING = {"aten.index", "aten.index_put", "aten.index_put_"}  # by a mask, they look for what is not zero


class Reads(TorchDispatchMode):
    """Counts the operators whose result the host must know before it goes on."""

    def __init__(self, waits: Counter[str]) -> None:
        super().__init__()
        self.waits = waits

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = str(function).rpartition(".")[0]
        by_mask = name in INDEXING and any(index is not None and index.dtype == torch.bool for index in args[1])
        self.waits[name] += name in READS or by_mask
        return function(*args, **(kwargs or {}))


def waits_of(function: Callable[[], Any], monkeypatch: pytest.MonkeyPatch) -> tuple[Any, dict[str, int]]:
    """What the function returns, and how often it would have waited, by call."""
    waits: Counter[str] = Counter()

    def counted(owner: Any, name: str) -> None:
        original = getattr(owner, name)

        def call(*args: Any, **kwargs: Any) -> Any:
            waits[name] += 1
            return original(*args, **kwargs)

        monkeypatch.setattr(owner, name, call)

    with monkeypatch.context() as patched, Reads(waits):
        monkeypatch = patched
        for name in ("cpu", "numpy", "tolist", "__array__"):
            counted(torch.Tensor, name)
        for name in ("tensor", "as_tensor"):
            counted(torch, name)
        result = function()
    return result, {name: count for name, count in waits.items() if count}


@pytest.mark.parametrize(
    "flags", [(), ("--train.skip_spikes", "6", "--data.mask_documents", "true", "--optim.name", "muon")]
)
def test_a_step_reads_nothing_from_the_device(flags, tmp_path: Path, sample_corpus: Path, monkeypatch):
    recipe = ["--config", str(RECIPES / "demo.toml"), "--data.corpus", str(sample_corpus)]
    config, plan = pretrain.check([*recipe, "--run.dir", str(tmp_path / "run"), "--train.micro_batch", "8", *flags])
    with process_group(config) as process:
        run = open_pretraining(config, plan, process)
        first = loop.take_step(run, run.objective.next_batch(run))  # FSDP2 sets itself up in it
        batch, waits = waits_of(lambda: run.objective.next_batch(run), monkeypatch)
        assert waits == {}
        assert len(batch.parts) > 1
        second, waits = waits_of(lambda: loop.take_step(run, batch), monkeypatch)
        assert waits == {}
        # It does see them: in the values of the step before, which have come by then.
        stop, waits = waits_of(lambda: loop.finish_step(run, first), monkeypatch)
        assert (stop, waits) == ("", {"numpy": 1})
        loop.finish_step(run, second)
        close_run(run, "stopped")


def test_what_would_wait_is_seen(monkeypatch):
    values = torch.arange(3.0)
    for wait in (
        lambda: values[0].item(),
        lambda: bool(values[0] > 1),
        lambda: values[values > 1],
        lambda: values.cpu(),
    ):
        assert waits_of(wait, monkeypatch)[1], wait
    assert waits_of(lambda: torch.tensor([1.0]), monkeypatch)[1] == {"tensor": 1}
