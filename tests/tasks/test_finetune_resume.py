"""Bugs prevented: a killed fine-tuning that ends elsewhere, a checkpoint that is believed half written, a test set that
is read before the end, and a way to save memory or time that changes a bit of the result."""

from __future__ import annotations

import json
import os
import shutil
import signal
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import gloria.dist.checkpoint
import gloria.finetune as finetune
import gloria.train.loop
import gloria.train.run
import gloria.train.selection as finetune_score
from gloria.dist.manifest import saved_steps
from gloria.dist.run_lock import read_status
from gloria.errors import run_command
from tests import launch
from tests.tasks.test_finetune import command, results
from tests.tasks.tiny import make_folder, write_assin

FLAGS = {"train__steps": 14, "eval__every": 4, "checkpoint__every": 4, "train__dropout": 0.1}


@pytest.fixture(scope="module")
def assin(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_assin(tmp_path_factory.mktemp("assin"), {"train": 24, "dev": 8, "test": 6})


@pytest.fixture(scope="module")
def neo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_folder("gpt_neo", tmp_path_factory.mktemp("neo") / "neo")


@pytest.fixture(scope="module")
def whole(assin: Path, neo: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nothing disturbed."""
    run = tmp_path_factory.mktemp("whole") / "run"
    assert finetune.main(command("assin2", neo, assin, run, **FLAGS)) == 0
    return run


def assert_same_end(run: Path, whole: Path) -> None:
    for file in ("model.safetensors", "head.safetensors"):
        found, expected = (load_file(folder / "model" / file) for folder in (run, whole))
        assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert results(run) == results(whole)


def _tune_and_die(arguments: list[str], moment: str) -> None:
    """Fine-tune in this process and end it, as a power cut would, between two checkpoints or within one."""
    if moment == "between checkpoints":
        honest_step = gloria.train.loop.forward_backward

        def forward_backward(run: Any, batch: Any) -> torch.Tensor:
            if run.step == 5 and run.save:
                gloria.dist.checkpoint.wait(run.save)  # so that this step finds it written, however slow the disk
            if run.step == 7:  # the sums of step 5, which report it written, are read behind step 6
                os.kill(os.getpid(), signal.SIGKILL)
            return honest_step(run, batch)

        gloria.train.loop.forward_backward = forward_backward
    else:
        honest_write = gloria.dist.checkpoint.write_tensor_file

        def write_tensor_file(path: Path, *rest: Any, **options: Any) -> Any:
            done = honest_write(path, *rest, **options)
            if "step-00000008" in str(path):
                os.kill(os.getpid(), signal.SIGKILL)
            return done

        gloria.dist.checkpoint.write_tensor_file = write_tensor_file
    os._exit(finetune.main(arguments) or 99)  # it should have died


def test_killed_between_and_during_checkpoints_it_ends_where_an_undisturbed_run_does(assin, neo, whole, tmp_path):
    run = tmp_path / "run"
    arguments = command("assin2", neo, assin, run, **FLAGS)
    for moment in ("between checkpoints", "during a checkpoint"):
        killed = launch.start([], 1, tmp_path, prepare=partial(_tune_and_die, arguments, moment))
        assert killed.wait(120) == [-signal.SIGKILL], killed.text()
        assert saved_steps(run) == [4], moment
    assert finetune.main(arguments) == 0
    assert_same_end(run, whole)


@pytest.mark.parametrize(
    "change",
    [
        {"train__activation_checkpointing": "full"},
        {"train__activation_checkpointing": "selective"},
        {"checkpoint__asynchronous": "false", "dist__reshard": "never"},
    ],
    ids=["full", "selective", "synchronous, weights kept"],
)
def test_what_saves_memory_or_waits_for_the_disk_changes_no_bit(change, assin, neo, whole, tmp_path):
    assert finetune.main(command("assin2", neo, assin, tmp_path / "run", **FLAGS, **change)) == 0
    assert_same_end(tmp_path / "run", whole)


@pytest.mark.parametrize("family", ["bert", "deberta-v2", "gpt_neox"])
def test_activation_checkpointing_of_a_model_of_transformers_changes_no_bit(family, assin, tmp_path):
    model = make_folder(family, tmp_path / family)
    flags = {"train__steps": 3, "eval__every": 3, "train__dropout": 0.1, "train__precision": "bf16"}
    for kind in ("none", "full"):
        changed = {"train__activation_checkpointing": kind}
        assert finetune.main(command("assin2", model, assin, tmp_path / kind, **flags, **changed)) == 0
    assert_same_end(tmp_path / "full", tmp_path / "none")


def test_selective_checkpointing_is_refused_for_a_model_of_transformers(assin, tmp_path, capsys):
    model = make_folder("bert", tmp_path / "bert")
    arguments = command("assin2", model, assin, tmp_path / "run", train__activation_checkpointing="selective")
    assert run_command(finetune.main, arguments) == 2
    assert capsys.readouterr().err.splitlines()[-1] == (
        "error: train.activation_checkpointing: selective is not for models of transformers; set it to full or none"
    )


def test_fp16_counts_the_overflows_of_its_loss_scale_and_continues_with_it(assin, neo, tmp_path):
    flags = {"train__steps": 6, "eval__every": 6, "log__every": 1, "train__precision": "fp16"}
    assert finetune.main(command("assin2", neo, assin, tmp_path / "run", **flags)) == 0
    lines = launch.metrics(tmp_path / "run", "train")
    assert [line["skipped"] for line in lines] == [0] * 6
    assert all(line["loss_scale"] == 2.0 ** (16 - sum(before["overflows"] for before in lines[:number]))
               for number, line in enumerate(lines))  # fmt: skip
    assert sum(line["overflows"] for line in lines) < 6


def test_a_damaged_test_set_is_reported_before_any_training(assin, neo, whole, tmp_path, capsys):
    """It was found after all of it. Once the file is replaced the same command trains, and scores it at the end."""
    data = tmp_path / "data"
    data.mkdir()
    for file in assin.iterdir():
        (data / file.name).write_text(file.read_text())
    test = data / "assin2-test.xml"
    good = test.read_text()
    test.write_text("nada")
    arguments = command("assin2", neo, data, tmp_path / "run", **FLAGS)
    assert run_command(finetune.main, arguments) == 2
    assert capsys.readouterr().err.splitlines()[-1] == (
        f"error: {test}:1: is not XML (syntax error); get the file again"
    )
    assert not (tmp_path / "run").exists()
    test.write_text(good)
    assert finetune.main(arguments) == 0
    assert_same_end(tmp_path / "run", whole)


def test_out_of_memory_is_reported_in_a_line_with_what_to_do(assin, neo, tmp_path, monkeypatch, capsys):
    def no_memory(*_: Any) -> torch.Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(gloria.train.loop, "forward_backward", no_memory)
    assert run_command(finetune.main, command("assin2", neo, assin, tmp_path / "run", **FLAGS)) == 1
    assert capsys.readouterr().err == (
        "error: out of memory on rank 0 in step 0, forward and backward, with train.micro_batch 8 x 64 tokens; "
        "set train.micro_batch to 4, train.activation_checkpointing to full, or take more ranks\n"
    )
    assert read_status(tmp_path / "run").status == "failed"


def test_a_better_model_than_the_checkpoint_knows_of_is_the_one_that_is_reported(
    assin, neo, whole, tmp_path, monkeypatch
):
    """Killed behind an evaluation and before its checkpoint, `model` is of a later step than the run goes on from."""
    run = tmp_path / "run"
    stop_behind(monkeypatch, 6)
    assert finetune.main(command("assin2", neo, assin, run, **FLAGS)) == 0
    monkeypatch.undo()
    task = run / "model" / "task.json"
    content = json.loads(task.read_text())
    best = content["scores"] | {"mean_f1_pearson": 0.9999}
    task.write_text(json.dumps(content | {"step": 8, "scores": best}))
    model = (run / "model" / "model.safetensors").read_bytes()
    assert finetune.main(command("assin2", neo, assin, run, **FLAGS)) == 0
    assert json.loads((run / "results.json").read_text())["chosen"] == {"step": 8, "scores": best}
    assert (run / "model" / "model.safetensors").read_bytes() == model


def test_a_kill_between_the_two_renames_of_the_best_model_costs_nothing(assin, neo, whole, tmp_path, monkeypatch):
    run = tmp_path / "run"
    stop_behind(monkeypatch, 6)
    assert finetune.main(command("assin2", neo, assin, run, **FLAGS)) == 0
    monkeypatch.undo()
    (run / "model.partial-dead").mkdir()
    (run / "model.partial-dead" / "lock").touch()
    (run / "model").rename(run / "model.partial-dead" / "replaced")
    assert finetune.main(command("assin2", neo, assin, run, **FLAGS)) == 0
    assert_same_end(run, whole)
    assert not (run / "model.partial-dead").exists()


@pytest.mark.parametrize("examples", ["selection", "dev", "test"])
def test_a_stop_while_a_set_is_scored_is_heeded_and_made_up_for(examples, assin, neo, whole, tmp_path, monkeypatch):
    """A large set takes longer than what a queue leaves between its signal and the end."""
    run = tmp_path / "run"
    wanted = {"selection": (8, "validation", 1), "dev": (14, "end", 1), "test": (14, "end", 2)}[examples]
    seen: list[tuple[int, str]] = []

    def tell_and_stop(run: Any, phase: str) -> Any:
        seen.append((run.step, phase))
        monkeypatch.setattr(finetune_score, "stop_reason", lambda: "SIGUSR1" if here else "")
        here = (run.step, phase, seen.count((run.step, phase))) == wanted
        return go_on(run, phase)

    go_on = finetune_score._go_on
    monkeypatch.setattr(finetune_score, "_go_on", tell_and_stop)
    assert finetune.main(command("assin2", neo, assin, run, **FLAGS)) == 0
    monkeypatch.undo()
    assert (read_status(run).status, read_status(run).step) == ("stopped", wanted[0])
    assert not (run / "results.json").exists()
    assert finetune.main(command("assin2", neo, assin, run, **FLAGS)) == 0
    assert_same_end(run, whole)
    reported = [line["step"] for line in launch.metrics(run, "event") if line["event"] == "dev"]
    assert reported == [4, 8, 12, 14]


def test_another_seed_or_another_set_that_chooses_is_another_run(assin, neo, tmp_path, monkeypatch, capsys):
    run, data = tmp_path / "run", shutil.copytree(assin, tmp_path / "data")
    stop_behind(monkeypatch, 6)
    assert finetune.main(command("assin2", neo, data, run, **FLAGS)) == 0
    monkeypatch.undo()
    other = f"error: {run}: its run has run.seeds = 42, not 43; set that, or choose another run.dir"
    capsys.readouterr()
    assert run_command(finetune.main, command("assin2", neo, data, run, **FLAGS, run__seeds="[43]")) == 2
    assert capsys.readouterr().err.splitlines() == [other]
    assert run_command(finetune.main, command("assin2", neo, data, run, **FLAGS, run__seeds="[42, 43]")) == 2
    assert capsys.readouterr().err.splitlines() == [
        f"error: run.seeds: {run} holds the run of one seed; choose another run.dir for [42, 43]"
    ]

    dev = data / "assin2-dev.xml"
    good = dev.read_text()
    dev.write_text(good.replace('similarity="5.0"', 'similarity="4.0"'))
    assert run_command(finetune.main, command("assin2", neo, data, run, **FLAGS)) == 2
    assert capsys.readouterr().err.splitlines()[-1] == (
        f"error: {run}: the set to train on or the one that chooses the model is another than its run began with; "
        "choose another run.dir"
    )
    dev.write_text(good)
    assert finetune.main(command("assin2", neo, data, run, **FLAGS)) == 0
    capsys.readouterr()
    assert run_command(finetune.main, command("assin2", neo, data, run, **FLAGS, run__seeds="[43]")) == 2
    assert capsys.readouterr().err.splitlines() == [other]


def stop_behind(monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    """Ask the run to stop behind so many steps."""
    calls: list[int] = []
    monkeypatch.setattr(
        gloria.train.run, "stop_reason", lambda: calls.append(1) or ("SIGTERM" if len(calls) >= step else "")
    )
