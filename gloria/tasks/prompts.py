"""Prompts for models without a head: a context, and the answers whose log-likelihoods are compared."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

import xxhash

from gloria.errors import UserError
from gloria.tasks.examples import Choice, Example, LastWord, Pair, PairPrediction
from gloria.tasks.task import Task


@dataclass(frozen=True)
class Prompt:
    """A context and its possible continuations; `values` is what each stands for, `gold` the right one or None.

    The values are labels (entailment), scores (similarity), indices (choice), or the word itself (last word: one
    answer, or none where the gold word is empty). Winograd schemas have no context: the answers are whole sentences.
    """

    context: str
    answers: tuple[str, ...]
    values: tuple[str | float | int, ...]
    gold: str | None = None


def prompt(task: Task, example: Example, shots: Sequence[Example] = (), target: str = "") -> Prompt:
    """The prompt of an example after `shots` solved ones; `target` says which head of a pair (default the first).

    Raises `UserError` for a task that has no prompt (spans).
    """
    if task.ask is None:
        raise UserError(f"{task.name}: has no prompt; fine-tune a head for it")
    own, *solved = (task.ask(task, one, target) for one in (example, *shots))
    before = "".join(f"{shot.context}{shot.gold}\n\n" for shot in solved if shot.gold)
    return Prompt(before + own.context, own.answers, own.values, own.gold)


def ask_pair(task: Task, example: Pair, target: str) -> Prompt:
    """The task's template, and the words for its labels or scores."""
    target = target or task.targets[0]
    template = task.templates[target]
    # Not str.format: a sentence may hold braces.
    context = re.sub(r"\{(first|second)\}", lambda field: getattr(example, field[1]), template.text)
    answers = tuple(f" {word}" for word in template.words.values())
    if target == "entailment":
        gold = template.words.get(example.label or "")
        return Prompt(context, answers, tuple(template.words), gold and f" {gold}")
    values, score = tuple(map(float, template.words)), example.score
    nearest = None if score is None else min(values, key=lambda value: abs(value - score))
    return Prompt(context, answers, values, None if nearest is None else answers[values.index(nearest)])


def ask_word(task: Task, example: LastWord, target: str) -> Prompt:
    word = (example.word or "").strip()
    return Prompt(example.context.rstrip(), (f" {word}",) if word else (), (word,) if word else (), f" {word}")


def ask_choice(task: Task, example: Choice, target: str) -> Prompt:
    """The question, and each choice as its answer; where there is no question the choices are whole texts."""
    before, space = (f"Pergunta: {example.prompt}\nResposta:", " ") if example.prompt else ("", "")
    answers = tuple(space + choice for choice in example.choices)
    gold = None if example.answer is None else answers[example.answer]
    return Prompt(before, answers, tuple(range(len(answers))), gold)


def choose_shots(train: Sequence[Example], example: Example, count: int, seed: int) -> list[Example]:
    """`count` different examples of `train` for this example, by hash of (seed, id); never the example itself."""
    if len(train) <= count:
        raise UserError(f"{len(train)} training examples are too few for {count} shots; ask for fewer shots")
    chosen: dict[int, Example] = {}
    draw = 0
    while len(chosen) < count:
        index = xxhash.xxh3_64_intdigest(f"{seed} {example.id} {draw}".encode()) % len(train)
        if train[index] != example:
            chosen[index] = train[index]
        draw += 1
    return list(chosen.values())


def original_prompt(example: Pair, shots: Sequence[Pair]) -> str:
    """The original's few-shot prompt for ASSIN-2, to be continued by generation (its `run_assin_few_shot.py`)."""
    solved = "".join(
        f"{_original_pair(shot)}\nSemelhança: {shot.score}\nConsequência: {int(shot.label != 'None')} \n\n"
        for shot in shots
    )
    return f"Exemplos Classificados:\n{solved}Para classificar a Semelhança e Consequência:\n{_original_pair(example)}"


def _original_pair(pair: Pair) -> str:
    return f"Premissa: {pair.first}\nHipotese: {pair.second}"


def read_original(continuation: str) -> PairPrediction:
    """The first similarity and consequence in a continuation of `original_prompt`; None for a missing one.

    The original left a pair out of the score when it could not read the answer; here that is a wrong answer.
    """
    found = re.search(r"Semelhança: (\d+(?:\.\d+)?)\s+Consequência: ([01])\b", continuation)
    return PairPrediction(("None", "Entailment")[int(found[2])], float(found[1])) if found else PairPrediction()
