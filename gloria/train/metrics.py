"""What a run tells: `metrics.jsonl` (the format of record), the console, TensorBoard. Only rank 0 has a log.

Imports torch only for TensorBoard and for the memory of a GPU, and only when asked for those.
"""

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, TextIO

import numpy as np

from gloria.config.cli import option
from gloria.dist.gpus import card_of_cuda_name
from gloria.errors import UserError
from gloria.files import json_line


@dataclass(frozen=True)
class LogConfig:
    """What the run tells of itself."""

    every: int = option(10, "steps between two lines of the log", minimum=1)
    tensorboard: bool = option(True, "also write TensorBoard events, under DIR/tensorboard")


def peak_flops(card: str, precision: str) -> float | None:
    """The dense peak, in FLOP/s, of a card by CUDA's name for it; None for an unknown card."""
    known = card_of_cuda_name(card)
    return known.peak(precision) if known else None


def peak_memory(device_type: str) -> int:
    """Bytes this process has held at most: allocated on its GPU, or resident on CPU."""
    if device_type == "cuda":
        import torch

        return torch.cuda.max_memory_allocated()
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def perplexity(loss: float) -> float:
    """exp(loss), infinite where that does not fit."""
    return math.exp(loss) if not loss > 700 else math.inf


@dataclass
class Meter:
    """Sums over the steps since the last line of the log, equal on all ranks."""

    names: tuple[str, ...]
    sequence_length: int
    flops_per_token: int  # forward and backward
    ranks: int
    card_peak: float | None  # FLOP/s of one rank's card

    def __post_init__(self) -> None:
        self._start_anew()

    def _start_anew(self) -> None:
        self.steps = 0
        self.skipped = 0
        self.overflows = 0  # of the loss scale, which are no skips
        self.source_loss = np.zeros(len(self.names))  # sum of token losses
        self.source_rows = np.zeros(len(self.names), dtype=np.int64)  # windows
        self.grad_norm = math.nan  # of the last step that was applied
        self.timed_steps = 0  # those of this launch, which the clock has seen
        self.timed_rows = 0
        self.seconds = 0.0
        self.data_seconds = 0.0

    def add(
        self,
        source_loss: np.ndarray,
        source_rows: np.ndarray,
        grad_norm: float,
        applied: bool,
        seconds: float,
        data_seconds: float,
        overflow: bool = False,
    ) -> None:
        """Count a step; one whose update was left out counts in time and not in the loss."""
        self.steps += 1
        self.timed_steps += 1
        self.timed_rows += int(source_rows.sum())
        self.seconds += seconds
        self.data_seconds += data_seconds
        if applied:
            self.source_loss += source_loss
            self.source_rows += source_rows
            self.grad_norm = grad_norm
        elif overflow:
            self.overflows += 1
        else:
            self.skipped += 1

    def read(
        self,
        *,
        lr: float,
        tokens: int,
        asked: Mapping[str, float],
        taken: Mapping[str, int],
        epochs: Mapping[str, float],
        memory: int,
        loss_scale: float = 0.0,
    ) -> dict[str, Any]:
        """The values of a train line; then the meter starts anew.

        `tokens` and `epochs` are of the run so far; `taken` counts windows by source since the present
        weights hold, and the achieved share is measured on it; `memory` is in bytes. Losses and times are
        means over the steps, speed is of all ranks together, `tflops` of one. With a `loss_scale`, that of the last
        step, it and the steps that overflowed it are among the values.
        """
        rows = int(self.source_rows.sum())
        loss = float(self.source_loss.sum()) / (rows * self.sequence_length) if rows else math.nan
        speed = self.timed_rows * self.sequence_length / self.seconds if self.seconds else math.nan
        flops = speed * self.flops_per_token / self.ranks
        all_taken = max(sum(taken.values()), 1)
        sources = {
            name: {
                "asked": asked.get(name, 0.0),
                "share": taken.get(name, 0) / all_taken,
                "loss": float(total) / (int(count) * self.sequence_length) if count else None,
                "epoch": epochs[name],
            }
            for name, total, count in zip(self.names, self.source_loss, self.source_rows)
            if count or asked.get(name)
        }
        values = {
            "loss": loss,
            "perplexity": perplexity(loss),
            "lr": lr,
            "grad_norm": self.grad_norm,
            "tokens": tokens,
            "tokens_per_s": speed,
            "step_s": self.seconds / max(self.timed_steps, 1),
            "data_s": self.data_seconds / max(self.timed_steps, 1),
            "tflops": flops / 1e12,
            **({} if self.card_peak is None else {"mfu": flops / self.card_peak}),
            "memory": memory,
            "skipped": self.skipped,
            **({"overflows": self.overflows, "loss_scale": loss_scale} if loss_scale else {}),
            "sources": sources,
        }
        self._start_anew()
        return values

    def state_dict(self) -> dict[str, Any]:
        """The sums as plain JSON, so that the line after a resume has the losses of an unbroken run."""
        return {
            "steps": self.steps,
            "skipped": self.skipped,
            "overflows": self.overflows,
            "grad_norm": self.grad_norm if math.isfinite(self.grad_norm) else None,
            "loss": dict(zip(self.names, self.source_loss.tolist())),
            "rows": dict(zip(self.names, self.source_rows.tolist())),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take up the sums of `state_dict`; sources are found by name, for there may be others now."""
        self.steps, self.skipped, self.overflows = state["steps"], state["skipped"], state.get("overflows", 0)
        self.grad_norm = math.nan if state["grad_norm"] is None else state["grad_norm"]
        self.source_loss = np.array([state["loss"].get(name, 0.0) for name in self.names])
        self.source_rows = np.array([state["rows"].get(name, 0) for name in self.names], dtype=np.int64)


@dataclass
class RunLog:
    """The open log of a run: each method writes one line everywhere. Made by `open_log`, ended by `close`."""

    file: BinaryIO
    console: TextIO
    board: Any = None  # TensorBoard's SummaryWriter
    bar: Any = None  # tqdm, on a terminal
    lines: int = 0

    def train(self, step: int, values: Mapping[str, Any], table: tuple[Any, Any] | None = None) -> None:
        """A line of `Meter.read`, after `step` steps, or of other values as `table` (columns, cells) prints them."""
        columns, cells = table or (_COLUMNS, _cells)
        if self.lines % 20 == 0:
            self._print("  ".join(f"{title:>{width}}" for title, width in columns))
        self.lines += 1
        self._print("  ".join(f"{cell:>{width}}" for cell, (_, width) in zip(cells(step, values), columns)))
        self._write("train", step, values)

    def valid(self, step: int, loss: float, sources: Mapping[str, float]) -> None:
        """The validation losses after `step` steps, a mean over tokens each: in all and by source."""
        by_source = ", ".join(f"{name} {perplexity(value):.2f}" for name, value in sources.items())
        self._print(f"valid at step {step}: loss {loss:.4f}; perplexity {perplexity(loss):.2f} ({by_source})")
        self._write("valid", step, {"loss": loss, "perplexity": perplexity(loss), "sources": dict(sources)})

    def event(self, step: int, event: str, **fields: Any) -> None:
        """Something that happened after `step` steps, with what there is to know about it."""
        told = ", ".join(f"{key} {value}" for key, value in fields.items())
        self._print(f"{event} at step {step}{': ' if told else ''}{told}")
        self._write("event", step, {"event": event, **fields})

    def progress(self, step: int) -> None:
        """Move the progress bar, where there is one, to `step`."""
        if self.bar is not None:
            self.bar.update(step - self.bar.n)

    def close(self) -> None:
        """Flush and close everything."""
        self.file.close()
        if self.board is not None:
            self.board.close()
        if self.bar is not None:
            self.bar.close()

    def _print(self, line: str) -> None:
        if self.bar is not None:
            self.bar.write(line, file=self.console)
        else:
            print(line, file=self.console, flush=True)

    def _write(self, kind: str, step: int, values: Mapping[str, Any]) -> None:
        # Unbuffered: one write a line, so that a killed run leaves whole lines and at most one torn one.
        self.file.write(json_line({"kind": kind, "step": step, **values}))
        if self.board is not None and kind != "event":
            for name, value in _scalars(values):
                self.board.add_scalar(f"{kind}/{name}", value, step)


def open_log(
    folder: Path,
    step: int,
    total_steps: int,
    config: LogConfig,
    console: TextIO | None = None,
    validated_step: int | None = None,
    **fields: Any,
) -> RunLog:
    """Open `folder`/metrics.jsonl for a run that has done `step` steps, and write a start or resume event.

    What an earlier launch wrote about later steps (its train lines, and valid lines after `validated_step`, by default
    `step`; events stay, for they happened) and a last line torn by a kill are taken out by an atomic rewrite, and the
    event says how many lines that were. `fields` are added to the event.
    """
    console = console or sys.stdout
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "metrics.jsonl"
    existed = path.exists()
    if existed:
        later, torn = _take_out_later_lines(path, step, step if validated_step is None else validated_step)
        fields = {"lines_of_later_steps_removed": later, "torn_lines_removed": torn, **fields}
    log = RunLog(file=path.open("ab", buffering=0), console=console)
    if config.tensorboard:
        log.board = _open_tensorboard(folder / "tensorboard", step)
    if console.isatty():
        from tqdm import tqdm

        log.bar = tqdm(total=total_steps, initial=step, unit="step", dynamic_ncols=True, file=sys.stderr)
    log.event(step, "resume" if existed else "start", **fields)
    return log


def _take_out_later_lines(path: Path, step: int, validated_step: int) -> tuple[int, int]:
    """Remove train lines after `step`, valid lines after `validated_step`, and what is no JSON: (later, torn) lines."""
    later = torn = 0
    whole = True  # the last line kept has its newline
    temporary = path.with_name(f"{path.name}.tmp")
    with path.open("rb") as old, temporary.open("wb") as new:
        for line in old:
            try:
                values = json.loads(line)
                kind, line_step = values["kind"], values["step"]
            except (ValueError, TypeError, KeyError):
                torn += 1
                continue
            if kind != "event" and line_step > (validated_step if kind == "valid" else step):
                later += 1
                continue
            whole = line.endswith(b"\n")
            new.write(line if whole else line + b"\n")
        new.flush()
        os.fsync(new.fileno())
    if later or torn or not whole:
        os.replace(temporary, path)
    else:
        temporary.unlink()
    return later, torn


def _open_tensorboard(folder: Path, step: int) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise UserError(
            f"log.tensorboard: can't be loaded ({error}); pip install tensorboard or set it to false"
        ) from None
    return SummaryWriter(str(folder), purge_step=step + 1 if step else None)


def _scalars(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, float]]:
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from _scalars(value, f"{prefix}{key}/")
        elif value is not None and math.isfinite(value):
            yield f"{prefix}{key}", value


_COLUMNS = (
    ("step", 8),
    ("loss", 8),
    ("ppl", 9),
    ("lr", 8),
    ("grad norm", 9),
    ("tokens", 7),
    ("tokens/s", 8),
    ("step s", 7),
    ("data %", 6),
    ("mfu", 11),
    ("memory", 8),
)


def _cells(step: int, values: Mapping[str, Any]) -> tuple[str, ...]:
    mfu = f"{100 * values['mfu']:.1f} %" if "mfu" in values else f"{values['tflops']:.3g} TF/s"
    return (
        str(step),
        f"{values['loss']:.4f}",
        f"{values['perplexity']:.6g}",
        f"{values['lr']:.2e}",
        f"{values['grad_norm']:.4g}",
        short_number(values["tokens"]),
        short_number(values["tokens_per_s"]),
        f"{values['step_s']:.3f}",
        f"{100 * values['data_s'] / values['step_s']:.1f}" if values["step_s"] else "-",
        mfu,
        f"{values['memory'] / 2**30:.2f} GB",
    )


def short_number(number: float) -> str:
    """A number in four places at most: 999, 12.3k, 4.56M, 35.5B."""
    for size, letter in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(number) >= 0.9995 * size:
            return f"{number / size:.3g}{letter}"
    return f"{number:.3g}"
