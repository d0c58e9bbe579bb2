"""What a training step of 1.3B must do, and so how fast an H100 and an A100 could do it: no GPU is needed.

    python bench/roofline.py

One pass of gloria-1.3b (8 windows of 2,048 tokens) on meta tensors. Counted: products (FLOPs, launches), what is
pointwise and where inductor can fuse it (bytes, launches), the head and the loss as they were before and as they are.
Computed from sizes: attention, FSDP's copies, the optimizer. Assumed: how fast a card does each, in CARDS and below,
with where it is from. `before` is the repository until November 2026: head of 50,257 rows, loss in eager chunks of 512
with its logits computed twice, local layers by a mask, FSDP2 as it comes. Nothing here is measured on a GPU:
bench/gpu.py does that, and its figures replace the assumptions.
"""

from __future__ import annotations

import sys
import textwrap
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from functorch.compile import make_boxed_func, min_cut_rematerialization_partition
from torch import Tensor, fx, nn
from torch._dynamo.backends.common import aot_autograd
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from gloria.dist.gpus import CARDS as KNOWN_CARDS
from gloria.model.config import PRESETS, TransformerConfig, count_parameters, flops_per_token
from gloria.model.loss import chunk_losses, language_model_loss
from gloria.model.transformer import Block

BATCH, LENGTH = 8, 2048
TOKENS = BATCH * LENGTH
PASSES = 16  # micro-batches of a step, over which the optimizer is spread: 262,144 tokens
BF16 = 2  # bytes
# Of chunk_losses compiled, by the loops of inductor's code for it: for the maximum, the sum, and the gradient, of which
# the targets are then set.
SOFTMAX_READS, SOFTMAX_LAUNCHES = 3, 4
BACKWARD_OF_ATTENTION = 2.5  # times the FLOPs of forward, with the scores computed again (FlashAttention-2, 3.1)
WINDOW_TILE = 128  # keys that a windowed kernel visits beyond the window, for it works in tiles

# Bytes a parameter and pass that FSDP2 moves on one GPU beside the products: an estimate. Before: two casts of fp32 to
# bf16 (6 each), a gather's copy (4), a gradient of bf16 added to fp32 (10). After: that, and a cast once a step.
FSDP_BYTES = {"before": 2 * 6 + 4 + 10, "after": 10 + 6 / PASSES}
OPTIMIZER_BYTES = 7 * 4 + 4  # AdamW reads weight, gradient and two averages, writes three; the norm reads the gradient
GAPS_MS = {"before": 3.0, "after": 1.0}  # waits of the host and short kernels: an estimate
AIMS = {"H100": 57, "A100-80GB": 62}  # MFU, in per cent


@dataclass(frozen=True)
class Speeds:
    """What a card is assumed to reach, in TFLOP/s and TB/s. Low and high where the forecast depends on it most."""

    name: str
    matmul: tuple[float, float]
    odd: float  # of a product with an odd leading dimension, as a share of an even one
    global_attention: float
    local_attention: dict[str, float]
    bandwidth: float
    source: str


SPEEDS = (
    Speeds(
        "H100",
        matmul=(650, 700),
        odd=0.4,
        global_attention=440,
        local_attention={"before": 170, "after": 270},
        bandwidth=2.8,
        source="Products: 82-88 % of the best that was found, 792 TFLOP/s (stas00/ml-engineering, table of achievable "
        "matmul FLOPS). Attention: estimates for causal, heads of 128 and 2k: cuDNN, which is near FlashAttention-3 "
        "(arXiv 2407.08608); windows by FlashAttention-2; before by torch's memory-efficient kernel with a mask, its "
        "copies included. Odd sides: an estimate of cuBLAS's kernels of alignment 1. Copies: 84 % of 3.35 TB/s.",
    ),
    Speeds(
        "A100-80GB",
        matmul=(240, 258),
        odd=0.5,
        global_attention=165,
        local_attention={"before": 95, "after": 130},
        bandwidth=1.7,
        source="Products: 90-96 % of 268 TFLOP/s (the same table), nearer to it than an H100, which its power holds "
        "back. Attention: estimates for FlashAttention-2 (arXiv 2307.08691). Odd sides: an estimate. Copies: 83 % of "
        "2.04 TB/s.",
    ),
)


@dataclass
class Count:
    """Launches, FLOPs of products and bytes; of each product also FLOPs and bytes, for the slower of both decides."""

    launches: int = 0
    bytes: float = 0.0  # outside products
    products: list[tuple[float, float]] = field(default_factory=list)

    @property
    def flops(self) -> float:
        return sum(flops for flops, _ in self.products)

    def times(self, factor: int) -> Count:
        return Count(factor * self.launches, factor * self.bytes, factor * self.products)

    def milliseconds(self, matmul: float, bandwidth: float) -> float:
        """At `matmul` TFLOP/s and `bandwidth` TB/s."""
        products = sum(max(flops / matmul, size / bandwidth) for flops, size in self.products)
        return (products + self.bytes / bandwidth) / 1e9


def size_of(*tensors: Any) -> int:
    return sum(x.numel() * x.element_size() for x in tensors if isinstance(x, Tensor))


def product_flops(left: Tensor, right: Tensor) -> float:
    return 2.0 * left.shape[0] * left.shape[1] * right.shape[1]


class Eager(TorchDispatchMode):
    """Counts what an eager call launches: all that is no view and no allocation reads and writes its tensors once."""

    def __init__(self) -> None:
        super().__init__()
        self.count = Count()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        name = func._schema.name.removeprefix("aten::")
        if func.is_view or name.startswith(("empty", "new_empty", "_unsafe_view", "detach")):
            return result
        self.count.launches += 1
        size = size_of(*tree_leaves((args, kwargs)), *(tree_leaves(result) if "out" not in (kwargs or {}) else []))
        if name in ("mm", "addmm", "addmm_"):
            left, right = [x for x in args if isinstance(x, Tensor)][-2:]
            self.count.products.append((product_flops(left, right), size))
        else:
            self.count.bytes += size
        return result


def is_view(node: fx.Node) -> bool:
    words = ("view", "aten.t.", "permute", "transpose", "expand", "unsqueeze", "getitem")
    return node.op == "call_function" and any(word in str(node.target) for word in words)


def is_product(node: fx.Node) -> bool:
    return node.op == "call_function" and "mm.default" in str(node.target)


def base(node: fx.Node) -> fx.Node:
    """The node whose memory a chain of views shows."""
    while is_view(node):
        node = node.all_input_nodes[0]
    return node


def values(node: fx.Node) -> list[Tensor]:
    return [x for x in tree_leaves(node.meta.get("val")) if isinstance(x, Tensor)]


def count_graph(graph: fx.Graph, count: Count) -> None:
    """Add what a compiled graph launches at least: its products, and the rest but attention, fused.

    Pointwise operations and sums along rows are one kernel where they are connected and no product lies between: it
    reads each of its inputs once and writes what others read. A sum over tokens (the gradient of a bias) is a kernel of
    its own, which reads its input.
    """
    level: dict[fx.Node, int] = {}  # products and attention before it
    kernel: dict[fx.Node, fx.Node] = {}  # of what is fused: another node of the kernel, or itself

    def find(node: fx.Node) -> fx.Node:
        while kernel[node] is not node:
            node = kernel[node]
        return node

    over_tokens = set()
    for node in graph.nodes:
        if node.op != "call_function" or is_view(node):
            continue
        sources = [base(source) for source in node.all_input_nodes]
        apart = is_product(node) or "attention" in str(node.target)
        level[node] = max([level.get(source, 0) for source in sources], default=0) + apart
        if apart:
            count.launches += is_product(node)
            if is_product(node):
                left, right = [values(source)[0] for source in node.all_input_nodes][-2:]
                count.products.append((product_flops(left, right), size_of(left, right, *values(node))))
        elif "sum" in str(node.target) and TOKENS * values(node)[0].numel() == values(sources[0])[0].numel():
            over_tokens.add(node)
            count.launches += 1
            count.bytes += size_of(values(sources[0])[0])
        else:
            kernel[node] = node
            for source in sources:
                if source in kernel and level[source] == level[node]:
                    kernel[find(source)] = find(node)
    reads, writes = set(), set()
    for node in graph.nodes:
        if is_view(node) or node in over_tokens:
            continue
        for source in map(base, node.all_input_nodes):
            if node in kernel and not (source in kernel and find(source) is find(node)):
                reads.add((find(node), source))
            if source in kernel and not (node in kernel and find(source) is find(node)):
                writes.add(source)
    count.launches += len({find(node) for node in kernel})
    count.bytes += sum(size_of(*values(source)) for _, source in reads) + sum(size_of(*values(node)) for node in writes)


def empty(*size: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.empty(size, dtype=dtype, device="meta")


def count_block(shape: TransformerConfig) -> Count:
    """Forward and backward of a layer, compiled; its attention stands there as one operation and is not counted."""
    count = Count()

    def compiler(module: fx.GraphModule, _: Any) -> Any:
        count_graph(module.graph, count)
        return make_boxed_func(module.forward)

    def attention(query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> Tensor:
        heads = (x.unflatten(2, (shape.num_heads, -1)).transpose(1, 2) for x in (query, key, value))
        output = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(*heads, is_causal=True, scale=1.0)[0]
        return output.transpose(1, 2).flatten(2)

    with torch.device("meta"):
        block = Block(shape, 0, "none", kept=[]).to(torch.bfloat16)
    block.attn.attend = attention
    backend = aot_autograd(fw_compiler=compiler, bw_compiler=compiler, partition_fn=min_cut_rematerialization_partition)
    hidden = empty(BATCH, LENGTH, shape.hidden_size).requires_grad_()
    output = torch.compile(block.forward, backend=backend, fullgraph=True)(hidden, None)
    output.backward(torch.empty_like(output))
    return count


def count_ends(shape: TransformerConfig) -> Count:
    """Embeddings and last norm, forward and backward, eager as they are."""
    with torch.device("meta"):
        words = nn.Embedding(shape.padded_vocab, shape.hidden_size).to(torch.bfloat16)
        places = nn.Embedding(shape.max_positions, shape.hidden_size).to(torch.bfloat16)
        norm = nn.LayerNorm(shape.hidden_size).to(torch.bfloat16)
        ids = torch.zeros(BATCH, LENGTH, dtype=torch.int64)
    with Eager() as eager:
        output = norm(words(ids) + places(ids[0]))
        output.backward(torch.empty_like(output))
    return eager.count


def count_loss(shape: TransformerConfig) -> Count:
    """Head and loss as they are, the pointwise part compiled."""
    eager = Eager()

    def compiled(logits: Tensor, labels: Tensor, *rest: Any) -> Any:
        held = Count(eager.count.launches, eager.count.bytes, list(eager.count.products))
        results = chunk_losses(logits, labels, *rest)
        eager.count = held
        eager.count.launches += SOFTMAX_LAUNCHES
        eager.count.bytes += (SOFTMAX_READS + 1) * size_of(logits)
        return results

    hidden = empty(BATCH, LENGTH, shape.hidden_size).requires_grad_()
    weight = empty(shape.padded_vocab, shape.hidden_size).requires_grad_()
    labels = empty(BATCH, LENGTH, dtype=torch.int64)
    with eager:
        loss, _ = language_model_loss(hidden, weight, labels, shape.vocab_size, token_losses=compiled)
        loss.backward()
    return eager.count


def count_loss_before(shape: TransformerConfig, chunk: int = 512) -> Count:
    """Head and loss as they were: the vocabulary without its padding, 512 tokens at a time, twice."""
    hidden, weight = empty(TOKENS, shape.hidden_size), empty(shape.vocab_size, shape.hidden_size)
    labels, one = empty(chunk, dtype=torch.int64), empty(chunk, 1, dtype=torch.float32)
    hidden_gradient, total = torch.empty_like(hidden), torch.empty_like(weight, dtype=torch.float32)
    with Eager() as eager:
        for start in range(0, TOKENS, chunk):
            part = hidden[start : start + chunk]
            F.cross_entropy(F.linear(part, weight).float(), labels, reduction="none")
        total.zero_()
        for start in range(0, TOKENS, chunk):
            part = hidden[start : start + chunk]
            gradient = torch.softmax(F.linear(part, weight), dim=1, dtype=torch.float32)
            gradient = gradient.scatter_add_(1, labels[:, None], one).mul_(one).to(torch.bfloat16)
            torch.mm(gradient, weight, out=hidden_gradient[start : start + chunk])
            total.add_(gradient.T @ part)
        total.to(torch.bfloat16)
    return eager.count


def attention_flops(shape: TransformerConfig, keys: int) -> float:
    """Of one layer whose tokens see so many keys on average, forward and backward."""
    return (1 + BACKWARD_OF_ATTENTION) * 4.0 * TOKENS * keys * shape.hidden_size


def forecast(
    shape: TransformerConfig, when: str, counts: dict[str, Count], card: Speeds, matmul: float
) -> dict[str, float]:
    """Milliseconds of a pass, part by part."""
    parameters, windows = count_parameters(shape)["total"], [window for window in shape.windows if window]
    layers, everywhere = shape.num_layers, shape.num_layers - len(windows)
    block, loss = counts["block"], counts[f"loss {when}"]
    keys = 2 * shape.window_size if when == "before" else shape.window_size + WINDOW_TILE
    odd = loss.flops / matmul * (1 / card.odd - 1) / 1e9 if when == "before" else 0.0
    return {
        "layer products": Count(products=layers * block.products).milliseconds(matmul, card.bandwidth),
        "norms, GELU, residuals, biases": layers * block.bytes / card.bandwidth / 1e9,
        "global attention": everywhere * attention_flops(shape, LENGTH // 2) / card.global_attention / 1e9,
        "local attention": len(windows) * attention_flops(shape, keys) / card.local_attention[when] / 1e9,
        "embeddings, last norm": counts["ends"].milliseconds(matmul, card.bandwidth),
        "head and loss": loss.milliseconds(matmul, card.bandwidth),
        "odd vocabulary": odd,
        "FSDP's casts and copies": FSDP_BYTES[when] * parameters / card.bandwidth / 1e9,
        "optimizer, its share": OPTIMIZER_BYTES * parameters / PASSES / card.bandwidth / 1e9,
        "gaps": GAPS_MS[when],
    }


def main() -> None:
    """Print the counts, the assumptions and the forecasts."""
    shape = PRESETS["gloria-1.3b"]
    counts = {
        "block": count_block(shape),
        "ends": count_ends(shape),
        "loss before": count_loss_before(shape),
        "loss after": count_loss(shape),
    }
    print(f"gloria-1.3b, a pass of {BATCH} x {LENGTH} = {TOKENS:,} tokens, counted on meta tensors")
    print(f"{'':<32}{'launches':>9}{'TFLOP':>9}{'GB beside products':>20}")
    rows = {f"{shape.num_layers} layers, without attention": counts["block"].times(shape.num_layers)}
    rows |= {name: count for name, count in counts.items() if name != "block"}
    for name, count in rows.items():
        print(f"{name:<32}{count.launches:>9}{count.flops / 1e12:>9.2f}{count.bytes / 1e9:>20.1f}")
    model_flops = flops_per_token(shape, LENGTH) * TOKENS
    print(f"MFU counts {model_flops / 1e12:.1f} TFLOP a pass: 6 N + 12 d sum(keys reached), see flops_per_token\n")
    assumed = (
        f"Assumed: {GAPS_MS} ms of gaps; {FSDP_BYTES} bytes a parameter and pass by FSDP2; a step of {PASSES} passes; "
        f"windows of {shape.window_size} and {WINDOW_TILE} more keys, before of {2 * shape.window_size}; a compiled "
        f"softmax that reads its logits {SOFTMAX_READS} times; nothing overlaps."
    )
    print("\n".join(textwrap.wrap(assumed, 100)))
    for card in SPEEDS:
        peak = next(known for known in KNOWN_CARDS if known.name == card.name).peak("bf16")
        assert peak
        low, high = card.matmul
        speeds = (
            f"{card.name}, assumed: products at {low:g} to {high:g} TFLOP/s of {peak / 1e12:g}, {card.odd:g} of that "
            f"where a side is odd; attention at {card.global_attention:g}, local at {card.local_attention}; "
            f"{card.bandwidth:g} TB/s. {card.source}"
        )
        print("\n" + "\n".join(textwrap.wrap(speeds, 100)))
        columns = [(when, matmul) for when in ("before", "after") for matmul in card.matmul]
        found = [forecast(shape, when, counts, card, matmul) for when, matmul in columns]
        print(f"{'ms a pass, at TFLOP/s':<32}" + "".join(f"{f'{when} {matmul:g}':>13}" for when, matmul in columns))
        for part in found[0]:
            print(f"{part:<32}" + "".join(f"{each[part]:>13.1f}" for each in found))
        sums = [sum(each.values()) for each in found]
        print(f"{'sum':<32}" + "".join(f"{total:>13.1f}" for total in sums))
        shares = [1e5 * model_flops / peak / total for total in sums]
        print(f"{'MFU, %':<32}" + "".join(f"{share:>13.1f}" for share in shares))
        aim = AIMS[card.name]
        met = ["missed", "met at the higher rate of products alone", "met"][sum(share >= aim for share in shares[2:])]
        print(f"aim {aim} %: {met}")


if __name__ == "__main__":
    main()
