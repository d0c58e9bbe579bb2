"""Answers of a language model without a head, by what it finds likely or by what it writes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np

from gloria.data.corpus import MANIFEST, open_corpus
from gloria.data.prepare.text import format_of, read_documents
from gloria.data.shards import map_tokens, read_index
from gloria.data.tokenizer import load_tokenizer
from gloria.dist.process import Process
from gloria.errors import UserError
from gloria.tasks.examples import (
    Choice,
    ChoicePrediction,
    Example,
    LastWord,
    Pair,
    PairPrediction,
    Prediction,
    WordPrediction,
)
from gloria.tasks.formats.lastword import LOG_LIKELIHOOD, RULES
from gloria.tasks.models.backbones import Loaded
from gloria.tasks.models.encode import tokenize
from gloria.tasks.models.loglikelihood import (
    Request,
    Settings,
    continuations,
    log_likelihoods,
    perplexity_scores,
    requests,
    start_ids,
    windows,
)
from gloria.tasks.prompts import Prompt, choose_shots, original_prompt, prompt, read_original
from gloria.tasks.task import Task

LIKELIHOOD, GENERATION = "likelihood", "generation"
ORIGINAL_TOKENS = 24  # " Semelhança: 4.5 / Consequência: 1" in any tokenizer


@dataclass(frozen=True)
class Answers:
    """Predictions by example id, the rule and method that made them, and how many prompts were cut to fit."""

    predictions: dict[str, Prediction]
    method: str
    cut: int
    rule: str = ""


@dataclass(frozen=True)
class EvalSettings:
    """How a task is put to a model."""

    method: str  # LIKELIHOOD or GENERATION
    shots: int
    seed: int
    rules: tuple[str, ...]  # of last words
    batch: int


def answers(
    loaded: Loaded,
    task: Task,
    examples: Sequence[Example],
    train: Sequence[Example],
    asking: EvalSettings,
    process: Process,
) -> Iterator[Answers]:
    """The model's answers: one set, or for last words one a rule."""
    if task.family == "last_word":
        yield from _words(loaded, examples, asking, process)
    elif task.family == "choice":
        yield _choices(loaded, task, examples, train, asking, process)
    elif asking.method == GENERATION:
        yield _original(loaded, task, examples, train, asking, process)
    else:
        yield _pairs(loaded, task, examples, train, asking, process)


def _pairs(
    loaded: Loaded,
    task: Task,
    examples: Sequence[Pair],
    train: Sequence[Example],
    asking: EvalSettings,
    process: Process,
) -> Answers:
    found: dict[str, dict[str, str | float]] = {example.id: {} for example in examples}
    cut = 0
    for target in task.targets:
        prompts = [_with_shots(task, example, train, asking, target) for example in examples]
        logs, cut_here = _answer_logs(loaded, prompts, asking.batch, process)
        cut += cut_here
        for example, asked, values in zip(examples, prompts, logs):
            if not np.isfinite(values).all():
                continue  # weights that are not finite predict nothing
            if target == "entailment":
                found[example.id]["label"] = str(asked.values[int(values.argmax())])
            else:
                weights = np.exp(values - values.max())
                found[example.id]["score"] = float(weights @ np.array(asked.values, float) / weights.sum())
    predictions: dict[str, Prediction] = {name: PairPrediction(**values) for name, values in found.items()}
    way = "log-likelihood of the answers (a score is their mean, weighted by probability)"
    return Answers(predictions, f"{asking.shots} shots, {way}", cut)


def _choices(
    loaded: Loaded,
    task: Task,
    examples: Sequence[Choice],
    train: Sequence[Example],
    asking: EvalSettings,
    process: Process,
) -> Answers:
    every = [(example, _with_shots(task, example, train, asking, "")) for example in examples]
    asked = [(example, prompt_) for example, prompt_ in every if prompt_.answers]
    prompts = [prompt_ for _, prompt_ in asked]
    logs, cut = _answer_logs(loaded, prompts, asking.batch, process)
    predictions: dict[str, Prediction] = {}
    for (example, _), values in zip(asked, logs):
        predictions[example.id] = ChoicePrediction(tuple(values.tolist()))
    return Answers(predictions, f"{asking.shots} shots, log-likelihood of the answers", cut)


def _original(
    loaded: Loaded,
    task: Task,
    examples: Sequence[Pair],
    train: Sequence[Example],
    asking: EvalSettings,
    process: Process,
) -> Answers:
    if set(task.targets) != {"entailment", "similarity"} or task.labels != ("None", "Entailment"):
        raise UserError(f"--method: the original's prompt is for assin2, not {task.name}; use {LIKELIHOOD}")
    texts = [original_prompt(example, _shots(example, train, asking)) for example in examples]
    settings = Settings(ORIGINAL_TOKENS, is_over=lambda text: read_original(text + "\n") != PairPrediction())
    ((written, cut),), _ = continuations(loaded, texts, [settings], asking.batch, process)
    predictions: dict[str, Prediction] = {example.id: read_original(text) for example, text in zip(examples, written)}
    return Answers(
        predictions, f"{asking.shots} shots, the original's prompt, greedy; what cannot be read is wrong", cut
    )


def _words(loaded: Loaded, examples: Sequence[LastWord], asking: EvalSettings, process: Process) -> Iterator[Answers]:
    contexts = [example.context.rstrip() for example in examples]
    asked: list[int] = []
    if LOG_LIKELIHOOD in asking.rules:
        asked = [number for number, example in enumerate(examples) if (example.word or "").strip()]
    words = [(contexts[number], f" {examples[number].word.strip()}") for number in asked]
    made, cut_words = requests(loaded, words) if words else ([], 0)
    written, logs = {}, {}
    for strip, prompts in ((True, contexts), (False, [example.context for example in examples])):
        names = [name for name in asking.rules if name in RULES and RULES[name].strip == strip]
        rules = [RULES[name] for name in names]
        settings = [Settings(rule.max_new_tokens, rule.repetition_penalty, rule.is_over) for rule in rules]
        if strip or names:
            along = dict(zip(asked, made)) if strip else {}
            texts, found = continuations(loaded, prompts, settings, asking.batch, process, along)
            written |= dict(zip(names, texts))
            logs |= found
    for name in asking.rules:
        if name == LOG_LIKELIHOOD:
            predictions: dict[str, Prediction] = {
                examples[number].id: WordPrediction(log_likelihood=float(log), greedy=bool(greedy))
                for number, (log, greedy) in logs.items()
            }
            yield Answers(predictions, "log-likelihood of the gold word", cut_words, name)
            continue
        rule, (continued, cut) = RULES[name], written[name]
        predictions = {example.id: WordPrediction(text=text) for example, text in zip(examples, continued)}
        penalty = f", repetition penalty {rule.repetition_penalty:g}" if rule.repetition_penalty != 1 else ""
        yield Answers(predictions, f"greedy, at most {rule.max_new_tokens} tokens{penalty}", cut, name)


def _shots(example: Example, train: Sequence[Example], asking: EvalSettings) -> list[Example]:
    return choose_shots(train, example, asking.shots, asking.seed) if asking.shots else []


def _with_shots(task: Task, example: Example, train: Sequence[Example], asking: EvalSettings, target: str) -> Prompt:
    return prompt(task, example, _shots(example, train, asking), target)


def _answer_logs(
    loaded: Loaded, prompts: Sequence[Prompt], batch: int, process: Process
) -> tuple[list[np.ndarray], int]:
    """The log-likelihoods of each prompt's answers, in nats, and how many of the texts were cut."""
    texts = [(prompt_.context, answer) for prompt_ in prompts for answer in prompt_.answers]
    made, cut = requests(loaded, texts)
    values = log_likelihoods(loaded, made, batch, process)[:, 0]
    ends = np.cumsum([len(prompt_.answers) for prompt_ in prompts])
    return np.split(values, ends[:-1]), cut


def corpus_texts(path: Path) -> dict[str, list[str]]:
    """Held-out documents by source of a prepared corpus, or those of a text file, whatever it is called."""
    if (path / MANIFEST).is_file():
        corpus = open_corpus(path)
        tokenizer = load_tokenizer(corpus.tokenizer_folder)
        found: dict[str, list[str]] = {}
        for source in corpus.manifest.sources:
            texts = found.setdefault(source.name, [])
            for shard in source.valid.shards:
                offsets = read_index(path / shard.path).document_offsets()
                tokens = map_tokens(path / shard.path)
                for begin, end in pairwise(offsets.tolist()):
                    ids = [token for token in tokens[begin:end].tolist() if token != tokenizer.eos_id]
                    texts.append(tokenizer.decode(ids))
        return found
    if not path.is_file():
        raise UserError(f"--data: {path} is neither a text file nor a prepared corpus; perplexity needs one of them")
    kind = format_of(str(path))
    if kind is None:
        raise UserError(f"--data: {path}: its name tells no format; call it .txt or .jsonl")
    documents = list(read_documents(str(path), kind))
    if bad := [document for document in documents if document.problem]:
        raise UserError(f"{path}:{bad[0].line}: {bad[0].problem}; mend it ({len(bad)} such documents)")
    return {path.name: [document.text for document in documents if document.text.strip()]}


def perplexity(
    loaded: Loaded, texts: Sequence[str], length: int, stride: int, batch: int, process: Process
) -> tuple[dict[str, float], dict[str, int]]:
    """Perplexities and bits per byte of documents, each on its own, and counts; EOS is not scored."""
    start = start_ids(loaded.tokenizer, needed=True)
    asked: list[Request] = []
    for row in tokenize(loaded.tokenizer, texts):
        asked += windows(start[-1:] + row.ids, length, stride)
    counts = {
        "documents": len(texts),
        "bytes": sum(len(text.encode()) for text in texts),
        "words": sum(len(text.split()) for text in texts),
        "tokens": sum(request.scored for request in asked),
    }
    if not counts["tokens"]:
        raise UserError("--data: there is no text in it; give another file")
    nats = -float(log_likelihoods(loaded, asked, batch, process)[:, 0].sum())
    return perplexity_scores(nats, counts["tokens"], counts["words"], counts["bytes"]), counts
