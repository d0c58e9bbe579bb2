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

import argparse
import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from gloria.config.cli import argument_parser, suggest
from gloria.dist.agreement import require_same
from gloria.dist.manifest import run_and_step
from gloria.dist.process import Process, leave_process_group, rank0_decides, start_process_group, stop_process_group
from gloria.tasks import evaluation
from gloria.tasks.catalog import TASKS, find_task
from gloria.tasks.compare import compare_models
from gloria.tasks.evaluation import PERPLEXITY, Options, about
from gloria.tasks.formats.lastword import LOG_LIKELIHOOD, RULES
from gloria.tasks.models.backbones import Loaded
from gloria.tasks.models.zeroshot import GENERATION, LIKELIHOOD, corpus_texts
from gloria.tasks.report import RESULTS, default_folder, free_number, numbered, request_of, table, write_results
from gloria.tasks.samples import describe_sample, sample_folder
from gloria.tasks.submissions import save_predictions
from gloria.tasks.watch import watch


def main(argv: list[str] | None = None) -> int:
    arguments = read_arguments(argv)
    if arguments.compare:
        ((task, _),) = arguments.requests
        data = Path(arguments.data) if arguments.data else None
        rules = arguments.options.rules if arguments.rule else ()
        for line in compare_models(task, *arguments.compare, data, arguments.split, rules, arguments.seed):
            print(line)
        return 0
    process = start_process_group(arguments.device, timeout_minutes=30)
    try:
        require_same(
            process, {f"--{key}": value for key, value in vars(arguments).items() if key not in ("requests", "options")}
        )
        report_data(arguments, process)
        status = (watch_run if arguments.watch else score_model)(arguments, process)
    except (UserError, SystemExit):
        leave_process_group()
        raise
    stop_process_group()
    return status


def score_model(arguments: argparse.Namespace, process: Process) -> int:
    """Score a model on every task; write the results after each, and print them."""
    source, scored = evaluation.load_and_score(arguments.model, arguments.requests, arguments.options, process)
    tasks = [{"task": name, **about(one, arguments.options)} for name, one in zip(arguments.names, arguments.requests)]
    request = {"model": str(Path(source).absolute()) if Path(source).exists() else source, "tasks": tasks}
    number = rank0_decides(process, lambda: results_number(arguments, request))
    folder = numbered(arguments.out or default_folder(arguments.model, arguments.task), number)
    if process.is_main:
        print(f"results    {folder}, after each task", flush=True)
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


def results_number(arguments: argparse.Namespace, request: dict[str, Any]) -> int:
    """The number of the folder for the results; of --out always 1, or a UserError if it has others' results."""
    if arguments.out is None:
        return free_number(default_folder(arguments.model, arguments.task), request)
    found = request_of(arguments.out)
    if found not in (None, request):
        of = found.get("model", "an older version, or of a fine-tuning")
        raise UserError(
            f"--out: {arguments.out} has results of {of}, with other tasks, files or settings; choose another folder"
        )
    return 1


def watch_run(arguments: argparse.Namespace, process: Process) -> int:
    """Score the checkpoints of a run as they appear; what can be checked of the tasks is checked before the first."""
    for task, folder in arguments.requests:
        if task is not None:
            evaluation.read_task(task, folder, arguments.options)
        elif folder is not None:
            corpus_texts(folder)
    requests = dict(zip(arguments.names, arguments.requests))

    def load(checkpoint: Path) -> tuple[Loaded, Path | None]:
        return evaluation.load_language_model(str(checkpoint), arguments.requests, arguments.options, process)

    def score(model: tuple[Loaded, Path | None], names: list[str]) -> Iterator[dict[str, Any]]:
        chosen = [requests[name] for name in names]
        for scored in evaluation.score_language_model(*model, chosen, arguments.options, process):
            yield scored.record

    tasks = {name: about(request, arguments.options) for name, request in requests.items()}
    return watch(arguments.watch, tasks, arguments.poll, process, load, score)


def read_arguments(argv: list[str] | None) -> argparse.Namespace:
    """The flags, and made of them `names` of tasks, `requests` and `options`; or a UserError."""
    parser = argument_parser("python -m gloria.evaluate", f"Score a model. Tasks: {', '.join(TASKS)}, {PERPLEXITY}.")
    parser.add_argument("--task", required=True, help="one, or several with commas between them")
    parser.add_argument("--model", help="a run, a checkpoint, a fine-tuned model or a Hugging Face folder")
    parser.add_argument("--watch", type=Path, metavar="RUN", help="score each checkpoint of this run as it appears")
    parser.add_argument("--poll", type=float, default=30.0, help="seconds between two looks of --watch, up to 600")
    parser.add_argument(
        "--data",
        help="folder of the files, one for all tasks or one for each, with commas between them; default, also for "
        "one that is left empty: a sample that comes with gloria, for perplexity the run's own corpus",
    )
    parser.add_argument(
        "--split", choices=("train", "dev", "test"), help="default: test, or dev where tests are hidden"
    )
    parser.add_argument(
        "--out", type=Path, help="folder for results.json and predictions; default: under runs/evaluate"
    )
    parser.add_argument("--method", choices=(LIKELIHOOD, GENERATION), default=LIKELIHOOD, help="how pairs are asked")
    parser.add_argument("--shots", type=int, help="solved examples before each; default 0, with generation 5")
    parser.add_argument("--seed", type=int, default=0, help="of the shots")
    parser.add_argument("--rule", help=f"of last words: {', '.join((*RULES, LOG_LIKELIHOOD))}; default: all of them")
    parser.add_argument("--length", type=int, help="tokens of a window of text; default: all that the model sees")
    parser.add_argument("--stride", type=int, help="tokens that a window of text scores; default: half of its length")
    parser.add_argument("--batch", type=int, default=16, help="rows at a time")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32", help="of the weights")
    parser.add_argument(
        "--device", choices=("auto", "cpu", "cuda"), default="auto", help="auto takes a GPU if there is one"
    )
    parser.add_argument(
        "--compare", nargs=2, type=Path, metavar=("A", "B"), help="runs, evaluations or predictions.jsonl"
    )
    arguments = parser.parse_args(argv)
    arguments.names = list(dict.fromkeys(arguments.task.split(",")))
    tasks = [None if name == PERPLEXITY else find_task(name) for name in arguments.names]
    known = [*RULES, LOG_LIKELIHOOD]
    options = arguments.options = Options(*(getattr(arguments, field.name) for field in dataclasses.fields(Options)))
    problems = [f"--rule: unknown rule {rule}; {suggest(rule, known)}" for rule in options.rules if rule not in known]
    numbers = {"batch": 1, "shots": 0, "length": 1, "stride": 1, "seed": 0}
    problems += [
        f"--{name}: must be at least {least}, not {getattr(arguments, name)}"
        for name, least in numbers.items()
        if getattr(arguments, name) is not None and getattr(arguments, name) < least
    ]
    folders = (arguments.data or "").split(",")
    if len(folders) not in (1, len(tasks)):
        problems.append(f"--data: {len(folders)} folders for {len(tasks)} tasks; give one, or one for each")
    folders *= len(tasks) if len(folders) == 1 else 1
    arguments.requests = [
        (task, Path(folder) if folder else task and sample_folder(task)) for task, folder in zip(tasks, folders)
    ]
    families = {task.family if task else PERPLEXITY for task in tasks}
    unused = options.given().keys() - options.given(families).keys()
    problems += [f"--{flag}: no task of {arguments.task} uses it; leave it out" for flag in sorted(unused)]
    if arguments.compare:
        beside = [flag for flag in ("model", "watch", "out") if getattr(arguments, flag)]
        problems += [f"--{flag}: --compare reads predictions alone; leave it out" for flag in beside]
        if tasks == [None] or len(tasks) > 1:
            problems.append("--task: --compare is for one task; name one")
    elif bool(arguments.model) == bool(arguments.watch):
        found = "both are given" if arguments.model else "neither is given"
        problems.append(f"--model and --watch: {found}; give a model's folder, or a run to watch")
    elif arguments.watch and arguments.out:
        problems.append(f"--out: --watch writes in {arguments.watch} itself, and no predictions; leave it out")
    elif (None, None) in arguments.requests and arguments.model and not run_and_step(Path(arguments.model)):
        problems.append(f"--data: is missing; {arguments.model} is no run with a corpus of its own, so name a text")
    if not 0 < arguments.poll <= 600:
        problems.append(f"--poll: {arguments.poll:g} s is no pause; give up to 600, such as 30")
    if problems:
        raise UserError(*problems)
    return arguments


def report_data(arguments: argparse.Namespace, process: Process) -> None:
    """Print which data are used where none are named, and what they are good for."""
    given = (arguments.data or "").split(",") * len(arguments.requests)
    for (task, _), named in zip(arguments.requests, given):
        if not named and process.is_main:
            print(describe_sample(task) if task else "data       the held-out part of the run's own corpus", flush=True)


if __name__ == "__main__":
    raise SystemExit(run_command(main))
