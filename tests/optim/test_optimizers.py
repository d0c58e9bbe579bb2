"""Weight decay on embeddings and norms; `found_inf` ignored, so that a NaN gradient reaches the weights."""

from __future__ import annotations

import math
from dataclasses import fields

import pytest
import torch
from torch import nn

from gloria.dist.state import load_training_state, training_state
from gloria.optim.optimizers import OPTIMIZERS, Entry, OptimConfig, averages_kept, build_optimizer, parameter_groups
from tests.world import run_world

GPT2 = {
    "transformer.wte.weight": (False, (8, 4)),
    "transformer.wpe.weight": (False, (6, 4)),
    "transformer.h.0.ln_1.weight": (False, (4,)),
    "transformer.h.0.ln_1.bias": (False, (4,)),
    "transformer.h.0.attn.c_attn.weight": (True, (12, 4)),
    "transformer.h.0.attn.c_attn.bias": (False, (12,)),
    "transformer.h.0.mlp.c_proj.weight": (True, (4, 16)),
    "transformer.ln_f.weight": (False, (4,)),
}
GPT_NEO = {
    "transformer.wte.weight": (False, (8, 4)),
    "transformer.h.0.attn.attention.q_proj.weight": (True, (4, 4)),
    "transformer.h.0.attn.attention.out_proj.weight": (True, (4, 4)),
    "transformer.h.0.attn.attention.out_proj.bias": (False, (4,)),
    "transformer.h.0.mlp.c_fc.weight": (True, (16, 4)),
    "transformer.h.0.ln_2.weight": (False, (4,)),
}
OTHERS = {
    "bert.embeddings.word_embeddings.weight": (False, (8, 4)),
    "model.embed_tokens.weight": (False, (8, 4)),
    "gpt_neox.embed_in.weight": (False, (8, 4)),
    "classifier.weight": (True, (2, 4)),
}


@pytest.mark.parametrize("family", [GPT2, GPT_NEO, OTHERS], ids=["gpt2", "gpt-neo", "others"])
def test_only_matrices_outside_embeddings_decay(family: dict[str, tuple[bool, tuple[int, ...]]]) -> None:
    parameters = {name: nn.Parameter(torch.zeros(size)) for name, (_, size) in family.items()}
    names = {id(parameter): name for name, parameter in parameters.items()}
    groups = parameter_groups(parameters.items(), 0.1)
    assert [group["weight_decay"] for group in groups] == [0.1, 0.0][: len(groups)]
    decayed = {names[id(parameter)] for parameter in groups[0]["params"]}
    assert decayed == {name for name, (decays, _) in family.items() if decays}
    assert sum(len(group["params"]) for group in groups) == len(family), "none lost, none twice"


def test_frozen_parameters_are_left_out_and_so_is_an_empty_group() -> None:
    frozen = nn.Parameter(torch.zeros(4, 4), requires_grad=False)
    bias = nn.Parameter(torch.zeros(4))
    groups = parameter_groups([("fc.weight", frozen), ("fc.bias", bias)], 0.1)
    assert [(group["weight_decay"], len(group["params"])) for group in groups] == [(0.0, 1)]


@pytest.mark.parametrize(
    ("name", "peer"),
    [
        (
            "adamw",
            lambda p: torch.optim.AdamW(p, lr=1e-2, betas=(0.9, 0.95), weight_decay=0.1, foreach=False),
        ),
        (
            "radam",
            lambda p: torch.optim.RAdam(
                p, lr=1e-2, betas=(0.9, 0.95), weight_decay=0.1, decoupled_weight_decay=True, foreach=False
            ),
        ),
    ],
)
def test_updates_are_those_of_the_plain_optimizer(name: str, peer) -> None:
    torch.manual_seed(0)
    start = torch.randn(6, 5)
    ours, theirs = nn.Parameter(start.clone()), nn.Parameter(start.clone())
    config = OptimConfig(name, lr=1e-2, weight_decay=0.1, betas=(0.9, 0.95))
    optimizers = (build_optimizer(config, [("fc.weight", ours)]), peer([theirs]))
    for _ in range(12):
        gradient = torch.randn(6, 5)
        for parameter, optimizer in zip((ours, theirs), optimizers):
            parameter.grad = gradient.clone()
            optimizer.step()
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-7)


def take_two_steps(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, bool]:
    """One good step and one with a NaN gradient and found_inf 1; what stayed the same over the second."""
    take_step(optimizer, 0.5, found_inf=0.0)
    before = snapshot(model, optimizer)
    take_step(optimizer, math.nan, found_inf=1.0)
    same = {name: torch.equal(value, before[name]) for name, value in snapshot(model, optimizer).items()}
    take_step(optimizer, 0.5, found_inf=0.0)
    after = snapshot(model, optimizer)
    same["moves again"] = all(not torch.equal(after[name], before[name]) for name in after if after[name].numel())
    return same


def take_step(optimizer: torch.optim.Optimizer, gradient: float, found_inf: float) -> None:
    for group in optimizer.param_groups:
        for rows in group["params"]:
            assert type(rows) in (torch.Tensor, nn.Parameter), "an optimizer's tensors have no dispatch of their own"
            rows.grad = torch.full_like(rows, gradient)
    optimizer.found_inf = torch.tensor(found_inf)
    optimizer.step()


def snapshot(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    return {name: shard.tensor.clone() for name, shard in training_state(model, optimizer).items()}


def test_a_step_with_found_inf_leaves_weights_and_state_alone() -> None:
    model = nn.Linear(4, 3)
    same = take_two_steps(model, build_optimizer(OptimConfig(), model.named_parameters()))
    assert "optim.step.weight" in same
    assert "optim.exp_avg_sq.weight" in same
    assert all(same.values()), same


def step_sharded(rank: int, world: int) -> dict[str, bool]:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    model = nn.Linear(4, 3)
    fully_shard(model, mesh=init_device_mesh("cpu", (world,)))
    return take_two_steps(model, build_optimizer(OptimConfig(), model.named_parameters()))


@pytest.mark.parametrize("world", [1, 2])
def test_found_inf_works_on_sharded_parameters(world: int) -> None:
    for same in run_world(step_sharded, world):
        assert "optim.step.weight" in same
        assert all(same.values()), same


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_plan_knows_what_an_optimizer_keeps(name: str) -> None:
    parameters = {name: nn.Parameter(torch.zeros(size)) for name, (_, size) in (GPT2 | GPT_NEO).items()}
    optimizer = build_optimizer(OptimConfig(name), parameters.items())
    for key, parameter in parameters.items():
        kept = [value for value in optimizer.state[parameter].values() if value.shape == parameter.shape]
        assert len(kept) == averages_kept(name, key, parameter.ndim), key


def test_an_optimizer_is_one_entry(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its name is a choice of the recipe, and its state is saved before the first step and loaded again to the bit."""

    def momentum(parameter: torch.Tensor, group: dict) -> dict[str, torch.Tensor]:
        return {"momentum_buffer": torch.zeros_like(parameter)}

    def build(groups: list[dict], config: OptimConfig) -> torch.optim.Optimizer:
        return torch.optim.SGD(groups, lr=config.lr, momentum=config.betas[0])

    monkeypatch.setitem(OPTIMIZERS, "sgd", Entry(build, momentum))
    config = OptimConfig("sgd", lr=0.1, weight_decay=0.0)

    def begin() -> tuple[nn.Module, torch.optim.Optimizer]:
        torch.manual_seed(0)
        model = nn.Linear(4, 3)
        return model, build_optimizer(config, model.named_parameters())

    def step(model: nn.Module, optimizer: torch.optim.Optimizer, value: float) -> None:
        for parameter in model.parameters():
            parameter.grad = torch.full_like(parameter, value)
        optimizer.step()

    (model, optimizer), (plain, _) = begin(), begin()
    theirs = torch.optim.SGD(plain.parameters(), lr=0.1, momentum=0.9)
    names = list(training_state(model, optimizer))
    assert names == ["model.weight", "model.bias", "optim.momentum_buffer.weight", "optim.momentum_buffer.bias"]
    step(model, optimizer, 0.5)
    step(plain, theirs, 0.5)
    saved = {name: shard.tensor.clone() for name, shard in training_state(model, optimizer).items()}
    model, optimizer = begin()
    load_training_state(model, optimizer, lambda name, tensor, *_: tensor.copy_(saved[name]))
    step(model, optimizer, -0.2)
    step(plain, theirs, -0.2)
    assert all(torch.equal(ours, other) for ours, other in zip(model.parameters(), plain.parameters()))
    assert next(item for item in fields(OptimConfig) if item.name == "name").metadata["choices"] == (
        "adamw",
        "radam",
        "muon",
    )
