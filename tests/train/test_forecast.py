"""Prevents: whole weights kept on a card that has no room for them, and a run on many nodes that waits for the network
without anybody having said what to set."""

from __future__ import annotations

import dataclasses

import pytest

from gloria.config.toml import RECIPES
from gloria.dist.gpus import read_gpus, usable_memory
from gloria.model.config import PRESETS
from gloria.train.config import PretrainConfig, peak_of_step, read_pretrain_config
from gloria.train.forecast import SPARE, Network, advice, keep_gathered

SHAPE = PRESETS["gloria-1.3b"]
_, H100 = read_gpus("H100")


def recipe(ranks: int, *flags: str) -> PretrainConfig:
    return read_pretrain_config(
        ["--config", str(RECIPES / "gloria-1.3b.toml"), *flags], world=lambda config: ranks, needs_corpus=False
    )


def test_whole_weights_are_kept_where_the_forecast_has_room_for_them() -> None:
    config = recipe(4)
    peak = peak_of_step(config, SHAPE, 4, precision="bf16", on_gpu=True, keep_gathered=True).total
    given_back = peak_of_step(config, SHAPE, 4, precision="bf16", on_gpu=True).total
    assert 2 * 1.2e9 < peak - given_back < 2 * 1.4e9, "16 bits for each parameter but those of the blocks at work"
    room = peak / (1 - SPARE)
    for usable, keep in ((room * 1.001, True), (room * 0.999, False), (None, False)):
        assert keep_gathered(config, SHAPE, 4, precision="bf16", usable=usable).keep == keep
    for asked, keep in (("always", False), ("never", True)):
        config = dataclasses.replace(config, dist=dataclasses.replace(config.dist, reshard=asked))
        found = keep_gathered(config, SHAPE, 4, precision="bf16", usable=room * 0.999)
        assert found.keep == keep
        assert found.describe().endswith(f": dist.reshard is {asked}")


@pytest.mark.parametrize(
    ("ranks", "flags", "keys"),
    [
        (64, ("--train.micro_batch", "4"), ["train.micro_batch", "dist.replicas"]),
        (64, ("--train.micro_batch", "8", "--dist.replicas", "8"), ["train.micro_batch"]),
        (8, ("--train.micro_batch", "32"), []),
        (16, ("--train.global_batch", "4096", "--train.micro_batch", "32"), []),  # computing takes longer
    ],
)
def test_what_would_make_a_step_faster_is_said(ranks: int, flags: tuple[str, ...], keys: list[str]) -> None:
    usable = usable_memory(H100.memory * 2**20)
    config, network = recipe(ranks, *flags), Network(H100.link)
    lines = list(advice(config, SHAPE, ranks, H100, network, "bf16", kept=False, usable=usable))
    assert [line.partition(":")[0] for line in lines] == keys
    if "dist.replicas" in keys:
        assert "between 8 nodes" in lines[-1]
        assert "set it to 8, one copy of the model a node" in lines[-1]
        too_small = list(advice(config, SHAPE, ranks, H100, network, "bf16", kept=False, usable=5e9))
        assert [line.partition(":")[0] for line in too_small] == keys[:1]
