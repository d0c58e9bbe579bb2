"""Prevents: a GPU that is out of memory reported as a rank that is gone, for torch tells it in many ways."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

from gloria.errors import UserError
from gloria.train.failure import is_out_of_memory, is_peer_gone

NCCL = "NCCL error in: NCCLUtils.cpp:94, unhandled cuda error, NCCL version 2.27.5\nLast error:\n"


@pytest.mark.parametrize(
    ("error", "memory", "peer"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"), True, False),
        (MemoryError(), True, False),
        (RuntimeError("CUDA error: out of memory\nCompile with `TORCH_USE_CUDA_DSA`"), True, False),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), True, False),
        (RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"), True, False),
        (RuntimeError("cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED"), True, False),
        (RuntimeError("[enforce fail at alloc_cpu.cpp:124] DefaultCPUAllocator: can't allocate memory"), True, False),
        (dist.DistBackendError(f"{NCCL}Cuda failure 2 'out of memory'"), True, False),
        (dist.DistBackendError(f"{NCCL}Failed to CUDA calloc async 608 bytes"), True, False),
        (dist.DistBackendError("NCCL communicator was aborted on rank 1"), False, True),
        (RuntimeError("[../third_party/gloo/gloo/transport/tcp/pair.cc:544] Connection reset"), False, True),
        (RuntimeError("CUDA error: an illegal memory access was encountered"), False, False),
        (UserError("data.corpus: a worker ran out of memory"), False, False),
    ],
)
def test_out_of_memory_is_recognised_in_all_its_forms(error: Exception, memory: bool, peer: bool) -> None:
    assert (is_out_of_memory(error), is_peer_gone(error)) == (memory, peer)
