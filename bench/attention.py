"""Time of local attention, forward and backward: blocks (`gloria.model.attention`) against a band mask over the
square.

    python bench/attention.py [--batch 2] [--length 2048] [--window 256] [--heads 8] [--head-dim 64]

All compute the same; "global" is causal attention over the whole sequence, for scale.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from gloria.model.attention import Masks, attend, attention_masks


def seconds(function: Callable[..., Tensor], inputs: list[Tensor], repeats: int) -> float:
    """The best of `repeats` forward and backward passes."""
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        function(*inputs).sum().backward()
        if inputs[0].is_cuda:
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return min(times)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--window", type=int, default=256)
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--head-dim", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=4)
    a = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    size = (a.batch, a.length, a.heads * a.head_dim)
    inputs = [torch.randn(size, device=device, dtype=dtype, requires_grad=True) for _ in range(3)]
    masks = attention_masks(a.batch, a.length, a.window, None, device=device, dtype=dtype)
    position = torch.arange(a.length, device=device)
    distance = position[:, None] - position
    band = (distance >= 0) & (distance < a.window)  # (length, length)

    def split(x: Tensor) -> Tensor:
        return x.unflatten(2, (a.heads, a.head_dim)).transpose(1, 2)  # (batch, heads, length, head_dim)

    def merge(x: Tensor) -> Tensor:
        return x.transpose(1, 2).flatten(2)

    def eager(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        scores = split(query) @ split(key).transpose(-1, -2)
        scores = torch.where(band, scores, torch.finfo(dtype).min)
        return merge(scores.softmax(-1) @ split(value))

    def band_mask(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        heads = (split(x) for x in (query, key, value))
        return merge(F.scaled_dot_product_attention(*heads, attn_mask=band, scale=1.0))

    def over(window: int) -> Callable[..., Tensor]:
        def attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            used = masks if window else Masks(None, None)
            return attend(query, key, value, used, num_heads=a.heads, window=window, scale=1.0, dropout=0.0)

        return attention

    methods = {"eager": eager, "band mask": band_mask, "blocks": over(a.window), "global": over(0)}
    wanted = eager(*inputs)
    print(f"batch {a.batch}, length {a.length}, window {a.window}, {a.heads} x {a.head_dim}, {device.type}")
    for name, method in methods.items():
        error = "" if name == "global" else f"  largest error {(method(*inputs) - wanted).abs().max():.1e}"
        print(f"{name:10} {1000 * seconds(method, inputs, a.repeats):8.1f} ms{error}")


if __name__ == "__main__":
    main()
