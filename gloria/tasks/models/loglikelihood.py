"""Log-likelihoods of continuations, greedy continuations and bits per byte of a causal language model.

Rows are padded on the right, where a causal model never looks, and batched over all of them by length; batches are
dealt out whole, so any number of ranks computes the same ones. Each rank holds the whole model.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from gloria.data.loader import text_windows
from gloria.dist.process import Process
from gloria.errors import UserError
from gloria.model.decode import OwnCache, begin
from gloria.model.transformer import Transformer
from gloria.tasks.models.backbones import LoadedModel
from gloria.tasks.models.encode import rank_batches, start_ids, sum_over_ranks, tokenize

_CHUNK = 1024  # places whose logits, (chunk, vocab) in fp32, are held at once


@dataclass(frozen=True)
class Request:
    """Token ids and how many of the last of them are to be scored, given all before."""

    ids: list[int]
    scored: int


@dataclass(frozen=True)
class Settings:
    """How to continue a text greedily."""

    max_new_tokens: int
    repetition_penalty: float = 1.0  # arXiv 1909.05858: above 1, tokens that were there before are less likely
    is_over: Callable[[str], bool] = lambda text: False


def make_requests(loaded: LoadedModel, texts: Sequence[tuple[str, str]]) -> tuple[list[Request], int]:
    """A request for each (context, answer), and how many contexts were cut on the left to fit.

    Context and answer are tokenized as one text: the answer's tokens are those behind as many as the context
    alone has.
    """
    wholes = tokenize(loaded.tokenizer, [context + answer for context, answer in texts])
    contexts = tokenize(loaded.tokenizer, [context for context, _ in texts])
    made, cut = [], 0
    for whole, context, (_, answer) in zip(wholes, contexts, texts):
        start = start_ids(loaded, needed=not context.ids)
        scored = len(whole.ids) - min(len(context.ids), len(whole.ids) - 1)
        ids = start + whole.ids
        room = (loaded.max_length or len(ids)) + 1
        if scored >= room:
            raise UserError(
                f'"{answer[:40]}...": {scored} tokens are more than the model sees ({room - 1}); leave it out'
            )
        cut += len(ids) > room
        made.append(Request(ids[-room:], scored))
    return made, cut


@torch.no_grad()
def log_likelihoods(loaded: LoadedModel, requests: Sequence[Request], batch_size: int, process: Process) -> np.ndarray:
    """Of each request the summed log-likelihood of its scored tokens, in nats, and whether each of them was the
    likeliest (1 or 0): (requests, 2) float64, the same on all ranks.

    Our own models read the context that several requests share once.
    """
    found = torch.zeros(len(requests), 2, dtype=torch.float64)
    model = loaded.require_language_model()
    groups = _by_context(requests) if isinstance(model, Transformer) else [[number] for number in range(len(requests))]
    alone = [group[0] for group in groups if len(group) == 1]
    for chosen in rank_batches([len(requests[number].ids) for number in alone], batch_size, process, "scoring"):
        rows = [requests[alone[number]] for number in chosen]
        states = _states(model, *_pad([row.ids[:-1] for row in rows], process.device))
        found[[alone[number] for number in chosen]] = _sums(model, states, rows, [len(row.ids) - 1 for row in rows])
    shared = [group for group in groups if len(group) > 1]
    for chosen in rank_batches([len(requests[group[0]].ids) for group in shared], batch_size, process, "scoring"):
        batch = [shared[number] for number in chosen]
        room = max(requests[number].scored for group in batch for number in group)
        contexts = [requests[group[0]].ids[: -requests[group[0]].scored] for group in batch]
        state, _ = begin(model, contexts, room, process.device)
        assert isinstance(state, OwnCache), "only our own models share contexts"
        for turn in range(max(map(len, batch))):
            # A group with fewer answers than others repeats its last one.
            numbers = [group[min(turn, len(group) - 1)] for group in batch]
            rows = [requests[number] for number in numbers]
            ids, _ = _pad([row.ids[-row.scored - 1 : -1] for row in rows], process.device)
            found[numbers] = _sums(model, state.look_ahead(ids, back=1), rows, [row.scored for row in rows])
    return sum_over_ranks(found, process)


def _by_context(requests: Sequence[Request]) -> list[list[int]]:
    """The numbers of the requests, grouped by the tokens they continue, where these are most of a request's."""
    groups: dict[tuple[int, ...], list[int]] = {}
    for number, request in enumerate(requests):
        context = request.ids[: -request.scored]
        # A context of one token, or shorter than what comes after it, saves nothing.
        own = (-1, number) if len(context) <= max(request.scored, 1) else ()
        groups.setdefault(own or tuple(context), []).append(number)
    return list(groups.values())


@torch.no_grad()
def continuations(
    loaded: LoadedModel, prompts: Sequence[str], settings: Sequence[Settings], batch_size: int, process: Process
) -> list[tuple[list[str], int]]:
    """For each of the `settings` the greedy continuation of every prompt, and how many prompts were cut on the left.

    A continuation ends after `max_new_tokens`, at EOS, or when its text `is_over`. A prompt is read once for all
    settings, and those with the same penalty share the tokens that come after it.
    """
    starts = [start_ids(loaded, needed=not row.ids) + row.ids for row in tokenize(loaded.tokenizer, prompts)]
    rows: dict[tuple[int, int], dict[float, _Row]] = {}  # by prompt and how much of it is left, and by penalty
    kept: list[list[list[int]]] = []  # for each of the settings the prompts as they fit
    for number, setting in enumerate(settings):
        room = (loaded.max_length or 10**9) - setting.max_new_tokens
        if room < 1:
            raise UserError(
                f"--model: sees {loaded.max_length} tokens, too few for a prompt and {setting.max_new_tokens} new ones"
            )
        kept.append([ids[-room:] for ids in starts])
        for prompt, ids in enumerate(kept[-1]):
            alike = rows.setdefault((prompt, len(ids)), {})
            row = alike.setdefault(setting.repetition_penalty, _Row(prompt, ids, setting.repetition_penalty))
            row.open[number] = setting
    most = max((setting.max_new_tokens for setting in settings), default=0)
    made = torch.zeros(len(settings), len(prompts), most, dtype=torch.float64)  # ids + 1; 0 where there is none
    groups = [list(alike.values()) for alike in rows.values()]
    lengths = [len(group[0].start) for group in groups]
    for chosen in rank_batches(lengths, batch_size if loaded.pads_left else 1, process, "generating"):
        for row in _decode(loaded, [groups[number] for number in chosen], process.device):
            for number, end in row.ends.items():
                made[number, row.prompt, :end] = torch.tensor(row.tokens[:end], dtype=torch.float64) + 1
    found = []
    for table, prompts_ in zip((sum_over_ranks(made, process).astype(np.int64) - 1).tolist(), kept):
        new = [[token for token in tokens if token >= 0] for tokens in table]
        texts = [_new_text(loaded.tokenizer, ids, tokens) for ids, tokens in zip(prompts_, new)]
        found.append((texts, sum(len(ids) < len(start) for ids, start in zip(prompts_, starts))))
    return found


@dataclass
class _Row:
    """A prompt and its continuation with one penalty, for all settings with this penalty."""

    prompt: int
    start: list[int]
    penalty: float
    open: dict[int, Settings] = field(default_factory=dict)  # settings that need more tokens, by number
    ends: dict[int, int] = field(default_factory=dict)  # how many of the tokens belong to each
    tokens: list[int] = field(default_factory=list)


def _decode(loaded: LoadedModel, groups: Sequence[Sequence[_Row]], device: torch.device) -> list[_Row]:
    """The rows of the groups with their tokens; those of a group begin alike, and are read as one."""
    live = [row for group in groups for row in group]
    room = max(setting.max_new_tokens for row in live for setting in row.open.values())
    model = loaded.require_language_model()
    state, logits = begin(model, [group[0].start for group in groups], room, device)
    going = [number for number, group in enumerate(groups) for _ in group]
    if len(going) > len(groups):
        index = torch.tensor(going, device=device)
        state.keep(index)
        logits = logits[index]
    rows, ends = live, loaded.end_ids()
    while True:
        tokens = _penalise(logits, live).argmax(dim=1)
        for row, token in zip(live, tokens.tolist()):
            _add(loaded.tokenizer, row, token, ends)
        going = [number for number, row in enumerate(live) if row.open]
        if not going:
            return rows
        if len(going) < len(live):
            index = torch.tensor(going, device=device)
            state.keep(index)
            live, tokens = [live[number] for number in going], tokens[index]
        logits = state.step(tokens)


def _add(tokenizer: PreTrainedTokenizerBase, row: _Row, token: int, ends: set[int]) -> None:
    """Put a token behind a row, unless it ends it, and close the settings that are over with it."""
    if token in ends:
        row.open.clear()
        return
    row.tokens.append(token)
    text = _new_text(tokenizer, row.start, row.tokens)
    row.ends |= dict.fromkeys(row.open, len(row.tokens))
    row.open = {
        number: setting
        for number, setting in row.open.items()
        if len(row.tokens) < setting.max_new_tokens and not setting.is_over(text)
    }


def windows(ids: Sequence[int], length: int, stride: int) -> Iterator[Request]:
    """A long text as requests of at most `length` + 1 tokens that score each token but the first once.

    Each window but the first scores its last `stride` tokens, given at least `length` - `stride` before them.
    """
    for first, end, scored in text_windows(len(ids), length, stride):
        yield Request(list(ids[first:end]), scored)


def perplexity_scores(nats: float, tokens: int, words: int, bytes_: int) -> dict[str, float]:
    """Perplexities by token, word and byte, and bits per byte, of a text with the log-likelihood -`nats`."""
    return {
        "bits_per_byte": nats / bytes_ / math.log(2),
        "token_perplexity": math.exp(nats / tokens),
        "word_perplexity": math.exp(min(nats / max(words, 1), 700)),
        "byte_perplexity": math.exp(nats / bytes_),
    }


def _states(model: torch.nn.Module, ids: Tensor, mask: Tensor) -> Tensor:
    """Hidden states of our own models, logits of others: what `_sums` computes log-likelihoods from."""
    if isinstance(model, Transformer):
        return model.hidden_states(ids)
    return model(input_ids=ids, attention_mask=mask, use_cache=False).logits


def _sums(model: torch.nn.Module, states: Tensor, requests: Sequence[Request], ends: Sequence[int]) -> Tensor:
    """Summed log-likelihoods, and whether each token was the likeliest: (rows, 2) float64 on the CPU.

    `states` (rows, seq, ...) of a request that come before its scored tokens are those that end at its end.
    """
    places = [(row, end - request.scored + n) for row, (request, end) in enumerate(zip(requests, ends))
              for n in range(request.scored)]  # fmt: skip
    rows, columns = torch.tensor(places, device=states.device).T
    targets = torch.tensor([token for request in requests for token in request.ids[-request.scored :]])
    targets = targets.to(states.device)
    # Per row the log-likelihood, and the number of tokens that are not the likeliest.
    sums = torch.zeros(len(requests), 2, dtype=torch.float64, device=states.device)
    for at in range(0, len(rows), _CHUNK):
        row, target = rows[at : at + _CHUNK], targets[at : at + _CHUNK]
        logits = states[row, columns[at : at + _CHUNK]]
        logits = model.logits(logits) if isinstance(model, Transformer) else logits.float()
        sums[:, 0].index_add_(0, row, -F.cross_entropy(logits, target, reduction="none").double())
        sums[:, 1].index_add_(0, row, (logits.argmax(dim=1) != target).double())
    sums[:, 1] = (sums[:, 1] == 0).double()
    return sums.cpu()


def _penalise(logits: Tensor, rows: Sequence[_Row]) -> Tensor:
    """Logits (rows, vocab) with those of each row's own tokens lowered by its penalty."""
    if all(row.penalty == 1 for row in rows):
        return logits
    # Padding points at the row's own first token, which is there anyway.
    longest = max(len(row.start) + len(row.tokens) for row in rows)
    seen = [row.start + row.tokens + [row.start[0]] * (longest - len(row.start) - len(row.tokens)) for row in rows]
    places = torch.tensor(seen, device=logits.device)
    penalty = torch.tensor([row.penalty for row in rows], device=logits.device)[:, None]
    values = logits.gather(1, places)
    return logits.scatter(1, places, torch.where(values > 0, values / penalty, values * penalty))


def _new_text(tokenizer: PreTrainedTokenizerBase, start: list[int], new: list[int]) -> str:
    """What the tokens `new` add to the text of `start`: alone, a first piece may lose its leading space."""
    before, after = tokenizer.batch_decode([start, start + new], skip_special_tokens=True)
    return after[len(before) :]


def _pad(rows: Sequence[Sequence[int]], device: torch.device) -> tuple[Tensor, Tensor]:
    length = max(len(row) for row in rows)
    ids, mask = np.zeros((len(rows), length), np.int64), np.zeros((len(rows), length), np.int64)
    for number, row in enumerate(rows):
        ids[number, : len(row)], mask[number, : len(row)] = row, 1
    return torch.from_numpy(ids).to(device), torch.from_numpy(mask).to(device)
