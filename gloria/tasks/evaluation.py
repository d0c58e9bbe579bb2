"""Score a model on tasks: what `python -m gloria.evaluate` does, and with `--watch` does with each checkpoint."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from time import perf_counter
from typing import Any

import torch

from gloria.config.cli import option
from gloria.dist.checkpoint_read import read_trainer
from gloria.dist.process import Process, on_any_rank
from gloria.errors import UserError
from gloria.tasks.catalog import find_task
from gloria.tasks.examples import Example, Prediction
from gloria.tasks.formats.files import Loaded as Read
from gloria.tasks.formats.lastword import LOG_LIKELIHOOD, RULES
from gloria.tasks.models.backbones import LoadedModel, load_model
from gloria.tasks.models.finetuned import FinetunedModel, find_finetuned, load_finetuned, predict, task_heads
from gloria.tasks.models.zeroshot import (
    GENERATION,
    LIKELIHOOD,
    EvalSettings,
    Evaluation,
    answers,
    corpus_texts,
    perplexity,
)
from gloria.tasks.report import score_record
from gloria.tasks.samples import sample_folder
from gloria.tasks.task import Task

PERPLEXITY = "perplexity"
# The flags that change a score, and the families of tasks that they are for.
USES = {
    "method": {"pair"},
    "shots": {"pair", "choice"},
    "seed": {"pair", "choice"},
    "rule": {"last_word"},
    "length": {PERPLEXITY},
    "stride": {PERPLEXITY},
}
Request = tuple[Task | None, Path | None]  # a task, None for perplexity, and its files, None for the run's own corpus


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
    method: str = option(LIKELIHOOD, "how a model answers pairs", choices=(LIKELIHOOD, GENERATION))
    shots: int | None = option(None, "solved examples before each; default 0, with generation 5", minimum=0)
    seed: int = option(0, "of the shots", minimum=0)
    rule: str | None = option(None, f"of last words: {', '.join((*RULES, LOG_LIKELIHOOD))}; default: all of them")
    length: int | None = option(None, "tokens of a window of text; default: all that the model sees", minimum=1)
    stride: int | None = option(None, "tokens that a window of text scores; default: half of its length", minimum=1)
    batch: int = option(16, "rows at a time", minimum=1)
    precision: str = option(
        "auto",
        "of the weights: auto is bf16 on a GPU that has it, about ten times as fast there, and fp32 elsewhere",
        choices=("auto", "fp32", "bf16"),
    )
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
            (task, Path(folder) if folder else sample_folder(task) if task else None)
            for task, folder in zip(tasks, folders)
        ]

    @property
    def rules(self) -> tuple[str, ...]:
        return tuple(self.rule.split(",")) if self.rule else (*RULES, LOG_LIKELIHOOD)

    @property
    def dtype(self) -> torch.dtype:
        return torch.bfloat16 if self.precision == "bf16" else torch.float32

    def given(self, families: Collection[str] | None = None) -> dict[str, Any]:
        """The flags that were given and that tasks of these families use; None: of any."""
        given = {flag: getattr(self, flag) for flag, users in USES.items() if families is None or users & set(families)}
        given |= {"split": self.split, "precision": self.precision}
        without = {"method": LIKELIHOOD, "seed": 0, "precision": "fp32"}
        return {flag: value for flag, value in given.items() if value != without.get(flag)}


def with_precision(options: EvaluateOptions, device: torch.device) -> EvaluateOptions:
    """The options with `auto` for what it is on the device; every rank calls this, and gets the same answer."""
    if options.precision != "auto":
        return options
    has = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    return dataclasses.replace(options, precision="fp32" if on_any_rank(not has) else "bf16")


@dataclass(frozen=True)
class Scored:
    """A record for results.json, and the predictions that it is of; perplexity has none."""

    record: dict[str, Any]
    task: Task | None = None
    examples: Sequence[Example] = ()
    predictions: Mapping[str, Prediction] = field(default_factory=dict)


def about(request: Request, options: EvaluateOptions) -> dict[str, Any]:
    """What a score depends on besides the model: the files, and the flags that were given and that the task uses."""
    task, folder = request
    settings = options.given({task.family if task else PERPLEXITY})
    return {"data": str(folder.absolute()) if folder else "the run's own corpus", "settings": settings}


def load_and_score(model: str, options: EvaluateOptions, process: Process) -> tuple[str, Iterator[Scored]]:
    """Load a model; its name (of a run with the step) and its scores, one a task, rule or source of a corpus."""
    if folder := find_finetuned(model):
        if unused := options.given().keys() & USES.keys():
            raise UserError(f"--{min(unused)}: {folder} predicts with its head, which has no use for it; leave it out")
        finetuned = load_finetuned(folder, process.device)
        finetuned.model.to(options.dtype)
        return finetuned.source, (
            score_head(finetuned, task, folder, options, process) for task, folder in options.requests
        )
    loaded, corpus = load_language_model(model, options, process)
    return loaded.source, score_language_model(loaded, corpus, options.requests, options, process)


def load_language_model(model: str, options: EvaluateOptions, process: Process) -> tuple[LoadedModel, Path | None]:
    """The model (of a run, its newest checkpoint) on this rank's device, and its own corpus if a task needs it."""
    loaded = load_model(model, language_model=True)
    loaded.require_language_model().to(process.device, options.dtype).eval()
    own = (None, None) in options.requests
    # Read at once: a checkpoint under watch may be gone before it is scored.
    return loaded, Path(read_trainer(Path(loaded.source))["recipe"]["data"]["corpus"]) if own else None


def score_language_model(
    loaded: LoadedModel, corpus: Path | None, requests: Sequence[Request], options: EvaluateOptions, process: Process
) -> Iterator[Scored]:
    """The scores of a language model on some tasks; `corpus` is the text of a perplexity without a text of its own."""
    for request in requests:
        task, folder = request
        text = folder or corpus
        assert text is not None, "only a perplexity is without files, and then there is a corpus"
        if task is None:
            found = _score_text(loaded, text, options, process)
        else:
            found = _score_task(loaded, task, text, options, process)
        for scored in found:
            scored.record.update(about(request, options))
            yield scored


def score_head(
    finetuned: FinetunedModel, task: Task | None, folder: Path | None, options: EvaluateOptions, process: Process
) -> Scored:
    """The scores of a fine-tuned head on a task with the same inputs and outputs."""
    own = finetuned.task
    if (
        task is None
        or folder is None
        or task.family != own.family
        or task_heads(task) != finetuned.inputs.heads
        or task.labels != own.labels
    ):
        name = PERPLEXITY if task is None else task.name
        raise UserError(
            f"--task: {finetuned.source} has heads for {own.name}, not {name}; give the model before fine-tuning"
        )
    split = options.split or task.reported_split(folder)
    read = task.load(folder, split)
    started = perf_counter()
    found, encoded = predict(finetuned, read.examples, options.batch, process)
    counts: dict[str, float] = {**read.counts, f"longer than {finetuned.inputs.max_length} tokens": encoded.truncated}
    counts["seconds"] = round(perf_counter() - started, 2)
    record = score_record(task, split, read.examples, found, data=folder, method="fine-tuned head", counts=counts)
    return Scored(record | about((task, folder), options), task, read.examples, found)


def _score_task(
    loaded: LoadedModel, task: Task, folder: Path, options: EvaluateOptions, process: Process
) -> Iterator[Scored]:
    """The scores of a language model on a task, one a rule."""
    split, read, shots, train = read_task(task, folder, options)
    settings = EvalSettings(options.method, shots, options.seed, options.rules, options.batch)
    if process.is_main:
        print(f"scoring    {task.name} {split}: {len(read.examples)} examples of {folder}", flush=True)
    started = perf_counter()
    every = list(answers(Evaluation(loaded, task, read.examples, train, settings, process)))
    seconds = round(perf_counter() - started, 2)  # of all rules together: they share what they read
    for found in every:
        record = score_record(
            task,
            split,
            read.examples,
            found.predictions,
            rule=found.rule,
            data=folder,
            method=found.method,
            counts={**read.counts, "prompts cut to fit": found.cut, "seconds": seconds},
        )
        yield Scored(record, task, read.examples, found.predictions)


def read_task(task: Task, folder: Path, options: EvaluateOptions) -> tuple[str, Read, int, list[Example]]:
    """The split to score, its examples, the number of solved examples in a prompt, and those to choose them from."""
    if task.family == "span":
        raise UserError(
            f"--task: {task.name} is answered by a span, which needs a head; fine-tune the model on it first"
        )
    split = options.split or task.reported_split(folder)
    read = task.load(folder, split)
    shots = options.shots if task.family in USES["shots"] else 0
    if shots is None:
        shots = 5 if options.method == GENERATION and task.family in USES["method"] else 0
    return split, read, shots, task.read(folder, "train") if shots else []


def _score_text(loaded: LoadedModel, path: Path, options: EvaluateOptions, process: Process) -> Iterator[Scored]:
    """The perplexity of a text file, or of each source of a corpus."""
    length = options.length or loaded.max_length
    if length is None:
        raise UserError(f"--length: {loaded.source} has no known limit; give the length of a window in tokens")
    if loaded.max_length is not None and length > loaded.max_length:
        raise UserError(f"--length: {length} is more than the model sees, {loaded.max_length}; lower it")
    stride = options.stride or max(length // 2, 1)
    if stride > length:
        raise UserError(f"--stride: {stride} is more than the {length} tokens of a window; lower it")
    there = {name: texts for name, texts in corpus_texts(path).items() if texts}
    if not there:
        raise UserError(f"--data: {path} has no held-out text; give another corpus, or a text file")
    method = f"windows of {length} tokens, stride {stride}; each document on its own, its EOS not scored"
    for name, texts in there.items():
        if process.is_main:
            print(f"scoring    {PERPLEXITY} {name}: {len(texts)} documents of {path}", flush=True)
        started = perf_counter()
        scores, counts = perplexity(loaded, texts, length, stride, options.batch, process)
        n, seconds = counts["tokens"], round(perf_counter() - started, 2)
        record = {"task": PERPLEXITY, "split": name, "method": method, "n": n, "counts": {**counts, "seconds": seconds}}
        yield Scored(record | {"scores": {key: {"value": value, "n": n} for key, value in scores.items()}})
