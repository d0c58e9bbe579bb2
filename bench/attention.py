"""Time of attention, forward and backward, by every kernel a run can take (`train.attention`), and how exact it is.

    python bench/attention.py [--batch 8] [--length 512 2048] [--window 256] [--heads 16] [--head-dim 128]

On a GPU, in bf16: the best of some passes in milliseconds, and the relative error of the gradients of one row against
fp32. "documents" are masked, of --document tokens each. Local layers should cost less than global ones, documents too.
On a CPU a tiny case runs, to show that it does, and the figures mean nothing for a GPU.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from gloria.data.loader import document_bounds
from gloria.model.attention import attend, attention_masks

Method = Callable[[Tensor, Tensor, Tensor], Tensor]
BACKENDS = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
}
# What, which kernel of train.attention, with which of sdpa's; "flex" is compiled.
GPU = (
    *(("global", "sdpa", name) for name in ("flash", "cudnn")),
    *(("local", "sdpa", name) for name in ("efficient", "cudnn")),
    *(("local", kernel, "") for kernel in ("varlen", "flex")),
    *(("documents", "sdpa", name) for name in ("efficient", "cudnn")),
    *(("documents", kernel, "") for kernel in ("varlen", "flex")),
    *(("local documents", kernel, "") for kernel in ("sdpa", "varlen", "flex")),
)
CPU = (("global", "sdpa", ""), ("local", "sdpa", ""), ("documents", "sdpa", ""), ("local documents", "sdpa", ""))


def method(what: str, kernel: str, bounds: Tensor, window: int, heads: int) -> Method:
    """A forward as a layer of the model does it, its masks made once for all layers, so outside of the time."""
    documents = bounds if "documents" in what else None
    window = window if "local" in what else 0
    step = torch.compile(attend, dynamic=False) if kernel == "flex" else attend
    masks: dict[tuple, Any] = {}

    def run(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        batch, length, _ = query.shape
        own = documents
        if documents is not None:  # those of the rows that are there
            own = documents.clamp(max=batch * length)
        made = masks.get((batch, query.dtype))
        if made is None:
            like = {"device": query.device, "dtype": query.dtype}
            made = masks[batch, query.dtype] = attention_masks(batch, length, window, own, kernel=kernel, **like)
        query, key, value = (x.unflatten(-1, (heads, -1)) for x in (query, key, value))
        return step(query, key, value, made, window=window, scale=1.0, dropout=0.0)

    return run


def passes(run: Method, inputs: list[Tensor], weights: Tensor) -> list[Tensor]:
    """Gradients of a weighted sum of the output."""
    return list(torch.autograd.grad((run(*inputs) * weights).sum(), inputs))


def milliseconds(run: Method, inputs: list[Tensor], weights: Tensor, repeats: int) -> float:
    """The best of `repeats`, after one that compiles and one that warms up."""
    best = float("inf")
    for number in range(repeats + 2):
        if inputs[0].is_cuda:
            torch.cuda.synchronize()
        start = time.perf_counter()
        passes(run, inputs, weights)
        if inputs[0].is_cuda:
            torch.cuda.synchronize()
        if number >= 2:
            best = min(best, 1000 * (time.perf_counter() - start))
    return best


def exact(what: str, inputs: list[Tensor], weights: Tensor, bounds: Tensor, window: int, heads: int) -> list[Tensor]:
    """The gradients in fp32, from the definition."""
    length = inputs[0].shape[1]
    place = torch.arange(length, device=inputs[0].device)
    allowed = place[:, None] >= place
    if "local" in what:
        allowed &= place[:, None] - place < window
    if "documents" in what:
        document = torch.searchsorted(bounds, place.int(), right=True)
        allowed &= document[:, None] == document

    def eager(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        query, key, value = (x.unflatten(2, (heads, -1)).transpose(1, 2) for x in (query, key, value))
        scores = (query @ key.transpose(2, 3)).masked_fill(~allowed, float("-inf"))
        return (F.softmax(scores, dim=-1) @ value).transpose(1, 2).flatten(2)

    return passes(eager, [x.float().detach().requires_grad_() for x in inputs], weights.float())


def measure(a: argparse.Namespace, length: int, device: torch.device) -> dict[tuple[str, str], float]:
    """A table of one length; milliseconds by what and kernel."""
    gpu = device.type == "cuda"
    dtype = torch.bfloat16 if gpu else torch.float32
    torch.manual_seed(0)
    size = (a.batch, length, a.heads * a.head_dim)
    inputs = [torch.randn(size, device=device) for _ in range(3)]
    inputs[0] *= a.head_dim**-0.5  # scores as in a model; without it attention would be nearly one-hot
    inputs = [x.to(dtype).requires_grad_() for x in inputs]
    weights = torch.randn(size, device=device, dtype=dtype)
    ids = np.zeros((a.batch, length), np.int64)
    ids[:, a.document - 1 :: a.document] = 1
    bounds = torch.from_numpy(document_bounds(ids, eos_id=1)).to(device)
    one_row = [x[:1].detach().requires_grad_() for x in inputs]
    print(f"\n{a.batch} x {length} tokens, window {a.window}, {a.heads} heads x {a.head_dim}, {dtype}")
    found: dict[tuple[str, str], float] = {}
    for what, kernel, backend in GPU if gpu else CPU:
        run = method(what, kernel, bounds, a.window, a.heads)
        name = f"{what:<16} {' '.join(filter(None, (kernel, backend))):<15}"
        try:
            with sdpa_kernel([BACKENDS[backend]]) if backend else nullcontext():
                best = milliseconds(run, inputs, weights, a.repeats)
                ours = torch.cat(passes(run, one_row, weights[:1]))
        except (RuntimeError, torch._dynamo.exc.TorchDynamoException) as error:
            print(f"{name} not here: {str(error).strip().splitlines()[0][:90]}")
            continue
        wanted = torch.cat(exact(what, one_row, weights[:1], bounds, a.window, a.heads))
        print(f"{name} {best:9.3f} ms   gradients off by {(ours - wanted).norm() / wanted.norm():.1e}", flush=True)
        found[what, kernel] = min(best, found.get((what, kernel), best))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    gpu = device.type == "cuda"
    number = partial(parser.add_argument, type=int)
    number("--batch", default=8 if gpu else 2)
    number("--length", nargs="+", default=[512, 2048] if gpu else [100])
    number("--window", default=256 if gpu else 16)
    number("--heads", default=16 if gpu else 2)
    number("--head-dim", default=128 if gpu else 16)
    number("--document", default=600 if gpu else 30)
    number("--repeats", default=20 if gpu else 2)
    a = parser.parse_args()
    name = torch.cuda.get_device_name(device) if gpu else "no GPU: the figures mean nothing, they show that it runs"
    print(f"torch {torch.__version__}; {name}")
    for length in a.length:
        found = measure(a, length, device)
        times = {kernel: found[what, kernel] for what, kernel in found if what == "local"}
        if "varlen" in times and "flex" in times:
            best = "auto (varlen)" if times["varlen"] <= times["flex"] else "flex"
            print(
                f"local layers: varlen {times['varlen']:.3f} ms, flex {times['flex']:.3f} ms; train.attention: {best}"
            )


if __name__ == "__main__":
    main()
