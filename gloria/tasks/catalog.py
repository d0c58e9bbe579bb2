"""Every task as data. A new task of a known family is an entry of `TASKS`; no other file has a task's name in it.

A metric of one's own is a function as in metrics.py and its name in the task. Examples of another kind are a dataclass
as in examples.py, a reader and an `ask` that makes a prompt of it: a file in formats/, beside the entry here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from gloria.config.cli import suggest
from gloria.errors import UserError
from gloria.tasks.formats.choices import read_enem, read_exams, read_wsc
from gloria.tasks.formats.lastword import read_last_words
from gloria.tasks.formats.pairs import read_assin, read_table
from gloria.tasks.formats.spans import read_squad
from gloria.tasks.metrics import (
    Answered,
    accuracy,
    binary_f1,
    macro_f1,
    mean_f1_pearson,
    mse,
    pearson,
    span_metric,
    span_oracle,
    spearman,
)
from gloria.tasks.own import CHOICE, SPANS, WORDS, is_own, read_own
from gloria.tasks.prompts import ask_choice, ask_pair, ask_word
from gloria.tasks.statistics import Measure
from gloria.tasks.task import Family, Task, Template


def find_task(name: str) -> Task:
    """A task by its name, or by the file of one of the user's own. Raises `UserError` with the nearest name."""
    if is_own(name):
        return read_own(name)
    if name not in TASKS:
        raise UserError(f"{name}: unknown task; {suggest(name, list(TASKS))}")
    return TASKS[name]


Metrics = Mapping[str, Callable[[Answered], Measure]]

PREMISE = "Premissa: {first}\nHipótese: {second}\nPergunta: "
FOLLOWS = PREMISE + "A hipótese pode ser inferida pela premissa? Sim ou Não?\nResposta:"
KIND = PREMISE + "A hipótese é inferida da premissa, é uma paráfrase dela, ou nenhuma das duas coisas?\nResposta:"
SENTENCES = "Frase 1: {first}\nFrase 2: {second}\nPergunta: "
SAME = SENTENCES + "As duas frases dizem o mesmo? Sim ou Não?\nResposta:"
MOOD = "Frase: {first}\nPergunta: O sentimento da frase é positivo ou negativo?\nResposta:"
SQUAD1 = {name: SPANS[name] for name in ("exact_match", "f1", "exact_match_pt", "f1_pt")}
SQUAD2 = SQUAD1 | {
    "has_answer_exact": partial(span_metric, column=0, has=True),
    "has_answer_f1": partial(span_metric, column=1, has=True),
    "no_answer_exact": partial(span_metric, column=0, has=False),
    "best_exact_oracle": partial(span_oracle, column=0),
    "best_f1_oracle": partial(span_oracle, column=1),
}
ACCURACY = {"accuracy": accuracy}


def _similar(low: int, high: int) -> Template:
    text = f"{SENTENCES}De {low} a {high}, quão semelhantes são as duas frases?\nResposta:"
    return Template(text, {str(value): str(value) for value in range(low, high + 1)})


def _assin(name: str, words: dict[str, str], text: str, **where: Any) -> list[Task]:
    """A set of ASSIN as entailment, as similarity, and as both at once."""
    both, similar = {"accuracy": accuracy, "macro_f1": macro_f1}, {"pearson": pearson, "mse": mse}
    # The mean is no official metric: it is what chooses a model of two heads.
    forms = {
        "": (("entailment", "similarity"), both | similar | {"mean_f1_pearson": mean_f1_pearson}, "mean_f1_pearson"),
        "-entailment": (("entailment",), both, "macro_f1"),
        "-similarity": (("similarity",), similar, "pearson"),
    }
    about = {"labels": tuple(words), "range": (1.0, 5.0), "submission": f"{name}.xml", "ask": ask_pair, **where}
    about["templates"] = {"entailment": Template(text, words), "similarity": _similar(1, 5)}
    return [
        Task(name + form, "pair", read_assin, metrics, selection, targets=targets, **about)
        for form, (targets, metrics, selection) in forms.items()
    ]


def _glue(name: str, official: str, template: Template, metrics: Metrics, **about: Any) -> Task:
    """A task of GLUE: PLUE's SPLIT.tsv or GLUE-PTPT's SPLIT.jsonl, in the folder given or in one of its name."""
    stems = {"train": ["train"], "dev": ["dev", "validation"], "test": ["test"]}
    tables = {split: [stem + end for stem in names for end in (".tsv", ".jsonl")] for split, names in stems.items()}
    files = {split: (*names, *(f"{official}/{name}" for name in names)) for split, names in tables.items()}
    target = "entailment" if "labels" in about else "similarity"
    columns = {
        "id": ("index", "idx", "id"),
        "first": ("sentence1", "#1 String"),
        "second": ("sentence2", "#2 String"),
        "label": ("label", "Quality"),
        "score": ("score", "label"),
    }
    about = {"columns": columns, "targets": (target,), "templates": {target: template}, **about}
    about |= {"files": files, "hold_out": True, "submission": f"{official}.tsv", "ask": ask_pair}
    return Task(name, "pair", read_table, metrics, next(iter(metrics)), **about)


def _squad(name: str, metrics: Metrics, train: tuple[str, ...], dev: tuple[str, ...]) -> Task:
    files = {"train": (*train, "train.jsonl"), "dev": (*dev, "dev.jsonl", "validation.jsonl")}
    return Task(name, "span", read_squad, metrics, "f1", files, hold_out=True, submission=f"{name}.json")


def _unsplit(name: str, family: Family, reader: Any, metrics: Metrics, *files: str, **about: Any) -> Task:
    """A set that is only evaluated on."""
    ask = ask_word if family == "last_word" else ask_choice
    about = {"files": {"test": files} if files else {}, "submission": f"{name}.jsonl", "ask": ask, **about}
    return Task(name, family, reader, metrics, next(iter(metrics)), **about)


def _files(pattern: str, *splits: str) -> dict[str, tuple[str, ...]]:
    """{split: names}, the folder being the one with the files or the one above it."""
    return {split: (pattern.format(split).rpartition("/")[2], pattern.format(split)) for split in splits}


SPLITS = ("train", "dev", "test")
THREE = {"None": "Nenhuma", "Entailment": "Inferida", "Paraphrase": "Paráfrase"}
TWO = {"None": "Não", "Entailment": "Sim"}
SST2 = {"id": ("index", "idx", "id"), "first": ("sentence",), "label": ("label",)}
YES_NO = {"0": "Não", "1": "Sim"}
BINARY = ("0", "1")
RTE = {"entailment": "Sim", "not_entailment": "Não"}
ASSIN2 = _files("assin2/assin2-{}.xml", "dev", "test") | {
    "train": ("assin2-train-only.xml", "assin2/assin2-train-only.xml")
}

_PTPT = _assin("assin1-ptpt", THREE, KIND, files=_files("assin1/assin-ptpt-{}.xml", *SPLITS))
_PTBR = _assin("assin1-ptbr", THREE, KIND, files=_files("assin1/assin-ptbr-{}.xml", *SPLITS))
_ENEM22 = _unsplit("enem-2022", "choice", read_enem, CHOICE, "2022.json", "enem/2022.json")
_ENEM24 = _unsplit("enem-2024", "choice", read_enem, CHOICE, "2024.jsonl", "enem/2024.jsonl")

TASKS: dict[str, Task] = {
    task.name: task
    for task in (
        *_PTPT,
        *_PTBR,
        *_assin("assin1", THREE, KIND, parts=((_PTPT[0], "ptpt"), (_PTBR[0], "ptbr"))),
        *_assin("assin2", TWO, FOLLOWS, files=ASSIN2),
        _glue("mrpc", "MRPC", Template(SAME, YES_NO), {"f1": binary_f1, "accuracy": accuracy}, labels=BINARY),
        _glue("rte", "RTE", Template(FOLLOWS, RTE), ACCURACY, labels=tuple(RTE)),
        _glue("stsb", "STS-B", _similar(0, 5), {"pearson": pearson, "spearman": spearman}, range=(0.0, 5.0)),
        _glue("wnli", "WNLI", Template(FOLLOWS, YES_NO), ACCURACY, labels=BINARY),
        _glue(
            "sst2", "SST-2", Template(MOOD, {"0": "negativo", "1": "positivo"}), ACCURACY, labels=BINARY, columns=SST2
        ),
        _squad(
            "squad1",
            SQUAD1,
            ("squad-train-v1.1.json", "train-v1.1.json", "sample-v1.1-pt.json"),
            ("squad-dev-v1.1.json", "dev-v1.1.json"),
        ),
        _squad(
            "squad2", SQUAD2, ("squad-train-v2.0.json", "train-v2.0.json"), ("squad-dev-v2.0.json", "dev-v2.0.json")
        ),
        _squad("faquad", SQUAD1, ("train.json",), ("dev.json",)),
        _unsplit("calame", "last_word", read_last_words, WORDS, "calamept_all.jsonl", "calame-pt.jsonl", "test.jsonl"),
        _unsplit(
            "lambada", "last_word", read_last_words, WORDS, "lambada-pt.jsonl", "lambada_test.jsonl", "test.jsonl"
        ),
        _ENEM22,
        _ENEM24,
        _unsplit("enem", "choice", read_enem, CHOICE, parts=((_ENEM22, "2022"), (_ENEM24, "2024"))),
        _unsplit("exams", "choice", read_exams, CHOICE, files=_files("exams-pt/{}_pt.jsonl", *SPLITS)),
        _unsplit("wsc", "choice", read_wsc, CHOICE, "portuguese_wsc.json", "wsc-pt/portuguese_wsc.json"),
    )
}
