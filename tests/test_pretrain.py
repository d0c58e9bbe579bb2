"""Prevents: one bad batch that ruins the weights, a resume that quietly goes on with something else, and a plan that
the user never sees before the hours are spent."""

from __future__ import annotations

import math
import runpy
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import gloria.pretrain
import gloria.train.checkpointing
import gloria.train.windows
from gloria.dist.checkpoint_read import find_checkpoint, read_full_tensors, read_trainer
from gloria.dist.run_lock import read_status
from gloria.dist.signals import STOP_SIGNALS
from gloria.errors import run_command
from gloria.files import hash_file
from gloria.pretrain import main
from gloria.train.metrics import RunLog
from gloria.train.pretraining import Pretraining
from gloria.train.windows import Windows
from tests.launch import SMALL, flags, losses, metrics


@pytest.fixture
def recipe(sample_corpus: Path, repository: Path, tmp_path: Path) -> dict[str, Any]:
    """The demo's recipe, small, in a run folder of its own."""
    config = repository / "launch/demo.toml"
    return {"config": config, "data.corpus": sample_corpus, **SMALL, "run.dir": tmp_path / "run"}


def fails_at(monkeypatch: pytest.MonkeyPatch, steps: set[int], value: float) -> None:
    """Make the loss of one row `value` in the given steps (from 0)."""
    honest = gloria.train.windows.window_losses

    def window_losses(run: Any, tokens: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        loss, rows = honest(run, tokens, labels)
        if run.step in steps and torch.is_grad_enabled():
            rows[0] = value
            loss = loss * value
        return loss, rows

    monkeypatch.setattr(gloria.train.windows, "window_losses", window_losses)


def weights(run_dir: Path) -> dict[str, torch.Tensor]:
    return dict(read_full_tensors(find_checkpoint(run_dir)))


@pytest.mark.parametrize("name", ["adamw", "radam", "muon"])
def test_a_step_that_is_not_finite_is_left_out_and_reported(recipe, monkeypatch, tmp_path, name):
    recipe |= {"train.steps": 5, "optim.name": name, "schedule.kind": "constant", "schedule.min_ratio": 0.0}
    fails_at(monkeypatch, {4}, float("nan"))
    assert main(flags(recipe)) == 0
    (event,) = [line for line in metrics(tmp_path / "run", "event") if line["event"] == "skipped"]
    assert (event["step"], event["samples"], event["in_a_row"]) == (5, "48:60", 1)
    assert metrics(tmp_path / "run", "train")[4]["loss"] is None
    # The weights are those after four steps.
    monkeypatch.undo()
    recipe |= {"train.steps": 4, "run.dir": tmp_path / "four"}
    assert main(flags(recipe)) == 0
    after_five, after_four = weights(tmp_path / "run"), weights(tmp_path / "four")
    assert all(torch.equal(after_five[name], after_four[name]) for name in after_four)


def test_too_many_such_steps_in_a_row_end_the_run_and_leave_the_last_checkpoint(recipe, monkeypatch, tmp_path, capsys):
    fails_at(monkeypatch, set(range(5, 12)), float("inf"))
    assert main(flags(recipe, train__max_skips=3)) == 1
    assert capsys.readouterr().err.splitlines()[-1] == (
        f"error: {tmp_path / 'run'}: 3 steps in a row had to be skipped; the newest checkpoint is of step 4"
    )
    status = read_status(tmp_path / "run")
    assert (status.status, status.step) == ("failed", 8)
    assert find_checkpoint(tmp_path / "run").name == "step-00000004"


def test_a_finished_run_started_again_does_nothing_and_one_prolonged_continues(recipe, tmp_path):
    recipe |= {"schedule.kind": "constant", "schedule.min_ratio": 0.0}
    assert main(flags(recipe)) == 0
    assert main(flags(recipe)) == 0
    assert sorted(losses(tmp_path / "run")) == list(range(1, 13))
    assert main(flags(recipe, train__steps=15)) == 0
    assert main(flags(recipe, train__steps=15, run__dir=tmp_path / "at once")) == 0
    assert losses(tmp_path / "run") == losses(tmp_path / "at once")


def error_lines(capsys: pytest.CaptureFixture[str]) -> list[str]:
    return [line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")]


def test_resuming_with_another_model_or_optimizer_names_both(recipe, capsys):
    recipe |= {"train.steps": 2}
    assert main(flags(recipe)) == 0
    assert run_command(main, flags(recipe, model__hidden_size=64, optim__name="radam")) == 2
    assert error_lines(capsys) == [
        "error: --model.hidden_size: the run's is 32, not 64; set 32, or begin another run",
        f"error: {recipe['config']}: model.intermediate_size: the run's is 128, not 256; set 128, or begin another run",
        "error: --optim.name: the run's state is adamw's, not radam's; set adamw, or begin another run from an export",
    ]
    assert main(flags(recipe)) == 0  # the lock was given back


def test_resuming_with_another_seed_or_sequence_length_is_refused_by_name(recipe, tmp_path, capsys):
    recipe |= {"train.steps": 2}
    assert main(flags(recipe)) == 0
    assert run_command(main, flags(recipe, run__seed=9, train__sequence_length=16)) == 2
    assert error_lines(capsys) == [
        "error: --run.seed: the run began with 1, not 9; set 1, or begin another run",
        "error: --train.sequence_length: the run's windows are of 32, not 16; set 32, or begin each source's next "
        "epoch with --data.new-epoch",
    ]


def test_weights_and_batch_may_change_when_a_run_continues(recipe, tmp_path, capsys):
    assert main(flags(recipe, train__steps=6)) == 0
    past = losses(tmp_path / "run")
    capsys.readouterr()
    assert main(flags(recipe, train__steps=9, train__global_batch=24, data__weights__cartas=0)) == 0
    changed = [line for line in capsys.readouterr().out.splitlines() if line.startswith("changed: ")]
    assert any("cartas" in line and "left out" in line for line in changed)
    assert any("global_batch" in line for line in changed)
    found = losses(tmp_path / "run")
    assert {step: found[step] for step in past} == past
    last = metrics(tmp_path / "run", "train")[-1]
    assert last["tokens"] == (6 * 12 + 3 * 24) * 32
    assert last["sources"].get("cartas", {"asked": 0.0})["asked"] == 0.0


def test_validation_means_the_same_before_and_after_a_change_of_weights(recipe, tmp_path):
    """It keeps the weights the run began with, and a source that is left out: forgetting shows there."""
    recipe |= {"valid.every": 2, "valid.windows": 3, "schedule.kind": "constant", "schedule.min_ratio": 0.0}
    assert main(flags(recipe, train__steps=4)) == 0
    assert main(flags(recipe, train__steps=6, data__weights__cartas=0, data__weights__dialogos=3)) == 0
    lines = metrics(tmp_path / "run", "valid")
    assert [line["step"] for line in lines] == [0, 2, 4, 6]
    assert lines[0]["weights"] == lines[-1]["weights"]
    assert {"cartas", "dialogos"} < set(lines[-1]["sources"]) == set(lines[0]["sources"])
    for line in lines:
        mean = sum(line["weights"][name] * loss for name, loss in line["sources"].items())
        assert line["loss"] == pytest.approx(mean / sum(line["weights"].values()))


def test_a_metric_of_ones_own_is_one_place(recipe, tmp_path, monkeypatch):
    """A sum that the objective returns by name is a mean over tokens in the log, however the batch is cut."""
    honest = Pretraining.losses

    def losses(self: Pretraining, run: Any, part: Windows) -> tuple[torch.Tensor, torch.Tensor, dict]:
        return *honest(self, run, part)[:2], {"even_tokens": (part.tokens[:, 1:] % 2 == 0).sum()}

    monkeypatch.setattr(Pretraining, "losses", losses)
    shares = []
    for micro_batch in (3, 12):
        folder = tmp_path / str(micro_batch)
        assert main(flags(recipe, train__steps=2, train__micro_batch=micro_batch, run__dir=folder)) == 0
        shares.append([line["even_tokens"] for line in metrics(folder, "train")])
    assert shares[0] == shares[1]
    assert all(0.1 < share < 0.9 for share in shares[0])


def test_z_loss_is_logged_by_itself_and_the_loss_stays_the_cross_entropy(recipe, tmp_path, capsys):
    for name, coefficient in (("run", 0.0), ("with", 0.01)):
        folder = tmp_path / name
        assert main(flags(recipe, train__steps=2, train__z_loss=coefficient, valid__every=2, run__dir=folder)) == 0
    without, with_it = (metrics(tmp_path / name, "train") for name in ("run", "with"))
    assert with_it[0]["loss"] == without[0]["loss"]
    assert with_it[1]["loss"] != without[1]["loss"], "the update was another one"
    # Logits are small at first: Z is nearly the size of the vocabulary.
    size = read_trainer(find_checkpoint(tmp_path / "with"))["model"]["vocab_size"]
    assert with_it[0]["z_loss"] == pytest.approx(0.01 * math.log(size) ** 2, rel=0.02)
    assert not any("z_loss" in line for line in (*without, *metrics(tmp_path / "with", "valid")))
    capsys.readouterr()
    assert run_command(main, flags(recipe, train__z_loss=-1)) == 2
    assert error_lines(capsys) == ["error: --train.z_loss: -1.0 is too small; give at least 0.0"]


def test_a_run_records_its_versions_its_changes_and_when(recipe, tmp_path):
    assert main(flags(recipe, train__steps=2)) == 0
    assert main(flags(recipe, train__steps=3, data__weights__cartas=0)) == 0
    events = metrics(tmp_path / "run", "event")
    for event in (event for event in events if event["event"] in ("start", "resume")):
        assert event["versions"]["torch"] == torch.__version__
        assert {"gloria", "numpy", "python"} <= event["versions"].keys()
    changes = [event["what"] for event in events if event["event"] == "changed"]
    assert any("cartas" in change and "left out" in change for change in changes)
    assert "train.steps: 2 before, 3 now" in changes
    times = [line["time"] for kind in ("event", "train") for line in metrics(tmp_path / "run", kind)]
    assert max(times) - min(times) < 3600


def test_a_checkpoint_is_published_behind_lines_that_a_power_loss_cannot_take(recipe, tmp_path, monkeypatch):
    """Otherwise the run goes on from the checkpoint, and the steps before it are in no log."""
    synced: list[int] = []
    sync, begin_save = RunLog.sync, gloria.train.checkpointing.begin_save

    def syncing(log: RunLog) -> None:
        synced.append(metrics(tmp_path / "run", "train")[-1]["step"])
        sync(log)

    def saving(folder: Path, step: int, *args: Any, **kwargs: Any) -> Any:
        assert synced[-1] == step
        return begin_save(folder, step, *args, **kwargs)

    monkeypatch.setattr(RunLog, "sync", syncing)
    monkeypatch.setattr(gloria.train.checkpointing, "begin_save", saving)
    assert main(flags(recipe)) == 0
    assert synced == [4, 8, 12]


def test_never_auto_and_a_step(recipe, tmp_path, capsys):
    assert main(flags(recipe)) == 0
    whole, folder = losses(tmp_path / "run"), tmp_path / "run"
    assert run_command(main, flags(recipe, run__resume="never")) == 2
    assert run_command(main, flags(recipe, run__resume=5)) == 2
    assert error_lines(capsys) == [
        f"error: run.resume: never, but {folder} holds checkpoints up to step 12; choose another run.dir, or go on "
        "with auto",
        f"error: {folder / 'checkpoints'}: holds no checkpoint of step 5; there are steps 8, 12",
    ]
    assert main(flags(recipe, run__resume=8)) == 0
    assert losses(folder) == whole
    assert len(list((folder / "checkpoints").glob("step-00000012.aside-*"))) == 1


def test_a_run_whose_checkpoints_are_gone_is_not_begun_afresh(recipe, tmp_path, capsys):
    assert main(flags(recipe, train__steps=2)) == 0
    shutil.rmtree(tmp_path / "run" / "checkpoints")
    assert run_command(main, flags(recipe)) == 2
    assert error_lines(capsys) == [
        f"error: {tmp_path / 'run'}: its run is done at step 2, but has no checkpoint; put the checkpoints back, or "
        "choose another run.dir"
    ]


def test_every_change_of_the_recipe_is_reported(recipe, capsys):
    recipe |= {"train.steps": 6, "checkpoint.every": 3}
    assert main(flags(recipe)) == 0
    capsys.readouterr()
    changes = flags(recipe, train__steps=8, optim__lr=2e-3, train__clip_norm=0.5, train__micro_batch=6)
    assert main(changes) == 0
    reported = [line for line in capsys.readouterr().out.splitlines() if line.startswith("changed: ")]
    assert reported == [
        "changed: train.steps: 6 before, 8 now",
        "changed: train.micro_batch: 3 before, 6 now",
        "changed: train.clip_norm: 1.0 before, 0.5 now",
        "changed: optim.lr: 0.001 before, 0.002 now",
        "changed: schedule.base_lr: 0.001 before, 0.002 now",
        "changed: schedule.total_steps: 6 before, 8 now",
        "changed: schedule: the curve is another one: step 5 had 0.0002318 and would have 0.0011; "
        "0.00065 at 6, 0.0003206 at 7",
    ]


def test_windows_longer_than_all_that_is_held_out_are_reported_and_train_without_validation(recipe, tmp_path, capsys):
    recipe |= {"train.steps": 2, "train.sequence_length": 1000, "model.max_positions": 1000, "valid.every": 1}
    assert main(flags(recipe)) == 0
    reported = [line for line in capsys.readouterr().err.splitlines() if "has no validation" in line]
    assert len(reported) == 4
    assert metrics(tmp_path / "run", "valid") == []


def test_dry_run_prints_the_recipe_and_the_plan_and_leaves_nothing(recipe, tmp_path, capsys):
    assert main([*flags(recipe), "--dry-run"]) == 0
    printed = capsys.readouterr().out
    for line in ("global_batch = 12", "[schedule]", "12 steps, 4.61k tokens (4,608)"):
        assert line in printed
    for source in ("enciclopedia", "parlamento", "dialogos", "cartas"):
        assert source in printed
    assert not (tmp_path / "run").exists()


def test_dry_run_knows_the_precision_of_the_card_that_is_here(recipe, tmp_path, monkeypatch, capsys):
    tool = tmp_path / "nvidia-smi"
    tool.write_text("#!/bin/sh\necho Tesla T4, 15360\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin:/usr/bin")
    for options, line in (
        ({"train.precision": "auto"}, "fp16: T4 has no bf16"),
        ({"train.precision": "auto", "run.device": "cpu"}, "fp32: no GPU is used"),
        ({"train.precision": "fp32"}, "fp32: as the recipe has it"),
    ):
        assert main([*flags(recipe | options), "--dry-run"]) == 0
        assert f"\nprecision   {line}\n" in capsys.readouterr().out
    assert run_command(main, [*flags(recipe | {"train.precision": "bf16"}), "--dry-run"]) == 2
    assert capsys.readouterr().err == "error: --train.precision: T4 has no bf16; set it to auto, fp16 or fp32\n"


def test_starting_from_a_hugging_face_folder_and_precision_bf16(recipe, tmp_path):
    """Exported, and taken up again: the first loss is the last run's next one, not that of random weights."""
    from gloria.export import main as export

    recipe |= {"train.steps": 12, "optim.lr": 0.01}
    assert main(flags(recipe)) == 0
    assert export(["--run", str(tmp_path / "run"), "--out", str(tmp_path / "model")]) in (0, None)
    again = {key: value for key, value in recipe.items() if not key.startswith("model.")}
    again |= {"model.from": tmp_path / "model", "run.dir": tmp_path / "again", "train.precision": "bf16"}
    assert main(flags(again, train__steps=2)) == 0
    first, last = losses(tmp_path / "run"), losses(tmp_path / "run")[12]
    assert abs(losses(tmp_path / "again")[1] - last) < 0.5 < first[1] - last


def test_masked_documents_change_the_loss_and_nothing_else(recipe, tmp_path, capsys):
    for masked, layers in (("false", "local layers"), ("true", "local layers and masked documents")):
        torch.backends.cuda.enable_cudnn_sdp(False)
        options = flags(recipe, train__steps=2, data__mask_documents=masked, run__dir=tmp_path / masked)
        assert main(options) == 0
        assert f"\nattention   {layers} by sdpa with a mask: no GPU is used\n" in capsys.readouterr().out
        assert torch.backends.cuda.cudnn_sdp_enabled()
    plain, masked = (metrics(tmp_path / folder, "train")[0] for folder in ("false", "true"))
    assert plain["loss"] == pytest.approx(masked["loss"], rel=0.02)
    assert plain["loss"] != masked["loss"]


def test_all_stop_signals_have_a_handler_before_torch_is_there():
    """Read off the source: in `python -m gloria.pretrain` nothing slow comes before the handlers."""
    source = Path(gloria.pretrain.__file__).read_text()
    assert source.index("install_stop_handlers()\n") < source.index("\nfrom gloria.train.loop")
    assert {number.name for number in STOP_SIGNALS} == {"SIGTERM", "SIGINT", "SIGUSR1", "SIGUSR2"}


def test_a_validation_of_a_launch_that_left_no_checkpoint_stands_once(recipe, tmp_path):
    """Killed behind the validation before the first step, begun again from there."""
    recipe |= {"valid.every": 2, "valid.windows": 3, "train.steps": 2}
    assert main(flags(recipe)) == 0
    shutil.rmtree(tmp_path / "run" / "checkpoints")
    (tmp_path / "run" / "status.json").unlink()
    assert main(flags(recipe)) == 0
    assert [line["step"] for line in metrics(tmp_path / "run", "valid")] == [0, 2]


def test_the_command_opens_its_corpus_once(recipe, monkeypatch, capsys):
    """It checks the recipe before torch is imported, and used to hash every shard again behind the import."""
    hashed = []
    monkeypatch.setattr("gloria.data.corpus.hash_file", lambda file: hashed.append(str(file)) or hash_file(file))
    monkeypatch.setattr("gloria.dist.signals.install_stop_handlers", lambda: None)
    monkeypatch.setattr(sys, "argv", ["pretrain", *flags(recipe), "--dry-run", "--verify"])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(gloria.pretrain.__file__, run_name="__main__")
    assert ended.value.code == 0
    shards = [str(path) for path in recipe["data.corpus"].glob("*/*-*.*")]
    assert sorted(file for file in hashed if file.endswith((".bin", ".idx"))) == sorted(shards)
