"""Bug prevented: a state dict that misses rows, names them twice, or differs after a validation pass, so that
a run goes on from a state it never had."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.distributed.tensor import DTensor

from gloria.dist.state import (
    load_rng_state_dict,
    load_training_state,
    model_state_dict,
    optimizer_state_dict,
    rng_state_dict,
    shard_rows,
)
from tests.dist.toys import (
    build,
    digest_tensors,
    full_state,
    state_digest,
    train_step,
    whole_tensors,
)
from tests.world import run_world


@given(rows=st.integers(0, 300), parts=st.integers(1, 40))
def test_rows_are_cut_as_torch_chunk_cuts_them(rows: int, parts: int):
    sizes = [len(chunk) for chunk in torch.arange(rows).chunk(parts)] if rows else []
    sizes += [0] * (parts - len(sizes))
    pieces = [shard_rows(rows, parts, index) for index in range(parts)]
    assert [size for _, size in pieces] == sizes
    assert [first for first, _ in pieces] == [sum(sizes[:index]) for index in range(parts)]


def names_and_rows(rank: int, world: int, vocab: int, replicas: int) -> dict[str, tuple]:
    model, optimizer = build(vocab, replicas=replicas)
    train_step(model, optimizer, 0)
    whole = whole_tensors(full_state(model, optimizer))  # asserts that every row comes exactly once
    rows = {
        parameter: rows
        for group in optimizer.param_groups
        for parameter, rows in zip(group["model_params"], group["params"])
    }
    for name, parameter in model.named_parameters():
        assert torch.equal(whole[f"model.{name}"], parameter.full_tensor())
        state = optimizer.state[rows[parameter]]
        assert state["exp_avg"].any() or not state["exp_avg"].numel()
        for key in ("exp_avg", "exp_avg_sq"):
            mesh, size = parameter.device_mesh, {"shape": parameter.shape, "stride": parameter.stride()}
            own = DTensor.from_local(state[key], mesh, parameter.placements, run_check=False, **size)
            assert torch.equal(whole[f"optim.{key}.{name}"], own.full_tensor())
        assert whole[f"optim.step.{name}"].item() == 1
    return {
        name: (shard.offset, tuple(shard.tensor.shape), shard.owner) for name, shard in model_state_dict(model).items()
    }


@pytest.mark.parametrize(("vocab", "world"), [(50257, 3), (50304, 3), (50257, 4), (50304, 4)])
def test_every_row_has_one_owner_when_the_ranks_do_not_divide_them(vocab: int, world: int):
    places = run_world(names_and_rows, world, vocab, 1)
    rows = -(-vocab // world)
    assert [place["model.wte.weight"][:2] for place in places] == [
        (index * rows, (min(rows, vocab - index * rows), 8)) for index in range(world)
    ]
    assert all(place["model.wte.weight"][2] for place in places)
    assert [place["model.h.0.gate.weight"] for place in places][1:] == [(1, (0, 8), True)] * (world - 1)
    assert [place["model.forwards"] for place in places] == [(0, (), rank == 0) for rank in range(world)]


def test_hsdp_replicas_write_nothing():
    places = run_world(names_and_rows, 4, 101, 2)
    assert [place["model.wte.weight"] for place in places] == [
        (0, (51, 8), True),
        (51, (50, 8), True),
        (0, (51, 8), False),
        (51, (50, 8), False),
    ]


def state_around_validation(rank: int, world: int) -> tuple[str, str]:
    model, optimizer = build(101)
    train_step(model, optimizer, 0)
    before = model_state_dict(model)
    digest = digest_tensors({name: shard.tensor for name, shard in before.items() if name != "model.forwards"})
    with torch.no_grad():
        model.eval()(torch.zeros(2, 6, dtype=torch.int64))  # FSDP leaves the root's parameters whole after it
    after = full_state(model, optimizer)
    assert all(len(after[name].tensor) == len(before[name].tensor) for name in before if before[name].shape)
    held = {name: after[name].tensor for name in before if name != "model.forwards"}
    return digest, digest_tensors(held)


def test_a_forward_without_backward_does_not_change_what_is_saved():
    for before, after in run_world(state_around_validation, 2):
        assert before == after


@pytest.mark.parametrize("name", ["adamw", "radam"])
def test_state_made_ahead_of_the_first_step_is_what_the_step_would_have_made(name: str):
    model, optimizer = build(101, name)
    ahead = optimizer_state_dict(model, optimizer)
    assert all(not shard.tensor.any() for shard in ahead.values())
    other_model, other_optimizer = build(101, name)
    other_optimizer.state.clear()  # torch makes its own
    losses = [
        [train_step(m, o, step) for step in range(3)] for m, o in ((model, optimizer), (other_model, other_optimizer))
    ]
    assert losses[0] == losses[1]
    assert state_digest(full_state(model, optimizer)) == state_digest(full_state(other_model, other_optimizer))
    for mine, other in zip(model.parameters(), other_model.parameters()):  # not sharded: the optimizer has them itself
        assert {key: (value.dtype, value.shape) for key, value in optimizer.state[mine].items()} == {
            key: (value.dtype, value.shape) for key, value in other_optimizer.state[other].items()
        }


def load_into_another(rank: int, world: int, optimizer_name: str) -> tuple[str, str, float, float]:
    model, optimizer = build(101, optimizer_name)
    for step in range(2):
        train_step(model, optimizer, step)
    saved = {name: shard.tensor.clone() for name, shard in full_state(model, optimizer).items()}

    def read(name: str, tensor: torch.Tensor, offset: int, shape: tuple[int, ...]) -> None:
        tensor.copy_(saved[name])

    other_model, other_optimizer = build(101, optimizer_name, seed=1)
    load_training_state(other_model, other_optimizer, read)
    digests = [state_digest(full_state(m, o)) for m, o in ((model, optimizer), (other_model, other_optimizer))]
    losses = [train_step(m, o, 2) for m, o in ((model, optimizer), (other_model, other_optimizer))]
    return (*digests, *losses)


@pytest.mark.parametrize("optimizer_name", ["adamw", "radam", "muon"])
def test_a_loaded_state_continues_with_the_same_bits(optimizer_name: str):
    for digest, loaded_digest, loss, loaded_loss in run_world(load_into_another, 2, optimizer_name):
        assert digest == loaded_digest
        assert loss == loaded_loss


def test_a_model_without_memory_cannot_be_loaded():
    with torch.device("meta"):
        model, optimizer = build(101)
    with pytest.raises(AssertionError, match="is on the meta device: call model"):
        load_training_state(model, optimizer, lambda *_: None)


def test_random_numbers_continue_where_they_were(capsys):
    states = rng_state_dict()
    assert states["cpu"].dtype == torch.uint8
    drawn = torch.rand(5)
    load_rng_state_dict(states)
    assert torch.equal(torch.rand(5), drawn)
    if not torch.cuda.is_available():
        load_rng_state_dict({**states, "cuda": torch.zeros(16, dtype=torch.uint8)})
        assert capsys.readouterr().err == (
            "warning: the checkpoint holds a CUDA generator's state, which is not used: no CUDA device is here\n"
        )
