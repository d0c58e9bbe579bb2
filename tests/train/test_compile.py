"""Prevents steps that compile again: a graph that breaks, or one for each layer, batch length or number of documents,
would make a run on a GPU several times slower, in silence."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch._dynamo.utils import counters
from torch.distributed.device_mesh import init_device_mesh
from transformers import LlamaConfig, LlamaModel

import gloria.model.kernels
from gloria.pretrain import main
from gloria.tasks.models.backbones import Backbone
from gloria.tasks.models.heads import TaskModel, shard_task_model
from tests import varlen  # noqa: F401, which has the operation of "varlen" on CPU
from tests.launch import LLAMA, SMALL, flags


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The graphs that blocks and the loss are compiled to from here on; they run eagerly."""
    found: list[str] = []

    def backend(module: torch.fx.GraphModule, inputs: list) -> Any:
        found.append("train" if torch.is_grad_enabled() else "eval")
        return module.forward

    honest = torch.compile  # that of a module calls it
    monkeypatch.setattr(torch, "compile", lambda function, **options: honest(function, **options, backend=backend))
    return found


@pytest.mark.parametrize(("family", "kinds"), [({}, 2), (LLAMA, 1)], ids=["gpt-neo", "llama"])
def test_fifty_steps_compile_each_kind_of_layer_once(
    family, kinds, graphs, monkeypatch, sample_corpus, repository, tmp_path
) -> None:
    """With validation between, documents, and launches that go on from a checkpoint: by varlen, as on a GPU."""
    monkeypatch.setattr(gloria.model.kernels, "_obstacle", lambda *_: "")
    recipe = {
        "config": repository / "launch/demo.toml",
        "data.corpus": sample_corpus,
        **SMALL,
        "model.num_layers": 4,
    } | family
    recipe |= {"run.dir": tmp_path / "run", "train.compile": "true", "data.mask_documents": "true"}
    recipe |= {"valid.every": 10, "valid.windows": 4, "checkpoint.every": 100}
    for steps, micro_batch in ((30, 6), (50, 12)):
        torch._dynamo.reset()  # a launch is a process of its own
        counters.clear()
        graphs.clear()
        assert main(flags(recipe, train__steps=steps, train__micro_batch=micro_batch)) == 0
        # Of a layer without a window and one with; and the loss, with its gradient and without: both in no_grad.
        assert sorted(graphs) == ["eval"] * (kinds + 2) + ["train"] * kinds
        assert not counters["graph_break"]


def test_fine_tuning_a_decoder_of_transformers_compiles_a_layer_once(graphs) -> None:
    """Batches are as long as their longest row. With the cache that transformers makes by default: a graph a layer."""
    torch._dynamo.reset()
    counters.clear()
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4
    )
    backbone = Backbone(LlamaModel(config), causal=True, hidden_size=32, token_types=False)
    model = TaskModel(backbone, {"label": 2}, dropout=0.0)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        shard_task_model(model, init_device_mesh("cpu", (1,)), "fp32", compile_blocks=True)
        for length in range(5, 25):
            ids = torch.randint(64, (2, length))
            mask = (torch.arange(length) < torch.tensor([[length], [length - 2]])).long()
            model({"ids": ids, "mask": mask})["label"].sum().backward()
    finally:
        dist.destroy_process_group()
    assert graphs == ["train"]
    assert not counters["graph_break"]
