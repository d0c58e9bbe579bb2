"""Bugs prevented: a checkpoint that is scored twice or never, after a restart or beside a run that saves and prunes;
scores of half a write taken for whole; a watch that ends with the queue, or never."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import gloria.evaluate as evaluate
import gloria.tasks.evaluation as evaluation
import gloria.tasks.watch as watching
from gloria.dist import signals
from gloria.dist.manifest import checkpoint_path, saved_steps
from gloria.dist.process import Process
from gloria.dist.retention import remove_checkpoint
from gloria.dist.run_lock import lock_run, release_run, write_status
from gloria.errors import UserError, run_command
from tests import launch
from tests.launch import SMALL, flags
from tests.tasks.tiny import WORDS, sentence, write_lines
from tests.world import run_world


@pytest.fixture(scope="module")
def trained(sample_corpus: Path, repository: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that is done, with checkpoints of steps 4, 8 and 12."""
    folder = tmp_path_factory.mktemp("trained")
    recipe = {"config": repository / "launch/demo.toml", "data.corpus": sample_corpus, **SMALL}
    launch.run(flags(recipe, run__dir=folder / "run", checkpoint__keep=3), 1, folder)
    return folder / "run"


@pytest.fixture(scope="module")
def repository() -> Path:
    return Path(__file__).resolve().parents[2]


@pytest.fixture
def run(trained: Path, tmp_path: Path) -> Path:
    """A copy of it, to do with what a test likes."""
    return shutil.copytree(trained, tmp_path / "run")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    generator = random.Random(3)
    rows = [{"id": n, "sentence": sentence(generator, 2 + n), "last_word": generator.choice(WORDS)} for n in range(5)]
    return write_lines(tmp_path_factory.mktemp("calame") / "calamept_all.jsonl", rows)


@pytest.fixture(autouse=True)
def no_group_left() -> Iterator[None]:
    """No process group stays behind where `main` was expected to fail."""
    yield
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def arguments(run: Path, data: Path, *more: str) -> list[str]:
    words = ["--task=calame,perplexity", f"--data={data},", f"--watch={run}", "--poll=0.05", "--device=cpu", *more]
    given = list({word.partition("=")[0]: word for word in words}.values())  # what comes last counts
    task = next(flag for flag in given if flag.startswith("--task="))
    of_a_task = {"calame": "--rule=first-word,log-likelihood", "perplexity": "--length=32"}
    return given + [flag for name, flag in of_a_task.items() if name in task]


def look(run: Path, data: Path, *more: str) -> int:
    return run_command(evaluate.main, arguments(run, data, *more))


def scores(run: Path) -> list[dict[str, Any]]:
    found = [json.loads(line) for line in (run / "scores.jsonl").read_text().splitlines()]
    for record in found:
        record["counts"].pop("seconds", None)
    return found


def keys(run: Path) -> list[tuple[int, str, str]]:
    return [(record["step"], record["task"], record.get("rule", record["split"])) for record in scores(run)]


SOURCES = ("enciclopedia", "parlamento", "dialogos", "cartas")
RECORDS = [("calame", rule) for rule in ("first-word", "log-likelihood")] + [("perplexity", name) for name in SOURCES]
ALL = [(step, *record) for step in (4, 8, 12) for record in RECORDS]


def set_status(run: Path, status: str, step: int = 12, reason: str = "") -> None:
    run_lock = lock_run(run, "test")
    write_status(run_lock, status, step, reason)
    release_run(run_lock)


def test_every_checkpoint_is_scored_once_in_order_as_plain_evaluation_does(run, data, tmp_path, capsys):
    assert look(run, data) == 0
    assert keys(run) == ALL
    out = capsys.readouterr().out
    assert "data       the held-out part of the run's own corpus\n" in out
    assert out.endswith(f"{run}: done; 3 checkpoints are scored, 3 by this watch: {run}/scores.jsonl\n")
    before = (run / "scores.jsonl").read_bytes()

    assert look(run, data) == 0
    assert (run / "scores.jsonl").read_bytes() == before
    out = capsys.readouterr().out
    assert f"{run}/scores.jsonl: 3 checkpoints are scored already\n" in out
    assert "3 checkpoints are scored, 0 by this watch" in out

    plain = [word for word in arguments(run, data) if not word.startswith(("--watch", "--poll"))]
    model = f"--model={checkpoint_path(run, 8)}"
    assert run_command(evaluate.main, [*plain, model, f"--out={tmp_path / 'out'}"]) == 0
    expected = json.loads((tmp_path / "out/results.json").read_text())["results"]
    found = [record for record in scores(run) if record["step"] == 8]
    assert [record.pop("part") for record in found] == ["1/2", "2/2", "1/4", "2/4", "3/4", "4/4"]
    for record, other in zip(found, expected, strict=True):
        other["counts"].pop("seconds", None)
        del record["step"], record["launch"], record["saved_at"]
        other.pop("predictions", None)
        assert record == other

    board = EventAccumulator(str(run / "tensorboard/eval")).Reload()
    curve = board.Scalars("eval/calame/exact_match:first-word")
    assert [event.step for event in curve] == [4, 8, 12]
    curve = board.Scalars("eval/perplexity/cartas/token_perplexity")
    values = [record["scores"]["token_perplexity"]["value"] for record in scores(run) if record["split"] == "cartas"]
    assert [event.value for event in curve] == pytest.approx(values, rel=1e-6)


def test_another_task_is_scored_of_the_checkpoints_that_lack_it(run, data):
    assert look(run, data, "--task=calame", f"--data={data}") == 0
    assert keys(run) == [key for key in ALL if key[1] == "calame"]
    assert look(run, data) == 0
    assert sorted(keys(run)) == sorted(ALL)


def test_other_files_or_flags_are_refused_and_not_taken_for_scored(run, data, tmp_path, capsys):
    assert look(run, data, "--task=calame", f"--data={data}") == 0
    other = shutil.copytree(data, tmp_path / "other")
    assert look(run, data, "--task=calame", f"--data={other}") == 2
    assert capsys.readouterr().err == (
        f"error: {run}/scores.jsonl:1: calame was scored with --data {data} --rule first-word,log-likelihood, and "
        f"now runs with --data {other} --rule first-word,log-likelihood; give the same flags, or move the file "
        "away\n"
    )


def test_half_a_write_is_taken_out_and_scored_again(run, data, capsys):
    assert look(run, data) == 0
    path = run / "scores.jsonl"
    whole = path.read_bytes()
    path.write_bytes(whole[:-20])  # killed in the last of four lines on the perplexity of step 12
    assert look(run, data) == 0
    assert keys(run) == ALL
    assert [line for line in capsys.readouterr().err.splitlines() if line.startswith("warning")] == [
        f"warning: {path}: 4 lines at its end are an incomplete write; they are deleted, and scored again"
    ]
    lines = whole.splitlines(keepends=True)
    path.write_bytes(b"".join([*lines[:3], b"{}\n", *lines[3:]]))
    assert look(run, data) == 2
    assert capsys.readouterr().err == f"error: {path}:4: is not a score; delete the line, or move the file away\n"


def test_a_damaged_checkpoint_is_named_once_and_passed_over_until_there_is_another(run, data, capsys):
    file = checkpoint_path(run, 8) / "rank-00000.safetensors"
    content = file.read_bytes()
    file.write_bytes(content[:-1] + b"\x01")
    assert look(run, data) == 0
    assert keys(run) == [key for key in ALL if key[0] != 8]
    assert capsys.readouterr().err.splitlines() == [
        f"warning: {file}: its content is not what was written (hash differs); the checkpoint of step 8 is passed over"
    ]
    (checkpoint_path(run, 8) / "manifest.json").unlink()
    assert look(run, data) == 0
    assert capsys.readouterr().err.splitlines() == [
        f"warning: {checkpoint_path(run, 8)}/manifest.json: is missing; the checkpoint of step 8 is passed over"
    ]


def test_a_checkpoint_that_is_pruned_while_it_is_read_leaves_nothing(run, data, capsys, monkeypatch):
    load = evaluation.load_model

    def load_late(name: str, **options: bool) -> Any:
        if name.endswith("step-00000004"):
            remove_checkpoint(Path(name))
        return load(name, **options)

    monkeypatch.setattr(evaluation, "load_model", load_late)
    assert look(run, data) == 0
    assert keys(run) == [key for key in ALL if key[0] != 4]
    (line,) = capsys.readouterr().err.splitlines()
    gone = f"{checkpoint_path(run, 4)}: its run has deleted it while it was read"
    assert line == f"warning: {gone}; the checkpoint of step 4 is passed over"


def test_a_checkpoint_may_go_once_it_is_loaded(run, data, monkeypatch):
    load = evaluation.load_language_model

    def load_and_prune(name: str, *rest: Any) -> Any:
        loaded = load(name, *rest)
        if saved_steps(run)[0] == 4:
            watching.identity(run, 4)
            monkeypatch.setattr(watching, "identity", lambda run, step, own=watching.identity: own(run, step))
        return loaded

    monkeypatch.setattr(evaluation, "load_language_model", load_and_prune)
    answer = evaluation.score_language_model

    def answer_late(*rest: Any) -> Iterator[evaluation.Scored]:
        if checkpoint_path(run, 4).exists():
            remove_checkpoint(checkpoint_path(run, 4))
        return answer(*rest)

    monkeypatch.setattr(evaluation, "score_language_model", answer_late)
    assert look(run, data) == 0
    assert keys(run) == ALL


def test_a_step_taken_again_on_another_way_is_another_checkpoint(run, data, trained):
    assert look(run, data, "--task=calame", f"--data={data}") == 0
    manifest = json.loads((checkpoint_path(run, 8) / "manifest.json").read_text())
    path = run / "scores.jsonl"
    path.write_text(path.read_text().replace(f'"step":8,"launch":"{manifest["launch"]}"', '"step":8,"launch":"older"'))
    assert look(run, data, "--task=calame", f"--data={data}") == 0
    assert [record["step"] for record in scores(run)] == [4, 4, 8, 8, 12, 12, 8, 8]


def test_it_waits_for_a_run_to_begin_to_continue_and_to_end(trained, data, tmp_path, capsys):
    run, out = tmp_path / "run", ""

    def reported(text: str) -> None:
        def seen() -> bool:
            nonlocal out
            out += capsys.readouterr().out
            return text in out

        launch.wait_until(seen)

    def play() -> None:
        reported(f"{run}: no run yet; waiting for it to begin\n")
        (run / "checkpoints").mkdir(parents=True)
        shutil.copytree(trained / "tokenizer", run / "tokenizer")
        set_status(run, "stopped", 2, "SIGUSR1")
        reported(f"{run}: stopped at step 2; waiting for it to continue\n")
        for step in (4, 8):
            work = tmp_path / f"work-{step}"
            shutil.copytree(checkpoint_path(trained, step), work)
            work.rename(checkpoint_path(run, step))
            set_status(run, "running", step)  # and its launch is gone
            reported(f"{run}: dead at step {step}; waiting for it to continue\n")
        set_status(run, "done")

    actor = threading.Thread(target=play)
    actor.start()
    assert look(run, data, "--task=calame", f"--data={data}") == 0
    actor.join()
    out += capsys.readouterr().out
    assert [record["step"] for record in scores(run)] == [4, 4, 8, 8]
    assert out.count("waiting for it to begin") == out.count("stopped at step 2") == 1


def test_a_failed_run_is_scored_and_ends_the_watch_with_1(run, data, capsys):
    set_status(run, "failed", 12, "10 steps in a row had to be skipped")
    assert look(run, data, "--task=calame", f"--data={data}") == 1
    assert len(scores(run)) == 6
    line = f"error: {run}: 10 steps in a row had to be skipped; 3 checkpoints are scored, 3 by this watch\n"
    assert capsys.readouterr().err == line


def test_a_failure_that_is_tried_again_at_once_is_no_end(run):
    watcher = watching.Watcher(run, {})
    set_status(run, "failed")
    assert watcher.look() == watching.WAIT
    run_lock = lock_run(run, "again")
    assert watcher.look() == watching.WAIT
    write_status(run_lock, "done", 12)
    release_run(run_lock)
    assert [watcher.look(), watcher.look()] == [watching.WAIT, watching.DONE]


def test_a_stop_between_two_records_writes_nothing_of_the_checkpoint(run, data, capsys, monkeypatch):
    asked = []

    def stop_reason() -> str:
        asked.append(1)
        return "SIGUSR1" if len(asked) > 11 else ""  # 6 records of step 4 and a look before each checkpoint

    monkeypatch.setattr(watching, "stop_reason", stop_reason)
    assert look(run, data) == 0
    assert keys(run) == ALL[:6]
    assert capsys.readouterr().out.endswith(f"{run}: the watch stops as requested; the same command continues it\n")


def test_a_signal_ends_the_waiting_and_the_next_watch_continues(run, data, monkeypatch, capfd):
    set_status(run, "stopped")
    monkeypatch.setattr(signals, "_received", [])
    before = {number: signal.getsignal(number) for number in signals.STOP_SIGNALS}
    signals.install_stop_handlers("the watch stops after this score")
    waiting = threading.Timer(0, lambda: _signal_once(run / "scores.jsonl", 6))
    waiting.start()
    try:
        assert look(run, data, "--task=calame", f"--data={data}", "--poll=600") == 0
    finally:
        waiting.join()
        for number, handler in before.items():
            signal.signal(number, handler)
    printed = capfd.readouterr()
    assert printed.err == "SIGUSR1: the watch stops after this score\n"
    assert printed.out.endswith(f"{run}: the watch stops as requested; the same command continues it\n")
    assert len(scores(run)) == 6
    set_status(run, "done")
    monkeypatch.setattr(signals, "_received", [])
    assert look(run, data, "--task=calame", f"--data={data}") == 0
    assert len(scores(run)) == 6


def _signal_once(path: Path, lines: int) -> None:
    """SIGUSR1 to this process once a file has so many lines."""
    launch.wait_until(lambda: path.exists() and path.read_bytes().count(b"\n") >= lines)
    os.kill(os.getpid(), signal.SIGUSR1)


def _on_a_rank(rank: int, world: int, given: list[str]) -> None:
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world))
    evaluate.start_process_group = lambda *_, **__: Process(rank, world, torch.device("cpu"))
    evaluate.stop_process_group = lambda: None
    assert evaluate.main(given) == 0


def test_two_ranks_take_the_same_way(run, trained, data, tmp_path):
    file = checkpoint_path(run, 8) / "rank-00000.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"\x01")
    run_world(_on_a_rank, 2, arguments(run, data))
    assert keys(run) == [key for key in ALL if key[0] != 8]
    other = shutil.copytree(trained, tmp_path / "other")
    assert look(other, data) == 0
    assert scores(run) == [record for record in scores(other) if record["step"] != 8]


@pytest.mark.parametrize(
    ("more", "line"),
    [
        (["--model=x"], "--model: both it and --watch are given; give a model's folder, or a run to watch"),
        (["--poll=0"], "--poll: 0.0 is too small; give more than 0"),
        (["--out=x"], "--out: --watch writes in {run} itself, and no predictions; leave it out"),
        (["--task=squad1"], "--task: squad1 is answered by a span, which needs a head; fine-tune the model on it "
                            "first"),
        (["--task=perplexity", "--data=nowhere"], "--data: nowhere is neither a text file nor a prepared corpus; "
                                                  "perplexity needs one of them"),
    ],
)  # fmt: skip
def test_mistakes_are_one_line_before_the_run_is_waited_for(more, line, tmp_path, data, capsys):
    more = [*more, f"--data={data}"] if "--data=nowhere" not in more and "--task=squad1" in more else more
    assert look(tmp_path / "none", data, *more) == 2
    assert capsys.readouterr().err == f"error: {line.format(run=tmp_path / 'none')}\n"


def test_what_is_no_pre_training_run_is_reported(run, data, tmp_path, capsys):
    (run / "model").mkdir()
    (run / "model/task.json").write_text("{}")
    assert look(run, data) == 2
    tuning = "is a fine-tuning, which scores itself on its dev set; name a pre-training run"
    assert capsys.readouterr().err == f"error: --watch: {run} {tuning}\n"
    (tmp_path / "config.json").touch()
    assert look(tmp_path, data) == 2
    line = f"error: --watch: {tmp_path} is no run; name the folder of a pre-training run (its run.dir)\n"
    assert capsys.readouterr().err == line


def test_without_data_a_model_that_is_no_run_has_no_corpus(tmp_path):
    with pytest.raises(UserError) as error:
        evaluate.main(["--task=perplexity", f"--model={tmp_path}"])
    (line,) = error.value.problems
    assert line == f"--data: is missing; {tmp_path} is no run with a corpus of its own, so name a text"
