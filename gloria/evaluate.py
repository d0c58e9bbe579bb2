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

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gloria.config.cli import Problems, option, parse, suggest
from gloria.dist.agreement import require_same
from gloria.dist.manifest import run_and_step
from gloria.dist.process import Process, leave_process_group, rank0_decides, start_process_group, stop_process_group
from gloria.tasks import evaluation
from gloria.tasks.catalog import TASKS, find_task
from gloria.tasks.compare import compare_models
from gloria.tasks.evaluation import PERPLEXITY, Options, Request, about
from gloria.tasks.formats.lastword import LOG_LIKELIHOOD, RULES
from gloria.tasks.models.backbones import Loaded
from gloria.tasks.models.zeroshot import GENERATION, LIKELIHOOD, corpus_texts
from gloria.tasks.report import RESULTS, default_folder, free_number, numbered, request_of, table, write_results
from gloria.tasks.samples import describe_sample, sample_folder
from gloria.tasks.submissions import save_predictions
from gloria.tasks.watch import watch


@dataclass(frozen=True)
class EvaluateOptions:
    """What is scored, on what, and how."""

    task: str = option(help="one, or several with commas between them")
    model: str | None = option(None, "a run, a checkpoint, a fine-tuned model or a Hugging Face folder")
    watch: Path | None = option(None, "a run: score each of its checkpoints as it appears")
    poll: float = option(30.0, "seconds between two looks of --watch", above=0, maximum=600)
    data: str | None = option(
        None,
        "folder of the files, one for all tasks or one for each, with commas between them; default, also for one that "
        "is left empty: a sample that comes with gloria, for perplexity the run's own corpus",
    )
    split: str | None = option(None, "default: test, or dev where tests are hidden", choices=("train", "dev", "test"))
    out: Path | None = option(None, "folder for results.json and predictions; default: under runs/evaluate")
    method: str = option(LIKELIHOOD, "how pairs are asked", choices=(LIKELIHOOD, GENERATION))
    shots: int | None = option(None, "solved examples before each; default 0, with generation 5", minimum=0)
    seed: int = option(0, "of the shots", minimum=0)
    rule: str | None = option(None, f"of last words: {', '.join((*RULES, LOG_LIKELIHOOD))}; default: all of them")
    length: int | None = option(None, "tokens of a window of text; default: all that the model sees", minimum=1)
    stride: int | None = option(None, "tokens that a window of text scores; default: half of its length", minimum=1)
    batch: int = option(16, "rows at a time", minimum=1)
    precision: str = option("fp32", "of the weights", choices=("fp32", "bf16"))
    device: str = option("auto", "auto takes a GPU if there is one", choices=("auto", "cpu", "cuda"))
    compare: tuple[Path, Path] | None = option(None, "A B: runs, evaluations or predictions.jsonl")

    @property
    def names(self) -> list[str]:
        """Of the tasks."""
        return list(dict.fromkeys(self.task.split(",")))

    @property
    def requests(self) -> list[Request]:
        """Each task with its files."""
        tasks = [None if name == PERPLEXITY else find_task(name) for name in self.names]
        folders = (self.data or "").split(",")
        folders *= len(tasks) if len(folders) == 1 else 1
        return [
            (task, Path(folder) if folder else task and sample_folder(task)) for task, folder in zip(tasks, folders)
        ]

    @property
    def options(self) -> Options:
        """What a score depends on."""
        return Options(*(getattr(self, field.name) for field in dataclasses.fields(Options)))


def main(argv: list[str] | None = None) -> int:
    """Score, watch or compare."""
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
        require_same(process, {f"--{key}": value for key, value in vars(arguments).items()})
        report_data(arguments, process)
        status = (watch_run if arguments.watch else score_model)(arguments, process)
    except (UserError, SystemExit):
        leave_process_group()
        raise
    stop_process_group()
    return status


def score_model(arguments: EvaluateOptions, process: Process) -> int:
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


def results_number(arguments: EvaluateOptions, request: dict[str, Any]) -> int:
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


def watch_run(arguments: EvaluateOptions, process: Process) -> int:
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


def read_arguments(argv: list[str] | None) -> EvaluateOptions:
    """The flags, or a UserError with everything that is wrong with them."""
    return parse(
        EvaluateOptions,
        argv,
        prog="python -m gloria.evaluate",
        description=f"Score a model. Tasks: {', '.join(TASKS)}, {PERPLEXITY}.",
        recipe=False,
        check=_contradictions,
    ).config


def _contradictions(arguments: EvaluateOptions) -> Problems:
    if arguments.task is None:  # missing, which is reported
        return
    try:
        requests = arguments.requests
    except UserError as error:
        yield ("task",), str(error)
        return
    families = {task.family if task else PERPLEXITY for task, _ in requests}
    known = [*RULES, LOG_LIKELIHOOD]
    options = arguments.options
    for rule in options.rules:
        if rule not in known:
            yield ("rule",), f"unknown rule {rule}; {suggest(rule, known)}"
    folders = (arguments.data or "").split(",")
    if len(folders) not in (1, len(requests)):
        yield ("data",), f"{len(folders)} folders for {len(requests)} tasks; give one, or one for each"
    for flag in sorted(options.given().keys() - options.given(families).keys()):
        yield (flag,), f"no task of {arguments.task} uses it; leave it out"
    if arguments.compare:
        for flag in ("model", "watch", "out"):
            if getattr(arguments, flag):
                yield (flag,), "--compare reads predictions alone; leave it out"
        if families == {PERPLEXITY} or len(requests) > 1:
            yield ("task",), "--compare is for one task; name one"
    elif bool(arguments.model) == bool(arguments.watch):
        found = "both it and --watch are given" if arguments.model else "neither it nor --watch is given"
        yield ("model", "watch"), f"{found}; give a model's folder, or a run to watch"
    elif arguments.watch and arguments.out:
        yield ("out",), f"--watch writes in {arguments.watch} itself, and no predictions; leave it out"
    elif (None, None) in requests and arguments.model and not run_and_step(Path(arguments.model)):
        yield ("data",), f"is missing; {arguments.model} is no run with a corpus of its own, so name a text"


def report_data(arguments: EvaluateOptions, process: Process) -> None:
    """Print which data are used where none are named, and what they are good for."""
    given = (arguments.data or "").split(",") * len(arguments.requests)
    for (task, _), named in zip(arguments.requests, given):
        if not named and process.is_main:
            print(describe_sample(task) if task else "data       the held-out part of the run's own corpus", flush=True)


if __name__ == "__main__":
    raise SystemExit(run_command(main))
