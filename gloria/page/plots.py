"""Which plots a report has: what each shows, in plain values that the page and matplotlib draw alike."""

from __future__ import annotations

import tomllib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from importlib.resources import files
from typing import Any, Literal

from gloria.page.read import Record
from gloria.page.thin import Key, Table

# How the y axis is chosen: all values; from 0; the same without what lies far above; logarithmic.
Range = Literal["all", "zero", "clip", "zero-clip", "log"]
SOLID, DASHED, DOTTED = 0, 1, 2


@dataclass
class Curve:
    """One line of a plot."""

    label: str
    x: list[int]
    y: list[float | None]
    run: int
    color: int
    dash: int = SOLID
    mean: list[float | None] = field(default_factory=list)  # of each row's bucket, where the log was thinned
    smooth: bool = False  # a moving mean is drawn over it
    points: bool = False
    low: list[float | None] = field(default_factory=list)  # ends of an interval
    high: list[float | None] = field(default_factory=list)


@dataclass
class Plot:
    """One plot."""

    id: str
    section: str
    title: str
    unit: str
    range: Range
    curves: list[Curve]
    note: str = ""
    anchors: list[dict[str, Any]] = field(default_factory=list)  # published values under the same protocol


def sources_of(record: Record) -> list[str]:
    """The run's sources, the greatest asked share first."""
    found = list(
        dict.fromkeys(s for table in (record.train, record.valid) for key, s in table.columns if s and key == "loss")
    )
    asked = {name: value.get("asked") or 0.0 for name, value in (record.last.get("sources") or {}).items()}
    return sorted(found, key=lambda name: -asked.get(name, 0.0))


def make_plots(records: Sequence[Record]) -> list[Plot]:
    """Every plot that has a value."""
    return [plot for plot in (*_of_log(records), *_of_scores(records), *_of_dev(records)) if plot.curves]


def _curve(table: Table, key: Key, label: str, scale: float = 1.0, **style: Any) -> list[Curve]:
    """The column as a curve, or nothing where the table has no such column."""
    column = table.columns.get(key)
    if column is None:
        return []
    if scale != 1.0:
        column = [value if value is None else value * scale for value in column]
    mean = [v if v is None else v * scale for v in table.means.get(key, [])]
    return [Curve(label, table.steps, column, mean=mean, **style)]


def _of_log(records: Sequence[Record]) -> Iterator[Plot]:
    many = len(records) > 1

    def both(key: str) -> list[Curve]:
        curves = []
        for run, record in enumerate(records):
            prefix = f"{record.name} " if many else ""
            colors = (run, run) if many else (0, 1)
            curves += _curve(record.train, (key, ""), f"{prefix}train", run=run, color=colors[0], smooth=True)
            style = {"run": run, "color": colors[1], "dash": DASHED if many else SOLID, "points": True}
            curves += _curve(record.valid, (key, ""), f"{prefix}validation", **style)
        return curves

    def one(key: str, scale: float = 1.0, smooth: bool = False) -> list[Curve]:
        style: dict[str, Any] = {"scale": scale, "smooth": smooth}
        labels = [record.name if many else key.replace("_", " ") for record in records]
        return [
            curve
            for run, (record, label) in enumerate(zip(records, labels))
            for curve in _curve(record.train, (key, ""), label, run=run, color=run, **style)
        ]

    names = list(dict.fromkeys(name for record in records for name in sources_of(record)))
    texts = dict.fromkeys(s for record in records for key, s in record.valid.columns if key == "text_loss")

    def by_source(which: str, key: str, dash: int = SOLID, suffix: str = "", **style: Any) -> list[Curve]:
        return [
            curve
            for run, record in enumerate(records)
            for color, name in enumerate(texts if key.startswith("text_") else names)
            for curve in _curve(
                getattr(record, which),
                (key, name),
                f"{record.name + ' ' if many else ''}{name}{suffix}",
                run=run,
                color=color,
                dash=run % 3 if many and not dash else dash,
                **style,
            )
        ]

    yield Plot("loss", "Loss", "Loss", "nats a token", "clip", both("loss"))
    yield Plot("perplexity", "Loss", "Perplexity", "exp(loss)", "log", both("perplexity"))
    yield Plot("bits-per-byte", "Loss", "Bits per byte", "bits per byte of text", "clip", both("bits_per_byte"))
    train = by_source("train", "loss", smooth=True)
    yield Plot("train-loss-by-source", "Loss", "Training loss by source", "nats a token", "clip", train)
    valid = by_source("valid", "loss", points=True)
    yield Plot("valid-loss-by-source", "Loss", "Validation loss by source", "nats a token", "clip", valid)
    bits = by_source("valid", "bits_per_byte", points=True)
    yield Plot("bits-per-byte-by-source", "Loss", "Validation by source", "bits per byte of text", "clip", bits)

    held = by_source("valid", "text_loss", points=True)
    yield Plot("text-loss", "Loss", "Loss on texts that are no source", "nats a token", "clip", held)
    held = by_source("valid", "text_bits_per_byte", points=True)
    yield Plot("text-bits", "Loss", "Bits per byte of texts that are no source", "bits per byte", "clip", held)

    yield Plot("lr", "Optimisation", "Learning rate", "", "zero", one("lr"))
    norm = one("grad_norm", smooth=True)
    yield Plot("grad-norm", "Optimisation", "Gradient norm", "before clipping", "zero-clip", norm)
    yield Plot("z-loss", "Optimisation", "z-loss", "added to the loss", "zero-clip", one("z_loss"))
    yield Plot("loss-scale", "Optimisation", "Loss scale of fp16", "", "log", one("loss_scale"))

    shares = [
        *by_source("train", "share", scale=100.0),
        *by_source("train", "asked", DASHED, " (asked)", scale=100.0),
    ]
    note = "Solid: achieved since the present weights hold. Dashed: asked."
    yield Plot("shares", "Mixture", "Shares of training tokens", "%", "zero", shares, note)
    yield Plot("epochs", "Mixture", "Epochs by source", "passes over the source", "zero", by_source("train", "epoch"))

    yield Plot("tokens-per-s", "Speed", "Speed", "tokens a second, all ranks", "zero-clip", one("tokens_per_s"))
    yield Plot("mfu", "Speed", "Model FLOPs utilisation (MFU)", "% of the card's dense peak", "zero", one("mfu", 100.0))
    yield Plot("tflops", "Speed", "Model FLOP/s of a rank", "TFLOP/s", "zero-clip", one("tflops"))
    yield Plot("memory", "Speed", "Peak memory of rank 0", "GiB", "zero", one("memory", 2.0**-30))
    wait = one("data_share")
    yield Plot("data-wait", "Speed", "Waiting for data", "% of a step", "zero-clip", wait)


def _of_scores(records: Sequence[Record]) -> Iterator[Plot]:
    anchors, many = tomllib.loads(files("gloria.page").joinpath("anchors.toml").read_text()), len(records) > 1
    for task, metric in dict.fromkeys(key for record in records for key in record.scores):
        curves, found = [], []
        for run, record in enumerate(records):
            for number, (split, points) in enumerate(record.scores.get((task, metric), {}).items()):
                steps, values = [step for step, _ in points], [value for _, value in points]
                label = f"{record.name + ' ' if many else ''}{split}"
                y, low, high = ([value.get(key) for value in values] for key in ("value", "low", "high"))
                color, dash = (run, number % 3) if many else (number, SOLID)
                curves.append(Curve(label, steps, y, run, color, dash, points=True, low=low, high=high))
            found += [anchor for anchor in matching(anchors["anchor"], record, task, metric) if anchor not in found]
        note = "Bars: 95 % intervals." if any(value is not None for curve in curves for value in curve.low) else ""
        slug = "".join(c if c.isalnum() else "-" for c in f"score-{task}-{metric}".lower())
        yield Plot(slug, "Scores", f"{task}: {metric}", "", "all", curves, note, found)


def matching(anchors: list[dict[str, Any]], record: Record, task: str, metric: str) -> list[dict[str, Any]]:
    """The published values under the very protocol of the run's own scores: task, metric, rule, examples and shots."""
    own = record.rules.get(task, {})
    settings = own.get("settings") or {}
    return [
        anchor
        for anchor in anchors
        if anchor["task"] == task
        and anchor["metric"] == metric
        and anchor["examples"] == own.get("n")
        and anchor["shots"] == int(settings.get("shots") or 0)
    ]


def _of_dev(records: Sequence[Record]) -> Iterator[Plot]:
    for key in dict.fromkeys(key for record in records for key in record.dev.columns):
        curves = [
            curve
            for run, record in enumerate(records)
            for curve in _curve(record.dev, key, record.name, run=run, color=run, points=True)
        ]
        yield Plot(f"dev-{key[0]}", "Scores while fine-tuning", f"dev: {key[0]}", "", "all", curves)
