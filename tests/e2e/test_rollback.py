"""Prevents: a run that goes around a bad stretch, and meets it again on the next resume, loses other samples with it,
or goes back a second time."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from gloria.dist.checkpoint_read import find_checkpoint, read_full_tensors
from gloria.errors import run_command
from gloria.pretrain import main
from gloria.show import read_run, samples_of
from tests.launch import SMALL, flags, losses

STEPS = 12


@pytest.fixture
def recipe(sample_corpus: Path, repository: Path, tmp_path: Path) -> dict[str, Any]:
    """The demo's recipe, small, with a rate that does not depend on the number of steps."""
    config = repository / "launch/demo.toml"
    constant = {"schedule.kind": "constant", "schedule.min_ratio": 0.0, "train.steps": STEPS, "checkpoint.keep": 9}
    return {"config": config, "data.corpus": sample_corpus, **SMALL, **constant, "run.dir": tmp_path / "run"}


def shown(run_dir: Path, steps: int) -> list[tuple[str, int, int]]:
    """What `gloria.show` says of the samples of the first steps."""
    mixture, _ = read_run(run_dir)
    rows = [row for step in range(steps) for row in samples_of(mixture, step, world=1)]
    assert [row["sample"] for row in rows] == list(range(12 * steps))
    return [(row["source"], row["epoch"], row["window"]) for row in rows]


def test_going_back_and_around_is_a_run_that_never_had_those_samples(recipe, tmp_path, capsys):
    folder, without = tmp_path / "run", tmp_path / "without"
    assert main(flags(recipe)) == 0
    order = shown(folder, STEPS + 6)

    capsys.readouterr()
    around = recipe | {"run.resume": 4, "data.skip_samples": "65:90"}
    assert main(flags(around)) == 0
    reported = capsys.readouterr().out
    assert "changed: data.skip_samples: 65:90: left out from step 5 on; sample 65 is the former sample 90" in reported
    assert main(flags(recipe, run__dir=without, data__skip_samples="65:90")) == 0
    expected = order[:65] + order[90:]
    assert shown(folder, STEPS + 3) == shown(without, STEPS + 3) == expected[: 12 * (STEPS + 3)]

    # Once more, longer: by the same command, and by one that says nothing of it.
    kept = sorted(path.name[:13] for path in (folder / "checkpoints").glob("*.aside-*"))
    assert kept == ["step-00000008", "step-00000012"]
    assert main(flags(around, train__steps=15)) == 0
    assert (
        "run.resume: the run has gone back to step 4 before, and goes on from step 12; to go back again, name another "
        "step or move the checkpoints after it away"
    ) in capsys.readouterr().out
    assert main(flags(recipe, train__steps=18)) == 0
    assert main(flags(recipe, train__steps=18, run__dir=without)) == 0
    assert sorted(path.name[:13] for path in (folder / "checkpoints").glob("*.aside-*")) == kept
    assert losses(folder) == losses(without)
    one, other = (dict(read_full_tensors(find_checkpoint(run))) for run in (folder, without))
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_samples_that_were_trained_are_not_left_out_afterwards(recipe, tmp_path, capsys):
    assert main(flags(recipe)) == 0
    assert run_command(main, flags(recipe, train__steps=15, data__skip_samples="65:90")) == 2
    assert capsys.readouterr().err.splitlines()[-1] == (
        "error: --data.skip_samples: 65:90: the run continues at sample 144; go back with run.resume to a checkpoint "
        "of step 5 or before"
    )
