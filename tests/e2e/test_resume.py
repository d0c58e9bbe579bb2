"""Prevents: a resumed run that is another one in a way that no loss curve shows: other samples, moments that were not
loaded, dropout drawn anew, an epoch or a stage begun twice."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import gloria.pretrain
from gloria.data.loader import Batch, Loader
from gloria.dist.checkpoint import begin_save, finish
from gloria.dist.checkpoint_read import read_full_tensors, read_trainer
from gloria.dist.manifest import checkpoint_path
from gloria.dist.run_lock import lock_run, release_run
from gloria.dist.state import training_state
from gloria.errors import run_command
from gloria.train.run import Run
from tests import launch
from tests.launch import LLAMA, SMALL, flags, losses

# A step in which a source ends its first epoch comes after step 4, and before step 14.
EPOCHS = {
    "train.epochs": 1.2,
    "train.sequence_length": 128,
    "train.global_batch": 24,
    "train.micro_batch": 12,
    "log.every": 1,
}


@pytest.fixture
def recipe(sample_corpus: Path, repository: Path) -> dict[str, Any]:
    """The demo's recipe, small, saving in the background at steps 4 and 8; all checkpoints stay."""
    return {"config": repository / "launch/demo.toml", "data.corpus": sample_corpus, **SMALL, "checkpoint.keep": 9}


def observe(folder: Path, replace: Callable[[Any, str, Any], None] = setattr) -> None:
    """From here on a run in this process leaves in `folder` what it starts from, and the samples of each step."""
    open_run, next_batch = gloria.pretrain.open_pretraining, Loader.__next__

    def reading(loader: Loader) -> Batch:
        batch = next_batch(loader)
        columns = (batch.rows, batch.source, batch.epoch, batch.window)
        line = [batch.step, loader._rank, *(column.tolist() for column in columns)]
        with open(folder / f"samples-{loader._rank}.jsonl", "a") as file:
            print(json.dumps(line), file=file)
        return batch

    def opening_run(*arguments: Any) -> Run:
        run = open_run(*arguments)
        ranks = {"rank": run.process.rank, "world": run.process.world}
        state = training_state(run.model, run.optimizer)
        assert finish(begin_save(folder, run.step, state, {}, {}, **ranks, launch="x", asynchronous=False))
        return run

    replace(Loader, "__next__", reading)
    replace(gloria.pretrain, "open_pretraining", opening_run)


@pytest.fixture
def go(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """`go(recipe, world, name)`: a run in the folder `name`, to its end; gives the folder."""

    def go(recipe: dict[str, Any], world: int, name: str, **changes: Any) -> Path:
        seen = tmp_path / f"{name} seen"
        seen.mkdir()
        arguments = flags(recipe, run__dir=tmp_path / name, **changes)
        if world > 1:
            launch.run(arguments, world, tmp_path, partial(observe, seen))
        else:
            with monkeypatch.context() as patch:
                observe(seen, patch.setattr)
                assert gloria.pretrain.main(arguments) == 0
        return tmp_path / name

    return go


def copied(run_dir: Path, name: str) -> Path:
    """The run folder once more, so that two ways can go on from the same checkpoint."""
    return Path(shutil.copytree(run_dir, run_dir.with_name(name)))


def samples(run_dir: Path) -> dict[int, list[tuple[int, int, int, int]]]:
    """By step (from 0): row, source, epoch and window of each sample, over all ranks, as one launch took them."""
    found: dict[int, list[tuple[int, int, int, int]]] = {}
    for file in run_dir.with_name(f"{run_dir.name} seen").glob("samples-*.jsonl"):
        for line in file.read_text().splitlines():
            step, _, *columns = json.loads(line)
            found.setdefault(step, []).extend(zip(*columns))
    return {step: sorted(rows) for step, rows in found.items()}


def saved(run_dir: Path, step: int) -> dict[str, torch.Tensor]:
    return dict(read_full_tensors(checkpoint_path(run_dir, step)))


def started_from(run_dir: Path, step: int) -> dict[str, torch.Tensor]:
    return saved(run_dir.with_name(f"{run_dir.name} seen"), step)


def assert_equal_tensors(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    assert any(name.startswith("optim.exp_avg_sq.") and tensor.any() for name, tensor in expected.items())
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name


def assert_went_on(resumed: Path, whole: Path, at: int) -> None:
    """`resumed`, from the checkpoint of step `at` of `whole`, is the same run to the last bit."""
    last = max(losses(whole))
    assert_equal_tensors(started_from(resumed, at), saved(whole, at))
    for step in (*range(at + 4, last, 4), last):
        assert_equal_tensors(saved(resumed, step), saved(whole, step))
    assert losses(resumed) == losses(whole)
    expected = samples(whole)
    assert samples(resumed) == {step: rows for step, rows in expected.items() if step >= at}
    resumed_state, whole_state = (read_trainer(checkpoint_path(run_dir, last)) for run_dir in (resumed, whole))
    assert resumed_state["mixture"] == whole_state["mixture"]


CASES = {
    "1-dropout-full": (1, {"model.dropout": 0.1, "train.activation_checkpointing": "full"}),
    "1-radam-selective": (1, {"optim.name": "radam", "train.activation_checkpointing": "selective"}),
    "1-compiled": (1, {"train.compile": "true", "model.num_layers": 1, "train.sequence_length": 16}),
    "2-radam-dropout": (2, {"optim.name": "radam", "model.dropout": 0.1}),
    "2-muon": (2, {"optim.name": "muon"}),
    "2-llama-muon-selective": (
        2,
        LLAMA | {"optim.name": "muon", "train.activation_checkpointing": "selective", "data.mask_documents": "true"},
    ),
    "4-dropout-selective": (4, {"model.dropout": 0.1, "train.activation_checkpointing": "selective"}),
}


@pytest.mark.parametrize(("world", "options"), CASES.values(), ids=CASES)
def test_a_resumed_run_is_the_same_to_the_last_bit(recipe, go, world, options):
    whole = go(recipe | options, world, "whole")
    copied(whole, "again")
    assert_went_on(go(recipe | options, world, "again", run__resume=4), whole, at=4)


@pytest.mark.parametrize("world", [1, 2])
def test_across_the_end_of_a_sources_epoch(recipe, go, world):
    recipe = {key: value for key, value in recipe.items() if key != "train.steps"} | EPOCHS
    whole = go(recipe, world, "whole")
    copied(whole, "again")
    again = go(recipe, world, "again", run__resume=4)
    assert_went_on(again, whole, at=4)
    epochs = {(source, epoch) for rows in samples(again).values() for _, source, epoch, _ in rows}
    assert {(0, 0), (0, 1)} <= epochs  # the first source went through its end after the resume


@pytest.mark.parametrize("world", [1, 2])
def test_across_a_change_of_weights(recipe, go, world):
    """Resumed where the weights change, and once more within the new stage."""
    before = go(recipe, world, "before")
    changed = recipe | {"data.weights.cartas": 0, "data.weights.dialogos": 0.7}
    copied(before, "whole")
    whole = go(changed, world, "whole", run__resume=4)
    assert_equal_tensors(started_from(whole, 4), saved(before, 4))
    assert {step: loss for step, loss in losses(whole).items() if step <= 4} == {
        step: loss for step, loss in losses(before).items() if step <= 4
    }
    copied(whole, "again")
    again = go(changed, world, "again", run__resume=8)
    assert_equal_tensors(saved(again, 12), saved(whole, 12))
    assert losses(again) == losses(whole)
    assert samples(again) == {step: rows for step, rows in samples(whole).items() if step >= 8}
    stages = read_trainer(checkpoint_path(again, 12))["mixture"]["stages"]
    assert [stage["start"] for stage in stages] == [0, 4 * 12]
    # The second stage goes on in each source where the first one stopped, and never takes a window twice.
    taken = [row[1:] for step in range(4) for row in samples(before)[step]]
    taken += [row[1:] for rows in samples(whole).values() for row in rows]
    assert len(taken) == len(set(taken)) == 12 * 12


@pytest.mark.parametrize(
    ("schedule", "rates"),
    [
        ({"schedule.kind": "constant"}, "0.001 at 8, 0.001 at 12, 0.001 at 15"),
        ({"schedule.kind": "cosine_hard", "schedule.restart_steps": 5}, "0.0009045 at 8, 0.001 at 12, 0.0003455 at 15"),
        ({"schedule.kind": "wsd", "schedule.decay_steps": 4}, "0.001 at 8, 0.001 at 12, 0.000134 at 15"),
    ],
    ids=["constant", "cosine_hard", "wsd"],
)
def test_prolonged_a_run_is_what_a_longer_one_would_have_been(recipe, go, capsys, schedule, rates):
    """And the new curve is printed before the first step."""
    recipe |= {"schedule.min_ratio": 0.0} | schedule
    longer = go(recipe, 1, "longer", train__steps=16)
    copied(go(recipe, 1, "shorter"), "prolonged")
    capsys.readouterr()
    prolonged = go(recipe, 1, "prolonged", train__steps=16, run__resume=8)
    reported = [line for line in capsys.readouterr().out.splitlines() if line.startswith("changed: ")]
    assert reported == [
        "changed: train.steps: 12 before, 16 now",
        "changed: schedule.total_steps: 12 before, 16 now",
        f"changed: schedule: the curve keeps its past; {rates}",
    ]
    assert_went_on(prolonged, longer, at=8)


def test_a_damaged_checkpoint_is_passed_over_for_the_one_before_it(recipe, go, tmp_path, capsys):
    whole = go(recipe, 1, "whole")
    again = copied(whole, "again")
    shutil.rmtree(checkpoint_path(again, 12))
    (again / "checkpoints/step-00000012.tmp-dead").mkdir()
    damaged = checkpoint_path(again, 8) / "rank-00000.safetensors"
    data = damaged.read_bytes()
    damaged.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    capsys.readouterr()
    assert_went_on(go(recipe, 1, "again"), whole, at=4)
    reported = capsys.readouterr()
    assert reported.out.splitlines()[1] == (
        f"{again}/checkpoints/step-00000012.tmp-dead: removed; a launch ended while it was being written or deleted"
    )
    assert reported.err.splitlines() == [
        f"warning: {damaged}: its content is not what was written (hash differs); the checkpoint of step 8 is passed "
        "over"
    ]

    manifests = [checkpoint_path(again, step) / "manifest.json" for step in (12, 8, 4)]
    for manifest in manifests:
        manifest.unlink()
    assert run_command(gloria.pretrain.main, flags(recipe, run__dir=again)) == 2
    assert capsys.readouterr().err.splitlines() == [
        *(
            f"warning: {manifest}: is missing; the checkpoint of step {step} is passed over"
            for manifest, step in zip(manifests, (12, 8, 4))
        ),
        f"error: {again}/checkpoints: none of the 3 checkpoints is whole (see the warnings); mend one, or move the "
        "folder away to start afresh",
    ]
    assert {path.name for path in (again / "checkpoints").glob("step-*")} == {
        manifest.parent.name for manifest in manifests
    }


def test_going_back_sets_aside_what_came_after_and_is_reported(recipe, go, capsys):
    whole = go(recipe, 1, "whole")
    again = copied(whole, "again")
    capsys.readouterr()
    assert_went_on(go(recipe, 1, "again", run__resume=4), whole, at=4)
    aside = sorted(again.glob("checkpoints/step-*.aside-*"))
    assert [path.name.split(".")[0] for path in aside] == ["step-00000008", "step-00000012"]
    assert capsys.readouterr().out.splitlines()[1:3] == [
        f"{path}: set aside, for the run goes on from step 4" for path in aside
    ]


def test_a_live_run_is_left_alone_and_a_full_disk_reported_before_the_first_step(recipe, tmp_path, monkeypatch, capsys):
    run_dir = tmp_path / "run"
    run_lock = lock_run(run_dir, "other")
    assert run_command(gloria.pretrain.main, flags(recipe, run__dir=run_dir)) == 2
    release_run(run_lock)
    assert capsys.readouterr().err.splitlines() == [
        f"error: {run_dir}: launch other is running there (process {os.getpid()}, {os.uname().nodename}); wait for its "
        "end, or give this run another run.dir"
    ]
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=5_000_000))
        assert run_command(gloria.pretrain.main, flags(recipe, run__dir=run_dir)) == 2
    assert capsys.readouterr().err.splitlines() == [
        f"error: {run_dir}/checkpoints: 5 MB free, and 10 checkpoints of 1.19 MB are to come (checkpoint.keep = 9, and "
        "one being written); free some space or choose another run.dir"
    ]
    assert gloria.pretrain.main(flags(recipe, run__dir=run_dir, train__steps=2)) == 0  # neither left a lock


@pytest.mark.parametrize("family", ["gpt-neo", "llama"])
def test_saved_by_replicas_resumed_by_shards_and_alone(recipe, go, family):
    """HSDP 2 x 2, then FSDP over 4 ranks, then one rank, with a vocabulary that neither 2 nor 4 divide."""
    recipe |= {"model.vocab_size": 50257, "model.hidden_size": 16, "train.sequence_length": 16}
    if family == "llama":
        recipe |= {**LLAMA, "model.vocab_size": 4001}
    whole = go(recipe, 4, "whole", dist__replicas=2)
    for world in (4, 1):
        copied(whole, f"on {world}")
        again = go(recipe, world, f"on {world}", run__resume=4)
        assert_equal_tensors(started_from(again, 4), saved(whole, 4))
        assert samples(again) == {step: rows for step, rows in samples(whole).items() if step >= 4}
        expected = losses(whole)
        assert losses(again) == pytest.approx(expected, rel=1e-5)
