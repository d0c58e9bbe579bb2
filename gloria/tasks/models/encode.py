"""Examples as token ids: one template for pairs and for questions, long contexts in windows, rows into batches.

The template is read off the tokenizer: what it puts before, between and behind two texts. A tokenizer that puts
nothing behind them (GPT-2 adds nothing at all, LLaMA only its start) gets EOS between and behind: it separates the
texts, and the last token of a causal model has seen everything.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from time import monotonic
from typing import Any, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from gloria.dist.process import Process
from gloria.dist.transfer import to_device
from gloria.errors import UserError
from gloria.tasks.examples import NOT_FOUND, Pair, Span
from gloria.tasks.models.backbones import LoadedModel
from gloria.tasks.models.heads import LABEL, SCORE, SPAN
from gloria.tasks.task import Task

T = TypeVar("T")


@dataclass(frozen=True)
class Template:
    """Ids before, between and behind two texts, and the token types of all five parts."""

    start: tuple[int, ...]
    middle: tuple[int, ...]
    end: tuple[int, ...]
    types: tuple[int, int, int, int, int]  # of start, first text, middle, second text, end

    def special(self, second: bool) -> int:
        """Tokens of the template itself, around one text or two."""
        return len(self.start) + len(self.end) + (len(self.middle) if second else 0)


@dataclass(frozen=True)
class Row:
    """One input of the model: a pair, or a question with a window of its context."""

    ids: list[int]
    types: list[int]
    example: int  # index into the examples
    targets: Mapping[str, float | tuple[int, int]] = field(default_factory=dict)  # by head; empty where unlabelled
    first: int = 0  # place of the window's first context token
    null: int = 0  # place that stands for "no answer"
    offsets: tuple[tuple[int, int], ...] = ()  # characters of the context that each token of the window stands for


@dataclass(frozen=True)
class Encoded:
    """The rows of a split, and how many examples did not fit."""

    rows: list[Row]
    truncated: int = 0  # examples that lost tokens
    unanswerable: int = 0  # questions left out of training, for their answer is not in the context


def read_template(tokenizer: PreTrainedTokenizerBase) -> Template:
    """What a tokenizer makes of two texts; `UserError` where it has neither a separator nor an EOS."""
    encoding = tokenizer("a", "a")
    ids, parts = encoding["input_ids"], encoding.sequence_ids(0)
    types = encoding.get("token_type_ids") or [0] * len(ids)
    first, second = ([place for place, part in enumerate(parts) if part == number] for number in (0, 1))
    start, middle, end = ids[: first[0]], ids[first[-1] + 1 : second[0]], ids[second[-1] + 1 :]
    if end:
        between = types[first[-1] + 1] if middle else 0
        return Template(
            tuple(start), tuple(middle), tuple(end), (types[0], types[first[0]], between, types[second[0]], types[-1])
        )
    if tokenizer.eos_token_id is None:
        raise UserError("--model: its tokenizer has neither a separator nor an EOS; name an eos_token in its config")
    eos = (tokenizer.eos_token_id,)
    return Template(tuple(start), eos, eos, (0, 0, 0, 0, 0))


def tokenize(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> list[Any]:
    """The `ids` and `offsets` of each text, without special tokens: "<|endoftext|>" in a text is text."""
    encoding = tokenizer(
        list(texts), add_special_tokens=False, return_offsets_mapping=True, split_special_tokens=True, verbose=False
    )
    return [encoding[number] for number in range(len(texts))]


def start_ids(loaded: LoadedModel, *, needed: bool) -> list[int]:
    """What a text begins with, for generation and every score. This is the rule:

    Our corpora have no BOS, and documents begin behind an EOS. So a run of ours begins with EOS, and so does a folder
    that `gloria.model` runs and whose config.json has one token for BOS and EOS: our exports (also of a LLaMA that was
    trained on), GPT-2, GPT-Neo, SmolLM, Qwen. A BOS that such a model's tokenizer adds all the same is left out. Any
    other model begins with what its tokenizer adds (LLaMA, Mistral: BOS), and where that is nothing with BOS or else
    EOS. What no tokenizer adds is put there only where it is `needed`: to write or score a whole document.
    """
    tokenizer = loaded.tokenizer
    added = tokenizer("a")["input_ids"]
    own = tokenizer("a", add_special_tokens=False)["input_ids"]
    start = added[: len(added) - len(own)] if added[len(added) - len(own) :] == own else added[:1]
    first = tokenizer.eos_token_id
    if loaded.behind_eos:
        start = [token for token in start if token == first]
    elif tokenizer.bos_token_id is not None:
        first = tokenizer.bos_token_id
    if start or not needed:
        return start
    if first is None:
        raise UserError("--model: its tokenizer has neither BOS nor EOS, and a text must begin with one; name one")
    return [first]


def encode_pairs(task: Task, examples: Sequence[Pair], tokenizer: PreTrainedTokenizerBase, max_length: int) -> Encoded:
    """A row for each example, of at most `max_length` tokens: of two texts the longer one is cut first."""
    template = read_template(tokenizer)
    firsts = tokenize(tokenizer, [example.first for example in examples])
    seconds = tokenize(tokenizer, [example.second for example in examples])
    rows, truncated = [], 0
    for number, example in enumerate(examples):
        first, second = firsts[number].ids, seconds[number].ids
        room = max_length - template.special(bool(example.second))
        if room < 2:
            raise UserError(f"train.max_length: {max_length} leaves no room for a pair; raise it")
        # The longer text is cut, down to the length of the other, before both are.
        kept_first = min(len(first), max(room - len(second), room - room // 2))
        kept_second = min(len(second), room - kept_first)
        truncated += kept_first + kept_second < len(first) + len(second)
        targets = _pair_targets(task, example)
        rows.append(_row(template, first[:kept_first], second[:kept_second], number, targets))
    return Encoded(rows, truncated)


def encode_spans(
    examples: Sequence[Span],
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    stride: int,
    *,
    causal: bool,
    training: bool,
) -> Encoded:
    """A row for each window of a question's context; neighbours share `stride` tokens.

    The answer of a window that does not hold it is "none": the last EOS of a causal model (position 0 has seen
    nothing), the first token of any other. In training, questions whose answer is not found in the context are left
    out and counted. A question that leaves the context no room is a `UserError`.
    """
    template = read_template(tokenizer)
    questions = tokenize(tokenizer, [example.question for example in examples])
    contexts = tokenize(tokenizer, [example.context for example in examples])
    rows, several, unanswerable = [], 0, 0
    for number, example in enumerate(examples):
        answer = next((found for found in example.answers if found[1] != NOT_FOUND), None)
        if training and answer is None and not example.impossible:
            unanswerable += 1
            continue
        question, context = questions[number].ids, contexts[number]
        room = max_length - template.special(True) - len(question)
        if room <= stride:
            raise UserError(
                f'question "{example.id}": its {len(question)} tokens leave {max(room, 0)} of train.max_length '
                f"{max_length} to the context, whose windows share {stride}; raise it or lower train.stride"
            )
        starts = [0]
        while starts[-1] + room < len(context.ids):
            starts.append(starts[-1] + room - stride)
        several += len(starts) > 1
        for start in starts:
            window = context.ids[start : start + room]
            offsets = tuple(context.offsets[start : start + room])
            row = _row(template, question, window, number, {})
            first = len(template.start) + len(question) + len(template.middle)
            null = len(row.ids) - 1 if causal else 0
            targets = {SPAN: _span_target(answer, offsets, first, null)} if training else {}
            rows.append(Row(row.ids, row.types, number, targets, first, null, offsets))
    return Encoded(rows, several, unanswerable)


def length_batches(lengths: Sequence[int], batch_size: int) -> list[list[int]]:
    """Row numbers in batches of neighbours by length, longest first: the same for any number of ranks."""
    order = sorted(range(len(lengths)), key=lambda number: (-lengths[number], number))
    return [order[at : at + batch_size] for at in range(0, len(order), batch_size)]


def rank_batches(lengths: Sequence[int], batch_size: int, process: Process, label: str) -> Iterator[list[int]]:
    """This rank's share of the batches of `length_batches`, with their progress."""
    yield from show_progress(length_batches(lengths, batch_size)[process.rank :: process.world], process, label)


def show_progress(batches: Sequence[T], process: Process, label: str) -> Iterator[T]:
    """Yield the batches, and show on rank 0 how many are done: a bar on a terminal, elsewhere a line a minute."""
    started = shown = monotonic()
    for done, batch in enumerate(tqdm(batches, label, leave=False, disable=None if process.is_main else True)):
        now = monotonic()
        if process.is_main and now - shown > 60 and not sys.stderr.isatty():
            shown, minutes = now, (now - started) / 60
            left = minutes * (len(batches) - done) / done
            print(f"{label:<10} {done} of {len(batches)} batches, about {left:.0f} minutes left", flush=True)
        yield batch


def sum_over_ranks(values: Tensor, process: Process) -> np.ndarray:
    """The sum of every rank's `values`, on all ranks."""
    target = values.to(process.device)
    dist.all_reduce(target)
    return target.cpu().numpy()


def epoch_batches(lengths: Sequence[int], batch_size: int, seed: int, epoch: int) -> list[list[int]]:
    """The batches of an epoch: each row once, in an order that (seed, epoch) decides, neighbours alike in length.

    Rows are shuffled, sorted by length within pools of 32 batches, and the batches shuffled. The last rows
    make a smaller batch.
    """
    generator = torch.Generator().manual_seed((seed * 1_000_003 + epoch) % 2**63)
    order = torch.randperm(len(lengths), generator=generator).tolist()
    pool = 32 * batch_size
    batches = []
    for at in range(0, len(order), pool):
        members = sorted(order[at : at + pool], key=lambda number: lengths[number])
        batches += [members[first : first + batch_size] for first in range(0, len(members), batch_size)]
    return [batches[number] for number in torch.randperm(len(batches), generator=generator).tolist()]


def collate(rows: Sequence[Row], pad_id: int, device: torch.device, targets: Iterable[str] = ()) -> dict[str, Tensor]:
    """Rows as tensors, padded on the right to the longest.

    "ids", "mask", "types", "allowed" (where an answer may begin or end) are (batch, seq) and "null" is (batch,); of
    the `targets` named, "label" and "score" are (batch,), "span" (batch, 2).
    """
    length = max(len(row.ids) for row in rows)
    ids, types = np.full((len(rows), length), pad_id), np.zeros((len(rows), length), np.int64)
    mask, allowed = np.zeros_like(types), np.zeros_like(types)
    for number, row in enumerate(rows):
        own = slice(len(row.ids))
        ids[number, own], types[number, own], mask[number, own] = row.ids, row.types, 1
        allowed[number, row.first : row.first + len(row.offsets)] = 1
        allowed[number, row.null] = 1
    batch = {"ids": ids, "types": types, "mask": mask, "allowed": allowed}
    batch["null"] = np.array([row.null for row in rows])
    kinds = {SCORE: np.float32}
    batch |= {name: np.array([row.targets[name] for row in rows], kinds.get(name)) for name in targets}
    return to_device(batch, device)


def _row(
    template: Template,
    first: list[int],
    second: list[int],
    number: int,
    targets: Mapping[str, float | tuple[int, int]],
) -> Row:
    parts = [list(template.start), first, list(template.middle), second, list(template.end)]
    if not second:  # a single text
        parts[2] = []
    kinds = template.types if second else (*template.types[:3], 0, template.types[1])
    types = [kind for part, kind in zip(parts, kinds) for _ in part]
    return Row([token for part in parts for token in part], types, number, targets)


def _pair_targets(task: Task, example: Pair) -> dict[str, float | tuple[int, int]]:
    targets: dict[str, float | tuple[int, int]] = {}
    if "entailment" in task.targets and example.label is not None:
        targets[LABEL] = task.labels.index(example.label)
    if "similarity" in task.targets and example.score is not None:
        targets[SCORE] = example.score
    return targets


def _span_target(
    answer: tuple[str, int] | None, offsets: tuple[tuple[int, int], ...], first: int, null: int
) -> tuple[int, int]:
    """First and last token of the answer in a window, or twice `null` where the window does not hold all of it."""
    if answer is None or not offsets:
        return null, null
    begin, end = answer[1], answer[1] + len(answer[0])
    if offsets[0][0] > begin or offsets[-1][1] < end:
        return null, null
    # A byte-level token may begin with the space before the answer, and one token may hold begin and end.
    start = max(place for place, (left, _) in enumerate(offsets) if left <= begin)
    stop = min(place for place, (_, right) in enumerate(offsets) if right >= end)
    return first + start, first + max(start, stop)


def decode_span(context: str, row: Row, start: int, end: int) -> str:
    """The characters of the context from token `start` to token `end` of a row, stripped of space around them."""
    begin = row.offsets[start - row.first][0]
    return context[begin : row.offsets[end - row.first][1]].strip()


def best_spans(
    rows: Sequence[Row], outputs: np.ndarray, examples: Sequence[Span], max_answer_tokens: int
) -> Iterator[tuple[str, str, float]]:
    """(id, best text, how much better no answer is) of each question over all its windows.

    `outputs` (rows, 4k + 1) are those of `top_span_logits`. Of "no answer" the least score over the windows
    counts, as in the official SQuAD 2.0 baselines: where one window is sure of an answer there is one.
    """
    best: dict[int, tuple[float, str]] = {}
    null: dict[int, float] = {}
    k = (outputs.shape[1] - 1) // 4
    for row, values in zip(rows, outputs):
        starts, start_logits, ends, end_logits = values[: 4 * k].reshape(4, k)
        null[row.example] = min(null.get(row.example, np.inf), values[-1])
        inside = range(row.first, row.first + len(row.offsets))
        for start, left in zip(starts.astype(int), start_logits):
            for end, right in zip(ends.astype(int), end_logits):
                if start in inside and end in inside and start <= end < start + max_answer_tokens:
                    found = best.get(row.example, (-np.inf, ""))
                    if left + right > found[0]:
                        text = decode_span(examples[row.example].context, row, start, end)
                        best[row.example] = (left + right, text) if text else found
    for number, example in enumerate(examples):
        score, text = best.get(number, (-np.inf, ""))
        yield example.id, text, float(null[number] - score)


def top_span_logits(logits: Tensor, null: Tensor, k: int = 20) -> Tensor:
    """The k best first and last tokens of each row and the score of "no answer", (batch, 4k + 1) float64.

    `logits` (batch, seq, 2), `null` (batch,) places. Places first, then logits, for both ends.
    """
    k_here = min(k, logits.shape[1])
    parts = []
    for end in (0, 1):
        values, places = logits[..., end].topk(k_here, dim=1)
        padding = (0, k - k_here)
        parts.append(torch.nn.functional.pad(places, padding, value=-1))
        parts.append(torch.nn.functional.pad(values, padding, value=-torch.inf))
    rows = torch.arange(len(logits), device=logits.device)
    parts.append(logits[rows, null].sum(dim=1, keepdim=True))
    # Finite, for these travel between ranks as sums with zeros.
    return torch.cat([part.double() for part in parts], dim=1).clamp(min=-1e30)
