"""Prevents: an fp16 overflow taken for a bad batch (or a bad batch for an overflow, for ever), a clip norm or a spike
measured on scaled gradients, micro-batches summed in fp16, and bf16 that a card emulates, many times slower."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from gloria.dist import loss_scale, sharding
from gloria.dist.loss_scale import adjust, new_loss_scale
from gloria.dist.process import Process
from gloria.dist.sharding import (
    build_mesh,
    clip_coefficient,
    fill_parameters,
    local_gradients,
    precision_and_reason,
    update,
)
from gloria.dist.step_sums import Flags, StepSums, decide_update, new_running_norm, overflowed, pack_sums, unpack_sums
from gloria.errors import UserError
from gloria.model.attention import attend, attention_masks
from gloria.model.transformer import initial_value
from gloria.optim.optimizers import OptimConfig, build_optimizer
from gloria.train.pretraining import shard_model
from tests.dist.test_sharding import batch, tiny_shape
from tests.world import run_world

CPU = torch.device("cpu")
V100, A100 = "Tesla V100-SXM2-32GB", "NVIDIA A100-SXM4-40GB"


def test_the_scale_halves_at_an_overflow_and_doubles_after_2000_good_steps():
    """Step by step beside torch's own scaler."""
    ours, theirs = new_loss_scale(CPU), torch.full((1,), 2.0**16)
    tracker = torch.zeros(1, dtype=torch.int32)
    overflows = {3, 4, 2500, 2501, 4600}
    for step in range(7000):
        adjust(ours, torch.tensor(step not in overflows))
        torch._amp_update_scale_(theirs, tracker, torch.tensor([float(step in overflows)]), 2.0, 0.5, 2000)
        assert ours.tolist() == [theirs.item(), tracker.item()], step
    assert ours[0] == 2.0 ** (16 - 5 + 3)


def test_the_scale_is_not_halved_under_1():
    scale = torch.tensor([2.0, 7.0])
    for _ in range(2):
        adjust(scale, torch.tensor(False))
        assert scale.tolist() == [1.0, 0.0]


def judged(grad_square: float, loss: float, scale: torch.Tensor | None) -> tuple[float, StepSums]:
    """The norm and the step's verdict, of which device and host must say the same."""
    sums = pack_sums(
        torch.tensor(grad_square, dtype=torch.float64), torch.tensor([loss, 1.0]), torch.tensor([0, 1]), 2, Flags()
    )
    norm, good = decide_update(sums, 2, loss_scale=scale)
    read = unpack_sums(sums.numpy(), 2)
    assert (bool(good), bool(overflowed(sums))) == (read.applied, read.overflow)
    return norm.item(), read


@pytest.mark.parametrize("bad", [float("inf"), float("nan")])
def test_an_overflow_is_a_gradient_that_is_not_finite_beside_a_finite_loss_under_a_scale_above_1(bad):
    scale = torch.tensor([1024.0, 0.0])
    norm, read = judged(9.0 * 1024**2, 2.0, scale)
    assert (norm, read.grad_norm, read.loss_scale, read.applied) == (3.0, 3.0, 1024.0, True)
    _, read = judged(bad, 2.0, scale)
    assert (read.applied, read.finite, read.spike, read.overflow) == (False, False, False, True)
    for grad_square, loss in ((9.0, bad), (bad, bad)):
        _, read = judged(grad_square, loss, scale)
        assert (read.applied, read.finite, read.overflow) == (False, False, False), "the batch is bad, not the scale"
    _, read = judged(bad, 2.0, torch.tensor([1.0, 0.0]))
    assert (read.applied, read.overflow) == (False, False), "a scale of 1 is not to blame"
    _, read = judged(bad, 2.0, None)
    assert (read.applied, read.overflow, read.loss_scale) == (False, False, 0.0)


def test_spikes_are_judged_by_unscaled_norms_and_overflows_leave_no_trace_in_them(monkeypatch):
    monkeypatch.setattr("gloria.dist.step_sums.SPIKE_WINDOW", 3)

    def verdicts(scales: list[float], norms: list[float]) -> tuple[list[bool], list[float]]:
        running, spikes = new_running_norm(CPU), []
        for scale, norm in zip(scales, norms):
            grad_square = torch.tensor((norm * scale) ** 2, dtype=torch.float64)
            sums = pack_sums(grad_square, torch.ones(1), torch.tensor([0]), 1, Flags())
            decide_update(sums, 1, running, 4.0, torch.tensor([scale, 0.0]))
            spikes.append(unpack_sums(sums.numpy(), 1).spike)
        return spikes, running.tolist()

    plain = verdicts([2.0] * 5, [1.0, 1.1, 0.9, 1.05, 50.0])
    assert plain[0] == [False] * 4 + [True]
    assert verdicts([2.0**30, 2.0**30, 2.0**29, 2.0, 2.0], [1.0, 1.1, 0.9, 1.05, 50.0]) == plain
    with_overflow = verdicts([2.0**20] * 6, [1.0, float("inf"), 1.1, 0.9, 1.05, 50.0])
    assert (with_overflow[0], with_overflow[1]) == ([False] * 5 + [True], plain[1])


@pytest.mark.parametrize("name", ["adamw", "radam", "muon"])
def test_the_update_of_a_scaled_gradient_is_that_of_the_gradient(name):
    """Clipped to a norm of 1 and not clipped at all, over steps with other scales."""

    def trained(scales: list[float], clip_norm: float) -> torch.Tensor:
        weight = torch.nn.Parameter(torch.linspace(-1, 1, 6).view(3, 2))
        optimizer = build_optimizer(OptimConfig(name=name, lr=0.1), [("h.0.weight", weight)])
        for step, scale in enumerate(scales):
            weight.grad = torch.full((3, 2), 0.5 + step) * scale
            norm = (weight.grad.double() / scale).norm()
            update(optimizer, [weight.grad], clip_coefficient(norm, clip_norm) / scale, torch.tensor(True))
        return weight.detach()

    for clip_norm in (1.0, 100.0):
        assert torch.equal(trained([2.0**16, 2.0**15, 2.0**17] * 3, clip_norm), trained([1.0] * 9, clip_norm))


def gradients_of_equal_micro_batches(rank: int, world: int, count: int) -> list[torch.Tensor]:
    shape = tiny_shape(500)
    model = shard_model(
        shape,
        build_mesh(Process(rank, world, CPU), 1),
        CPU,
        precision="fp16",
        activation_checkpointing="none",
        compile_blocks=False,
    )
    fill_parameters(model, lambda name, size: initial_value(name, size, shape, 3))
    ids, labels = batch(500)
    for number in range(count):
        model.set_requires_gradient_sync(number == count - 1)
        loss, losses = model(ids, labels)
        assert loss.dtype == losses.dtype == torch.float32
        (loss / labels.numel() * 1024).backward()
    return local_gradients(model)


@pytest.mark.parametrize("world", [1, 2])
def test_gradients_of_micro_batches_and_ranks_are_summed_in_fp32(world):
    """Three times an fp16 number has more bits than fp16, and none may be lost."""
    once, thrice = (run_world(gradients_of_equal_micro_batches, world, count)[0] for count in (1, 3))
    assert any(gradient.abs().max() > 0 for gradient in once)
    for one, three in zip(once, thrice):
        assert one.dtype == three.dtype == torch.float32
        assert torch.equal(three, 3 * one)
    assert not all(torch.equal(three, three.half().float()) for three in thrice), "the case does not need fp32"


@pytest.mark.parametrize("window", [0, 8])
def test_unscaled_scores_beyond_fp16_do_not_overflow(window):
    """GPT-Neo does not divide its scores by the root of head_dim; fp16 ends at 65,504."""
    generator = torch.Generator().manual_seed(1)
    query, key, value = (torch.randn(2, 32, 16, generator=generator).half() for _ in range(3))
    query, key = query * 150, key * 150
    assert (query.float() * key.float()).unflatten(-1, (2, 8)).sum(-1).abs().max() > 2 * 65504
    outputs = []
    for dtype in (torch.float32, torch.float16):
        masks = attention_masks(2, 32, window, None, device=CPU, dtype=dtype)
        inputs = [tensor.to(dtype).unflatten(-1, (2, 8)).requires_grad_() for tensor in (query, key, value)]
        outputs.append(attend(*inputs, masks, window=window, scale=1.0, dropout=0.0))
        outputs[-1].sum().backward()
        assert all(tensor.grad.isfinite().all() for tensor in inputs)
    torch.testing.assert_close(outputs[1].float(), outputs[0], rtol=2e-3, atol=2e-3)


# --- which precision


@pytest.fixture
def card(monkeypatch: pytest.MonkeyPatch):
    """`card(name, has_bf16, others)`: this rank is on such a GPU, and whether all other ranks' have bf16."""

    def put(name: str, has_bf16: bool, others: bool = True) -> SimpleNamespace:
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: has_bf16)
        monkeypatch.setattr(sharding, "on_any_rank", lambda here: here or not others)
        return SimpleNamespace(type="cuda")

    return put


def test_auto_is_the_best_that_every_card_has(card):
    assert precision_and_reason("auto", CPU) == ("fp32", "no GPU is used")
    assert precision_and_reason("bf16", CPU) == ("bf16", "as the recipe has it")
    assert precision_and_reason("auto", card(A100, True)) == ("bf16", f"{A100} has it")
    assert precision_and_reason("auto", card(V100, False)) == ("fp16", f"{V100} has no bf16")
    mixed = ("fp16", "the card of another rank has no bf16")
    assert precision_and_reason("auto", card(A100, True, others=False)) == mixed
    assert precision_and_reason("fp16", card(A100, True)) == ("fp16", "as the recipe has it")
    assert precision_and_reason("fp32", card(V100, False)) == ("fp32", "as the recipe has it")


def test_bf16_on_a_card_without_it_is_an_error_and_not_emulated(card):
    for here, name in (((V100, False), V100), ((A100, True, False), "the card of another rank")):
        with pytest.raises(UserError) as caught:
            precision_and_reason("bf16", card(*here))
        assert str(caught.value) == f"train.precision: {name} has no bf16; set it to auto, fp16 or fp32"


def test_the_numbers_are_those_of_torchs_scaler():
    scaler = torch.amp.GradScaler("cpu")
    assert (scaler._init_scale, scaler.get_growth_factor()) == (loss_scale.START, loss_scale.FACTOR)
    assert (scaler.get_backoff_factor(), scaler.get_growth_interval()) == (1 / loss_scale.FACTOR, loss_scale.PATIENCE)
