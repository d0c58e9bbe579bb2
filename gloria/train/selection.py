"""Scores of a fine-tuning: on the set that chooses the model while it trains, on those that are reported at its end."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch.distributed as dist
from torch import Tensor

from gloria.config.cli import to_mapping
from gloria.dist.agreement import on_all_ranks
from gloria.dist.process import on_any_rank, rank0_decides
from gloria.dist.signals import stop_reason
from gloria.tasks.metrics import score
from gloria.tasks.models.export import export_head
from gloria.tasks.models.finetuned import MODEL, load_finetuned, predict, save_finetuned, whole_state
from gloria.tasks.report import RESULTS, score_record, write_results
from gloria.tasks.submissions import save_predictions
from gloria.train.run import Run


class StopRequested(Exception):
    """A stop was requested on some rank: raised on all of them, between two batches."""


def choose(run: Run) -> bool:
    """Score the set that chooses the model, and keep the model where it is the best so far.

    False, and nothing is chosen, where a stop is requested meanwhile.
    """
    objective, task = run.objective, run.objective.plan.task
    selection, finetuned = objective.plan.selection, objective.finetuned
    run.watch.beat(run.step, "validation", slow=True)
    try:
        found, _ = predict(finetuned, selection, run.config.eval.batch, run.process, _go_on(run, "validation"))
    except StopRequested:
        return False
    scores = score(task, selection, found, resamples=0)
    values = {name: value.value for name, value in scores.items()}
    now, before = values[task.selection], objective.best.get("scores", {}).get(task.selection)
    better = not objective.best or (now is not None and (before is None or now > before))
    if run.log:
        shown: dict[str, Any] = {name: value and round(value, 6) for name, value in values.items()}
        run.log.event(run.step, "dev", **shown, best=better)
        run.log.card("dev", run.step, values)
    if better:
        objective.best = {"step": run.step, "scores": values}
        state = whole_state(finetuned.model, keep=run.process.is_main)
        rank0_decides(run.process, lambda: _keep_best(run, state))
    run.evaluated_step = run.step
    return True


def _go_on(run: Run, phase: str) -> Callable[[], None]:
    """What to do before each batch: a large set takes longer than a rank may be silent, and than a stop can wait."""

    def before_batch() -> None:
        if on_any_rank(bool(stop_reason())):
            raise StopRequested
        run.watch.beat(run.step, phase, slow=True)

    return before_batch


def _keep_best(run: Run, state: dict[str, Tensor]) -> int:
    extra = {"model": run.objective.finetuned.source, "seed": run.seed, **run.objective.best}
    save_finetuned(run.objective.finetuned, state, run.folder / MODEL, extra)
    return 0


def score_best(run: Run) -> bool:
    """Load the best model as anybody would, score each set that is reported once, write the results, export the model.

    False, and there are no results, where a stop is requested meanwhile.
    """
    run.watch.beat(run.step, "end", slow=True)
    plan, process = run.objective.plan, run.process
    run.optimizer.state.clear()  # room for a whole model
    finetuned = on_all_ranks(process, lambda: load_finetuned(run.folder / MODEL, process.device))
    # The splits that are reported, as far as the folder has them.
    splits = [split for split in ("dev", "test") if plan.task.has(plan.folder, split)]
    reads = on_all_ranks(process, lambda: [plan.task.load(plan.folder, split) for split in splits])
    records = []
    for split, read in zip(splits, reads):
        try:
            found, encoded = predict(finetuned, read.examples, run.config.eval.batch, process, _go_on(run, "end"))
        except StopRequested:
            return False
        run.watch.beat(run.step, "end", slow=True)
        if process.is_main:
            counts = {**read.counts, f"longer than {finetuned.inputs.max_length} tokens": encoded.truncated}
            about = {"data": plan.folder, "method": "fine-tuned head", "counts": counts}
            record = score_record(plan.task, split, read.examples, found, **about)
            records.append(record | {"predictions": f"predictions/{split}"})
            save_predictions(plan.task, read.examples, found, run.folder / "predictions" / split)
    if process.is_main:
        print(f"predictions {run.folder / 'predictions'}: {', '.join(splits)}", flush=True)
        origin = {"model": str(run.folder / MODEL), "from": run.config.model, "seed": run.seed}
        origin |= {"chosen": run.objective.best, "recipe": to_mapping(run.config)}
        write_results(run.folder / RESULTS, origin, records)
        # Last, so that no failure of it costs the results.
        print(f"export     {export_head(run.folder / MODEL, run.folder / 'huggingface')}", flush=True)
    dist.barrier()
    return True
