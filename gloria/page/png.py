"""Each plot of a report as a picture, by matplotlib (the extra `report`)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.figure import Figure

from gloria.page.plots import Curve, Plot
from gloria.page.read import Record

SMOOTHING = 0.3  # as the page begins
_COLORS = ("#1f6fb4", "#d9570d", "#2b8a3e", "#b3226b", "#6d4bc3", "#0f8b8d", "#a3730a", "#c9302c", "#5c6b7a", "#7a9a01")
_DASHES = ("-", "--", ":")


def draw(records: Sequence[Record], plots: Sequence[Plot], folder: Path) -> int:
    """Write `folder`/PLOT.png for each plot; how many."""
    matplotlib.rcParams["text.usetex"] = False
    for plot in plots:
        figure = Figure(figsize=(7, 4), layout="constrained")
        axes = figure.add_subplot()
        for curve in plot.curves:
            _draw_curve(axes, curve)
        for anchor in plot.anchors:
            axes.axhline(anchor["value"] / 100, color="grey", linestyle="--", linewidth=1)
            axes.text(0.01, anchor["value"] / 100, anchor["model"], transform=axes.get_yaxis_transform(), fontsize=8)
        for record in records:
            for event in record.events:
                if event.step and event.kind not in ("checkpoint", "done", "profile"):
                    axes.axvline(event.step, color="grey", linewidth=0.6, linestyle=":")
        if plot.range == "log":
            axes.set_yscale("log")
        elif plot.range.startswith("zero"):
            axes.set_ylim(bottom=0)
        # A name may hold a dollar sign, which is no mathematics.
        axes.set_title(plot.title.replace("$", r"\$"))
        axes.set_xlabel("step")
        axes.set_ylabel(plot.unit)
        axes.grid(alpha=0.25)
        axes.legend(fontsize=8)
        figure.savefig(folder / f"{plot.id}.png", dpi=150)
    return len(plots)


def _draw_curve(axes: Any, curve: Curve) -> None:
    points = [(x, y, n) for n, (x, y) in enumerate(zip(curve.x, curve.y)) if y is not None]
    x, y = [point[0] for point in points], [point[1] for point in points]
    color, label = _COLORS[curve.color % len(_COLORS)], curve.label.replace("$", r"\$")
    style = {"color": color, "linestyle": _DASHES[curve.dash], "marker": "." if curve.points else ""}
    if curve.smooth:
        axes.plot(x, y, color=color, alpha=0.25, linewidth=0.8)
        y = smoothed([curve.mean[n] if curve.mean else value for _, value, n in points])
    axes.plot(x, y, label=label, **style)
    if curve.low:
        ends = [(at, curve.low[n], curve.high[n]) for at, _, n in points if curve.low[n] is not None]
        axes.vlines([e[0] for e in ends], [e[1] for e in ends], [e[2] for e in ends], color=color, alpha=0.6)


def smoothed(values: Sequence[float | None]) -> list[float]:
    """The page's moving mean: with exponential weights, without the bias of its start."""
    weight = 1 - 1 / (1 + 0.2 * SMOOTHING**2 * len(values))
    found, total, norm = [], 0.0, 0.0
    for value in values:
        assert value is not None
        total = weight * total + (1 - weight) * value
        norm = weight * norm + 1 - weight
        found.append(total / norm)
    return found
