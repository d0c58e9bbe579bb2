"""Prevents a model whose gradients change with activation checkpointing or compilation, whose parameters
change their names with them, that sees the future or another document, or whose start depends on who
initialises it."""

from __future__ import annotations

import math
import shutil
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch._inductor import config as inductor_config
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.utils._python_dispatch import TorchDispatchMode

from gloria.model.config import EMBEDDING, HEAD, PRESETS, TransformerConfig, count_parameters, parameter_shapes
from gloria.model.transformer import Transformer, initial_value
from tests import varlen  # noqa: F401, which has the operation of "varlen" on CPU
from tests.tiny_models import GPT2, GPT_NEO, SHAPES, build_model, gradients, random_ids, uneven_model

families = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)


class Calls(TorchDispatchMode):
    """How often each operation is called within."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: dict[str, int] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._schema.name.removeprefix("aten::")
        self.counts[name] = self.counts.get(name, 0) + 1
        return func(*args, **(kwargs or {}))


def train_gradients(model: Transformer, length: int = 30) -> dict[str, torch.Tensor]:
    ids = random_ids(model.shape, 2, length + 1)
    torch.manual_seed(5)  # for dropout
    model(ids[:, :-1], ids[:, 1:])[0].backward()
    return gradients(model)


def assert_same_gradients(ours: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor], bound: float) -> None:
    assert list(ours) == list(wanted)
    for name, gradient in wanted.items():
        assert gradient.norm() > 0
        assert (ours[name] - gradient).norm() <= bound * gradient.norm(), name


@pytest.mark.parametrize("preset", PRESETS)
def test_the_counted_parameters_are_those_of_the_model(preset: str) -> None:
    shape = PRESETS[preset]
    with torch.device("meta"):
        model = Transformer(shape)
    sizes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    assert sizes == parameter_shapes(shape)
    assert list(sizes) == list(parameter_shapes(shape))
    padding = (shape.padded_vocab - shape.vocab_size) * shape.hidden_size
    assert sum(math.prod(size) for size in sizes.values()) - padding == count_parameters(shape)["total"]
    assert list(model.buffers()) == []


@families
def test_loss_is_the_cross_entropy_of_the_logits(shape: TransformerConfig) -> None:
    model = uneven_model(shape)
    ids, labels = random_ids(shape, 3, 20), random_ids(shape, 3, 20, seed=1)
    labels[0, 5:] = -100
    labels[2] = -100
    logits = model(ids)
    assert logits.shape == (3, 20, shape.vocab_size)
    assert logits.dtype == torch.float32
    wanted = F.cross_entropy(logits.transpose(1, 2), labels, reduction="none").sum(1)
    loss, losses = model(ids, labels)
    torch.testing.assert_close(losses, wanted, rtol=1e-6, atol=1e-6)
    assert losses[2] == 0
    torch.testing.assert_close(loss, losses.sum(), rtol=1e-6, atol=1e-6)


@families
def test_a_token_sees_nothing_that_comes_after_it(shape: TransformerConfig) -> None:
    model = uneven_model(shape)
    ids = random_ids(shape, 1, 40)
    changed = ids.clone()
    changed[0, 25] = (ids[0, 25] + 1) % shape.vocab_size
    difference = (model(ids) - model(changed)).abs().amax(dim=(0, 2))
    assert difference[:25].max() == 0
    assert difference[25] > 0


@families
def test_documents_do_not_see_each_other(shape: TransformerConfig) -> None:
    model = uneven_model(shape)
    ids = random_ids(shape, 1, 40)
    documents = (torch.arange(40) >= 17).long()[None]
    changed = ids.clone()
    changed[0, :17] = random_ids(shape, 1, 17, seed=1)
    masked, masked_changed = model(ids, documents=documents), model(changed, documents=documents)
    torch.testing.assert_close(masked[:, 17:], masked_changed[:, 17:], rtol=0, atol=0)
    torch.testing.assert_close(masked[:, :17], model(ids[:, :17]))
    assert (model(ids)[:, 17:] - masked[:, 17:]).abs().max() > 1e-3


@families
def test_rows_padded_on_the_left_have_the_hidden_states_of_the_rows_alone(shape: TransformerConfig) -> None:
    model = uneven_model(shape)
    lengths = (40, 1, 7, 8, 9, 31)  # on both sides of the window of 8 and its multiples
    rows = [random_ids(shape, 1, length, seed=length) for length in lengths]
    ids = torch.cat([F.pad(row, (max(lengths) - row.shape[1], 0), value=3) for row in rows])
    mask = torch.cat([F.pad(torch.ones_like(row), (max(lengths) - row.shape[1], 0)) for row in rows])
    hidden = model.hidden_states(ids, documents=mask, positions=mask.cumsum(1) - 1)
    for number, row in enumerate(rows):
        torch.testing.assert_close(hidden[number, -row.shape[1] :], model.hidden_states(row)[0], rtol=0, atol=1e-5)
    # Without the positions they are others, or this could not fail; but rotary ones are distances alone.
    same = (model.hidden_states(ids, documents=mask)[1, -1] - hidden[1, -1]).abs().max() < 1e-3
    assert same == shape.family.rotary


@families
def test_rows_that_pad_the_vocabulary_learn_nothing(shape: TransformerConfig) -> None:
    found = train_gradients(uneven_model(shape))
    assert found[EMBEDDING if shape.tied_head else HEAD][: shape.vocab_size].abs().amax(dim=1).min() > 0
    assert not any(found[name][shape.vocab_size :].any() for name in (EMBEDDING, HEAD) if name in found)


@families
@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_activation_checkpointing_changes_no_gradient(shape: TransformerConfig, dropout: float) -> None:
    shape = replace(shape, dropout=dropout)
    wanted = train_gradients(build_model(shape))
    for kind in ("full", "selective"):
        assert_same_gradients(train_gradients(build_model(shape, activation_checkpointing=kind)), wanted, 0.0)


@pytest.mark.parametrize(
    ("family", "kernel"), [("gpt-neo", "sdpa"), ("gpt-neo", "varlen"), ("qwen2", "varlen"), ("llama", "sdpa")]
)
def test_selective_checkpointing_computes_no_matmul_or_attention_again(family: str, kernel: str) -> None:
    shape, counts = SHAPES[family], {}
    for kind in ("none", "full", "selective"):
        model = build_model(shape, activation_checkpointing=kind, kernel=kernel)
        ids = random_ids(shape, 2, 30)
        loss, _ = model(ids, ids)
        with Calls() as calls:
            loss.backward()
        matmuls = calls.counts["mm"] + calls.counts.get("addmm", 0)
        attentions = calls.counts.get("_scaled_dot_product_flash_attention_for_cpu", 0)
        attentions += calls.counts.get("torch_attn::_varlen_attn", 0)  # in the local layer, by "varlen"
        counts[kind] = (matmuls, attentions, calls.counts.get("gelu", 0) + calls.counts.get("silu", 0))
    # (4 projections + 2 or 3 of the MLP) * 2 layers; checkpoint stops before a block's very last one.
    again = 2 * (6 if shape.family.gated_mlp else 5)
    assert counts["full"] == (counts["none"][0] + again, 2, 2)
    assert counts["selective"] == (counts["none"][0], 0, 2)


def test_dropout_stops_in_eval_mode() -> None:
    model = build_model(replace(GPT2, dropout=0.5))
    ids = random_ids(GPT2, 1, 12)
    assert not torch.equal(model(ids), model(ids))
    model.eval()
    assert torch.equal(model(ids), model(ids))
    torch.testing.assert_close(model(ids), build_model(GPT2)(ids))


@pytest.mark.parametrize(
    ("family", "kind", "kernel"),
    [
        ("gpt-neo", "none", "sdpa"),
        ("gpt-neo", "full", "sdpa"),
        ("gpt-neo", "selective", "sdpa"),
        ("gpt-neo", "selective", "varlen"),
        ("llama", "none", "sdpa"),
        ("qwen2", "selective", "varlen"),
    ],
)
def test_compiled_blocks_have_the_same_names_and_gradients(family: str, kind: str, kernel: str) -> None:
    torch._dynamo.reset()
    shape = SHAPES[family]
    wanted = train_gradients(build_model(shape))
    model = build_model(shape, activation_checkpointing=kind, kernel=kernel)
    for block in model.transformer.h:
        block.compile(backend="aot_eager")
    assert_same_gradients(train_gradients(model), wanted, 1e-6)


@pytest.mark.skipif(shutil.which("g++") is None, reason="compiling for the CPU needs g++")
def test_a_compiled_block_with_selective_checkpointing_down_to_machine_code() -> None:
    torch._dynamo.reset()
    shape = replace(GPT_NEO, num_layers=1, attention_layers=("local",))
    wanted = train_gradients(build_model(shape))
    model = build_model(shape, activation_checkpointing="selective")
    model.transformer.h[0].compile()
    with inductor_config.patch(compile_threads=1):  # no pool of processes for one small block
        assert_same_gradients(train_gradients(model), wanted, 1e-5)


@pytest.mark.parametrize("kind", ["full", "selective"])
def test_sharded_after_compiling_it_has_the_same_names_and_gradients(kind: str) -> None:
    torch._dynamo.reset()
    wanted = train_gradients(build_model(GPT_NEO))
    model = build_model(GPT_NEO, activation_checkpointing=kind)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        for block in model.transformer.h:
            block.compile(backend="aot_eager")
            fully_shard(block, mesh=mesh)
        fully_shard(model, mesh=mesh)
        ours = {name: gradient.full_tensor() for name, gradient in train_gradients(model).items()}
    finally:
        dist.destroy_process_group()
    assert_same_gradients(ours, wanted, 1e-6)


def test_initial_values_depend_on_seed_and_name_alone() -> None:
    size = torch.Size((GPT_NEO.padded_vocab, 32))
    torch.manual_seed(1)
    first = initial_value("transformer.wte.weight", size, GPT_NEO, seed=3)
    torch.manual_seed(2)
    assert torch.equal(first, initial_value("transformer.wte.weight", size, GPT_NEO, seed=3))
    assert not torch.equal(first, initial_value("transformer.wte.weight", size, GPT_NEO, seed=4))
    square = torch.Size((32, 32))
    one, other = (
        initial_value(f"transformer.h.{layer}.attn.attention.k_proj.weight", square, GPT_NEO, 3) for layer in (0, 1)
    )
    assert not torch.equal(one, other)


@pytest.mark.parametrize(
    ("family", "name", "std"),
    [
        ("gpt2", "transformer.wte.weight", 0.02),
        ("gpt2", "transformer.wpe.weight", 0.02),
        ("gpt2", "transformer.h.0.attn.c_attn.weight", 0.02),
        ("gpt2", "transformer.h.0.attn.c_proj.weight", 0.02 / 2),  # 1 / sqrt(2 * 2 layers)
        ("gpt2", "transformer.h.0.mlp.c_fc.weight", 0.02),
        ("gpt2", "transformer.h.0.mlp.c_proj.weight", 0.02 / 2),
        ("gpt-neo", "transformer.h.1.attn.attention.q_proj.weight", 0.02 / math.sqrt(8)),  # head_dim 8
        ("gpt-neo", "transformer.h.1.attn.attention.k_proj.weight", 0.02),
        ("gpt-neo", "transformer.h.1.attn.attention.out_proj.weight", 0.02 / 2),
        ("gpt-neo", "transformer.h.1.attn.attention.out_proj.bias", 0.0),
        ("gpt-neo", "transformer.h.1.ln_2.bias", 0.0),
        ("llama", "transformer.h.1.attn.attention.q_proj.weight", 0.02),
        ("llama", "transformer.h.1.attn.attention.out_proj.weight", 0.02),
        ("llama", "transformer.h.1.mlp.c_proj.weight", 0.02),
        ("llama", "lm_head.weight", 0.02),
        ("qwen2", "transformer.h.1.attn.attention.k_proj.bias", 0.0),
    ],
)
def test_spread_of_initial_values(family: str, name: str, std: float) -> None:
    shape = SHAPES[family]
    value = initial_value(name, torch.Size(parameter_shapes(shape)[name]), shape, seed=0)
    assert value.dtype == torch.float32
    real = value[: shape.vocab_size] if name in (EMBEDDING, HEAD) else value
    assert abs(real.mean()) <= 0.1 * std
    assert real.std(correction=0).item() == pytest.approx(std, rel=0.05)
    assert not value[shape.vocab_size :].any()


def test_norms_start_as_the_identity() -> None:
    for name in (
        "transformer.ln_f.weight",
        "transformer.h.0.ln_1.weight",
        "transformer.h.0.attn.attention.q_norm.weight",
    ):
        assert torch.equal(initial_value(name, torch.Size((32,)), GPT2, 0), torch.ones(32))
