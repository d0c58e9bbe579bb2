"""Score a model on tasks: a fine-tuned one by its head, a language model by what it finds likely or writes.

    python -m gloria.evaluate --task assin2 --model runs/assin2/model --data ../assin2
    python -m gloria.evaluate --task calame,enem --model models/demo --data ../calame-pt,../enem
    python -m gloria.evaluate --task perplexity --model runs/demo --data data/sample
    python -m gloria.evaluate --task calame,perplexity --watch runs/NAME     # every checkpoint as it appears
    python -m gloria.evaluate --task assin2 --data ../assin2 --compare A/guesses.jsonl B/guesses.jsonl

Under torchrun the ranks share the work, and each number is that of one process. Writes results.json and the
predictions, in each task's official format and as guesses.jsonl, and prints a table. Without --data a task's sample
that comes with gloria is taken, and for the perplexity of a run the held-out part of its own corpus.
"""

from __future__ import annotations

import sys

from gloria.dist.signals import install_stop_handlers
from gloria.errors import UserError, run_command

if __name__ == "__main__" and any(word.startswith("--watch") for word in sys.argv):
    # Before torch is imported (seconds): a stop signal is kept from here on.
    install_stop_handlers("the watch stops after this score")

import argparse
from collections.abc import Iterator, Sequence
from pathlib import Path
from time import perf_counter
from typing import Any

import torch

from gloria.config.cli import argument_parser, suggest
from gloria.dist.agreement import require_same
from gloria.dist.checkpoint_read import read_trainer
from gloria.dist.manifest import run_and_step
from gloria.dist.process import Process, leave_process_group, start_process_group, stop_process_group
from gloria.tasks.catalog import TASKS, find_task
from gloria.tasks.examples import Example, Prediction
from gloria.tasks.formats.files import Loaded as Read
from gloria.tasks.formats.lastword import LOG_LIKELIHOOD, RULES
from gloria.tasks.metrics import compare
from gloria.tasks.models.backbones import Loaded, load_model
from gloria.tasks.models.finetuned import FinetunedModel, find_tuned, load_tuned, predict, task_heads
from gloria.tasks.models.zeroshot import GENERATION, LIKELIHOOD, EvalSettings, answers, corpus_texts, perplexity
from gloria.tasks.report import GUESSES_FILE, RESULTS, score_record, table, write_results
from gloria.tasks.samples import describe_sample, sample_folder
from gloria.tasks.submissions import read_predictions, write_predictions, write_submission
from gloria.tasks.task import Task
from gloria.tasks.watch import watch

PERPLEXITY = "perplexity"
Asked = tuple[Task | None, Path | None]  # a task, None for perplexity, and its files, None for the run's own corpus


def main(argv: list[str] | None = None) -> int:
    arguments = read_arguments(argv)
    if arguments.compare:
        return compare_predictions(arguments)
    process = start_process_group(arguments.device, timeout_minutes=30)
    try:
        require_same(process, {f"--{key}": value for key, value in vars(arguments).items() if key != "asked"})
        report_data(arguments, process)
        status = (watch_run if arguments.watch else score_model)(arguments, process)
    except (UserError, SystemExit):
        leave_process_group()
        raise
    stop_process_group()
    return status


def score_model(arguments: argparse.Namespace, process: Process) -> int:
    """Score a model on all that is asked; write and print the results."""
    records = list(evaluate(arguments, process))
    if process.is_main:
        results = write_results(arguments.out / RESULTS, {"model": arguments.model}, records)
        print(table(results), f"{arguments.out / RESULTS}: written", sep="\n")
    return 0


def watch_run(arguments: argparse.Namespace, process: Process) -> int:
    """Score the checkpoints of a run as they appear; what can be checked of the tasks is checked before the first."""
    for task, folder in arguments.asked:
        if task is not None:
            read_task(task, folder, arguments)
        elif folder is not None:
            corpus_texts(folder)
    asked = dict(zip(arguments.names, arguments.asked))

    def load(checkpoint: Path) -> tuple[Loaded, Path | None]:
        return load_language_model(str(checkpoint), arguments, process)

    def score(model: tuple[Loaded, Path | None], names: list[str]) -> Iterator[dict[str, Any]]:
        return evaluate_loaded(*model, [asked[name] for name in names], arguments, process)

    return watch(arguments.watch, arguments.names, arguments.poll, process, load, score)


def evaluate(arguments: argparse.Namespace, process: Process) -> Iterator[dict[str, Any]]:
    """A record for each task (and rule, and source of a corpus)."""
    if model := find_tuned(arguments.model):
        given = {"--shots": arguments.shots, "--rule": arguments.rule, "--length": arguments.length}
        given |= {"--stride": arguments.stride, "--method": arguments.method == GENERATION}
        if unused := [flag for flag, value in given.items() if value]:
            raise UserError(f"{unused[0]}: {model} answers by its head and has no use for it; leave it out")
        tuned = load_tuned(model, process.device)
        tuned.model.to(_dtype(arguments))
        for task, folder in arguments.asked:
            yield evaluate_head(tuned, task, folder, arguments, process)
        return
    loaded = load_language_model(arguments.model, arguments, process)
    yield from evaluate_loaded(*loaded, arguments.asked, arguments, process)


def load_language_model(model: str, arguments: argparse.Namespace, process: Process) -> tuple[Loaded, Path | None]:
    """The model (of a run, its newest checkpoint) on this rank's device, and its own corpus if that is asked for."""
    loaded = load_model(model, language_model=True)
    loaded.language_model.to(process.device, _dtype(arguments)).eval()
    own = (None, None) in arguments.asked
    # Read at once: a checkpoint under watch may be gone before it is scored.
    return loaded, Path(read_trainer(Path(loaded.source))["recipe"]["data"]["corpus"]) if own else None


def evaluate_loaded(
    loaded: Loaded, corpus: Path | None, asked: Sequence[Asked], arguments: argparse.Namespace, process: Process
) -> Iterator[dict[str, Any]]:
    """The records of a language model on some tasks; `corpus` is the text of a perplexity without a text of its own."""
    for task, folder in asked:
        if task is None:
            yield from evaluate_text(loaded, folder or corpus, arguments, process)
        else:
            yield from evaluate_language_model(loaded, task, folder, arguments, process)


def evaluate_head(
    tuned: FinetunedModel, task: Task | None, folder: Path, arguments: argparse.Namespace, process: Process
) -> dict[str, Any]:
    """The record of a fine-tuned head on a task that asks the same things."""
    own = tuned.task
    if task is None or task.family != own.family or task_heads(task) != tuned.inputs.heads or task.labels != own.labels:
        asked = PERPLEXITY if task is None else task.name
        raise UserError(
            f"--task: {tuned.source} has heads for {own.name}, not {asked}; give the model before it was tuned"
        )
    split = choose_split(task, folder, arguments.split)
    read = task.load(folder, split)
    started = perf_counter()
    found, encoded = predict(tuned, read.examples, arguments.batch, process)
    counts = {**read.counts, f"longer than {tuned.inputs.max_length} tokens": encoded.truncated}
    counts |= {"seconds": round(perf_counter() - started, 2)}
    if process.is_main:
        _write_predictions(arguments.out, task, split, "", read.examples, found)
    return score_record(task, split, read.examples, found, method="fine-tuned head", counts=counts)


def evaluate_language_model(
    loaded: Loaded, task: Task, folder: Path, arguments: argparse.Namespace, process: Process
) -> Iterator[dict[str, Any]]:
    """The records of a language model on a task, one a rule."""
    split, read, shots, train = read_task(task, folder, arguments)
    asking = EvalSettings(arguments.method, shots, arguments.seed, arguments.rules, arguments.batch)
    started = perf_counter()
    every = list(answers(loaded, task, read.examples, train, asking, process))
    seconds = round(perf_counter() - started, 2)  # of all rules together: they share what they read
    for found in every:
        counts = {**read.counts, "prompts cut to fit": found.cut, "seconds": seconds}
        if process.is_main and arguments.out:
            _write_predictions(arguments.out, task, split, found.rule, read.examples, found.guesses)
        yield score_record(
            task, split, read.examples, found.guesses, rule=found.rule, method=found.method, counts=counts
        )


def read_task(task: Task, folder: Path, arguments: argparse.Namespace) -> tuple[str, Read, int, list[Example]]:
    """The split that is asked, its examples, and how many solved ones out of which a language model sees before."""
    if task.family == "span":
        raise UserError(f"--task: {task.name} asks for a span, which takes a head; fine-tune the model on it first")
    if arguments.method == GENERATION and task.family != "pair":
        raise UserError(f"--method: {GENERATION} is a way to ask for pairs, not {task.name}; leave it out")
    split = choose_split(task, folder, arguments.split)
    read = task.load(folder, split)
    shots = arguments.shots
    if shots is None:
        shots = 5 if arguments.method == GENERATION else 0
    if shots and task.family == "last_word":
        raise UserError(f"--shots: {task.name} is a text to go on with, without examples before it; leave it out")
    return split, read, shots, task.read(folder, "train") if shots else []


def evaluate_text(
    loaded: Loaded, path: Path, arguments: argparse.Namespace, process: Process
) -> Iterator[dict[str, Any]]:
    """The perplexity of a text file, or of each source of a corpus."""
    length = arguments.length or loaded.max_length
    if length is None:
        raise UserError(f"--length: {loaded.source} tells no limit of its own; give the length of a window in tokens")
    if loaded.max_length is not None and length > loaded.max_length:
        raise UserError(f"--length: {length} is more than the model sees, {loaded.max_length}; lower it")
    stride = arguments.stride or max(length // 2, 1)
    if stride > length:
        raise UserError(f"--stride: {stride} is more than the {length} tokens of a window; lower it")
    there = {name: texts for name, texts in corpus_texts(path).items() if texts}
    if not there:
        raise UserError(f"--data: {path} has no held-out text; give another corpus, or a text file")
    for name, texts in there.items():
        scores, counts = perplexity(loaded, texts, length, stride, arguments.batch, process)
        yield {
            "task": PERPLEXITY,
            "split": name,
            "method": f"windows of {length} tokens, stride {stride}; each document on its own, its EOS not scored",
            "n": counts["tokens"],
            "counts": counts,
            "scores": {key: {"value": value, "n": counts["tokens"]} for key, value in scores.items()},
        }


def compare_predictions(arguments: argparse.Namespace) -> int:
    """Print what model A has more than model B on the same examples, with a paired test."""
    ((task, folder),) = arguments.asked
    examples = task.read(folder, choose_split(task, folder, arguments.split))
    paths = [path / GUESSES_FILE if path.is_dir() else path for path in arguments.compare]
    a, b = (read_predictions(task, path) for path in paths)
    rule = arguments.rules[0] if task.family == "last_word" else ""
    print("{:<34}{:>9}  {:<20}{:>9}  {}".format("metric", "A - B", "95 % interval", "p", "test"))
    for name, found in compare(task, examples, a, b, rule=rule, seed=arguments.seed).items():
        if found.value is None:
            print(f"{name:<34}{'-':>9}  {found.test}")
            continue
        interval = "" if found.low is None else f"{found.low:.4f} to {found.high:.4f}"
        p = "" if found.p is None else f"{found.p:.4f}"
        print(f"{name:<34}{found.value:>9.4f}  {interval:<20}{p:>9}  {found.test}, n = {found.n}")
    return 0


def _write_predictions(
    out: Path, task: Task, split: str, rule: str, examples: list[Example], guesses: dict[str, Prediction]
) -> None:
    folder = out / "predictions" / "-".join(part for part in (task.name, split, rule) if part)
    folder.mkdir(parents=True, exist_ok=True)
    write_submission(task, examples, guesses, folder)
    write_predictions(folder / GUESSES_FILE, guesses)


def _dtype(arguments: argparse.Namespace) -> torch.dtype:
    return torch.bfloat16 if arguments.precision == "bf16" else torch.float32


def read_arguments(argv: list[str] | None) -> argparse.Namespace:
    """The flags, and of them `names` of tasks, `asked` (what each is, with its files) and `rules`; or a UserError."""
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
    parser.add_argument("--compare", nargs=2, type=Path, metavar=("A", "B"), help="two guesses.jsonl of one task")
    arguments = parser.parse_args(argv)
    arguments.names = list(dict.fromkeys(arguments.task.split(",")))
    tasks = [None if name == PERPLEXITY else find_task(name) for name in arguments.names]
    known = [*RULES, LOG_LIKELIHOOD]
    arguments.rules = tuple(arguments.rule.split(",")) if arguments.rule else tuple(known)
    problems = [f"--rule: unknown rule {rule}; {suggest(rule, known)}" for rule in arguments.rules if rule not in known]
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
    arguments.asked = [
        (task, Path(folder) if folder else task and sample_folder(task)) for task, folder in zip(tasks, folders)
    ]
    problems += _without_use(arguments, tasks)
    if arguments.compare:
        if tasks == [None] or len(tasks) > 1:
            problems.append("--task: --compare is for one task; name one")
        elif tasks[0].family == "last_word" and len(arguments.rules) != 1:
            problems.append("--rule: say by which one the predictions are compared")
    elif bool(arguments.model) == bool(arguments.watch):
        found = "both are given" if arguments.model else "neither is given"
        problems.append(f"--model and --watch: {found}; give a model's folder, or a run that is to be watched")
    elif arguments.watch and arguments.out:
        problems.append(f"--out: --watch writes in {arguments.watch} itself, and no predictions; leave it out")
    elif (None, None) in arguments.asked and arguments.model and not run_and_step(Path(arguments.model)):
        problems.append(f"--data: is missing; {arguments.model} is no run with a corpus of its own, so name a text")
    if not 0 < arguments.poll <= 600:
        problems.append(f"--poll: {arguments.poll:g} s is no pause; give up to 600, such as 30")
    if problems:
        raise UserError(*problems)
    if arguments.out is None and arguments.model and not arguments.compare:
        arguments.out = Path("runs/evaluate", Path(arguments.model).resolve().name, arguments.task.replace(",", "+"))
    return arguments


def _without_use(arguments: argparse.Namespace, tasks: list[Task | None]) -> list[str]:
    """A line for each flag that nothing of what is asked has a use for."""
    families = {task.family if task else PERPLEXITY for task in tasks}
    uses = {"rule": {"last_word"}, "length": {PERPLEXITY}, "stride": {PERPLEXITY}}  # --shots has lines of its own
    problems = [
        f"--{flag}: no task of {arguments.task} has a use for it; leave it out"
        for flag, users in uses.items()
        if getattr(arguments, flag) is not None and not families & users
    ]
    beside = [flag for flag in ("model", "watch", "out") if arguments.compare and getattr(arguments, flag)]
    return problems + [f"--{flag}: --compare reads predictions alone; leave it out" for flag in beside]


def report_data(arguments: argparse.Namespace, process: Process) -> None:
    """Say which data were not named, and what they are good for."""
    given = (arguments.data or "").split(",") * len(arguments.asked)
    for (task, _), named in zip(arguments.asked, given):
        if not named and process.is_main:
            print(describe_sample(task) if task else "data       the held-out part of the run's own corpus", flush=True)


def choose_split(task: Task, folder: Path, asked: str | None) -> str:
    """The split that is reported: GLUE hides the labels of its tests, so there it is the dev set."""
    if asked:
        return asked
    order = ("dev", "test") if task.hold_out else ("test", "dev")
    there = [split for split in order if task.has(folder, split)]
    return (there or [split for split in order if split in task.splits])[0]


if __name__ == "__main__":
    raise SystemExit(run_command(main))
