"""What a fine-tuning says of its steps: called on every rank, for some of it is counted on all; rank 0 writes."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from gloria.train.finetune_run import Run, Step
from gloria.train.metrics import peak_memory, short_number

COLUMNS = (
    ("step", 8),
    ("epoch", 7),
    ("loss", 8),
    ("lr", 8),
    ("grad norm", 9),
    ("rows/s", 8),
    ("tokens/s", 8),
    ("step s", 7),
    ("data %", 6),
    ("memory", 8),
)


def report_step(run: Run, step: Step) -> None:
    """Count a step; of a skipped one tell which rows it held; every so often tell what the last ones were like."""
    run.since.append(step)
    if run.log:
        run.log.progress(run.step)
        if not step.sums.applied and not step.sums.overflow:
            run.log.event(run.step, "skipped", rows=step.rows[:8], in_a_row=run.skips_in_a_row)
    if run.step % run.config.log.every:
        return
    since, run.since = run.since, []
    if run.log:
        run.log.train(run.step, _values(run, since), (COLUMNS, _cells))


def report_scores(run: Run, values: Mapping[str, float | None], best: bool) -> None:
    """The scores of the set that chooses the model."""
    if not run.log:
        return
    run.log.event(run.step, "dev", **{name: value and round(value, 6) for name, value in values.items()}, best=best)
    for name, value in values.items():
        if run.log.board is not None and value is not None:
            run.log.board.add_scalar(f"dev/{name}", value, run.step)


def _values(run: Run, since: list[Step]) -> dict[str, Any]:
    """The line that sums up steps; times are means over them, speeds of all ranks together."""
    applied = [step for step in since if step.sums.applied]
    rows, seconds = sum(int(step.sums.source_rows.sum()) for step in applied), sum(step.seconds for step in since)
    overflows = sum(bool(step.sums.overflow) for step in since)
    scaled = {"overflows": overflows, "loss_scale": since[-1].sums.loss_scale} if run.loss_scale is not None else {}
    return {
        "loss": sum(float(step.sums.source_loss.sum()) for step in applied) / rows if rows else math.nan,
        "lr": since[-1].lr,
        "grad_norm": applied[-1].sums.grad_norm if applied else math.nan,
        "epoch": run.step / run.batches,
        "tokens": run.tokens,
        "rows_per_s": sum(len(step.rows) for step in since) / seconds,
        "tokens_per_s": sum(step.tokens for step in since) / seconds,
        "step_s": seconds / len(since),
        "data_s": sum(step.data_seconds for step in since) / len(since),
        "memory": peak_memory(run.process.device.type),
        "skipped": len(since) - len(applied) - overflows,
        **scaled,
    }


def _cells(step: int, values: Mapping[str, Any]) -> tuple[str, ...]:
    return (
        str(step),
        f"{values['epoch']:.2f}",
        f"{values['loss']:.4f}",
        f"{values['lr']:.2e}",
        f"{values['grad_norm']:.4g}",
        short_number(values["rows_per_s"]),
        short_number(values["tokens_per_s"]),
        f"{values['step_s']:.3f}",
        f"{100 * values['data_s'] / values['step_s']:.1f}",
        f"{values['memory'] / 2**30:.2f} GB",
    )
