"""Score a model on tasks: a fine-tuned one by its head, a language model by log-likelihood or by generation.

    python -m gloria.evaluate --task assin2 --model runs/assin2/model --data ../assin2
    python -m gloria.evaluate --task calame,enem --model models/demo --data ../calame-pt,../enem
    python -m gloria.evaluate --task perplexity --model runs/demo --data data/sample
    python -m gloria.evaluate --task calame,perplexity --watch runs/NAME     # every checkpoint as it appears
    python -m gloria.evaluate --task assin2 --compare runs/A runs/B          # runs, evaluations or predictions.jsonl

Under torchrun the ranks share the work, and each score is that of one process. Writes results.json after each task, and
predictions/TASK-SPLIT/ with the task's official format and predictions.jsonl; prints a table. Without --data a task's
sample that comes with gloria is used, and for the perplexity of a run the held-out part of its own corpus. Results of
another model, other files or other settings are never replaced: the default folder gets a number.
"""

from __future__ import annotations

import sys

from gloria.dist.signals import install_stop_handlers
from gloria.errors import UserError, run_command

if __name__ == "__main__" and any(word.startswith("--watch") for word in sys.argv):
    # Before torch is imported (seconds): a stop signal is kept from here on.
    install_stop_handlers("the watch stops after this score")

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from gloria.config.cli import Problems, parse, suggest
from gloria.data.corpus import describe_contamination
from gloria.dist.agreement import require_same
from gloria.dist.checkpoint_read import read_trainer
from gloria.dist.manifest import run_and_step
from gloria.dist.process import Process, leave_process_group, rank0_decides, start_process_group, stop_process_group
from gloria.model.kernels import use_cudnn_attention
from gloria.tasks import evaluation
from gloria.tasks.catalog import TASKS
from gloria.tasks.compare import compare_models
from gloria.tasks.evaluation import PERPLEXITY, EvaluateOptions, about
from gloria.tasks.formats.lastword import LOG_LIKELIHOOD, RULES
from gloria.tasks.models.backbones import LoadedModel
from gloria.tasks.models.zeroshot import corpus_texts
from gloria.tasks.report import RESULTS, default_folder, free_number, numbered, request_of, table, write_results
from gloria.tasks.samples import describe_sample
from gloria.tasks.submissions import save_predictions
from gloria.tasks.watch import watch


def main(argv: list[str] | None = None) -> int:
    """Score, watch or compare."""
    options = read_options(argv)
    if options.compare:
        ((task, _),) = options.requests
        assert task is not None
        data = Path(options.data) if options.data else None
        rules = options.rules if options.rule else ()
        for line in compare_models(task, *options.compare, data, options.split, rules, options.seed):
            print(line)
        return 0
    process = start_process_group(options.device, timeout_minutes=30)
    use_cudnn_attention(False)
    try:
        require_same(process, {f"--{key}": value for key, value in vars(options).items()})
        options = evaluation.with_precision(options, process.device)
        report_data(options, process)
        if options.watch:
            status = watch_run(options.watch, options, process)
        else:
            assert options.model is not None
            status = score_model(options.model, options, process)
    except (UserError, SystemExit):
        leave_process_group()
        raise
    stop_process_group()
    return status


def score_model(model: str, options: EvaluateOptions, process: Process) -> int:
    """Score a model on every task; write the results after each, and print them."""
    source, scored = evaluation.load_and_score(model, options, process)
    tasks = [{"task": name, **about(one, options)} for name, one in zip(options.names, options.requests)]
    request = {"model": str(Path(source).absolute()) if Path(source).exists() else source, "tasks": tasks}
    default = default_folder(model, options.task)
    number = rank0_decides(process, lambda: results_number(options.out, default, request))
    folder = numbered(options.out or default, number)
    if process.is_main:
        print(f"results    {folder}, after each task", flush=True)
        if run_and_step(Path(source)):
            names = [task.name for task, _ in options.requests if task is not None]
            for line in describe_contamination(read_trainer(Path(source)), names):
                print(line, flush=True)
    records: list[dict[str, Any]] = []
    for one in scored:
        if not process.is_main:
            continue
        record = dict(one.record)
        if one.task is not None:
            name = "-".join(filter(None, (one.task.name, record["split"], record.get("rule"))))
            record["predictions"] = f"predictions/{name}"
            save_predictions(one.task, one.examples, one.predictions, folder / "predictions" / name)
        records.append(record)
        results = write_results(folder / RESULTS, {"model": source, "request": request}, records)
        seconds = f" in {record['counts']['seconds']} s" if "seconds" in record["counts"] else ""
        print(f"scored     {record['task']} {record['split']} {record.get('rule', '')}".rstrip() + seconds, flush=True)
    if process.is_main:
        print(table(results), f"{folder / RESULTS}: written; predictions in {folder / 'predictions'}", sep="\n")
    return 0


def results_number(out: Path | None, default: Path, request: dict[str, Any]) -> int:
    """The number of the folder for the results; of --out always 1, or a UserError if it has others' results."""
    if out is None:
        return free_number(default, request)
    found = request_of(out)
    if found is not None and found != request:
        of = found.get("model", "an older version, or of a fine-tuning")
        raise UserError(f"--out: {out} has results of {of}, with other tasks, files or settings; choose another folder")
    return 1


def watch_run(run: Path, options: EvaluateOptions, process: Process) -> int:
    """Score the checkpoints of a run as they appear; what can be checked of the tasks is checked before the first."""
    for task, folder in options.requests:
        if task is not None:
            assert folder is not None
            evaluation.read_task(task, folder, options)
        elif folder is not None:
            corpus_texts(folder)
    requests = dict(zip(options.names, options.requests))

    def load(checkpoint: Path) -> tuple[LoadedModel, Path | None]:
        return evaluation.load_language_model(str(checkpoint), options, process)

    def score(model: tuple[LoadedModel, Path | None], names: list[str]) -> Iterator[dict[str, Any]]:
        chosen = [requests[name] for name in names]
        for scored in evaluation.score_language_model(*model, chosen, options, process):
            yield scored.record

    tasks = {name: about(request, options) for name, request in requests.items()}
    return watch(run, tasks, options.poll, process, load, score)


def read_options(argv: list[str] | None) -> EvaluateOptions:
    """The flags, or a UserError with everything that is wrong with them."""
    return parse(
        EvaluateOptions,
        argv,
        prog="python -m gloria.evaluate",
        description=f"Score a model. Tasks: {', '.join(TASKS)}, {PERPLEXITY}, or a file of your own, FILE.toml.",
        recipe=False,
        check=_contradictions,
    ).config


def _contradictions(options: EvaluateOptions) -> Problems:
    if options.task is None:  # missing, which is reported
        return
    try:
        requests = options.requests
    except UserError as error:
        yield ("task",), str(error)
        return
    families = {task.family if task else PERPLEXITY for task, _ in requests}
    known = [*RULES, LOG_LIKELIHOOD]
    for rule in options.rules:
        if rule not in known:
            yield ("rule",), f"unknown rule {rule}; {suggest(rule, known)}"
    folders = (options.data or "").split(",")
    if len(folders) not in (1, len(requests)):
        yield ("data",), f"{len(folders)} folders for {len(requests)} tasks; give one, or one for each"
    for flag in sorted(options.given().keys() - options.given(families).keys()):
        yield (flag,), f"no task of {options.task} uses it; leave it out"
    if options.compare:
        for flag in ("model", "watch", "out"):
            if getattr(options, flag):
                yield (flag,), "--compare reads predictions alone; leave it out"
        if families == {PERPLEXITY} or len(requests) > 1:
            yield ("task",), "--compare is for one task; name one"
    elif bool(options.model) == bool(options.watch):
        found = "both it and --watch are given" if options.model else "neither it nor --watch is given"
        yield ("model", "watch"), f"{found}; give a model's folder, or a run to watch"
    elif options.watch and options.out:
        yield ("out",), f"--watch writes in {options.watch} itself, and no predictions; leave it out"
    elif (None, None) in requests and options.model and not run_and_step(Path(options.model)):
        yield ("data",), f"is missing; {options.model} is no run with a corpus of its own, so name a text"


def report_data(options: EvaluateOptions, process: Process) -> None:
    """Print the precision, and which data are used where none are named, and what they are good for."""
    if process.is_main:
        print(f"precision  {options.precision} on {process.device.type}", flush=True)
    given = (options.data or "").split(",") * len(options.requests)
    for (task, _), named in zip(options.requests, given):
        if not named and process.is_main:
            print(describe_sample(task) if task else "data       the held-out part of the run's own corpus", flush=True)


if __name__ == "__main__":
    raise SystemExit(run_command(main))
