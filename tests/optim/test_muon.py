"""Prevents: an update that depends on how the matrices lie on the ranks, a rank that does the work of all, and Muon on
what it is not for: embeddings, heads, norms."""

from __future__ import annotations

import math

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor, distribute_tensor

from gloria.dist.process import Process
from gloria.dist.sharding import build_mesh, shard, update
from gloria.dist.state import training_state
from gloria.model.config import PRESETS, parameter_shapes
from gloria.optim import muon
from gloria.optim.optimizers import OptimConfig, build_optimizer, is_hidden_matrix
from tests.dist.toys import whole_tensors
from tests.world import run_world

CONFIG = OptimConfig("muon", lr=1e-2, weight_decay=0.1, betas=(0.9, 0.95))


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(24, 40)
        self.down = nn.Linear(40, 24, bias=False)
        self.gate = nn.Linear(24, 3)  # fewer rows than ranks


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.wte = nn.Embedding(11, 24)
        self.h = nn.ModuleList(Layer() for _ in range(3))
        self.lm_head = nn.Linear(24, 11, bias=False)


def start() -> Model:
    torch.manual_seed(0)
    return Model()


def gradient(step: int, name: str, size: torch.Size) -> torch.Tensor:
    generator = torch.Generator().manual_seed(100 * step + sum(name.encode()))
    return torch.randn(size, generator=generator)


def take_steps(
    model: nn.Module, optimizer: torch.optim.Optimizer, steps: int, scale: float = 1.0, *, good: bool = True
) -> None:
    """Steps with the same whole gradients on any number of ranks."""
    for step in range(steps):
        gradients = []
        for name, parameter in model.named_parameters():
            whole = gradient(step, name, parameter.shape) * scale
            if isinstance(parameter, DTensor):
                whole = distribute_tensor(whole, parameter.device_mesh, parameter.placements)
                gradients.append(whole.to_local())
            else:
                gradients.append(whole)
            parameter.grad = whole
        update(optimizer, gradients, torch.tensor(1 / scale), torch.tensor(good))


def test_on_one_rank_it_is_torchs_muon_and_torchs_adamw(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch's Muon computes in bf16 on CPU too; here it is made to compute in fp32, as ours does."""
    ours, theirs = start(), start()
    take_steps(ours, build_optimizer(CONFIG, ours.named_parameters()), 10, scale=2.0**10)
    matrices, others = [], []
    for name, parameter in theirs.named_parameters():
        (matrices if is_hidden_matrix(name, parameter.ndim) else others).append(parameter)
    peers = [
        torch.optim.Muon(matrices, lr=1e-2, weight_decay=0.1, momentum=0.95, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(
            [p for p in others if p is theirs.lm_head.weight], lr=1e-2, betas=(0.9, 0.95), weight_decay=0.1
        ),
        torch.optim.AdamW(
            [p for p in others if p is not theirs.lm_head.weight], lr=1e-2, betas=(0.9, 0.95), weight_decay=0
        ),
    ]
    monkeypatch.setattr(torch.Tensor, "bfloat16", torch.Tensor.clone)
    for step in range(10):
        for name, parameter in theirs.named_parameters():
            parameter.grad = gradient(step, name, parameter.shape)
        for peer in peers:
            peer.step()
    assert len(matrices) == 9
    for (name, found), expected, before in zip(ours.named_parameters(), theirs.parameters(), start().parameters()):
        assert (found - expected).norm() <= 1e-6 * (expected - before).norm(), name


@pytest.mark.parametrize("size", [(24, 40), (40, 24), (16, 16), (1, 8)])
def test_in_bf16_the_matrix_is_torchs_to_the_bit(size: tuple[int, int]) -> None:
    weight = nn.Parameter(torch.zeros(size))
    weight.grad = gradient(0, "", weight.shape)
    torch.optim.Muon([weight], lr=1.0, weight_decay=0.0, momentum=0.0, nesterov=False, adjust_lr_fn="original").step()
    expected = -weight.detach() / math.sqrt(max(1, size[0] / size[1]))
    torch.testing.assert_close(muon.newton_schulz(weight.grad.bfloat16()).float(), expected, rtol=1e-6, atol=0)


def test_singular_values_come_near_one() -> None:
    values = torch.linalg.svdvals(muon.newton_schulz(gradient(0, "", torch.Size((64, 128)))))
    assert values.min() > 0.6
    assert values.max() < 1.3
    assert not muon.newton_schulz(torch.zeros(3, 5)).any(), "nothing to divide by"


@pytest.mark.parametrize(
    "name",
    [
        "transformer.wte.weight",
        "lm_head.weight",
        "model.embed_tokens.weight",
        "backbone.model.embed_out.weight",
        "heads.label.weight",
        "backbone.bert.pooler.dense.weight",
    ],
)
def test_what_lies_outside_the_layers_is_adamws(name: str) -> None:
    assert not is_hidden_matrix(name, 2)


def test_the_matrices_of_layers_are_muons_whatever_the_family() -> None:
    for preset in ("gpt2-124m", "gpt-neo-1.3b"):
        shape = PRESETS[preset]
        hidden = [name for name, size in parameter_shapes(shape).items() if is_hidden_matrix(name, len(size))]
        assert len(hidden) == (4 if preset == "gpt2-124m" else 6) * shape.num_layers
    for name in ("model.layers.3.self_attn.q_proj.weight", "backbone.encoder.layer.0.attention.self.query.weight"):
        assert is_hidden_matrix(name, 2)
        assert not is_hidden_matrix(name, 1), "a bias"


def sharded(rank: int, world: int, replicas: int) -> tuple[dict[str, torch.Tensor], list[tuple[int, int]]]:
    """The whole state after three steps and one that is left out, and the matrices that this rank multiplied."""
    model = start()
    mesh = build_mesh(Process(rank, world, torch.device("cpu")), replicas)
    shard(model, model.h, mesh, "fp32")
    owned, honest = [], muon.newton_schulz

    def counted(matrix: torch.Tensor) -> torch.Tensor:
        owned.append(tuple(matrix.shape))
        return honest(matrix)

    muon.newton_schulz = counted
    optimizer = build_optimizer(CONFIG, model.named_parameters())
    take_steps(model, optimizer, 3)
    multiplied = list(owned)
    take_steps(model, optimizer, 1, math.nan, good=False)  # is left out
    if replicas > 1:  # each replica has computed the same
        for piece in training_state(model, optimizer).values():
            first = piece.tensor.clone()
            dist.broadcast(first, mesh.get_local_rank("shard"), group=mesh.get_group("replicate"))
            assert torch.equal(first, piece.tensor)
    return whole_tensors(training_state(model, optimizer)), multiplied


@pytest.mark.parametrize(("world", "replicas"), [(1, 1), (2, 1), (4, 1), (4, 2)])
def test_the_update_does_not_depend_on_the_ranks_and_each_matrix_has_one_owner(world: int, replicas: int) -> None:
    plain = start()
    optimizer = build_optimizer(CONFIG, plain.named_parameters())
    take_steps(plain, optimizer, 3)
    expected = whole_tensors(training_state(plain, optimizer))
    before = {f"model.{name}": value for name, value in start().state_dict().items()}
    answers = run_world(sharded, world, replicas)
    for found, _ in answers:
        assert found.keys() == expected.keys()
        assert "optim.momentum_buffer.h.0.up.weight" in found
        for name, value in expected.items():
            moved = value - before.get(name, 0)
            assert (found[name] - value).norm() <= 1e-6 * moved.norm(), name
    owned = [sorted(shapes) for _, shapes in answers]
    shards = world // replicas
    assert sorted(size for sizes in owned[:shards] for size in sizes) == sorted([(40, 24), (24, 40), (3, 24)] * 9)
    assert owned == owned[:shards] * replicas


@pytest.mark.parametrize("ranks", [1, 5, 8, 64, 1024])
def test_no_owner_has_more_work_than_another_by_more_than_a_matrix(ranks: int) -> None:
    sizes = [
        size for name, size in parameter_shapes(PRESETS["gpt-neo-1.3b"]).items() if is_hidden_matrix(name, len(size))
    ]
    matrices = [muon.Matrix(torch.empty(0), size, ()) for size in sizes]
    rounds = muon._rounds(matrices, ranks)
    assert all(len(owned) == ranks for owned in rounds)
    work = [sum(math.prod(owned[rank].shape) for owned in rounds if owned[rank]) for rank in range(ranks)]
    assert sum(work) == sum(map(math.prod, sizes))
    assert max(work) - min(work) <= 2048 * 8192
