"""Prevents: samples of text that change what a run learns, that hang ranks which take other numbers of forward passes,
or that stay in the folder after the run has gone back behind them."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from gloria import pretrain
from gloria.errors import UserError
from tests import launch
from tests.launch import SMALL, flags

EVERY = {"log.samples_every": 4, "log.sample_tokens": 6, "log.prompts": '["A cortiça", ""]'}


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def undocumented(folder: Path) -> set[str]:
    """Keys in the records of a run that docs/records.md does not name."""
    named = re.findall(r"`(\w+)`", Path(__file__).parents[2].joinpath("docs/records.md").read_text("utf-8"))
    found = [*lines(folder / "metrics.jsonl"), *lines(folder / "samples.jsonl")]
    by_source = [values for line in found if line["kind"] == "train" for values in line["sources"].values()]
    records = [*found, *by_source, json.loads((folder / "status.json").read_text())]
    return {key for record in records for key in record} - set(named)


def test_losses_are_the_same_with_and_without_samples(sample_corpus: Path, tmp_path: Path) -> None:
    """On two ranks, with dropout, whose numbers a sample must not take; and stopped and continued."""
    demo = Path(__file__).resolve().parents[2] / "launch/demo.toml"
    recipe = {"config": demo, "data.corpus": sample_corpus, **SMALL, "model.dropout": 0.1, "valid.every": 4}
    launch.run(flags(recipe, run__dir=tmp_path / "plain"), 2, tmp_path)
    sampled = recipe | EVERY | {"log.tensorboard": "true"}
    launch.run(flags(sampled, run__dir=tmp_path / "run"), 2, tmp_path)
    losses = [
        [
            (line["kind"], line["step"], line["loss"])
            for line in lines(tmp_path / name / "metrics.jsonl")
            if "loss" in line
        ]
        for name in ("plain", "run")
    ]
    assert losses[0] == losses[1]
    found = lines(tmp_path / "run/samples.jsonl")
    assert [(line["step"], line["prompt"]) for line in found] == [
        (step, prompt) for step in (4, 8, 12) for prompt in ("A cortiça", "")
    ]
    assert len({line["text"] for line in found}) > 3, "a model that learns writes other things"

    board = EventAccumulator(str(tmp_path / "run/tensorboard"), size_guidance={"tensors": 0}).Reload()
    tags = board.Tags()["tensors"]
    assert {"samples/0/text_summary", "samples/1/text_summary", "custom_scalars__config__"} <= set(tags)
    layout = board.Tensors("custom_scalars__config__")[0].tensor_proto.string_val[0]
    for tag in ("valid/sources/cartas", "train/sources/cartas/loss"):
        assert f"^{tag}$".encode() in layout
        assert tag in board.Tags()["scalars"]

    assert not undocumented(tmp_path / "run")

    # Back to step 8, and on: what was written of step 12 is written once more, and once.
    launch.run(flags(sampled, run__dir=tmp_path / "run", run__resume=8), 2, tmp_path)
    assert [{**line, "time": 0} for line in lines(tmp_path / "run/samples.jsonl")] == [
        {**line, "time": 0} for line in found
    ]


def test_a_prompt_that_does_not_fit_is_an_error(sample_corpus: Path, tmp_path: Path) -> None:
    demo = Path(__file__).resolve().parents[2] / "launch/demo.toml"
    recipe = {"config": demo, "data.corpus": sample_corpus, **SMALL, "log.samples_every": 4, "log.sample_tokens": 5000}
    with pytest.raises(UserError) as caught:
        pretrain.main(flags(recipe, run__dir=tmp_path / "run"))
    (problem,) = caught.value.problems
    assert problem.startswith(
        "log.prompts: the longest has 1 tokens with its start, and log.sample_tokens = 5000 do not"
    )
