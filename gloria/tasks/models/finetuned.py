"""A fine-tuned model as a folder, and its predictions.

FOLDER/config.json, model.safetensors, tokenizer.json ...   the backbone, as Hugging Face has it
FOLDER/head.safetensors                                     our heads on it
FOLDER/adapter/                                             of LoRA: the same as peft has it, without the backbone
FOLDER/task.json                                            the task, its labels, how inputs were made
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from gloria.config.cli import from_mapping
from gloria.dist.process import Process
from gloria.errors import UserError
from gloria.files import parse_json_object, partial_folder, publish, read_bounded, to_json
from gloria.tasks.catalog import find_task
from gloria.tasks.examples import Example, Pair, PairPrediction, Prediction, Span, SpanPrediction, all_of
from gloria.tasks.models.adapters import has_adapters, merge_adapters, save_adapter
from gloria.tasks.models.backbones import load_model, save_model
from gloria.tasks.models.encode import (
    Encoded,
    Row,
    best_spans,
    collate,
    encode_pairs,
    encode_spans,
    length_batches,
    show_progress,
    sum_over_ranks,
    top_span_logits,
)
from gloria.tasks.models.heads import LABEL, SCORE, SPAN, TaskModel
from gloria.tasks.task import Task

TASK, HEAD = "task.json", "head.safetensors"
ADAPTER = "adapter"
MODEL = "model"  # the best one so far, in the folder of a fine-tuning
FORMAT = 1


@dataclass(frozen=True)
class Inputs:
    """How a task's examples become inputs of a model, and its outputs answers."""

    task: str
    labels: tuple[str, ...]
    heads: dict[str, int]  # name -> outputs
    max_length: int
    stride: int
    max_answer_tokens: int
    no_answer: bool  # some questions have none


@dataclass(frozen=True)
class FinetunedModel:
    """A model with heads, ready to predict."""

    source: str
    model: TaskModel
    tokenizer: PreTrainedTokenizerBase
    inputs: Inputs

    @property
    def task(self) -> Task:
        return find_task(self.inputs.task)


def task_heads(task: Task) -> dict[str, int]:
    """The heads that a task of pairs or spans asks for, with their outputs."""
    if task.family == "span":
        return {SPAN: 2}
    heads = {"entailment": (LABEL, len(task.labels)), "similarity": (SCORE, 1)}
    return dict(heads[target] for target in task.targets)


def encode(finetuned: FinetunedModel, examples: Sequence[Example], *, training: bool) -> Encoded:
    """The rows of a task's examples, as `finetuned.inputs` says."""
    inputs = finetuned.inputs
    if SPAN in inputs.heads:
        causal = finetuned.model.backbone.causal
        length, stride = inputs.max_length, inputs.stride
        spans = all_of(Span, examples)
        return encode_spans(spans, finetuned.tokenizer, length, stride, causal=causal, training=training)
    return encode_pairs(finetuned.task, all_of(Pair, examples), finetuned.tokenizer, inputs.max_length)


def pad_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """What fills a row: the pad token, or any other, for the mask hides it."""
    return tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0


@torch.no_grad()
def row_outputs(
    finetuned: FinetunedModel,
    rows: Sequence[Row],
    batch_size: int,
    process: Process,
    before_batch: Callable[[], None] = lambda: None,
) -> np.ndarray:
    """The outputs of the heads for every row, (rows, width) float64, the same on all ranks.

    Batches are formed over all rows, by length, and dealt out whole: any number of ranks computes the same
    ones. Every rank makes the same number of passes, for a sharded model's forward is a collective, and calls
    `before_batch` before each, which may end it by an exception, on all ranks alike.
    """
    model, heads = finetuned.model, finetuned.inputs.heads
    width = 81 if SPAN in heads else sum(heads.values())
    outputs = torch.zeros(len(rows), width, dtype=torch.float64)
    batches = length_batches([len(row.ids) for row in rows], batch_size)
    training = model.training
    model.eval()
    try:
        for at in show_progress(range(0, len(batches), process.world), process, "predicting"):
            before_batch()
            number = at + process.rank
            chosen = batches[min(number, len(batches) - 1)]
            batch = collate([rows[row] for row in chosen], pad_id(finetuned.tokenizer), process.device)
            found = model(batch)
            if number < len(batches):
                outputs[chosen] = _flat(found, batch).cpu()
    finally:
        model.train(training)
    return sum_over_ranks(outputs, process)


def _flat(outputs: dict[str, Tensor], batch: dict[str, Tensor]) -> Tensor:
    if SPAN in outputs:
        return top_span_logits(outputs[SPAN], batch["null"])
    return torch.cat([value.double().reshape(len(value), -1) for value in outputs.values()], dim=1)


def to_predictions(
    finetuned: FinetunedModel, examples: Sequence[Example], rows: Sequence[Row], outputs: np.ndarray
) -> dict[str, Prediction]:
    """Answers by example id, from what `row_outputs` gave for the rows."""
    inputs = finetuned.inputs
    if SPAN in inputs.heads:
        return {
            name: SpanPrediction(text, margin if inputs.no_answer else float("-inf"))
            for name, text, margin in best_spans(rows, outputs, all_of(Span, examples), inputs.max_answer_tokens)
        }
    classes = inputs.heads.get(LABEL, 0)
    found: dict[str, Prediction] = {}
    for row, values in zip(rows, outputs):
        known = classes and np.isfinite(values[:classes]).all()  # weights that are not finite predict nothing
        label = inputs.labels[int(values[:classes].argmax())] if known else None
        score = float(values[classes]) if SCORE in inputs.heads else None
        found[examples[row.example].id] = PairPrediction(label, score)
    return found


def predict(
    finetuned: FinetunedModel,
    examples: Sequence[Example],
    batch_size: int,
    process: Process,
    before_batch: Callable[[], None] = lambda: None,
) -> tuple[dict[str, Prediction], Encoded]:
    """The answers to all examples, the same on every rank, and how they were encoded; arguments as of `row_outputs`."""
    encoded = encode(finetuned, examples, training=False)
    outputs = row_outputs(finetuned, encoded.rows, batch_size, process, before_batch)
    return to_predictions(finetuned, examples, encoded.rows, outputs), encoded


def whole_state(model: TaskModel, keep: bool) -> dict[str, Tensor]:
    """Every tensor of a sharded model, whole and on the host where `keep`; a collective, one tensor at a time."""
    state = {}
    for name, tensor in model.state_dict().items():
        whole = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
        if keep:
            state[name] = whole.detach().cpu()
    return state


def save_finetuned(finetuned: FinetunedModel, state: dict[str, Tensor], folder: Path, extra: dict[str, Any]) -> None:
    """Write the folder, in the place of an older one; for one rank. `extra` goes into task.json."""
    body = {key.removeprefix("backbone.body."): value for key, value in state.items() if key.startswith("backbone.")}
    heads = {key.removeprefix("heads."): value.contiguous() for key, value in state.items() if key.startswith("heads.")}
    with partial_folder(folder) as work:
        made = work / folder.name
        save_model(finetuned.model.backbone, merge_adapters(body), finetuned.tokenizer, made, "float32")
        save_file(heads, made / HEAD)
        if has_adapters(body):
            save_adapter(finetuned.model.backbone, body, made / ADAPTER, finetuned.source)
            save_file(heads, made / ADAPTER / HEAD)
        (made / TASK).write_bytes(to_json({"format": FORMAT, **asdict(finetuned.inputs), **extra}))
        publish(made, folder, replace=True)


def is_finetuned(folder: str | Path) -> bool:
    """Whether a folder is one of `save_finetuned`."""
    return (Path(folder) / TASK).is_file()


def find_finetuned(folder: str | Path) -> Path | None:
    """This folder if it is one of `save_finetuned`, or the best model in that of a fine-tuning; None if neither."""
    return next((path for path in (Path(folder), Path(folder, MODEL)) if is_finetuned(path)), None)


def read_task_file(folder: Path) -> dict[str, Any]:
    """The folder's task.json: the fields of `Inputs`, and what else `save_finetuned` was given."""
    content = parse_json_object(read_bounded(folder / TASK), folder / TASK)
    if content.get("format") != FORMAT:
        raise UserError(f"{folder / TASK}: has format {content.get('format')!r}; this version reads format {FORMAT}")
    return content


def load_finetuned(folder: str | Path, device: torch.device) -> FinetunedModel:
    """A fine-tuned model, whole, on `device`. `UserError` where files are missing or do not fit each other."""
    folder = Path(folder)
    content = read_task_file(folder)
    values = {key: content[key] for key in Inputs.__dataclass_fields__ if key in content}
    inputs = from_mapping(Inputs, values, str(folder / TASK))
    task = find_task(inputs.task)
    if inputs.labels != task.labels or inputs.heads != task_heads(task) or inputs.max_length < 1:
        raise UserError(f"{folder / TASK}: does not fit the task {task.name}; fine-tune again")
    loaded = load_model(str(folder))
    model = TaskModel(loaded.backbone, inputs.heads, dropout=0.0)
    try:
        model.heads.load_state_dict(load_file(folder / HEAD), strict=True)
    except (OSError, SafetensorError, RuntimeError) as error:
        reason = str(error).partition("\n")[0]
        raise UserError(f"{folder / HEAD}: does not fit the model ({reason}); fine-tune again") from None
    return FinetunedModel(str(folder), model.to(device).eval(), loaded.tokenizer, inputs)
