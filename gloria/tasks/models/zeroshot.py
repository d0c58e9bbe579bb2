"""Answers of a language model without a head, by what it finds likely or by what it writes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from gloria.data.corpus import MANIFEST, open_corpus
from gloria.data.prepare.text import format_of, read_documents
from gloria.data.shards import map_tokens, read_index
from gloria.data.tokenizer import load_tokenizer
from gloria.dist.process import Process
from gloria.errors import UserError
from gloria.tasks.examples import (
    ChoicePrediction,
    Example,
    Pair,
    PairPrediction,
    Prediction,
    WordPrediction,
    all_of,
)
from gloria.tasks.formats.lastword import LOG_LIKELIHOOD, RULES
from gloria.tasks.models.backbones import LoadedModel
from gloria.tasks.models.encode import start_ids, tokenize
from gloria.tasks.models.loglikelihood import (
    Request,
    Settings,
    continuations,
    log_likelihoods,
    make_requests,
    perplexity_scores,
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
    """How a model is prompted with a task."""

    method: str  # LIKELIHOOD or GENERATION
    shots: int
    seed: int
    rules: tuple[str, ...]  # of last words
    batch: int


@dataclass(frozen=True)
class Evaluation:
    """A language model, the task and examples that it is scored on, and solved ones to choose shots from."""

    loaded: LoadedModel
    task: Task
    examples: Sequence[Any]  # of the task's kind
    train: Sequence[Example]
    settings: EvalSettings
    process: Process

    def prompts(self, target: str) -> list[Prompt]:
        """The prompts of all examples, each behind its shots; `target` is the head of a pair."""
        return [prompt(self.task, example, self.shots(example), target) for example in self.examples]

    def shots(self, example: Example) -> list[Example]:
        count = self.settings.shots
        return choose_shots(self.train, example, count, self.settings.seed) if count else []

    def log_likelihoods(self, prompts: Sequence[Prompt]) -> tuple[list[np.ndarray], int]:
        """The log-likelihoods of each prompt's answers, in nats, and how many of the texts were cut."""
        texts = [(prompt_.context, answer) for prompt_ in prompts for answer in prompt_.answers]
        made, cut = make_requests(self.loaded, texts)
        values = log_likelihoods(self.loaded, made, self.settings.batch, self.process)[:, 0]
        ends = np.cumsum([len(prompt_.answers) for prompt_ in prompts])
        return np.split(values, ends[:-1]), cut

    def continuations(self, texts: Sequence[str], settings: Sequence[Settings]) -> list[tuple[list[str], int]]:
        return continuations(self.loaded, texts, settings, self.settings.batch, self.process)


def answers(evaluation: Evaluation) -> Iterator[Answers]:
    """The model's answers: one set, or for last words one a rule."""
    if evaluation.task.family == "last_word":
        yield from _words(evaluation)
    elif evaluation.task.family == "choice":
        yield _choices(evaluation)
    else:
        yield (_original if evaluation.settings.method == GENERATION else _pairs)(evaluation)


def _pairs(evaluation: Evaluation) -> Answers:
    labels: dict[str, str] = {}
    scores: dict[str, float] = {}
    cut = 0
    for target in evaluation.task.targets:
        prompts = evaluation.prompts(target)
        logs, cut_here = evaluation.log_likelihoods(prompts)
        cut += cut_here
        for example, prompt_, values in zip(evaluation.examples, prompts, logs):
            if not np.isfinite(values).all():
                continue  # weights that are not finite predict nothing
            if target == "entailment":
                labels[example.id] = str(prompt_.values[int(values.argmax())])
            else:
                weights = np.exp(values - values.max())
                scores[example.id] = float(weights @ np.array(prompt_.values, float) / weights.sum())
    predictions: dict[str, Prediction] = {
        example.id: PairPrediction(labels.get(example.id), scores.get(example.id)) for example in evaluation.examples
    }
    way = "log-likelihood of the answers (a score is their mean, weighted by probability)"
    return Answers(predictions, f"{evaluation.settings.shots} shots, {way}", cut)


def _choices(evaluation: Evaluation) -> Answers:
    prompts = {e.id: prompt_ for e, prompt_ in zip(evaluation.examples, evaluation.prompts("")) if prompt_.answers}
    logs, cut = evaluation.log_likelihoods(list(prompts.values()))
    predictions: dict[str, Prediction] = {
        name: ChoicePrediction(tuple(values.tolist())) for name, values in zip(prompts, logs)
    }
    return Answers(predictions, f"{evaluation.settings.shots} shots, log-likelihood of the answers", cut)


def _original(evaluation: Evaluation) -> Answers:
    task, examples = evaluation.task, evaluation.examples
    if set(task.targets) != {"entailment", "similarity"} or task.labels != ("None", "Entailment"):
        raise UserError(f"--method: the original's prompt is for assin2, not {task.name}; use {LIKELIHOOD}")
    texts = [original_prompt(example, all_of(Pair, evaluation.shots(example))) for example in examples]
    settings = Settings(ORIGINAL_TOKENS, is_over=lambda text: read_original(text + "\n") != PairPrediction())
    ((written, cut),) = evaluation.continuations(texts, [settings])
    predictions: dict[str, Prediction] = {example.id: read_original(text) for example, text in zip(examples, written)}
    method = f"{evaluation.settings.shots} shots, the original's prompt, greedy; what cannot be read is wrong"
    return Answers(predictions, method, cut)


def _words(evaluation: Evaluation) -> Iterator[Answers]:
    examples, names = evaluation.examples, evaluation.settings.rules
    contexts = {True: [example.context.rstrip() for example in examples], False: [e.context for e in examples]}
    written: dict[str, tuple[list[str], int]] = {}
    for strip, texts in contexts.items():
        rules = {name: RULES[name] for name in names if name in RULES and RULES[name].strip == strip}
        settings = [Settings(rule.max_new_tokens, rule.repetition_penalty, rule.is_over) for rule in rules.values()]
        if rules:
            written |= dict(zip(rules, evaluation.continuations(texts, settings)))
    for name in names:
        if name == LOG_LIKELIHOOD:
            yield _gold_words(evaluation, contexts[True])
            continue
        rule, (texts, cut) = RULES[name], written[name]
        predictions: dict[str, Prediction] = {e.id: WordPrediction(text=text) for e, text in zip(examples, texts)}
        penalty = f", repetition penalty {rule.repetition_penalty:g}" if rule.repetition_penalty != 1 else ""
        yield Answers(predictions, f"greedy, at most {rule.max_new_tokens} tokens{penalty}", cut, name)


def _gold_words(evaluation: Evaluation, contexts: Sequence[str]) -> Answers:
    words = {
        e.id: (text, f" {e.word.strip()}") for e, text in zip(evaluation.examples, contexts) if (e.word or "").strip()
    }
    made, cut = make_requests(evaluation.loaded, list(words.values()))
    values = log_likelihoods(evaluation.loaded, made, evaluation.settings.batch, evaluation.process)
    predictions: dict[str, Prediction] = {
        name: WordPrediction(log_likelihood=float(log), greedy=bool(greedy))
        for name, (log, greedy) in zip(words, values)
    }
    return Answers(predictions, "log-likelihood of the gold word", cut, LOG_LIKELIHOOD)


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
        raise UserError(f"--data: {path}: has a name without a known format; rename it to .txt or .jsonl")
    documents = list(read_documents(str(path), kind))
    if bad := [document for document in documents if document.problem]:
        raise UserError(f"{path}:{bad[0].line}: {bad[0].problem}; correct it ({len(bad)} such documents)")
    return {path.name: [document.text for document in documents if document.text.strip()]}


def perplexity(
    loaded: LoadedModel, texts: Sequence[str], length: int, stride: int, batch: int, process: Process
) -> tuple[dict[str, float], dict[str, int]]:
    """Perplexities and bits per byte of documents, each on its own, and counts; EOS is not scored."""
    start = start_ids(loaded, needed=True)
    requests: list[Request] = []
    for row in tokenize(loaded.tokenizer, texts):
        requests += windows(start[-1:] + row.ids, length, stride)
    counts = {
        "documents": len(texts),
        "bytes": sum(len(text.encode()) for text in texts),
        "words": sum(len(text.split()) for text in texts),
        "tokens": sum(request.scored for request in requests),
    }
    if not counts["tokens"]:
        raise UserError("--data: there is no text in it; give another file")
    nats = -float(log_likelihoods(loaded, requests, batch, process)[:, 0].sum())
    return perplexity_scores(nats, counts["tokens"], counts["words"], counts["bytes"]), counts
