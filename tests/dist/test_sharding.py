"""Prevents: gradients that silently depend on how a batch is cut into ranks and micro-batches (the mean of means, a
divide factor set on the root module alone), and a gradient norm that the shards change."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from gloria.dist.process import Process
from gloria.dist.sharding import (
    all_reduce_sums,
    begin_pass,
    build_mesh,
    clip_coefficient,
    fill_parameters,
    gradient_square_sum,
    local_gradients,
    reseed,
    update,
)
from gloria.dist.step_sums import SPIKE_WINDOW, Flags, decide_update, new_running_norm, pack_sums, unpack_sums
from gloria.errors import UserError
from gloria.model.config import TransformerConfig
from gloria.model.transformer import Transformer, initial_value
from gloria.optim.optimizers import OptimConfig, build_optimizer
from gloria.train.pretraining import shard_model
from tests.world import run_world

ROWS, LENGTH, SEED = 4, 40, 3


def tiny_shape(vocab_size: int, architecture: str = "gpt-neo") -> TransformerConfig:
    return TransformerConfig(
        architecture=architecture,
        num_layers=2,
        hidden_size=32,
        num_heads=4,
        intermediate_size=64,
        max_positions=64,
        vocab_size=vocab_size,
        attention_layers=("global", "local") if architecture == "gpt-neo" else ("global", "global"),
        window_size=16,
        num_kv_heads=2 if architecture == "llama" else None,
        tied_head=architecture != "llama",
    )


def batch(vocab_size: int) -> tuple[torch.Tensor, torch.Tensor]:
    tokens = torch.randint(0, vocab_size, (ROWS, LENGTH + 1), generator=torch.Generator().manual_seed(1))
    return tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()


class Passes(TorchDispatchMode):
    """Counts what FSDP does besides computing: gathers of a module's weights, elements it copies and divides."""

    gathers = copied = divided = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        name = str(function)
        self.gathers += name.startswith("c10d._allgather_base_")
        self.copied += result.numel() if name == "aten.copy_.default" else 0
        self.divided += result.numel() if name == "aten.div.Tensor" and result.dim() else 0
        return result


def sharded_gradients(
    rank: int, world: int, replicas: int, micro_batch: int, shape: TransformerConfig
) -> tuple[dict[str, torch.Tensor], float]:
    """Whole gradients by name, and the norm as the loop logs it, of the global batch cut as requested; the same bits
    whether whole weights are given back behind each block or kept through the step."""
    torch.set_num_threads(1)
    whole, grad_norm, given_back = gradients_of(rank, world, replicas, micro_batch, shape, keep_gathered=False)
    kept_whole, _, kept = gradients_of(rank, world, replicas, micro_batch, shape, keep_gathered=True)
    assert all(torch.equal(kept_whole[name], gradient) for name, gradient in whole.items())
    shards, modules = world // replicas, 3  # two blocks and the root
    assert kept.gathers == (modules if shards > 1 else 0), "one gather a step, and alone none"
    assert given_back.gathers >= (2 * modules - 1 if shards > 1 else 0)
    elements = sum(gradient.numel() for gradient in whole.values())
    if world == 1:
        assert not kept.divided
        # The weights once, and the summed gradients into their place: no pass more, whatever the number of passes.
        assert 2 * elements <= kept.copied <= 2.1 * elements < given_back.copied
    return whole, grad_norm


def gradients_of(
    rank: int, world: int, replicas: int, micro_batch: int, shape: TransformerConfig, *, keep_gathered: bool
) -> tuple[dict[str, torch.Tensor], float, Passes]:
    process = Process(rank, world, torch.device("cpu"))
    mesh = build_mesh(process, replicas)
    model = shard_model(
        shape,
        mesh,
        process.device,
        precision="fp32",
        activation_checkpointing="full",
        compile_blocks=False,
        keep_gathered=keep_gathered,
    )
    fill_parameters(model, lambda name, size: initial_value(name, size, shape, SEED))
    ids, labels = batch(shape.vocab_size)
    own = list(range(rank, ROWS, world))
    row_losses = []
    passes = Passes()
    with passes:
        for first in range(0, len(own), micro_batch):
            rows = own[first : first + micro_batch]
            begin_pass(model, last=first + micro_batch >= len(own), keep_gathered=keep_gathered)
            loss, losses = model(ids[rows], labels[rows])
            loss.mul(1 / (ROWS * LENGTH)).backward()
            row_losses.append(losses)
    gradients = local_gradients(model)
    sources = torch.zeros(len(own), dtype=torch.int64)
    sums = pack_sums(gradient_square_sum(gradients, mesh), torch.cat(row_losses), sources, 1, Flags())
    all_reduce_sums(sums)
    whole = {name: parameter.grad.full_tensor() for name, parameter in model.named_parameters()}
    return whole, unpack_sums(sums.numpy(), 1).grad_norm, passes


def reference_gradients(shape: TransformerConfig) -> dict[str, torch.Tensor]:
    """One process, no sharding, the whole batch at once."""
    model = Transformer(shape)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(initial_value(name, parameter.shape, shape, SEED))
    ids, labels = batch(shape.vocab_size)
    (model(ids, labels)[0] / (ROWS * LENGTH)).backward()
    return {name: parameter.grad for name, parameter in model.named_parameters()}


@pytest.mark.parametrize(
    ("world", "replicas", "micro_batch", "vocab_size", "architecture"),
    [
        (1, 1, 1, 500, "gpt-neo"),
        (2, 1, 1, 500, "gpt-neo"),
        (4, 1, 1, 500, "gpt-neo"),
        (4, 2, 1, 500, "gpt-neo"),
        (4, 1, 1, 50257, "gpt-neo"),
        (3, 1, 2, 50257, "gpt-neo"),
        (4, 2, 1, 500, "llama"),  # its head is a parameter of the root's
        (3, 1, 2, 500, "llama"),
    ],
)
def test_gradients_do_not_depend_on_ranks_and_micro_batches(world, replicas, micro_batch, vocab_size, architecture):
    shape = tiny_shape(vocab_size, architecture)
    expected = reference_gradients(shape)
    for found, grad_norm in run_world(sharded_gradients, world, replicas, micro_batch, shape):
        assert found.keys() == expected.keys()
        for name, gradient in expected.items():
            assert gradient.norm() > 0, name
            assert (found[name] - gradient).norm() <= 1e-6 * gradient.norm(), name
        norm = sum(gradient.double().square().sum() for gradient in found.values()).sqrt().item()
        assert grad_norm == pytest.approx(norm, rel=1e-6)


def test_initial_weights_do_not_depend_on_the_ranks():
    shape = tiny_shape(50257)
    expected = {
        name: initial_value(name, parameter.shape, shape, SEED)
        for name, parameter in Transformer(shape).named_parameters()
    }
    for found in run_world(initial_weights, 3):
        for name, value in expected.items():
            assert torch.equal(found[name], value), name


def initial_weights(rank: int, world: int) -> dict[str, torch.Tensor]:
    process = Process(rank, world, torch.device("cpu"))
    shape = tiny_shape(50257)
    model = shard_model(
        shape,
        build_mesh(process, 1),
        process.device,
        precision="fp32",
        activation_checkpointing="none",
        compile_blocks=False,
    )
    fill_parameters(model, lambda name, size: initial_value(name, size, shape, SEED))
    return {name: parameter.full_tensor() for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("name", ["adamw", "radam", "muon"])
def test_an_update_that_is_not_finite_changes_nothing(name):
    weight = torch.nn.Parameter(torch.ones(3, 2))
    optimizer = build_optimizer(OptimConfig(name=name, lr=0.1), [("h.0.weight", weight)])
    weight.grad = torch.ones(3, 2)
    update(optimizer, [weight.grad], torch.tensor(1.0), torch.tensor(True))
    after_first = weight.detach().clone()
    assert not torch.equal(after_first, torch.ones(3, 2))
    weight.grad = torch.full((3, 2), float("nan"))
    update(optimizer, [weight.grad], torch.tensor(float("nan")), torch.tensor(False))
    assert torch.equal(weight.detach(), after_first)
    assert optimizer.state[weight].get("step", 1) == 1


@pytest.mark.parametrize("name", ["adamw", "radam"])
@pytest.mark.parametrize(("clip_norm", "expected"), [(1.0, [0.6, 0.8]), (50.0, [3.0, 4.0])])
def test_clipping_scales_to_the_norm_and_leaves_smaller_gradients_alone(name, clip_norm, expected):
    """Seen in the optimizer's own average of the gradient, which is (1 - beta1) times the first one."""
    weights = [torch.nn.Parameter(torch.ones(1)), torch.nn.Parameter(torch.ones(1, 1))]
    optimizer = build_optimizer(OptimConfig(name=name), [("b.bias", weights[0]), ("h.0.weight", weights[1])])
    weights[0].grad, weights[1].grad = torch.tensor([3.0]), torch.tensor([[4.0]])
    coefficient = clip_coefficient(torch.tensor(5.0, dtype=torch.float64), clip_norm)
    update(optimizer, [weight.grad for weight in weights], coefficient, torch.tensor(True))
    seen = [optimizer.state[weight]["exp_avg"].item() / 0.1 for weight in weights]
    assert seen == pytest.approx(expected, rel=1e-5)


def test_a_loss_or_gradient_that_is_not_finite_is_seen_by_every_rank():
    sources = torch.tensor([0, 1])
    flags = Flags(stop=True, save_failed=True)
    good = pack_sums(torch.tensor(4.0, dtype=torch.float64), torch.tensor([1.0, 2.0]), sources, 2, flags)
    norm, finite = decide_update(good, 2)
    assert (norm.item(), finite.item()) == (2.0, True)
    read = unpack_sums(good.numpy(), 2)
    assert (read.group_loss.tolist(), read.group_rows.tolist()) == ([1.0, 2.0], [1, 1])
    assert (read.stop_requests, read.saves_done, read.saves_failed, read.locks_lost) == (1, 0, 1, 0)
    assert (read.finite, read.spike, read.applied) == (True, False, True)
    for grad_square, losses in ((float("inf"), [1.0, 2.0]), (4.0, [1.0, float("nan")])):
        bad = good + pack_sums(
            torch.tensor(grad_square, dtype=torch.float64), torch.tensor(losses), sources, 2, Flags()
        )
        assert not decide_update(bad, 2)[1]
        read = unpack_sums(bad.numpy(), 2)
        assert (read.finite, read.spike, read.applied) == (False, False, False)


def test_spikes_are_judged_by_a_running_norm_that_leaves_them_out():
    """Against the mean and deviation of numpy while the window fills, and by hand where it is exponential."""
    norms = np.random.default_rng(1).normal(3.0, 0.5, SPIKE_WINDOW)
    running = new_running_norm(torch.device("cpu"))

    def verdict(norm: float) -> tuple[bool, bool]:
        sums = pack_sums(torch.tensor(norm**2), torch.ones(1), torch.tensor([0]), 1, Flags())
        good = bool(decide_update(sums, 1, running, deviations=4.0)[1])
        read = unpack_sums(sums.numpy(), 1)
        assert read.applied == good
        return read.finite, read.spike

    assert {verdict(norm) for norm in norms} == {(True, False)}  # too few to decide_update by
    assert running.tolist() == pytest.approx([SPIKE_WINDOW, norms.mean(), norms.var()])
    before, limit = running.clone(), norms.mean() + 4 * norms.std()
    assert verdict(limit * 1.001) == (True, True)
    assert verdict(float("inf")) == verdict(float("nan")) == (False, False)
    assert torch.equal(running, before)
    assert verdict(limit * 0.999) == (True, False)
    assert running[1].item() == pytest.approx(norms.mean() + (limit * 0.999 - norms.mean()) / SPIKE_WINDOW)


def test_random_numbers_of_a_step_depend_on_seed_step_and_rank():
    def draw(*key: int) -> torch.Tensor:
        reseed(*key)
        return torch.rand(4)

    assert torch.equal(draw(1, 2, 3), draw(1, 2, 3))
    for other in ((2, 2, 3), (1, 3, 3), (1, 2, 4)):
        assert not torch.equal(draw(1, 2, 3), draw(*other))


def test_replicas_must_divide_the_ranks():
    process = Process(0, 4, torch.device("cpu"))
    with pytest.raises(UserError, match=r"^dist\.replicas: 3 does not divide the 4 ranks; choose a divisor of 4$"):
        build_mesh(process, 3)
