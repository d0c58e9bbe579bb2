"""A log that a resumed run doubles, a NaN that makes it unreadable, a line torn by a kill, another card's MFU."""

from __future__ import annotations

import io
import json
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from gloria.train.metrics import (
    LogConfig,
    Meter,
    json_line,
    open_log,
    peak_flops,
    peak_memory,
    perplexity,
    short_number,
)

QUIET = LogConfig(tensorboard=False)


def new_meter(card_peak: float | None = None, names: tuple[str, ...] = ("ptwiki", "oscar")) -> Meter:
    return Meter(names, sequence_length=10, flops_per_token=6000, ranks=2, card_peak=card_peak)


def read_meter(meter: Meter) -> dict:
    return meter.read(
        lr=1e-3,
        tokens=400,
        asked={"ptwiki": 0.25, "oscar": 0.75},
        taken={"ptwiki": 10, "oscar": 30},
        epochs={"ptwiki": 1.5, "oscar": 0.1},
        memory=2**30,
    )


def add_step(meter: Meter, losses: list[float], rows: list[int], norm: float = 1.0, finite: bool = True) -> None:
    meter.add(np.array(losses), np.array(rows), norm, finite, seconds=0.5, data_seconds=0.05)


def lines(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_a_meter_gives_means_over_tokens_and_starts_anew() -> None:
    meter = new_meter(card_peak=1e6)
    add_step(meter, [20.0, 60.0], [1, 3], norm=2.0)
    add_step(meter, [40.0, 80.0], [1, 3], norm=3.0)
    values = read_meter(meter)
    assert values == {
        "loss": 200 / 80,
        "perplexity": math.exp(2.5),
        "lr": 1e-3,
        "grad_norm": 3.0,
        "tokens": 400,
        "tokens_per_s": 80.0,
        "step_s": 0.5,
        "data_s": 0.05,
        "tflops": 80 * 6000 / 2 / 1e12,
        "mfu": 80 * 6000 / 2 / 1e6,
        "memory": 2**30,
        "skipped": 0,
        "sources": {
            "ptwiki": {"asked": 0.25, "share": 0.25, "loss": 3.0, "epoch": 1.5},
            "oscar": {"asked": 0.75, "share": 0.75, "loss": 140 / 60, "epoch": 0.1},
        },
    }
    add_step(meter, [10.0, 0.0], [1, 0])
    assert read_meter(meter)["loss"] == 1.0, "nothing is left of the steps before"


def test_a_skipped_step_counts_in_time_and_not_in_the_loss() -> None:
    meter = new_meter()
    add_step(meter, [20.0, 60.0], [1, 3], norm=2.0)
    add_step(meter, [math.nan, 60.0], [1, 3], norm=math.nan, finite=False)
    values = read_meter(meter)
    assert (values["loss"], values["grad_norm"], values["skipped"]) == (2.0, 2.0, 1)
    assert values["tokens_per_s"] == 80.0
    assert "mfu" not in values, "an unknown card has none"


def test_a_source_without_a_window_in_these_steps_has_no_loss() -> None:
    meter = new_meter(names=("ptwiki", "oscar", "dropped"))
    add_step(meter, [20.0, 0.0, 0.0], [1, 0, 0])
    sources = read_meter(meter)["sources"]
    assert sources["oscar"]["loss"] is None
    assert list(sources) == ["ptwiki", "oscar"], "a source that is neither asked for nor read is not listed"


def test_a_resumed_meter_has_the_losses_of_an_unbroken_one() -> None:
    unbroken, before = new_meter(), new_meter()
    for meter in (unbroken, before):
        add_step(meter, [0.1, 0.2], [1, 3])
    state = json.loads(json.dumps(before.state_dict()))
    after = new_meter(names=("new", "oscar", "ptwiki"))
    after.load_state_dict(state)
    add_step(unbroken, [0.7, 0.3], [2, 2])
    add_step(after, [0.0, 0.3, 0.7], [0, 2, 2])
    asked = {"asked": {"ptwiki": 1.0}, "taken": {}, "epochs": dict.fromkeys(("ptwiki", "oscar"), 0.0)}
    one, other = (meter.read(lr=1.0, tokens=1, memory=1, **asked) for meter in (unbroken, after))
    assert (one["loss"], one["sources"]) == (other["loss"], dict(reversed(other["sources"].items())))
    assert other["tokens_per_s"] == 80.0, "speed is that of this launch's steps"


def test_lines_have_the_format_of_record(tmp_path: Path) -> None:
    console = io.StringIO()
    log = open_log(tmp_path, 0, 100, QUIET, console, ranks=2)
    meter = new_meter()
    add_step(meter, [20.0, 60.0], [1, 3])
    log.train(10, read_meter(meter))
    log.valid(10, 2.5, {"ptwiki": 2.0, "oscar": 3.0})
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
        "sources": {"ptwiki": 2.0, "oscar": 3.0},
    }
    assert event == {
        "kind": "event",
        "step": 10,
        "event": "checkpoint",
        "folder": "step-00000010",
        "seconds": 0.5,
    }
    assert console.getvalue().splitlines() == [
        "start at step 0: ranks 2",
        "    step      loss        ppl        lr  grad norm   tokens  tokens/s   step s  data %          mfu    memory",
        "      10    2.0000    7.38906  1.00e-03          1      400        80    0.500    10.0"
        "  2.4e-07 TF/s   1.00 GB",
        "valid at step 10: loss 2.5000; perplexity 12.18 (ptwiki 7.39, oscar 20.09)",
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
        log.train(step, {**read_meter(new_meter()), "loss": 1.0 * step})
        log.valid(step, 2.0, {})
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
    assert console.getvalue() == ("resume at step 20: lines_of_later_steps_removed 2, torn_lines_removed 0\n")
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"], "nothing temporary is left"


@pytest.mark.parametrize(
    ("tail", "torn", "kept"),
    [
        (b'{"kind":"train","step":5,"lo', 1, 1),
        (b'{"kind":"train","step":5,"loss":1.0}', 0, 2),  # whole but for its newline
        (b'{"kind":"train","step":5,"loss":"\xc3', 1, 1),  # cut within a letter
        (b"[1]\n", 1, 1),
    ],
)
def test_a_torn_last_line_is_mended_at_the_next_start(tmp_path: Path, tail: bytes, torn: int, kept: int) -> None:
    open_log(tmp_path, 0, 100, QUIET, io.StringIO()).close()
    with (tmp_path / "metrics.jsonl").open("ab") as file:
        file.write(tail)
    open_log(tmp_path, 10, 100, QUIET, io.StringIO()).close()
    assert len(lines(tmp_path)) == kept + 1
    assert lines(tmp_path)[-1]["torn_lines_removed"] == torn


def test_every_line_is_in_the_file_at_once(tmp_path: Path) -> None:
    log = open_log(tmp_path, 0, 100, QUIET, io.StringIO())
    for step in range(1, 4):
        log.event(step, "something")
        assert len(lines(tmp_path)) == step + 1, "written without close or flush"
    log.close()


def test_tensorboard_has_the_same_values_and_no_steps_that_are_done_again(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    log = open_log(tmp_path, 0, 100, LogConfig(), io.StringIO())
    for step in (10, 20):
        meter = new_meter()
        add_step(meter, [20.0, 60.0], [1, 3])
        log.train(step, read_meter(meter))
        log.valid(step, math.nan, {"ptwiki": 2.0})
    log.close()
    log = open_log(tmp_path, 10, 100, LogConfig(), io.StringIO())
    log.valid(30, 1.0, {"ptwiki": 1.5})
    log.close()
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [(event.step, event.value) for event in events.Scalars("train/loss")] == [(10, 2.0)]
    assert [(event.step, event.value) for event in events.Scalars("valid/sources/ptwiki")] == [
        (10, 2.0),
        (30, 1.5),
    ]
    assert events.Scalars("train/sources/oscar/share")[0].value == 0.75
    assert [event.step for event in events.Scalars("valid/loss")] == [30], "a NaN has no place in a curve"


def test_a_bar_is_shown_on_a_terminal_only(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    for console in (io.StringIO(), Terminal()):
        log = open_log(tmp_path, 5, 100, QUIET, console)
        log.progress(50)
        log.event(50, "something")
        log.close()
        assert ("50/100" in capsys.readouterr().err) is console.isatty()
        assert "something at step 50\n" in console.getvalue()


@pytest.mark.parametrize(
    ("card", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA H200", 989e12),
        ("NVIDIA A100-SXM4-40GB", 312e12),
        ("NVIDIA A100-PCIE-40GB", 312e12),
        ("NVIDIA A100 80GB PCIe", 312e12),
        ("NVIDIA L40S", 362e12),
        ("NVIDIA A10", 125e12),
        ("Tesla V100-SXM2-32GB", 125e12),
        ("Tesla T4", 65e12),
        ("NVIDIA GeForce RTX 4090", 165.2e12),
        ("NVIDIA GeForce RTX 3090", 71e12),
        # Near names of other cards, and slices of known ones.
        ("NVIDIA A10G", None),
        ("NVIDIA A100-SXM4-40GB MIG 1g.5gb", None),
        ("NVIDIA H100 80GB HBM3 MIG 3g.40gb", None),
        ("NVIDIA L40", None),
        ("NVIDIA GeForce RTX 3090 Ti", None),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None),
        ("Some GPU", None),
    ],
)
def test_a_card_has_its_own_peak_or_none(card: str, peak: float | None) -> None:
    assert peak_flops(card, "bf16") == peak_flops(card, "fp16") == peak
    if peak:
        assert peak_flops(card, "fp32") < peak


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
    assert peak_memory("cpu") > 2**20


def test_the_log_needs_no_torch() -> None:
    code = "import sys, gloria.train.metrics; print('torch' in sys.modules, 'tensorboard' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout == "False False\n"
