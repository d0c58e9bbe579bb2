"""Scores of a fine-tuning: on the set that chooses the model while it trains, on those that are reported at its end."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch.distributed as dist
from torch import Tensor

from gloria.dist.process import agree
from gloria.finetune_run import Run
from gloria.finetune_tell import tell_scores
from gloria.options import to_mapping
from gloria.tasks.catalog import Task, find_task
from gloria.tasks.export import export_head
from gloria.tasks.metrics import score
from gloria.tasks.report import GUESSES_FILE, RESULTS, score_record, write_results
from gloria.tasks.submissions import write_guesses, write_submission
from gloria.tasks.tuned import load_tuned, predict, save_tuned, whole_state


def choose(run: Run) -> None:
    """Score the set that chooses the model, and keep the model where it is the best so far."""
    task = run.plan.task
    run.watch.at(run.step, "validation", patient=True)
    found, _ = predict(run.tuned, run.plan.selection, run.config.eval.batch, run.process)
    scores = score(task, run.plan.selection, found, resamples=0)
    values = {name: value.value for name, value in scores.items()}
    now, before = values[task.selection], run.best.get("scores", {}).get(task.selection)
    better = not run.best or (now is not None and (before is None or now > before))
    tell_scores(run, values, better)
    if better:
        run.best = {"step": run.step, "scores": values}
        state = whole_state(run.tuned.model, keep=run.process.is_main)
        agree(run.process, lambda: _keep_best(run, state))


def _keep_best(run: Run, state: dict[str, Tensor]) -> int:
    extra = {"model": run.tuned.source, "seed": run.seed, **run.best}
    save_tuned(run.tuned, state, run.folder / "model", extra)
    return 0


def score_best(run: Run) -> None:
    """Load the best model as anybody would, score the sets that are reported, each once, and export it."""
    run.watch.at(run.step, "end", patient=True)
    plan, device = run.plan, run.process.device
    run.optimizer.state.clear()  # room for a whole model
    tuned, records = load_tuned(run.folder / "model", device), []
    for split in reported_splits(plan.task, plan.folder):
        read = plan.task.load(plan.folder, split)
        found, encoded = predict(tuned, read.examples, run.config.eval.batch, run.process)
        run.watch.at(run.step, "end", patient=True)
        if run.process.is_main:
            counts = {**read.counts, f"longer than {tuned.inputs.max_length} tokens": encoded.truncated}
            records.append(
                score_record(plan.task, split, read.examples, found, method="fine-tuned head", counts=counts)
            )
            target = run.folder / "predictions" / split
            target.mkdir(parents=True, exist_ok=True)
            write_submission(plan.task, read.examples, found, target)
            write_guesses(target / GUESSES_FILE, found)
    if run.process.is_main:
        print(f"export     {export_head(run.folder / 'model', run.folder / 'huggingface')}", flush=True)
        about = {"model": str(run.folder / "model"), "from": run.config.model, "seed": run.seed, "chosen": run.best}
        about["recipe"] = to_mapping(run.config)
        write_results(run.folder / RESULTS, about, records)
    dist.barrier()


def reported_splits(task: Task, folder: Path) -> Iterator[str]:
    """The splits whose scores are told at the end, as far as the folder has them."""
    parts = [find_task(part) for part in task.parts] or [task]
    for split in ("dev", "test"):
        if all(any((folder / name).is_file() for name in part.files.get(split, ())) for part in parts):
            yield split
