"""The log of a run: `metrics.jsonl` (the format of record), the console, TensorBoard. Only rank 0 has one.

A line of `metrics.jsonl` is a JSON object with kind, step and time (seconds since 1970), and by kind, of pre-training:

    train   loss perplexity bits_per_byte lr grad_norm tokens tokens_per_s step_s data_s skipped memory tflops [mfu ...]
            sources: NAME -> {asked, share, loss, bits_per_byte, epoch}
    valid   loss perplexity bits_per_byte, of all sources by `weights`: NAME -> share
            sources: NAME -> loss; source_bits_per_byte: NAME -> bits
            texts (of valid.paths): NAME -> {loss, perplexity, bits_per_byte, documents, tokens, bytes}
    event   event: start, resume, changed, checkpoint, skipped, done, ...; start and resume of a branch have
            ancestors: [{run, step}, ...], the nearest first

`samples.jsonl` has a line for each prompt that is continued: kind ("sample"), step, prompt, text, time.
`bits_per_byte` is null where bytes were not counted; see the function of that name. Imports torch for TensorBoard
alone, and only where that is on.
"""

from __future__ import annotations

import math
import os
import re
import sys
import textwrap
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, TextIO

from gloria.config.cli import option
from gloria.errors import UserError, write_line
from gloria.files import json_line, open_plain, parse_json_object, whole_file
from gloria.train.tracker import TRACKERS, Tracker, open_tracker, tracker_problem

METRICS, SAMPLES = "metrics.jsonl", "samples.jsonl"


@dataclass(frozen=True)
class LogConfig:
    """What a run reports, and how often."""

    every: int = option(10, "steps between two lines of the log", minimum=1)
    tensorboard: bool = option(True, "also write TensorBoard events, under DIR/tensorboard")
    tracker: str = option(
        "none",
        "also give the values to an experiment tracker, offline, under DIR (WANDB_MODE decides)",
        choices=TRACKERS,
    )
    samples_every: int = option(
        0, "steps between two samples of text, in DIR/samples.jsonl; 0: none. Pre-training only", minimum=0
    )
    prompts: tuple[str, ...] = option(
        ("",), "what the samples continue; an empty one begins a document. Few: all ranks compute all of them"
    )
    sample_tokens: int = option(48, "tokens of a sample; each takes one forward pass of all ranks", minimum=1)
    sample_temperature: float = option(
        0.8, "0 takes the likeliest token, more gives more variety; the same seed at each sample", minimum=0
    )


def log_problems(log: LogConfig) -> Iterator[tuple[tuple[str, ...], str]]:
    """A problem where the tracker is not installed, or there is nothing to continue."""
    if problem := tracker_problem(log.tracker):
        yield ("log.tracker",), problem
    if log.samples_every and not log.prompts:
        yield ("log.prompts", "log.samples_every"), 'there is none to continue; give one, such as [""]'


def perplexity(loss: float) -> float:
    """exp(loss), infinite where that does not fit."""
    return math.exp(loss) if not loss > 700 else math.inf


def bits_per_byte(loss: float | None, bytes_per_token: float | None) -> float | None:
    """The bits that a model needs for a byte of text, which compares over tokenizers; None where one is not known.

    `loss` is a mean over tokens in nats: loss / ln 2 / bytes_per_token. Of a corpus, tokens and bytes are those of
    the manifest, by source and split: every token counts, also the EOS of each document (the model has to predict
    where a text ends), and the bytes are of the documents' cleaned text in UTF-8, to which EOS adds none. The loss is
    of windows and the ratio of the whole split. A text of `valid.paths` counts its own: the EOS before a document is
    given, the one behind it is neither predicted nor counted, as in `gloria.evaluate --task perplexity`. Of a
    mixture, `bytes_per_token` is the mean over its shares of tokens.
    """
    return None if loss is None or not bytes_per_token else loss / math.log(2) / bytes_per_token


def weighted_mean(values: Mapping[str, float], weights: Mapping[str, float]) -> float | None:
    """The mean of `values` by `weights`; None where one with a weight is missing, or no weight is above 0."""
    used = {name: weight for name, weight in weights.items() if weight > 0}
    if not used or not used.keys() <= values.keys():
        return None
    return sum(weight * values[name] for name, weight in used.items()) / sum(used.values())


def short_number(number: float) -> str:
    """A number in four places at most: 999, 12.3k, 4.56M, 35.5B."""
    for size, letter in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(number) >= 0.9995 * size:
            return f"{number / size:.3g}{letter}"
    return f"{number:.3g}"


# Of the console's table: key, title, width and format; a key that a line does not have has no column. With a step of
# seven digits in front it fits a terminal of 80 columns.
_COLUMNS: tuple[tuple[str, str, int, Callable[[float], str]], ...] = (
    ("epoch", "epoch", 6, "{:.2f}".format),
    ("loss", "loss", 7, "{:.4f}".format),
    ("lr", "lr", 8, "{:.2e}".format),
    ("grad_norm", "grad", 7, "{:.4g}".format),
    ("tokens", "tokens", 6, short_number),
    ("rows_per_s", "rows/s", 6, short_number),
    ("tokens_per_s", "tok/s", 6, short_number),
    ("step_s", "s/step", 6, "{:.3f}".format),
    ("data_share", "data %", 6, "{:.1f}".format),
    ("mfu", "MFU %", 6, lambda share: f"{100 * share:.1f}"),
    ("tflops", "TFLOP/s", 7, "{:.3g}".format),
    ("memory", "GB", 6, lambda count: f"{count / 2**30:.2f}"),
)
# TensorBoard has a card for each of these, and for whatever metrics an objective sums, so that the curves are found.
_NO_CARD = {
    "tokens",
    "perplexity",
    "step_s",
    "data_s",
    "rows_per_s",
    "tflops",
    "asked",
    "epoch",
    "overflows",
    "weights",
}


@dataclass
class RunLog:
    """The open log of a run: each method writes one line everywhere. Made by `open_log`, ended by `close`."""

    file: BinaryIO
    console: TextIO
    board: Any = None  # TensorBoard's SummaryWriter
    bar: Any = None  # tqdm, on a terminal
    tracker: Tracker | None = None
    samples: Path | None = None  # the file of `sample`
    lines: int = 0

    def train(self, step: int, values: Mapping[str, Any]) -> None:
        """The values of the steps up to `step`: a row of the console's table, and all of them in the file."""
        shown = dict(values)
        if values["step_s"]:
            shown["data_share"] = 100 * values["data_s"] / values["step_s"]
        if "mfu" in values:
            del shown["tflops"]
        columns = [column for column in _COLUMNS if column[0] in shown]
        if self.lines % 20 == 0:
            self._print(" ".join([f"{'step':>7}", *(f"{title:>{width}}" for _, title, width, _ in columns)]))
        self.lines += 1
        cells = (f"{form(shown[key]):>{width}}" for key, _, width, form in columns)
        self._print(" ".join([f"{step:>7}", *cells]))
        self._write("train", step, values)

    def valid(self, step: int, values: Mapping[str, Any]) -> None:
        """What a validation after `step` steps found: the `values` of the record that the head of this file lists."""
        sources, texts, bits = values["sources"], values.get("texts", {}), values.get("source_bits_per_byte", {})
        shown = {name: (perplexity(loss), bits.get(name)) for name, loss in sources.items()}
        shown |= {name: (text["perplexity"], text["bits_per_byte"]) for name, text in texts.items()}
        whole = f"; bits per byte {values['bits_per_byte']:.3f}" if values.get("bits_per_byte") else ""
        self._print(f"valid at step {step}: loss {values['loss']:.4f}; perplexity {values['perplexity']:.2f}{whole}")
        parts = (f"{name} {ppl:.2f}" + (f" ({rate:.3f})" if rate else "") for name, (ppl, rate) in shown.items())
        # A name and its numbers stay on one line.
        line = ", ".join(part.replace(" ", "\xa0") for part in parts)
        lines = textwrap.fill(line, 79, initial_indent=" " * 8, subsequent_indent=" " * 8, break_long_words=False)
        self._print(lines.replace("\xa0", " "))
        self._write("valid", step, values)

    def event(self, step: int, event: str, shown: str | None = None, **fields: Any) -> None:
        """Something that happened after `step` steps; the console has `shown`, by default all that is known of it."""
        if shown is None:
            known = ", ".join(f"{key} {value}" for key, value in fields.items())
            shown = f"{event} at step {step}{': ' if known else ''}{known}"
        self._print(shown)
        self._write("event", step, {"event": event, **fields})

    def sample(self, step: int, number: int, prompt: str, text: str) -> None:
        """What the model writes behind prompt `number` after `step` steps: on the console its beginning."""
        shown = " ".join(f"{prompt}|{text}".split())
        self._print(textwrap.shorten(f"sample at step {step}: {shown}", 160, placeholder=" ..."))
        assert self.samples
        line = {"kind": "sample", "step": step, "prompt": prompt, "text": text, "time": round(time.time(), 3)}
        with open(open_plain(self.samples, os.O_WRONLY | os.O_APPEND | os.O_CREAT), "ab", buffering=0) as file:
            file.write(json_line(line))
        if self.board is not None:
            # Two spaces and a line end are a line end in Markdown.
            self.board.add_text(f"samples/{number}", f"**{prompt}**{text}".replace("\n", "  \n"), step)

    def card(self, group: str, step: int, values: Mapping[str, Any]) -> None:
        """The numbers among `values` for TensorBoard and the tracker, under `group`."""
        if self.board is not None:
            for name, value in _scalars(values, _NO_CARD):
                self.board.add_scalar(f"{group}/{name}", value, step)
        if self.tracker is not None:
            self.tracker.log({f"{group}/{name}": value for name, value in _scalars(values)}, step)

    def group_sources(self, names: Sequence[str]) -> None:
        """One chart of all sources for each of their values, in TensorBoard's custom scalars."""
        if self.board is None:
            return
        charts = {"validation loss": "valid/sources/{}", "training loss": "train/sources/{}/loss"}
        charts["share"] = "train/sources/{}/share"
        layout = {
            title: ["Multiline", [f"^{re.escape(tag.format(n))}$" for n in names]] for title, tag in charts.items()
        }
        whole = {"loss": ["Multiline", ["^train/loss$", "^valid/loss$"]]}
        self.board.add_custom_scalars({"sources": layout, "all": whole})

    def progress(self, step: int) -> None:
        """Move the progress bar, where there is one, to `step`."""
        if self.bar is not None:
            self.bar.update(step - self.bar.n)

    def sync(self) -> None:
        """Make all lines so far survive a power loss. Called before a checkpoint, from which the run goes on."""
        os.fsync(self.file.fileno())
        if self.board is not None:
            self.board.flush()

    def close(self) -> None:
        """Flush and close everything."""
        self.file.close()
        if self.board is not None:
            self.board.close()
        if self.bar is not None:
            self.bar.close()
        if self.tracker is not None:
            self.tracker.close()

    def _print(self, line: str) -> None:
        # tqdm.write would not clear the bar here: it looks for one on sys.stderr, where the rank's log is.
        if self.bar is not None:
            self.bar.clear()
        write_line(line, self.console)
        if self.bar is not None:
            self.bar.refresh()

    def _write(self, kind: str, step: int, values: Mapping[str, Any]) -> None:
        # Unbuffered: one write a line, so that a killed run leaves whole lines and at most one torn one.
        self.file.write(json_line({"kind": kind, "step": step, **values, "time": round(time.time(), 3)}))
        if kind != "event":
            self.card(kind, step, values)


def open_log(
    folder: Path,
    step: int,
    total_steps: int,
    config: LogConfig,
    console: TextIO | None = None,
    evaluated_step: int | None = None,
    **fields: Any,
) -> RunLog:
    """Open `folder`/metrics.jsonl for a run that has done `step` steps, and write a start or resume event.

    What an earlier launch wrote about later steps (its train lines, and valid lines after `evaluated_step`, by default
    `step`; events stay, for they happened) and a last line torn by a kill are taken out by an atomic rewrite, and the
    event says how many lines that were. `fields` are added to the event.
    """
    console = console or sys.stdout
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / METRICS
    existed = os.path.lexists(path)
    shown = f"{'resumed from' if existed else 'started at'} step {step}"
    if existed:
        later, torn = _take_out_later_lines(path, step, step if evaluated_step is None else evaluated_step)
        fields = {"lines_of_later_steps_removed": later, "torn_lines_removed": torn, **fields}
        if later:
            shown += f"; {later} lines of later steps are taken out of {path.name}"
        if torn:
            shown += f"; {torn} damaged lines are taken out of {path.name}"
    descriptor = open_plain(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    log = RunLog(file=os.fdopen(descriptor, "ab", buffering=0), console=console, samples=folder / SAMPLES)
    if os.path.lexists(folder / SAMPLES):
        _take_out_later_lines(folder / SAMPLES, step, step)
    log.tracker = open_tracker(config.tracker, folder, fields.get("recipe", {}))
    if config.tensorboard:
        log.board = _open_tensorboard(folder / "tensorboard", step if existed else None)
    if console.isatty():
        from tqdm import tqdm

        # On the terminal itself: a rank's log has the lines and not the bar.
        log.bar = tqdm(total=total_steps, initial=step, unit="step", dynamic_ncols=True, file=sys.__stderr__)
    log.event(step, "resume" if existed else "start", shown, **fields)
    return log


def _take_out_later_lines(path: Path, step: int, evaluated_step: int) -> tuple[int, int]:
    """Remove train lines after `step`, valid lines after `evaluated_step`, and what is no JSON: (later, torn) lines."""

    def verdict(line: bytes) -> str:
        try:
            values = parse_json_object(line, path)
            kind, line_step = values["kind"], int(values["step"])
        except (UserError, ValueError, TypeError, KeyError):
            return "torn"
        later = kind != "event" and line_step > (evaluated_step if kind == "valid" else step)
        return "later" if later else "kept"

    with open(open_plain(path), "rb") as old:
        verdicts, last = [], b"\n"
        for last in old:
            verdicts.append(verdict(last))
        later, torn = verdicts.count("later"), verdicts.count("torn")
        if later == torn == 0 and last.endswith(b"\n"):
            return 0, 0
        old.seek(0)
        with whole_file(path) as new:
            for line, found in zip(old, verdicts):
                if found == "kept":
                    new.write(line if line.endswith(b"\n") else line + b"\n")
    return later, torn


def _open_tensorboard(folder: Path, resumed: int | None) -> Any:
    """A writer whose first event hides what an earlier launch wrote beyond the step that is `resumed`."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise UserError(
            f"log.tensorboard: can't be loaded ({error}); pip install tensorboard or set it to false"
        ) from None
    return SummaryWriter(str(folder), purge_step=resumed + 1 if resumed else resumed)


def _scalars(
    values: Mapping[str, Any], left_out: Collection[str] = (), prefix: str = ""
) -> Iterator[tuple[str, float]]:
    for key, value in values.items():
        if key in left_out:
            continue
        if isinstance(value, Mapping):
            yield from _scalars(value, left_out, f"{prefix}{key}/")
        elif isinstance(value, int | float) and math.isfinite(value):
            yield f"{prefix}{key}", value
