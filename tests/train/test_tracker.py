"""Prevents: a tracker whose failure ends a run of weeks, one that sends data away unasked, and other names than the
log's. The real packages are large; what a run calls of them stands here as a module of a few lines."""

from __future__ import annotations

import io
import sys
import types
from pathlib import Path
from typing import Any

import pytest

from gloria.errors import UserError
from gloria.train.config import read_pretrain_config
from gloria.train.finetune_config import read_finetune_config
from gloria.train.metrics import LogConfig, open_log


@pytest.fixture(params=["wandb", "trackio"])
def fake(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A module that keeps what it is given, and fails at step 30."""
    module: Any = types.ModuleType(request.param)
    module.calls = []

    def log(values: dict[str, float], step: int) -> None:
        if step == 30:
            raise ConnectionError("no disk left")
        module.calls.append((step, values))

    module.init = lambda **about: module.calls.append(about)
    module.log = log
    module.finish = lambda: module.calls.append("finished")
    monkeypatch.setitem(sys.modules, request.param, module)
    for name in ("WANDB_MODE", "TRACKIO_DIR"):
        monkeypatch.delenv(name, raising=False)
    return module


def test_a_tracker_has_the_names_of_the_log_and_its_failure_is_said_once(
    fake: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = LogConfig(tensorboard=False, tracker=fake.__name__)
    log = open_log(tmp_path / "run", 0, 100, config, io.StringIO(), recipe={"optim": {"lr": 0.1}})
    values = {"loss": 2.0, "lr": 0.1, "grad_norm": 1.0, "tokens": 10, "step_s": 1.0, "data_s": 0.0, "memory": 1}
    for step in (10, 30, 40):
        log.train(step, values | {"tokens_per_s": 10.0, "tflops": 1.0, "sources": {"wiki": {"loss": float("nan")}}})
    log.valid(40, {"loss": 2.5, "perplexity": 12.2, "sources": {"wiki": 2.5}, "weights": {"wiki": 1.0}})
    log.close()
    about, (step, logged) = fake.calls  # nothing after the failure
    assert (about["project"], about["name"], about["config"]) == ("gloria", "run", {"optim": {"lr": 0.1}})
    if fake.__name__ == "wandb":
        assert (about["mode"], about["dir"]) == ("offline", str(tmp_path / "run"))
    assert step == 10
    assert logged.keys() == {f"train/{name}" for name in (*values, "tokens_per_s", "tflops")}
    line = (
        f"warning: log.tracker: {fake.__name__} has failed (ConnectionError: no disk left); the run goes on without it"
    )
    assert capsys.readouterr().err == f"{line}\n"
    assert (tmp_path / "run/metrics.jsonl").read_bytes().count(b'"kind":"train"') == 3


def test_a_tracker_that_cannot_begin_is_said_and_the_run_goes_on(
    fake: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def init(**about: Any) -> None:
        raise RuntimeError("full")

    fake.init = init
    log = open_log(tmp_path, 0, 100, LogConfig(tensorboard=False, tracker=fake.__name__), io.StringIO())
    log.valid(10, {"loss": 2.5, "perplexity": 12.2, "sources": {}, "weights": {}})
    log.close()
    assert capsys.readouterr().err.count("has failed (RuntimeError: full)") == 1
    assert fake.calls == []


def test_a_tracker_that_is_missing_and_samples_without_text_are_errors_before_the_run(
    monkeypatch: pytest.MonkeyPatch, repository: Path
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    demo = ["--config", str(repository / "launch/demo.toml"), "--log.tracker", "wandb"]
    with pytest.raises(UserError) as caught:
        read_pretrain_config([*demo, "--log.samples_every", "5", "--log.prompts", "[]"])
    assert caught.value.problems == (
        "--log.tracker: wandb is not installed; pip install 'gloria[wandb]', or set none",
        '--log.prompts: there is none to continue; give one, such as [""]',
    )
    with pytest.raises(UserError) as caught:
        read_finetune_config(["--task", "rte", "--run.dir", "x", "--log.samples_every", "5"])
    assert caught.value.problems == ("--log.samples_every: a fine-tuning has no text to continue; leave it out",)


@pytest.fixture
def repository() -> Path:
    return Path(__file__).resolve().parents[2]
