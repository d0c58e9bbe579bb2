"""Prevents: a copy between host and device for which the host waits, or that comes out cut at the wrong places. There
is no GPU here: the calls that would go to CUDA are recorded, and done on the CPU."""

from __future__ import annotations

from typing import ClassVar

import numpy as np
import pytest
import torch

from gloria.dist.transfer import host_buffer, start_copy_to_host, to_device

CUDA = torch.device("cuda", 0)


class OnDevice(torch.Tensor):
    """A tensor that says it is on a GPU."""

    device = CUDA


class Event:
    """CUDA's, as far as it is used: what was done with it, in `calls`."""

    calls: ClassVar[list[str]] = []

    def record(self) -> None:
        self.calls.append("record")

    def synchronize(self) -> None:
        self.calls.append("wait")


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, bool]]:
    """The copies, in order: what, and whether the host goes on at once (page-locked memory and non_blocking)."""
    copies: list[tuple[str, bool]] = []
    locked: set[int] = set()
    empty = torch.empty

    def allocate(*size, pin_memory=False, **options) -> torch.Tensor:
        tensor = empty(*size, **options)
        if pin_memory:
            locked.add(tensor.data_ptr())
        return tensor

    def to(tensor: torch.Tensor, device: torch.device, *, non_blocking: bool = False) -> torch.Tensor:
        copies.append(("to device", non_blocking and tensor.data_ptr() in locked))
        return tensor.clone()

    def copy(tensor: torch.Tensor, source: torch.Tensor, *, non_blocking: bool = False) -> torch.Tensor:
        copies.append(("to host", non_blocking and tensor.data_ptr() in locked))
        tensor.numpy()[:] = source.numpy()
        return tensor

    monkeypatch.setattr(torch, "empty", allocate)
    monkeypatch.setattr(torch.Tensor, "to", to)
    monkeypatch.setattr(torch.Tensor, "copy_", copy)
    monkeypatch.setattr(torch.cuda, "Event", Event)
    Event.calls.clear()
    return copies


ARRAYS = {
    "tokens": np.arange(21, dtype=np.uint16).reshape(3, 7),
    "wide": np.arange(6, dtype=np.int32).reshape(2, 3)[:, 1:],  # not contiguous
    "score": np.array([0.5], dtype=np.float32),
    "none": np.empty((0, 4), dtype=np.int64),
    "groups": np.array([2, 0, 1]),
}


def test_arrays_travel_in_one_copy_that_the_host_does_not_wait_for(cuda):
    there = to_device(ARRAYS, CUDA)
    assert cuda == [("to device", True)]
    for name, array in ARRAYS.items():
        assert there[name].dtype == torch.from_numpy(array).dtype
        assert np.array_equal(there[name].numpy(), array), name


def test_on_cpu_the_arrays_are_the_tensors():
    ARRAYS["groups"].flags.writeable = False  # as the mixture plans them
    there = to_device(ARRAYS, torch.device("cpu"))
    assert all(np.array_equal(there[name].numpy(), array) for name, array in ARRAYS.items())
    assert there["tokens"].data_ptr() == ARRAYS["tokens"].ctypes.data


def test_the_host_waits_for_the_values_alone_and_when_it_reads_them(cuda):
    arriving = start_copy_to_host(torch.arange(3.0, dtype=torch.float64).as_subclass(OnDevice))
    assert (cuda, Event.calls) == ([("to host", True)], ["record"])
    assert arriving.read().tolist() == [0.0, 1.0, 2.0]
    assert Event.calls == ["record", "wait"]


def test_on_cpu_nothing_is_copied():
    values = torch.arange(3.0)
    assert start_copy_to_host(values).read().ctypes.data == values.data_ptr()


def test_page_locked_memory_is_what_was_asked_for_and_is_given_back(monkeypatch):
    calls: list[tuple] = []

    class Runtime:
        failure = 0

        def cudaHostRegister(self, address: int, size: int, flags: int) -> int:
            calls.append(("lock", address, size))
            return self.failure

        def cudaHostUnregister(self, address: int) -> int:
            calls.append(("unlock", address))
            return 0

    runtime = Runtime()
    monkeypatch.setattr(torch.cuda, "cudart", lambda: runtime)
    memory = host_buffer(100, page_locked=True)
    part, address = memory[10:20], memory.data_ptr()
    del memory
    assert calls == [("lock", address, 100)], "a part of it is in use"
    del part
    assert calls[1:] == [("unlock", address)]
    Runtime.failure = 2
    with pytest.raises(RuntimeError, match=r"^100 bytes of host memory cannot be page-locked \(CUDA error 2\)$"):
        host_buffer(100, page_locked=True)
    calls.clear()
    assert host_buffer(100, page_locked=False).shape == (100,)
    assert not calls
