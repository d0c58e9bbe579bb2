"""Bugs prevented: premise and hypothesis run together, a pair cut at one side only, an answer's end off by one or its
last token lost at a window's edge, "no answer" at a token that has seen nothing, rows lost or doubled in batches."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gloria.errors import UserError
from gloria.tasks.catalog import find_task
from gloria.tasks.examples import Pair, Span
from gloria.tasks.models.encode import (
    best_spans,
    collate,
    decode_span,
    encode_pairs,
    encode_spans,
    epoch_batches,
    length_batches,
    top_span_logits,
)
from gloria.tasks.models.heads import LABEL, SCORE, SPAN
from tests.tasks.tiny import FAMILIES, WORDS, make_tokenizer

TOKENIZERS = {family: make_tokenizer(family) for family in FAMILIES}
GPT2, BERT = TOKENIZERS["gpt2"], TOKENIZERS["bert"]
ASSIN2 = find_task("assin2")


def test_a_pair_has_a_separator_and_an_end():
    (row,) = encode_pairs(ASSIN2, [Pair("1", "o gato", "a casa", "Entailment", 4.5)], GPT2, 50).rows
    first, second = (GPT2(text)["input_ids"] for text in ("o gato", "a casa"))
    assert row.ids == [*first, GPT2.eos_token_id, *second, GPT2.eos_token_id]
    assert row.targets == {LABEL: 1, SCORE: 4.5}
    (row,) = encode_pairs(ASSIN2, [Pair("1", "o gato", "a casa", "None", 1.0)], BERT, 50).rows
    both = BERT("o gato", "a casa")
    assert (row.ids, row.types) == (both["input_ids"], both["token_type_ids"])


def test_special_tokens_in_a_text_are_text():
    (row,) = encode_pairs(ASSIN2, [Pair("1", "um </s>", "dois", "None", 1.0)], GPT2, 50).rows
    assert row.ids.count(GPT2.eos_token_id) == 2


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 30), st.integers(1, 30), st.integers(12, 50))
def test_the_longer_text_is_cut_and_counted(first, second, length):
    pair = Pair("1", " ".join(["x"] * first), " ".join(["z"] * second), "None", 1.0)
    sizes = [len(GPT2(text)["input_ids"]) for text in (pair.first, pair.second)]
    encoded = encode_pairs(ASSIN2, [pair], GPT2, length)
    ids = encoded.rows[0].ids
    assert len(ids) == min(length, sum(sizes) + 2)
    assert encoded.truncated == (sum(sizes) + 2 > length)
    kept = ids.index(GPT2.eos_token_id)
    rest = len(ids) - kept - 2
    if encoded.truncated:
        assert kept + rest == length - 2
        # What is cut is no shorter than what is not.
        assert kept == sizes[0] or kept >= (length - 2) // 2
        assert rest == sizes[1] or rest >= (length - 2) // 2


@settings(max_examples=80, deadline=None)
@given(st.data())
def test_the_answer_comes_back_from_its_tokens(data):
    family = data.draw(st.sampled_from(FAMILIES))
    words = data.draw(st.lists(st.sampled_from([*WORDS, "ação,", "(pão)", "«já»"]), min_size=3, max_size=40))
    first = data.draw(st.integers(0, len(words) - 1))
    last = data.draw(st.integers(first, min(first + 3, len(words) - 1)))
    answer, start = " ".join(words[first : last + 1]), len(" ".join(words[:first])) + (first > 0)
    span = Span("q", "onde?", " ".join(words), ((answer, start),))
    assert span.context[start : start + len(answer)] == answer
    causal = family not in ("bert", "deberta-v2")
    encoded = encode_spans([span], TOKENIZERS[family], 60, 20, causal=causal, training=True)
    found = 0
    for row in encoded.rows:
        assert len(row.ids) <= 60
        begin, end = row.targets[SPAN]
        if (begin, end) == (row.null, row.null):
            continue
        found += 1
        assert decode_span(span.context, row, begin, end) == answer
    assert found >= 1, "the answer is whole in no window"
    covered = {place for row in encoded.rows for place in row.offsets}
    assert covered == set(
        encode_spans([span], TOKENIZERS[family], 5000, 0, causal=causal, training=True).rows[0].offsets
    )


def test_no_answer_is_the_last_eos_of_a_causal_model_and_the_first_token_of_another():
    span = Span("q", "onde?", "o gato dorme", impossible=True)
    (row,) = encode_spans([span], GPT2, 60, 10, causal=True, training=True).rows
    assert row.null == len(row.ids) - 1
    assert row.ids[row.null] == GPT2.eos_token_id
    assert row.targets[SPAN] == (row.null, row.null)
    (row,) = encode_spans([span], BERT, 60, 10, causal=False, training=True).rows
    assert row.targets[SPAN] == (0, 0)


def test_an_answer_that_is_not_in_its_context_is_left_out_and_counted():
    lost = Span("q", "onde?", "o gato dorme", (("cão", -1),))
    encoded = encode_spans([lost], GPT2, 60, 10, causal=True, training=True)
    assert (encoded.rows, encoded.unanswerable) == ([], 1)
    assert len(encode_spans([lost], GPT2, 60, 10, causal=True, training=False).rows) == 1


def test_a_question_that_leaves_no_room_is_reported():
    span = Span("q7", "onde " * 30, "o gato dorme", (("gato", 2),))
    size = len(GPT2(span.question)["input_ids"])
    with pytest.raises(UserError) as caught:
        encode_spans([span], GPT2, 40, 10, causal=True, training=False)
    assert caught.value.problems == (
        f'question "q7": its {size} tokens leave 0 of train.max_length 40 to the context, whose windows share 10; '
        "raise it or lower train.stride",
    )


def test_the_best_span_over_all_windows_wins():
    span = Span("q", "quem?", " ".join(WORDS * 3), (("gato", 4),))
    encoded = encode_spans([span], GPT2, 50, 10, causal=True, training=False)
    batch = collate(encoded.rows, 0, torch.device("cpu"))
    logits = torch.full((*batch["ids"].shape, 2), -5.0)
    logits = logits.masked_fill(~batch["allowed"].bool().unsqueeze(-1), -torch.inf)
    place = encoded.rows[1].first + 3
    logits[1, place, 0], logits[1, place + 1, 1] = 4.0, 3.0
    logits[1, encoded.rows[1].null] = 1.0
    ((name, text, margin),) = best_spans(encoded.rows, top_span_logits(logits, batch["null"]).numpy(), [span], 30)
    assert (name, text) == ("q", decode_span(span.context, encoded.rows[1], place, place + 1))
    assert margin == pytest.approx(-10.0 - 7.0)  # the least of the windows' "no answer"


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(1, 90), min_size=1, max_size=300), st.integers(1, 40), st.integers(0, 3))
def test_every_row_is_in_one_batch_beside_rows_of_its_length(lengths, size, epoch):
    batches = epoch_batches(lengths, size, 7, epoch)
    assert sorted(np.concatenate(batches).tolist()) == list(range(len(lengths)))
    assert batches == epoch_batches(lengths, size, 7, epoch)
    assert len(batches) == -(-len(lengths) // size) if len(lengths) <= 32 * size else True
    for_scoring = length_batches(lengths, size)
    assert sorted(np.concatenate(for_scoring).tolist()) == list(range(len(lengths)))
    longest = [lengths[batch[0]] for batch in for_scoring]
    assert longest == sorted(longest, reverse=True)
