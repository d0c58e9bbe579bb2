"""The same model in transformers, for bench/gpu.py: under its Trainer where accelerate is installed."""

from __future__ import annotations

import importlib.util
import math
import tempfile
import time
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from bench.gpu_parts import CUDA, DEVICE, PASSES, Row, both_mfu, shape_of


def peer(model: str, length: int, micro_batch: int, implementation: str) -> Iterator[Row]:
    """Whole steps of the same model at one micro-batch."""
    shape = shape_of(model, length)
    network = network_of(shape, implementation)
    seconds, how = peer_seconds(network, shape.vocab_size, length, micro_batch, 8 if CUDA else 2)
    tokens = micro_batch * PASSES * length
    parameters = sum(parameter.numel() for parameter in network.parameters())
    yield {
        "who": f"transformers {implementation}, {how}",
        "model": model,
        "T": length,
        "micro-batch": micro_batch,
        "ms": 1000 * seconds,
        "tokens/s": tokens / seconds,
        **both_mfu(shape, parameters, length, tokens / seconds),
        "peak GiB": torch.cuda.max_memory_allocated() / 2**30 if CUDA else math.nan,
    }


def network_of(shape: Any, implementation: str) -> nn.Module:
    """transformers' model of a shape of ours, with random weights."""
    from transformers import AutoConfig, AutoModelForCausalLM

    from gloria.model.config_json import config_of_fields

    fields = config_of_fields(shape.to_dict())
    config = AutoConfig.for_model(fields.pop("model_type"), **fields)
    return AutoModelForCausalLM.from_config(config, attn_implementation=implementation).to(DEVICE).train()


def peer_seconds(network: nn.Module, vocab_size: int, length: int, micro_batch: int, steps: int) -> tuple[float, str]:
    """Seconds a step of `PASSES` micro-batches, after three that warm up, and under what."""
    ids = torch.randint(vocab_size, (micro_batch, length), device=DEVICE)
    if importlib.util.find_spec("accelerate"):
        return _trainer_seconds(network, ids, steps), "Trainer"
    return _plain_seconds(network, ids, steps), "plain loop (Trainer needs accelerate)"


def _plain_seconds(network: nn.Module, ids: Tensor, steps: int) -> float:
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-4, fused=True)
    for number in range(3 + steps):
        if number == 3:
            if CUDA:
                torch.cuda.synchronize()
            start = time.perf_counter()
        for _ in range(PASSES):
            with torch.autocast(DEVICE.type, torch.bfloat16, enabled=CUDA):
                (network(input_ids=ids, labels=ids, use_cache=False).loss / PASSES).backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    if CUDA:
        torch.cuda.synchronize()
    return (time.perf_counter() - start) / steps


def _trainer_seconds(network: nn.Module, ids: Tensor, steps: int) -> float:
    from transformers import Trainer, TrainerCallback, TrainingArguments

    ends: list[float] = []

    class Clock(TrainerCallback):
        def on_step_end(self, *_: Any, **__: Any) -> None:
            if CUDA:
                torch.cuda.synchronize()
            ends.append(time.perf_counter())

    rows = [{"input_ids": row, "labels": row} for row in ids.cpu().repeat(PASSES * (steps + 3), 1)]
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            folder,
            per_device_train_batch_size=len(ids),
            gradient_accumulation_steps=PASSES,
            max_steps=steps + 3,
            bf16=CUDA,
            use_cpu=not CUDA,
            report_to=[],
            save_strategy="no",
            logging_strategy="no",
            disable_tqdm=True,
        )
        Trainer(network, arguments, train_dataset=rows, callbacks=[Clock()]).train()
    return (ends[-1] - ends[2]) / steps
