"""A task of the user's own, as a TOML file says it: `--task emotions.toml`. No file of ours is touched.

kind = "text"                                    # pair, text, span, last_word, choice
files = { train = "train.tsv", test = "test.tsv" }
columns = { text = "frase", label = "emocao" }   # where the file's names are others
labels = ["0", "1"]
metrics = ["macro_f1", "accuracy"]               # the first chooses the checkpoint
prompt = "Frase: {text}\\nSentimento:"
words = { "0" = "negativo", "1" = "positivo" }
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeGuard

from gloria.config.cli import from_mapping, option, read_toml, suggest
from gloria.errors import UserError
from gloria.tasks.examples import Choice, LastWord
from gloria.tasks.formats.files import Loaded, Problems, check_unique, json_rows, tab_rows
from gloria.tasks.formats.lastword import LOG_LIKELIHOOD, RULES
from gloria.tasks.formats.pairs import read_table
from gloria.tasks.formats.spans import read_squad
from gloria.tasks.metrics import (
    PORTUGUESE,
    acc,
    acc_norm,
    accuracy,
    binary_f1,
    macro_f1,
    mse,
    pearson,
    span_metric,
    spearman,
    word_greedy,
    word_match,
    word_perplexity,
)
from gloria.tasks.prompts import Prompt, ask_pair, ask_word
from gloria.tasks.task import Family, Task, Template


@dataclass(frozen=True)
class OwnTask:
    """The keys of a task's file."""

    kind: str = option(
        help="pair and text are classified or scored, a span answers by a part of its context, a last word is "
        "written, of choices the likeliest is taken",
        choices=("pair", "text", "span", "last_word", "choice"),
    )
    files: dict[str, str] = option(help="train, dev, test: a file each, relative to this one; .tsv or .jsonl")
    columns: dict[str, str] = option({}, "a field of the kind -> the file's name for it")
    labels: list[str] = option([], "of a pair or text that is classified, in the order of the head")
    range: tuple[float, float] | None = option(None, "lowest and highest score of a pair or text that is scored")
    metrics: list[str] = option([], "those that are reported, all of the kind by default; the first chooses")
    prompt: str = option("", "what a model without a head reads, with the fields in braces")
    words: dict[str, str] = option({}, "what is written after the prompt for a label, or for each of some scores")


CLASSES = {"accuracy": accuracy, "macro_f1": macro_f1, "f1": binary_f1}
SCORES = {"pearson": pearson, "spearman": spearman, "mse": mse}
# Of published tasks and one's own alike (catalog.py).
WORDS = {f"exact_match:{rule}": word_match for rule in RULES}
WORDS |= {f"accuracy:{LOG_LIKELIHOOD}": word_greedy, f"perplexity:{LOG_LIKELIHOOD}": word_perplexity}
CHOICE = {"acc": acc, "acc_norm": acc_norm}
SPANS = {
    "f1": partial(span_metric, column=1),
    "exact_match": partial(span_metric, column=0),
    "f1_pt": partial(span_metric, column=1, articles=PORTUGUESE),
    "exact_match_pt": partial(span_metric, column=0, articles=PORTUGUESE),
}
METRICS: dict[str, dict[str, Any]] = {"span": SPANS, "last_word": WORDS, "choice": CHOICE}
FIELDS = {
    "pair": ("id", "first", "second", "label", "score"),
    "text": ("id", "text", "label", "score"),
    "span": (),  # SQuAD's JSON, or its rows
    "last_word": ("id", "context", "word"),
    "choice": ("id", "question", "choices", "answer"),
}


def is_own(name: str) -> bool:
    """Whether a task's name is a file of the user's."""
    return name.endswith(".toml")


def read_own(name: str) -> Task:
    """The task in a TOML file; every problem of it in one `UserError`."""
    path = Path(name)
    own = from_mapping(OwnTask, read_toml(path), str(path))
    family: Family = "pair" if own.kind in ("pair", "text") else own.kind  # type: ignore[assignment]
    known = _metrics(own)
    if problems := [f"{path}: {problem}" for problem in _problems(own, known)]:
        raise UserError(*problems)
    metrics = {metric: known[metric] for metric in own.metrics or known}
    fields = {field: own.columns.get(field, field) for field in FIELDS[own.kind]}
    readers = {"pair": read_table, "span": read_squad, "last_word": read_words, "choice": read_choices}
    asks: dict[Family, Any] = {"pair": ask_pair, "last_word": ask_word, "choice": ask_choice}
    target = "entailment" if own.labels else "similarity"  # the heads' names: a classification, a score
    prompt = own.prompt
    if own.kind == "text":
        fields["first"], prompt = fields.pop("text"), prompt.replace("{text}", "{first}")
    return Task(
        path.stem,
        family,
        readers[family],
        metrics,
        next(iter(metrics)),
        files={split: (file,) for split, file in own.files.items()},
        labels=tuple(own.labels),
        range=own.range,
        targets=(target,) if family == "pair" else (),
        columns={field: (column,) for field, column in fields.items()},
        templates={target: Template(prompt, own.words)} if prompt else {},
        ask=asks.get(family) if prompt or family in ("last_word", "choice") else None,
        submission=f"{path.stem}.jsonl",
        hold_out="dev" not in own.files,
        source=str(path.absolute()),
    )


def _metrics(own: OwnTask) -> dict[str, Any]:
    """The metrics of a kind, by name."""
    if own.kind in METRICS:
        return METRICS[own.kind]
    if not own.labels:
        return SCORES
    return {name: metric for name, metric in CLASSES.items() if name != "f1" or len(own.labels) == 2}


def _problems(own: OwnTask, known: dict[str, Any]) -> list[str]:
    """What contradicts itself in a task's file."""
    splits = ("train", "dev", "test")
    found = [f"files.{split}: unknown split; {suggest(split, splits)}" for split in own.files if split not in splits]
    if not own.files:
        found.append("files: is empty; name a file for train, dev or test")
    fields = FIELDS[own.kind]
    for field in own.columns.keys() - set(fields):
        what = suggest(field, fields) if fields else "a span is read in the format of SQuAD"
        found.append(f"columns.{field}: unknown field; {what}")
    found += [f"metrics: {name}: unknown metric; {suggest(name, known)}" for name in own.metrics if name not in known]
    if own.kind in ("pair", "text"):
        if bool(own.labels) == bool(own.range):
            found.append("labels: give labels of a classification or the range of a score, one of them")
        if bool(own.prompt) != bool(own.words):
            found.append("words: a prompt needs the words that answer it, and they need a prompt; give both or none")
        for word in own.words:
            if (word not in own.labels) if own.labels else not _is_number(word):
                found.append(f"words.{word}: is no label and no score; the words are by label, or by score")
        bare = [label for label in own.labels if label not in own.words] if own.words else []
        found += [f"words: has none for {label}; give each label its word" for label in bare]
    else:
        given = [key for key in ("labels", "range", "words") if getattr(own, key)]
        found += [f"{key}: has no effect on {own.kind}; remove it" for key in given]
    if own.kind == "span" and own.prompt:
        found.append("prompt: has no effect on span, which a head answers; remove it")
    names = [name for name in fields if name not in ("id", "label", "score", "choices", "answer", "word")]
    if own.prompt and not any(f"{{{name}}}" in own.prompt for name in names):
        found.append(f"prompt: names no field; write {' and '.join(f'{{{name}}}' for name in names)} where it stands")
    return found


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _rows(path: Path, problems: Problems) -> list[tuple[int, dict[str, Any]]]:
    rows: Any = tab_rows(path, problems) if path.suffix == ".tsv" else json_rows(path, problems)
    return list(rows)


def read_words(path: Path, task: Task) -> Loaded:
    """Rows of a context and the word that ends it; the context is put into the prompt, if the task has one."""
    problems = Problems(path)
    examples, lines = [], []
    template = next(iter(task.templates.values()), Template("{context}", {}))
    for line, row in _rows(path, problems):
        id, context, word = (row.get(task.columns[field][0]) for field in ("id", "context", "word"))
        if not isinstance(context, str) or not context.strip() or not isinstance(word, str | None):
            names = " and ".join(task.columns[field][0] for field in ("context", "word"))
            problems.add(line, f"a part is missing or no text; {names} are expected")
            continue
        text = template.text.replace("{context}", context)
        examples.append(LastWord(str(id if id is not None else line), text, word))
        lines.append(line)
    return _loaded(examples, lines, problems)


def read_choices(path: Path, task: Task) -> Loaded:
    """Rows of a question, its choices (in tsv parted by " | ") and the right one: its index from 0, letter or text."""
    problems = Problems(path)
    examples, lines = [], []
    for line, row in _rows(path, problems):
        id, question, choices, answer = (
            row.get(task.columns[field][0]) for field in ("id", "question", "choices", "answer")
        )
        choices = choices.split(" | ") if isinstance(choices, str) else choices
        if not isinstance(question, str) or not _are_texts(choices):
            problems.add(line, "a part is missing or no text; a question and a list of choices are expected")
            continue
        right = _right_choice(choices, answer)
        if right == -1:
            problems.add(line, f'answer "{answer}" is none of the choices; give its index from 0, letter or text')
            continue
        examples.append(Choice(str(id if id is not None else line), question, tuple(choices), right))
        lines.append(line)
    return _loaded(examples, lines, problems)


def _are_texts(value: Any) -> TypeGuard[list[str]]:
    return isinstance(value, list) and all(isinstance(part, str) for part in value)


def _right_choice(choices: Sequence[str], answer: Any) -> int | None:
    """The index of the right choice, None where it is not said, -1 where it is no choice."""
    if answer is None or answer == "":
        return None
    if answer in choices:
        return choices.index(answer)
    text = str(answer).strip()
    index = int(text) if text.isdecimal() else ord(text.upper()) - ord("A") if len(text) == 1 else -1
    return index if 0 <= index < len(choices) else -1


def _loaded(examples: list[Any], lines: Sequence[int], problems: Problems) -> Loaded:
    check_unique(examples, lines, problems)
    if not examples and not problems.lines:
        problems.lines.append(f"{problems.path}: has no rows; get the file again")
    problems.report()
    return Loaded(examples, {"examples": len(examples), "not labelled": sum(not e.labelled() for e in examples)})


def ask_choice(task: Task, example: Choice, target: str) -> Prompt:
    """The task's prompt with the question in it, and each choice as its answer."""
    template = next(iter(task.templates.values()), Template("Pergunta: {question}\nResposta:", {}))
    answers = tuple(f" {choice}" for choice in example.choices)
    gold = None if example.answer is None else answers[example.answer]
    return Prompt(template.text.replace("{question}", example.prompt), answers, tuple(range(len(answers))), gold)
