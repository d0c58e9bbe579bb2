"""Prevents: a run folder that cannot be used, or a forged trainer.json, ending in a traceback or a run on nonsense."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path
from typing import Any

import pytest
import xxhash

import gloria.train.checkpointing
from gloria.checkpoints import main as checkpoints
from gloria.dist.checkpoint_read import read_trainer
from gloria.dist.manifest import FileEntry, checkpoint_path, manifest_bytes, read_manifest, saved_steps
from gloria.dist.run_lock import read_status
from gloria.errors import UserError, run_command
from gloria.files import to_json
from gloria.pretrain import main
from gloria.train.loop import Run
from gloria.train.resume import read_run_state
from tests.launch import SMALL, flags, metrics


@pytest.fixture
def recipe(sample_corpus: Path, repository: Path, tmp_path: Path) -> dict[str, Any]:
    config = repository / "launch/demo.toml"
    return {"config": config, "data.corpus": sample_corpus, **SMALL, "run.dir": tmp_path / "run"}


def errors(recipe: dict[str, Any], capsys: pytest.CaptureFixture[str], **changes: Any) -> list[str]:
    capsys.readouterr()
    assert run_command(main, flags(recipe, **changes)) == 2
    return [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]


# What a run cannot use; the rest it makes, reads or replaces.
OBSTACLES = [
    *(("", obstacle) for obstacle in ("file", "link")),
    ("lock", "folder"),
    ("status.json", "folder"),
    *(("checkpoints", obstacle) for obstacle in ("file", "link")),
    *(("metrics.jsonl", obstacle) for obstacle in ("folder", "link")),
    *(("tokenizer", obstacle) for obstacle in ("file", "link")),
    ("mixture.json", "folder"),
]


@pytest.mark.parametrize(("name", "obstacle"), OBSTACLES)
def test_a_run_folder_that_cannot_be_used_is_one_line(recipe, tmp_path, capsys, name, obstacle):
    run = tmp_path / "run"
    if name:
        run.mkdir()
    path = run / name if name else run
    if obstacle == "link":
        path.symlink_to("loop" if name else run)
        (path.parent / "loop").symlink_to("loop")
    elif obstacle == "folder":
        path.mkdir()
        (path / "mine").touch()
    else:
        path.write_text("mine")
    if name == "lock":
        os.utime(path, (1, 1))  # else the run waits to see whether its holder is alive
    lines = errors(recipe, capsys)
    assert len(lines) == 1
    assert str(run) in lines[0]


@pytest.mark.parametrize("name", ["\0", "a" * 300, "file/below"])
def test_a_name_that_no_folder_can_have_is_one_line(recipe, tmp_path, capsys, name):
    (tmp_path / "file").touch()
    (line,) = errors(recipe, capsys, run__dir=tmp_path / name)
    assert "run.dir" in line


def forge(run: Path, change) -> Path:
    """Change the trainer state of step 4, with a manifest that agrees."""
    path = checkpoint_path(run, 4)
    content = json.loads((path / "trainer.json").read_bytes())
    change(content["state"])
    data = to_json(content)
    (path / "trainer.json").write_bytes(data)
    manifest = read_manifest(path)
    entry = FileEntry("trainer.json", len(data), xxhash.xxh3_128_hexdigest(data))
    files = (*manifest.files[:-1], entry)
    (path / "manifest.json").write_bytes(manifest_bytes(type(manifest)(*list(vars(manifest).values())[:-1], files)))
    return path


VALUES = (None, "x", [], {}, -1, 1.5, True, 10**30)
# What each field may be of these.
FINE = {
    ("model",): [{}],
    ("tokens",): [],
    ("seed",): [],
    ("world",): [],
    ("recipe",): [{}],
    ("schedule", "base_lr"): [1.5],
    ("schedule", "step"): [],
    ("schedule", "total_steps"): [],
    ("schedule", "warmup_steps"): [],
    ("meter",): [None],
    ("meter", "steps"): [],
    ("meter", "grad_norm"): [None, 1.5],
    ("meter", "loss"): [{}],
    ("meter", "rows", "enciclopedia"): [],
}


def test_a_forged_trainer_state_is_refused_by_field(recipe, tmp_path):
    assert main(flags(recipe, train__steps=4)) == 0
    run = tmp_path / "run"
    before = (checkpoint_path(run, 4) / "trainer.json").read_bytes()
    for keys, fine in FINE.items():
        for value in VALUES:

            def change(state: dict[str, Any], keys=keys, value=value) -> None:
                for key in keys[:-1]:
                    state = state[key]
                state[keys[-1]] = value

            (checkpoint_path(run, 4) / "trainer.json").write_bytes(before)
            path = forge(run, change)
            place = f"{path / 'trainer.json'}: {'.'.join(keys)}"
            if any(type(value) is type(good) and value == good for good in fine):
                assert read_run_state(path)
                continue
            if keys[-1] in ("base_lr", "grad_norm") and value == 10**30:
                continue
            with pytest.raises(UserError) as error:
                read_run_state(path)
            assert str(error.value).startswith(place), (keys, value)
            assert str(error.value).endswith("; go on from an older checkpoint with run.resume")
    (checkpoint_path(run, 4) / "trainer.json").write_bytes(before)
    forge(run, lambda state: state.pop("recipe"))
    with pytest.raises(UserError, match="recipe: missing"):
        read_run_state(checkpoint_path(run, 4))
    assert "meter" in read_trainer(checkpoint_path(run, 4))


def test_a_run_that_cannot_save_stops_after_the_third_failure(recipe, tmp_path, monkeypatch, capsys):
    begin = gloria.train.checkpointing.begin_save

    def failing(*arguments: Any, **options: Any) -> Any:
        save = begin(*arguments, **options)
        save.thread and save.thread.join()
        save.error = "rank 0: the disk is away"
        return save

    monkeypatch.setattr(gloria.train.checkpointing, "begin_save", failing)
    assert main(flags(recipe, checkpoint__every=1)) == 1
    err = capsys.readouterr().err
    assert f"warning: {tmp_path / 'run'}: 3 checkpoints in a row failed; the run tries once more and stops\n" in err
    assert (
        f"error: {tmp_path / 'run'}: the last checkpoint could not be written; the newest checkpoint is of step 0"
        in err
    )
    assert len(metrics(tmp_path / "run", "train")) < 12
    assert read_status(tmp_path / "run").status == "failed"


def test_weights_that_are_not_finite_cost_no_good_checkpoint(recipe, tmp_path, monkeypatch, capsys):
    import gloria.train.loop as loop

    take_step = loop.take_step

    def harm(run: Run, batch: Any) -> Any:
        step = take_step(run, batch)
        if run.step == 7:
            next(run.model.parameters()).to_local().data[0, 0] = float("nan")
        return step

    monkeypatch.setattr(loop, "take_step", harm)
    assert main(flags(recipe, checkpoint__every=2, checkpoint__keep=2)) == 1
    err = capsys.readouterr().err
    assert "not saved; rank 0: NotFinite: model." in err
    assert "the newest checkpoint is of step 6" in err
    assert saved_steps(tmp_path / "run") == [4, 6]
    assert run_command(checkpoints, ["--run", str(tmp_path / "run"), "--verify"]) == 0


def test_a_full_disk_ends_in_one_line_and_gives_the_lock_back(recipe, tmp_path, monkeypatch, capsys):
    from gloria.dist import run_lock
    from gloria.train.metrics import RunLog

    def full(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(tmp_path / "run" / "metrics.jsonl"))

    train = RunLog.train

    def fill(log: RunLog, step: int, values: Any) -> None:
        if step == 3:
            monkeypatch.setattr(RunLog, "_write", full)
            monkeypatch.setattr(run_lock, "write_whole", full)
        train(log, step, values)

    monkeypatch.setattr(RunLog, "train", fill)
    assert main(flags(recipe)) == 1
    lines = capsys.readouterr().err.splitlines()
    remedy = "No space left on device; free some space and start again"
    assert f"error: rank 0: {tmp_path / 'run' / 'metrics.jsonl'}: {remedy}" in lines
    assert not any("Traceback" in line for line in lines)
    assert not (tmp_path / "run" / "lock").exists()
