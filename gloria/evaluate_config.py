"""What gloria.evaluate is told: its flags, and where the data come from that nobody named."""

from __future__ import annotations

import argparse
from pathlib import Path

from gloria.dist.manifest import run_and_step
from gloria.dist.process import Process
from gloria.errors import UserError
from gloria.options import argument_parser, suggest
from gloria.tasks.catalog import TASKS, Task, find_task
from gloria.tasks.lastword import LOG_LIKELIHOOD, RULES
from gloria.tasks.samples import describe_sample, sample_folder
from gloria.tasks.zeroshot import GENERATION, LIKELIHOOD

PERPLEXITY = "perplexity"
Asked = tuple[Task | None, Path | None]  # a task, None for perplexity, and its files, None for the run's own corpus


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


def tell_data(arguments: argparse.Namespace, process: Process) -> None:
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
