"""Prevents: a memory plan that drifts away from the code it describes, and so a job that dies of memory after a week
in the queue. Each case runs real steps of gloria.pretrain in processes of its own, measured as bench/plan.py does."""

from __future__ import annotations

from pathlib import Path

import pytest

from bench.plan import CASES, GPT2, LLAMA, NEO, measure
from gloria.model.config import PRESETS
from gloria.model.memory import loss_chunk, memory_per_rank

SMALL = {"model.num_layers": 3, "model.hidden_size": 128, "train.sequence_length": 128, "model.vocab_size": 4096}
MEASURED = {
    "gpt2, full, weights kept through passes": (
        1,
        GPT2
        | SMALL
        | {"train.activation_checkpointing": "full", "train.global_batch": 16, "train.micro_batch": 4}
        | {"dist.reshard": "never"},
    ),
    "gpt-neo, selective, masks": (
        1,
        NEO
        | SMALL
        | {"train.activation_checkpointing": "selective", "train.global_batch": 12, "model.window_size": 48}
        | {"data.mask_documents": "true"},
    ),
    "gpt-neo, bf16, passes": (
        1,
        NEO
        | SMALL
        | {"train.precision": "bf16", "train.global_batch": 8, "train.micro_batch": 4, "model.window_size": 32},
    ),
    "gpt-neo, muon at the update": (
        1,
        NEO
        | {"model.num_layers": 1, "model.hidden_size": 384, "model.intermediate_size": 6144, "model.vocab_size": 2048}
        | {"model.max_positions": 16, "train.sequence_length": 16, "train.global_batch": 1, "optim.name": "muon"},
    ),
    "llama, own head, selective": (
        1,
        LLAMA | SMALL | {"train.activation_checkpointing": "selective", "train.global_batch": 8},
    ),
    "gpt-neo, two ranks": (2, NEO | SMALL | {"train.global_batch": 24, "model.window_size": 32}),
}


@pytest.mark.parametrize("name", MEASURED)
def test_the_plan_is_what_is_measured(name: str, sample_corpus: Path) -> None:
    ranks, recipe = MEASURED[name]
    found = measure(recipe, ranks, sample_corpus, resident=False)
    # With one rank the measure is exact, and a layer's part that is forgotten must show.
    assert found["memory"] == pytest.approx(found["tensors"], rel=0.02 if ranks == 1 else 0.1)
    assert found["flops"] == found["counted"]


def test_the_bench_measures_seven_configurations() -> None:
    assert len(CASES) == 7
    assert {ranks for ranks, _ in CASES.values()} == {1, 2}


def test_a_chunk_of_the_loss_is_a_quarter_of_a_pass_on_a_gpu() -> None:
    passes = (1, 2049, 4096, 5000, 16384, 65536)
    assert [loss_chunk(tokens, on_gpu=True) for tokens in passes] == [512, 640, 1024, 1280, 4096, 4096]
    assert {loss_chunk(tokens, on_gpu=False) for tokens in passes} == {512}


def test_memory_falls_with_ranks_and_grows_with_the_micro_batch() -> None:
    def peak(**changes) -> int:
        settings = {
            "sequence_length": 512,
            "micro_batch": 4,
            "accumulation": 1,
            "shards": 4,
            "element_bytes": 2,
            "activation_checkpointing": "none",
        }
        return memory_per_rank(PRESETS["gpt-neo-125m"], **settings | changes).total

    assert peak(shards=8) < peak() < peak(shards=2)
    masked = peak(mask_documents=True)
    assert peak(by_flash=True) == peak(by_flash=True, mask_documents=True) < peak() < masked, "no masks, no windows"
    assert peak() < peak(micro_batch=8) < peak(micro_batch=8, element_bytes=4)
    assert peak() < peak(accumulation=2) == peak(accumulation=16), "gradients are summed in place"
    assert peak(activation_checkpointing="full") < peak(activation_checkpointing="selective") < peak()
