"""Prevents a run that ends on an old GPU, for dropout or for fp32 in an attention kernel that has none of it, one that
takes the slow kernel in silence, and cuDNN's plans for each new length."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.nn.attention import varlen

from gloria.errors import UserError
from gloria.model.kernels import choose_kernel
from tests.tiny_models import GPT2, GPT_NEO, MISTRAL

CUDA, CPU = torch.device("cuda", 0), torch.device("cpu")
VARLEN = "local layers by varlen flash, all else by sdpa"


def choose(requested: str = "auto", shape: Any = GPT_NEO, device: torch.device = CUDA, **changes: Any):
    usual = {"precision": "bf16", "sequence_length": 32, "mask_documents": False, "compiled": True}
    return choose_kernel(requested, shape, device=device, **(usual | changes))


@pytest.fixture(autouse=True)
def a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H100 80GB HBM3")
    monkeypatch.setattr(torch.backends.cuda, "is_flash_attention_available", lambda: True)


def test_varlen_flash_is_taken_where_a_layer_needs_a_mask() -> None:
    assert choose() == ("varlen", VARLEN)
    assert choose("varlen", precision="fp16", compiled=False) == ("varlen", VARLEN)
    both = "local layers and masked documents by varlen flash, all else by sdpa"
    assert choose(mask_documents=True) == ("varlen", both)
    assert choose(shape=GPT2, mask_documents=True)[0] == choose(shape=MISTRAL)[0] == "varlen"
    assert choose("flex", precision="fp32") == ("flex", "local layers by FlexAttention, all else by sdpa")
    plain = ("sdpa", "sdpa: every layer is plainly causal")
    assert choose(shape=GPT2) == choose(sequence_length=8) == choose("varlen", shape=GPT2, device=CPU) == plain
    assert choose("sdpa") == ("sdpa", "local layers by sdpa with a mask: as the recipe has it")


def without_flash(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cuda, "is_flash_attention_available", lambda: False)


def without_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(varlen, "varlen_attn", lambda query, key, value, cu_seq_q, cu_seq_k, max_q, max_k: query)


def without_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    def varlen_attn(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, scale=None, window_size=(-1, -1)):
        return query

    monkeypatch.setattr(varlen, "varlen_attn", varlen_attn)


def on_a_v100(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla V100-SXM2-32GB")


@pytest.mark.parametrize(
    ("change", "options", "why"),
    [
        (None, {"device": CPU}, "no GPU is used"),
        (None, {"precision": "fp32"}, "flash attention has no fp32"),
        (None, {"shape": replace(GPT_NEO, dropout=0.1)}, "varlen flash has no dropout"),
        (None, {"shape": replace(GPT_NEO, num_heads=8)}, "heads of 4 are no multiple of 8 up to 192"),
        (None, {"shape": replace(GPT_NEO, hidden_size=800)}, "heads of 200 are no multiple of 8 up to 192"),
        (on_a_v100, {}, "Tesla V100-SXM2-32GB (sm_70) is no NVIDIA GPU from sm_80 on"),
        (without_flash, {}, "this torch is built without flash attention"),
        (without_windows, {}, f"varlen_attn of torch {torch.__version__} has no window"),
        (without_groups, {"shape": MISTRAL}, f"varlen_attn of torch {torch.__version__} has no grouped queries"),
    ],
)
def test_what_takes_its_place_says_why(monkeypatch: pytest.MonkeyPatch, change: Any, options: dict, why: str) -> None:
    if change:
        change(monkeypatch)
    assert choose(**options) == ("sdpa", f"local layers by sdpa with a mask: {why}")
    with pytest.raises(UserError) as caught:
        choose("varlen", **options)
    assert caught.value.problems == (f"train.attention: no varlen flash here: {why}; set it to auto",)


def test_flex_attention_is_refused_where_it_would_be_slow_or_wrong() -> None:
    with pytest.raises(UserError, match="FlexAttention is fast only when compiled"):
        choose("flex", compiled=False)
    with pytest.raises(UserError, match="FlexAttention has no dropout"):
        choose("flex", shape=replace(GPT_NEO, dropout=0.1))
