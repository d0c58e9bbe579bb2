"""Bug prevented: a checkpoint that holds a mixture of two steps, or that only the number of ranks which saved it can
read."""

from __future__ import annotations

import errno
import os
import re
import shutil
import socket
import threading
from pathlib import Path
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open

from gloria.dist import checkpoint, checkpoint_read
from gloria.dist.checkpoint import (
    SaveState,
    begin_save,
    checkpoint_bytes,
    finish,
    publish,
    wait,
)
from gloria.dist.checkpoint_read import (
    find_checkpoint,
    list_checkpoints,
    open_reader,
    read_full_tensors,
    read_trainer,
    verify,
)
from gloria.dist.manifest import checkpoint_path
from gloria.dist.state import load_rng_state_dict, load_training_state, rng_state_dict
from gloria.dist.tensor_file import DTYPES
from gloria.errors import UserError
from tests.dist.toys import (
    WHOLE,
    begin,
    build,
    checkpoint_digest,
    cut,
    digest_tensors,
    full_state,
    save_whole,
    state_digest,
    train_step,
)
from tests.world import run_world

# --- what is written can be read, on any number of ranks


@st.composite
def tensors(draw) -> dict[str, torch.Tensor]:
    found = {}
    for index in range(draw(st.integers(1, 4))):
        shape = draw(st.lists(st.integers(0, 7), max_size=3))
        dtype = draw(st.sampled_from(sorted(DTYPES.values(), key=str)))
        generator = torch.Generator().manual_seed(draw(st.integers(0, 99)))
        raw = torch.randint(0, 2, shape, generator=generator)
        found[f"t.{index}"] = (raw * 3 if dtype != torch.bool else raw).to(dtype)
    return found


@settings(max_examples=40, deadline=None)
@given(whole=tensors(), saved_by=st.integers(1, 5), read_by=st.integers(1, 5))
def test_any_tensors_come_back_whole_and_in_any_cut(tmp_path_factory, whole, saved_by: int, read_by: int):
    run_dir = tmp_path_factory.mktemp("run")
    with mock.patch("os.fsync"):  # hundreds of them, and no power cut here
        path = save_whole(run_dir, 3, whole, saved_by)
    assert verify(path) == []
    assert digest_tensors(dict(read_full_tensors(path))) == digest_tensors(whole)
    reader = open_reader(path)
    for rank in range(read_by):
        for name, shard in cut(whole, rank, read_by).items():
            # a buffer of its own, and one that is not contiguous
            for target in (
                torch.zeros_like(shard.tensor),
                torch.zeros(*shard.tensor.shape, 2, dtype=shard.tensor.dtype)[..., 0],
            ):
                reader.read_into(name, target, shard.offset, shard.shape)
                assert torch.equal(target, shard.tensor)
    shutil.rmtree(run_dir)


def test_the_files_are_plain_safetensors(tmp_path: Path):
    path = save_whole(tmp_path, 1, WHOLE, world=2)
    assert sorted(os.listdir(path)) == [
        "manifest.json",
        "rank-00000.safetensors",
        "rank-00001.safetensors",
        "trainer.json",
    ]
    with safe_open(path / "rank-00001.safetensors", framework="pt") as file:
        assert sorted(file.keys()) == ["model.a", "rng.cpu"]
        assert torch.equal(file.get_tensor("model.a"), WHOLE["model.a"][4:])
        assert file.metadata()["gloria.shards"] == '{"model.a": [4, [7, 3]], "rng.cpu": [0, [5056]]}'
    assert (tmp_path / "checkpoints" / "latest").read_text() == "step-00000001\n"


def test_rows_are_read_in_place_without_a_second_copy(tmp_path: Path, monkeypatch):
    path = save_whole(tmp_path, 1, WHOLE, world=3)
    target = torch.zeros(4, 3)
    monkeypatch.setattr(checkpoint_read.torch, "empty", lambda *_, **__: pytest.fail("a buffer was made"))
    open_reader(path).read_into("model.a", target, 2, (7, 3))
    assert torch.equal(target, WHOLE["model.a"][2:6])


@pytest.mark.parametrize(
    ("name", "target", "shape", "line"),
    [
        ("model.b", torch.zeros(7, 3), (7, 3), "has no tensor model.b; was it saved from another model?"),
        (
            "model.a",
            torch.zeros(8, 3),
            (8, 3),
            "model.a is torch.float32 [7, 3] there and torch.float32 [8, 3] here; was it saved from another model?",
        ),
        (
            "model.a",
            torch.zeros(7, 3, dtype=torch.bfloat16),
            (7, 3),
            "model.a is torch.float32 [7, 3] there and torch.bfloat16 [7, 3] here; was it saved from another model?",
        ),
    ],
)
def test_another_models_tensors_are_refused(tmp_path: Path, name, target, shape, line: str):
    path = save_whole(tmp_path, 1, WHOLE)
    with pytest.raises(UserError) as error:
        open_reader(path).read_into(name, target, 0, shape)
    assert str(error.value) == f"{path}: {line}"


def test_a_disk_that_cannot_read_is_reported_with_the_file(tmp_path: Path, monkeypatch):
    path = save_whole(tmp_path, 1, WHOLE)
    file, reader = path / "rank-00000.safetensors", open_reader(path)

    def refuse(*_: object) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "preadv", refuse)
    with pytest.raises(UserError) as error:
        reader.read_into("model.a", torch.zeros(7, 3), 0, (7, 3))
    assert str(error.value) == f"{file}: cannot be read (Input/output error)"
    monkeypatch.setattr(checkpoint_read, "hash_file", refuse)
    assert verify(path) == [f"{other}: cannot be read (Input/output error)" for other in (file, path / "trainer.json")]
    monkeypatch.undo()

    os.truncate(file, file.stat().st_size // 2)
    with pytest.raises(UserError, match=re.escape(f"{file}: ends before byte ")):
        reader.read_rng(0)  # the last in the file
    file.unlink()
    with pytest.raises(UserError) as error:
        reader.read_rng(0)
    assert str(error.value) == f"{file}: is missing"


def test_trainer_state_and_raw_rng_come_back(tmp_path: Path):
    state = {"tokens": 10**15, "lr": 1e-4, "mixture": {"Camões": [1, 2]}, "none": None}
    torch.manual_seed(5)
    save = begin(tmp_path, 2, WHOLE, trainer=state)
    assert publish(save)
    drawn = torch.rand(3)
    path = checkpoint_path(tmp_path, 2)
    assert read_trainer(path) == state
    reader = open_reader(path)
    assert reader.read_rng(1) is None
    load_rng_state_dict(reader.read_rng(0))
    assert torch.equal(torch.rand(3), drawn)


def test_bytes_to_come_are_known_from_one_ranks_shards(tmp_path: Path):
    expected = 21 * 4 + 4
    assert [checkpoint_bytes(cut(WHOLE, rank, 3)) for rank in range(3)] == [expected] * 3


# --- elastic: real ranks


def save_trained(rank: int, world: int, run_dir: Path, vocab: int, optimizer_name: str, replicas: int):
    model, optimizer = build(vocab, optimizer_name, replicas)
    model.eval()  # no dropout: its draws depend on the number of ranks
    for step in range(2):
        train_step(model, optimizer, step)
    state = full_state(model, optimizer)
    save = begin_save(run_dir, 2, state, rng_state_dict(), {}, rank=rank, world=world, launch="x", asynchronous=True)
    digest = state_digest(state)
    assert finish(save), save.error
    return digest, train_step(model, optimizer, 2)


def resume_trained(rank: int, world: int, run_dir: Path, vocab: int, optimizer_name: str, replicas: int):
    model, optimizer = build(vocab, optimizer_name, replicas, seed=1)
    model.eval()
    load_training_state(model, optimizer, open_reader(find_checkpoint(run_dir)).read_into)
    return state_digest(full_state(model, optimizer)), train_step(model, optimizer, 2)


@pytest.mark.parametrize(
    ("vocab", "optimizer_name", "saved_on", "resumed_on"),
    [
        (50257, "adamw", (2, 1), [(1, 1), (3, 1), (4, 1), (2, 1)]),
        (50304, "radam", (3, 1), [(4, 1), (1, 1)]),
        (101, "adamw", (4, 2), [(4, 1), (4, 2), (2, 1)]),
        (101, "radam", (1, 1), [(4, 2)]),
        (101, "muon", (4, 1), [(2, 1), (1, 1), (4, 2), (4, 1)]),
    ],
    ids=["50257-from-2", "50304-from-3", "hsdp", "alone-to-hsdp", "muon"],
)
def test_saved_on_some_ranks_resumed_on_others(tmp_path: Path, vocab, optimizer_name, saved_on, resumed_on):
    world, replicas = saved_on
    saved = run_world(save_trained, world, tmp_path, vocab, optimizer_name, replicas)
    digest, loss = saved[0]
    assert checkpoint_digest(find_checkpoint(tmp_path)) == digest
    for world, replicas in resumed_on:
        for resumed_digest, resumed_loss in run_world(resume_trained, world, tmp_path, vocab, optimizer_name, replicas):
            assert resumed_digest == digest
            assert resumed_loss == pytest.approx(loss, rel=1e-5)
            if (world, replicas) == saved_on:
                assert resumed_loss == loss


# --- in the background


def save_and_step_on(rank: int, world: int, run_dir: Path) -> list[tuple[str, str]]:
    model, optimizer = build(50257)
    staging: dict[str, torch.Tensor] = {}
    pairs = []
    trainer = {"tokens": 0}
    for step in range(3):
        train_step(model, optimizer, step)
        trainer["tokens"] = step
        state, rng = full_state(model, optimizer), rng_state_dict()
        before = state_digest(state)
        save = begin_save(
            run_dir, step, state, rng, trainer,
            rank=rank, world=world, launch="x", asynchronous=True, staging=staging,
        )  # fmt: skip
        trainer["tokens"] = -1
        for tensor in rng.values():
            tensor.zero_()
        train_step(model, optimizer, 100 + step)  # changes parameters, moments, steps and the buffer
        assert state_digest(full_state(model, optimizer)) != before
        assert finish(save), save.error
        path = checkpoint_path(run_dir, step)
        assert read_trainer(path) == {"tokens": step}
        assert open_reader(path).read_rng(rank)["cpu"].any()
        pairs.append((before, checkpoint_digest(path)))
    return pairs


def test_a_step_taken_during_a_save_does_not_leak_into_it(tmp_path: Path):
    for pairs in run_world(save_and_step_on, 2, tmp_path):
        for before, saved in pairs:
            assert before == saved


def test_a_save_is_pending_until_its_file_is_durable(tmp_path: Path, monkeypatch):
    gate = threading.Event()
    write = checkpoint.write_tensor_file
    monkeypatch.setattr(checkpoint, "write_tensor_file", lambda *a, **k: gate.wait(30) and write(*a, **k))
    save = begin(tmp_path, 1, WHOLE, asynchronous=True)
    assert save.state() == SaveState.PENDING
    assert list_checkpoints(tmp_path) == []
    gate.set()
    wait(save)
    assert save.state() == SaveState.DONE
    assert list_checkpoints(tmp_path) == []  # still only step-00000001.tmp-first
    assert publish(save)
    assert find_checkpoint(tmp_path) == checkpoint_path(tmp_path, 1)


def test_nothing_appears_before_it_is_on_the_disk(tmp_path: Path, monkeypatch):
    """The order of syncs and renames is all that counts in a power cut."""
    events = []
    sync, rename, swap = os.fsync, os.rename, os.replace
    beside = f".{socket.gethostname()}-{os.getpid()}"  # of a file not yet in its place

    def record_sync(descriptor: int) -> None:
        name = Path(os.readlink(f"/proc/self/fd/{descriptor}")).name
        events.append(f"sync {name.removesuffix(beside).removeprefix('.')}")
        sync(descriptor)

    def record(call):
        return lambda source, target: (events.append(f"place {Path(target).name}"), call(source, target))[1]

    monkeypatch.setattr(os, "fsync", record_sync)
    monkeypatch.setattr(os, "rename", record(rename))
    monkeypatch.setattr(os, "replace", record(swap))
    save_whole(tmp_path, 1, WHOLE)
    assert events == [
        *("sync rank-00000.safetensors", "sync trainer.json", "place rank-00000.json"),
        *("sync manifest.json", "sync step-00000001.tmp-first", "place step-00000001", "sync checkpoints"),
        *("sync latest", "place latest", "sync checkpoints"),
    ]


def test_a_background_save_takes_one_copy_of_host_memory_and_keeps_it(tmp_path: Path):
    staging: dict[str, torch.Tensor] = {}
    places = []
    for step in (1, 2):
        save = begin(tmp_path, step, WHOLE, asynchronous=True, staging=staging)
        wait(save)
        assert publish(save)
        places.append({name: tensor.data_ptr() for name, tensor in staging.items()})
    assert sum(tensor.nbytes for tensor in staging.values()) == checkpoint_bytes(cut(WHOLE, 0, 1)) + 5056  # and the RNG
    assert places[0] == places[1]


def test_what_is_saved_is_the_moment_of_the_call(tmp_path: Path):
    whole = {"model.a": torch.zeros(4)}
    save = begin(tmp_path, 1, whole, asynchronous=True)
    whole["model.a"].fill_(1)
    wait(save)
    assert publish(save)
    ((_, tensor),) = read_full_tensors(checkpoint_path(tmp_path, 1))
    assert not tensor.any()
