"""Copies between host and device that the host does not wait for: from and into page-locked memory, on the stream."""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

_ALIGNMENT = 64  # bytes of a cache line: an array of any type may begin there


def to_device(arrays: Mapping[str, np.ndarray], device: torch.device) -> dict[str, Tensor]:
    """The arrays on the device, by name, in one transfer behind which the host goes on at once.

    They travel in page-locked memory: from ordinary memory CUDA would first wait for all that is queued. On CPU the
    tensors are the arrays themselves.
    """
    if device.type != "cuda":
        writable = {name: array if array.flags.writeable else array.copy() for name, array in arrays.items()}
        return {name: torch.from_numpy(array) for name, array in writable.items()}
    places, end = side_by_side({name: array.nbytes for name, array in arrays.items()})
    packed = torch.empty(end, dtype=torch.uint8, pin_memory=True)  # kept by torch until its copy is done
    for name, array in arrays.items():
        packed[places[name]].numpy()[:] = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
    there = packed.to(device, non_blocking=True)
    dtypes = {name: torch.from_numpy(np.empty(0, array.dtype)).dtype for name, array in arrays.items()}
    return {name: there[places[name]].view(dtypes[name]).view(array.shape) for name, array in arrays.items()}


def side_by_side(sizes: Mapping[str, int]) -> tuple[dict[str, slice], int]:
    """Where things of so many bytes lie in one piece of memory, by name, and how large it is."""
    places, end = {}, 0
    for name, size in sizes.items():
        begin = -(-end // _ALIGNMENT) * _ALIGNMENT
        end = begin + size
        places[name] = slice(begin, end)
    return places, end


def host_buffer(size: int, *, page_locked: bool) -> Tensor:
    """`size` bytes of host memory, (size,) uint8, `page_locked` for a GPU to copy into; no byte more.

    torch's own page-locked memory is rounded up to a power of two, which of 17 GB makes 32. RuntimeError where there is
    none.
    """
    memory = np.empty(size, np.uint8)
    if page_locked and size:
        runtime, address = torch.cuda.cudart(), memory.ctypes.data
        if status := int(runtime.cudaHostRegister(address, size, 1)):  # for all contexts
            raise RuntimeError(f"{size} bytes of host memory cannot be page-locked (CUDA error {status})")
        weakref.finalize(memory, runtime.cudaHostUnregister, address).atexit = False
    return torch.from_numpy(memory)


@dataclass(frozen=True)
class HostCopy:
    """A tensor on its way to the host."""

    values: Tensor
    arrived: torch.cuda.Event | None  # None: it is there

    def read(self) -> np.ndarray:
        """The values, once they have arrived; of what was queued behind them on the device nothing is waited for."""
        if self.arrived is not None:
            self.arrived.synchronize()
        return self.values.numpy()


def start_copy_to_host(tensor: Tensor) -> HostCopy:
    """Queue a copy of the tensor, as it is once what is queued so far is done; its memory must not change on a CPU."""
    if tensor.device.type != "cuda":
        return HostCopy(tensor, None)
    values = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    values.copy_(tensor, non_blocking=True)
    arrived = torch.cuda.Event()
    arrived.record()
    return HostCopy(values, arrived)
