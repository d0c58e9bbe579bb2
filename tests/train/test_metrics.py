"""A log that a resumed run doubles, a NaN that makes it unreadable, a line torn by a kill, another card's MFU."""

from __future__ import annotations

import io
import itertools
import json
import math
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from gloria.errors import UserError
from gloria.train.metrics import LogConfig, json_line, open_log, perplexity, short_number

QUIET = LogConfig(tensorboard=False)


def values_of_a_line(**changes: Any) -> dict[str, Any]:
    line = {"loss": 2.0, "lr": 1e-3, "grad_norm": 1.0, "tokens": 400, "tokens_per_s": 80.0, "step_s": 0.5}
    line |= {"data_s": 0.05, "skipped": 0, "memory": 2**30, "perplexity": math.exp(2.0), "tflops": 2.4e-7}
    return line | {"sources": {"ptwiki": {"asked": 0.25, "share": 0.25, "loss": 2.0, "epoch": 1.5}}} | changes


def valid_values(loss: float, sources: dict[str, float], weights: dict[str, float]) -> dict[str, Any]:
    return {"loss": loss, "perplexity": perplexity(loss), "sources": sources, "weights": weights}


def lines(folder: Path) -> list[dict]:
    """All lines without their time, which each of them has."""
    found = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert all(abs(line.pop("time") - time.time()) < 60 for line in found if "time" in line)
    return found


def test_lines_have_the_format_of_record(tmp_path: Path) -> None:
    console = io.StringIO()
    log = open_log(tmp_path, 0, 100, QUIET, console, ranks=2)
    log.train(10, values_of_a_line())
    text = {"loss": 2.0, "perplexity": math.exp(2.0), "bits_per_byte": 1.1, "documents": 1, "tokens": 9, "bytes": 30}
    found = valid_values(2.5, {"ptwiki": 2.0, "oscar": 3.0}, {"ptwiki": 0.5, "oscar": 0.5})
    found |= {"bits_per_byte": 0.95, "source_bits_per_byte": {"ptwiki": 0.9}, "texts": {"jornal": text}}
    log.valid(10, found)
    log.event(10, "checkpoint", folder="step-00000010", seconds=0.5)
    log.close()
    start, train, valid, event = lines(tmp_path)
    assert start == {"kind": "event", "step": 0, "event": "start", "ranks": 2}
    listed = ["kind", "step", "loss", "lr", "grad_norm", "tokens", "tokens_per_s", "sources"]
    assert [key for key in train if key in listed] == listed
    assert (train["kind"], train["step"], train["loss"]) == ("train", 10, 2.0)
    assert train["sources"]["ptwiki"] == {"asked": 0.25, "share": 0.25, "loss": 2.0, "epoch": 1.5}
    assert valid == {
        "kind": "valid",
        "step": 10,
        "loss": 2.5,
        "perplexity": math.exp(2.5),
        "bits_per_byte": 0.95,
        "source_bits_per_byte": {"ptwiki": 0.9},
        "texts": {"jornal": text},
        "sources": {"ptwiki": 2.0, "oscar": 3.0},
        "weights": {"ptwiki": 0.5, "oscar": 0.5},
    }
    assert event == {
        "kind": "event",
        "step": 10,
        "event": "checkpoint",
        "folder": "step-00000010",
        "seconds": 0.5,
    }
    assert console.getvalue().splitlines() == [
        "started at step 0",
        "   step    loss       lr    grad tokens  tok/s s/step data % TFLOP/s     GB",
        "     10  2.0000 1.00e-03       1    400     80  0.500   10.0 2.4e-07   1.00",
        "valid at step 10: loss 2.5000; perplexity 12.18; bits per byte 0.950",
        "        ptwiki 7.39 (0.900), oscar 20.09, jornal 7.39 (1.100)",
        "checkpoint at step 10: folder step-00000010, seconds 0.5",
    ]


def test_a_number_that_is_not_finite_is_null_with_a_note() -> None:
    line = json_line({"loss": math.nan, "sources": {"ptwiki": {"loss": math.inf}}, "norms": [1.0, -math.inf]})
    assert line == (
        b'{"loss":null,"sources":{"ptwiki":{"loss":null}},"norms":[1.0,null],'
        b'"note":"loss is nan; sources.ptwiki.loss is inf; norms[1] is -inf"}\n'
    )


def test_resuming_takes_out_what_will_be_written_again(tmp_path: Path) -> None:
    log = open_log(tmp_path, 0, 100, QUIET, io.StringIO())
    for step in (10, 20, 30):
        log.train(step, values_of_a_line(loss=1.0 * step))
        log.valid(step, valid_values(2.0, {}, {}))
        log.event(step, "checkpoint")
    log.close()
    console = io.StringIO()
    open_log(tmp_path, 20, 100, QUIET, console).close()
    assert [(line["kind"], line["step"]) for line in lines(tmp_path)] == [
        ("event", 0),
        ("train", 10),
        ("valid", 10),
        ("event", 10),
        ("train", 20),
        ("valid", 20),
        ("event", 20),
        ("event", 30),
        ("event", 20),
    ]
    assert lines(tmp_path)[-1] == {
        "kind": "event",
        "step": 20,
        "event": "resume",
        "lines_of_later_steps_removed": 2,
        "torn_lines_removed": 0,
    }
    assert console.getvalue() == "resumed from step 20; 2 lines of later steps are taken out of metrics.jsonl\n"
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"], "nothing temporary is left"


@pytest.mark.parametrize(
    ("tail", "torn", "kept"),
    [
        (b'{"kind":"train","step":5,"lo', 1, 1),
        (b'{"kind":"train","step":5,"loss":1.0}', 0, 2),  # whole but for its newline
        (b'{"kind":"train","step":5,"loss":"\xc3', 1, 1),  # cut within a letter
        (b"[1]\n", 1, 1),
        (b'{"kind":"train","step":"5"}\n{"kind":"train","step":null}\n', 1, 2),
        (b"[" * 100_000 + b"\n", 1, 1),
    ],
)
def test_a_torn_last_line_is_mended_at_the_next_start(tmp_path: Path, tail: bytes, torn: int, kept: int) -> None:
    open_log(tmp_path, 0, 100, QUIET, io.StringIO()).close()
    with (tmp_path / "metrics.jsonl").open("ab") as file:
        file.write(tail)
    open_log(tmp_path, 10, 100, QUIET, io.StringIO()).close()
    assert len(lines(tmp_path)) == kept + 1
    assert lines(tmp_path)[-1]["torn_lines_removed"] == torn


def test_what_stands_at_the_logs_place_is_neither_followed_nor_waited_for(tmp_path: Path) -> None:
    """A link planted in a run folder must not let a run write through it."""
    other, log = tmp_path / "other", tmp_path / "metrics.jsonl"
    other.write_text("precious\n")
    for plant in (lambda: log.symlink_to(other), lambda: os.mkfifo(log), log.mkdir):
        plant()
        with pytest.raises(UserError, match=r"metrics\.jsonl"):
            open_log(tmp_path, 0, 100, QUIET, io.StringIO())
        log.rmdir() if log.is_dir() and not log.is_symlink() else log.unlink()
    assert other.read_text() == "precious\n"


def test_every_line_is_in_the_file_at_once(tmp_path: Path) -> None:
    log = open_log(tmp_path, 0, 100, QUIET, io.StringIO())
    for step in range(1, 4):
        log.event(step, "something")
        assert len(lines(tmp_path)) == step + 1, "written without close or flush"
    log.close()


def test_tensorboard_has_the_same_values_and_no_steps_that_are_done_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    # TensorBoard reads files in the order of their names, which begin with the second of their making.
    seconds = itertools.count(10**9)
    monkeypatch.setattr(time, "time", lambda: float(next(seconds)))
    for _ in range(2):  # the first is killed before it has a checkpoint, so the second begins at 0, too
        log = open_log(tmp_path, 0, 100, LogConfig(), io.StringIO(), evaluated_step=-1)
        log.valid(0, valid_values(math.nan, {"ptwiki": 3.0}, {"ptwiki": 1.0}))
        for step in (10, 20):
            log.train(step, values_of_a_line())
            log.valid(step, valid_values(math.nan, {"ptwiki": 2.0}, {"ptwiki": 1.0}))
        log.close()
    log = open_log(tmp_path, 10, 100, LogConfig(), io.StringIO())
    log.valid(30, valid_values(1.0, {"ptwiki": 1.5}, {"ptwiki": 1.0}))
    log.close()
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [(event.step, event.value) for event in events.Scalars("train/loss")] == [(10, 2.0)]
    assert [(event.step, event.value) for event in events.Scalars("valid/sources/ptwiki")] == [
        (0, 3.0),
        (10, 2.0),
        (30, 1.5),
    ]
    # A card for what one looks at, and no more: 27 of them hid the loss.
    assert {tag for tag in events.Tags()["scalars"] if tag.startswith("train/")} == {
        *(f"train/{name}" for name in ("loss", "lr", "grad_norm", "tokens_per_s", "skipped", "memory")),
        *(f"train/sources/ptwiki/{name}" for name in ("share", "loss")),
    }
    assert [event.step for event in events.Scalars("valid/loss")] == [30], "a NaN has no place in a curve"


def test_a_bar_is_shown_on_a_terminal_only(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """And in its stderr as the process has it, not in what stands for it, which a rank logs."""

    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    for console in (io.StringIO(), Terminal()):
        log = open_log(tmp_path, 5, 100, QUIET, console)
        log.progress(50)
        log.event(50, "something")
        log.close()
        assert ("50/100" in capfd.readouterr().err) is console.isatty()
        assert "something at step 50\n" in console.getvalue()


def test_numbers_are_short_and_perplexity_never_raises() -> None:
    numbers = (0, 12.345, 999, 999.6, 1234, 35.5e9, 1e15)
    assert [short_number(number) for number in numbers] == [
        "0",
        "12.3",
        "999",
        "1k",
        "1.23k",
        "35.5B",
        "1e+03T",
    ]
    assert perplexity(1000.0) == math.inf
    assert math.isnan(perplexity(math.nan))


def test_the_log_needs_no_torch() -> None:
    code = "import sys, gloria.train.metrics; print('torch' in sys.modules, 'tensorboard' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False False\n"


def test_a_line_takes_the_place_of_the_bar(tmp_path: Path) -> None:
    from tqdm import tqdm

    screen = io.StringIO()
    log = open_log(tmp_path, 0, 100, QUIET, screen)
    log.bar = tqdm(total=100, file=screen, ncols=80)
    log.event(1, "checkpoint")
    before, _, after = screen.getvalue().partition("checkpoint at step 1\n")
    assert before.endswith(f"{' ' * 79}\r"), before[-90:]
    assert "0/100" in after
    log.close()
