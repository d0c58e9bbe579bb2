"""What a rank's memory holds at the worst moment of a step, worked out from the shape alone. Imports no torch.

The model follows the code of transformer.py, attention.py, loss.py and dist/sharding.py tensor by tensor, run eagerly
(a compiled block keeps less for backward, so on GPU this is what is needed at most). A step is a series of moments,
each with what is alive in it: the loss, each block's backward, the embedding's backward. The largest is the peak. Not
counted: what the process holds besides tensors (Python, the CUDA context, NCCL) and what the allocator wastes.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import NamedTuple

from gloria.model.config import TransformerConfig, parameter_shapes
from gloria.model.families import LOCAL
from gloria.optim.optimizers import averages_kept, is_hidden_matrix

STATE_BYTES = 4  # weights, gradients and the optimizer's averages are fp32 each


def loss_chunk(tokens: int, *, on_gpu: bool) -> int:
    """Of a pass of so many tokens, those whose logits exist at a time.

    512 on CPU. On a GPU a quarter of the pass, from 512 to 4,096: each chunk reads and writes the head's gradient once,
    which from 4,096 tokens on is little beside its products, and below that the loss stays under a quarter of the
    memory of logits for the whole pass.
    """
    return min(max(-(-tokens // 512) * 128, 512), 4096) if on_gpu else 512


@dataclass(frozen=True)
class Memory:
    """Bytes by part at the moment of the peak."""

    weights: int
    optimizer: int
    gradients: int
    activations: int  # kept for backward, and what a block's backward works with
    loss: int  # a chunk's logits, and the gradients of hidden states and head
    buffers: int  # whole weights of the blocks at work and of the embedding, gradients on their way

    @property
    def total(self) -> int:
        """All of it, which is the peak."""
        return sum(dataclasses.astuple(self))

    def describe(self) -> str:
        """The peak and its parts in a line; 1 GiB is 2^30 bytes."""
        parts = ", ".join(f"{name} {size / 2**30:.2f}" for name, size in dataclasses.asdict(self).items())
        return f"{self.total / 2**30:.2f} GiB a rank at the worst moment of a step ({parts})"


def memory_per_rank(
    shape: TransformerConfig,
    *,
    sequence_length: int,
    micro_batch: int,
    accumulation: int,
    shards: int,
    element_bytes: int,
    activation_checkpointing: str,
    mask_documents: bool = False,
    on_gpu: bool = False,
    by_flash: bool = False,
    keep_gathered: bool = False,
    optimizer: str = "adamw",
) -> Memory:
    """The peak of a training step on the first rank of `shards` (ranks / replicas), which has the largest shards.

    `accumulation` is the number of micro-batches in a step, `element_bytes` the size of what is computed with: 2 for
    bf16 and fp16, 4 for fp32. `by_flash`: local layers and masked documents have a kernel that needs no masks.
    `keep_gathered`: whole weights stay from a step's first pass to its last.
    """
    whole_mask, local = mask_documents and not by_flash, LOCAL if not by_flash else ""
    step = _Step(
        shape, sequence_length, micro_batch, element_bytes, activation_checkpointing, whole_mask, on_gpu, local
    )
    sizes = _Sizes(shape, shards, optimizer)
    kept = [step.kept(layer, activation_checkpointing) for layer in range(shape.num_layers)]
    # With several micro-batches the sum of gradients is kept whole until the last one, in fp32.
    summed = STATE_BYTES if accumulation > 1 else 0
    head_gradient = shape.padded_vocab * shape.hidden_size * element_bytes
    block, root = sizes.block * element_bytes, sizes.root * element_bytes  # whole weights at work
    # FSDP2 keeps the last all-gather of the forward pass, and gathers a block ahead in the backward pass.
    gathered = block if shards > 1 else 0
    reduced_block, reduced_root = STATE_BYTES * sizes.block, STATE_BYTES * sizes.root

    def at(gradients: int, activations: int, loss: int, buffers: int) -> Memory:
        weights = STATE_BYTES * sizes.shard
        return Memory(weights, STATE_BYTES * sizes.averages_shard, gradients, activations, loss, buffers)

    def weights_at_work(done: int) -> int:
        """Whole weights, in the backward pass behind so many blocks; where they are kept, before the last pass."""
        if not keep_gathered:
            return root + block + 2 * gathered
        left = shape.num_layers - (done if accumulation == 1 else 0)
        return root + left * block + gathered

    every_block = shape.num_layers * block if keep_gathered else 0
    moments = [
        at(summed * sizes.whole, step.masks + sum(kept) + step.norm, step.loss, root + gathered + every_block),
    ]
    for layer in reversed(range(shape.num_layers)):
        done = shape.num_layers - 1 - layer
        gradients = STATE_BYTES * done * sizes.block_shard + summed * (sizes.whole - done * sizes.block)
        if keep_gathered and accumulation > 1:  # in a pass before the last one
            gradients = summed * sizes.whole
        buffers = weights_at_work(done) + (reduced_block if done else 0)
        before = step.masks + sum(kept[:layer])
        # In the middle of the MLP, and when the block's gradients are whole and its activations gone.
        middle = buffers + shape.hidden_size * shape.intermediate_size * element_bytes
        moments.append(at(gradients, before + kept[layer] + step.work(layer), head_gradient, middle))
        moments.append(at(gradients, before + step.hidden, head_gradient, buffers + block))
    # The embedding's gradient beside the head's, their sum (of a tied head) on its way, and what has become a shard.
    blocks = STATE_BYTES * shape.num_layers * sizes.block_shard + summed * sizes.root
    moments.append(at(blocks, 0, 2 * head_gradient, root + gathered + reduced_block))
    moments.append(at(blocks, 0, (1 if shape.tied_head else 2) * head_gradient, reduced_root + gathered))
    moments.append(at(STATE_BYTES * sizes.shard, 0, 0, reduced_root + gathered))
    if optimizer == "muon":
        moments.append(at(STATE_BYTES * sizes.shard, 0, 0, _muon_element_bytes(on_gpu) * sizes.muon_work))
    return max(moments, key=lambda memory: memory.total)


class _Sizes:
    """Elements of the parameters: whole and of rank 0's shard, of a block and of the root (embeddings, last norm).

    And of the optimizer's averages, and of what Muon computes with: a matrix, two of its iterates, two Gram matrices.
    """

    def __init__(self, shape: TransformerConfig, shards: int, optimizer: str) -> None:
        self.block = self.root = self.block_shard = root_shard = self.averages_shard = 0
        self.muon_work = max(3 * math.prod(size) + 2 * min(size) ** 2 for size in hidden_matrices(shape))
        for name, size in parameter_shapes(shape).items():
            whole, shard = math.prod(size), -(-size[0] // shards) * math.prod(size[1:])
            self.averages_shard += averages_kept(optimizer, name, len(size)) * shard
            if name.startswith("transformer.h.0."):
                self.block += whole
                self.block_shard += shard
            elif not name.startswith("transformer.h."):
                self.root += whole
                root_shard += shard
        self.whole = self.root + shape.num_layers * self.block
        self.shard = root_shard + shape.num_layers * self.block_shard


@dataclass(frozen=True)
class _Step:
    """Bytes that forward and backward of one micro-batch work with."""

    shape: TransformerConfig
    length: int
    batch: int
    element: int
    checkpointing: str
    mask_documents: bool
    on_gpu: bool
    cut: str  # the kind of layer that is cut into windows and has masks, LOCAL or none

    @property
    def tokens(self) -> int:
        return self.batch * self.length

    @property
    def hidden(self) -> int:
        return self.tokens * self.shape.hidden_size * self.element

    @property
    def inner(self) -> int:
        return self.tokens * self.shape.intermediate_size * self.element

    @property
    def queries(self) -> int:
        return self.tokens * self.shape.query_width * self.element

    @property
    def keys(self) -> int:
        return self.tokens * self.shape.kv_width * self.element

    @property
    def masks(self) -> int:
        """Those of attention_masks and the rotations, made once for all layers."""
        window = self.shape.window_size
        whole = self.tokens * self.length * self.element if self.mask_documents else 0
        blocks = -(-self.length // window) if self.cut and 0 < window < self.length else 0
        turned = 2 * self.length * self.shape.head_dim * self.element if self.shape.family.rotary else 0
        return whole + turned + self.batch * blocks * 2 * window**2 * self.element

    @property
    def loss(self) -> int:
        """In the loss: the gradient of the hidden states and, of a chunk, one of two.

        Its logits and their exponentials in fp32, beside what earlier chunks have summed of the head's gradient, or
        its gradient and the head's. The head's is in fp32, and has its copy in 16 bits where these are computed with.
        """
        element = 4 if self.on_gpu else self.element
        chunk = min(self.tokens, loss_chunk(self.tokens, on_gpu=self.on_gpu))
        head = self.shape.padded_vocab * self.shape.hidden_size
        logits = chunk * self.shape.padded_vocab * (4 + 4) + (head * STATE_BYTES if chunk < self.tokens else 0)
        products = chunk * self.shape.padded_vocab * self.element + head * STATE_BYTES
        copy = head * self.element if self.element < 4 else 0
        return self.tokens * self.shape.hidden_size * element + max(logits, products + copy)

    def kept(self, layer: int, checkpointing: str) -> int:
        """What a layer keeps from forward to backward."""
        shape, hidden, gated = self.shape, self.hidden, self.shape.family.gated_mlp
        log_sums = self.tokens * shape.num_heads * 4  # of the attention, fp32
        if checkpointing == "full":
            return hidden  # the block's input
        if checkpointing == "selective":
            # input, queries, keys, values, attention, its projection, the MLP's two or three products
            return 3 * hidden + 2 * (self.queries + self.keys) + (2 if gated else 1) * self.inner + log_sums
        local = shape.attention_layers[layer] == self.cut and self.length > shape.window_size
        repeated = not self.on_gpu or self.mask_documents or local  # keys and values for each head of the queries
        attention = 2 * self.queries + 2 * (self.queries if repeated else self.keys)  # and the output
        if local:
            # Padded to whole windows; keys and values twice over, each window's beside those of the one before.
            padded = -(-self.length // shape.window_size) * shape.window_size
            attention = 6 * self.queries * padded // self.length + (self.queries if padded > self.length else 0)
        dropout = 2 * self.tokens * shape.hidden_size if shape.dropout else 0  # a byte for each place of two masks
        inner = (4 if gated else 2) * self.inner  # gated: gate, its SiLU, the other product, and theirs
        norms = 2 * self.norm
        if shape.family.qk_norm:  # their outputs are turned at once
            norms += self.normed(shape.query_width + shape.kv_width, shape.num_heads + shape.kv_heads)
        return attention + norms + inner + log_sums + dropout

    @property
    def norm(self) -> int:
        """What a norm of the residual stream keeps, with its output."""
        return self.normed(self.shape.hidden_size, 1) + self.hidden

    def normed(self, width: int, norms: int) -> int:
        """What norms of a token's `width` elements keep: their input, and in fp32 means and deviations.

        RMSNorm has no mean; on CPU torch puts it together from parts, and keeps the input and what is normed in fp32.
        """
        rms = self.shape.family.rms_norm
        inputs = 2 * 4 if rms and not self.on_gpu else self.element
        return self.tokens * (width * inputs + norms * (4 if rms else 8))

    def work(self, layer: int) -> int:
        """What a layer's backward needs besides, at its peak: in the MLP's GELU, its output's value let go of.

        Or in the product with a gate, for both of whose factors there are gradients.
        """
        gradients = self.hidden + (2 if self.shape.family.gated_mlp else 1) * self.inner
        if self.checkpointing == "none":
            return gradients
        computed_again = self.kept(layer, "none") - self.kept(layer, self.checkpointing)
        # The block's input is among both; selective still holds the MLP's second product, which is not used.
        return gradients + computed_again + (self.hidden if self.checkpointing == "selective" else 0)


def executed_flops_per_token(shape: TransformerConfig, sequence_length: int, activation_checkpointing: str) -> int:
    """Floating-point operations of matrix products that forward and backward really do for one token.

    More than `flops_per_token` counts: the loss multiplies with the padded vocabulary, attention computes its scores
    again in backward, a local layer looks at two whole windows (a flash kernel does less), and full checkpointing does
    a layer again but for its last product. Softmax, norms and other pointwise work are left out, as in
    torch.utils.flop_counter, whose counts these are.
    """
    hidden, inner = shape.hidden_size, shape.intermediate_size
    again = activation_checkpointing == "full"
    matrices = 2 * hidden * (shape.query_width + shape.kv_width) + (3 if shape.family.gated_mlp else 2) * hidden * inner
    flops = 6 * shape.padded_vocab * hidden
    for kind in shape.attention_layers:
        reach = sequence_length
        if kind == LOCAL and sequence_length > shape.window_size:
            blocks = -(-sequence_length // shape.window_size)
            reach = round(2 * shape.window_size * blocks * shape.window_size / sequence_length)
        flops += 6 * matrices + (2 * (matrices - hidden * inner) if again else 0)
        flops += shape.query_width * reach * (18 if again else 14)
    return flops


def hidden_matrices(shape: TransformerConfig) -> list[tuple[int, ...]]:
    """The sizes of those that Muon updates."""
    return [size for name, size in parameter_shapes(shape).items() if is_hidden_matrix(name, len(size))]


def newton_schulz_flops(shape: TransformerConfig) -> int:
    """Floating-point operations of a step of Muon, over all owners: five iterations of three products a matrix."""
    sides = [sorted(size) for size in hidden_matrices(shape)]
    return sum(10 * short**2 * (2 * long + short) for short, long in sides)


def saved_bytes(shape: TransformerConfig, optimizer: str) -> int:
    """Of a checkpoint: the weights and the optimizer's averages, whole."""
    sizes = parameter_shapes(shape).items()
    return STATE_BYTES * sum(math.prod(size) * (1 + averages_kept(optimizer, name, len(size))) for name, size in sizes)


def _muon_element_bytes(on_gpu: bool) -> int:
    return 2 if on_gpu else 4  # bf16 or fp32, whatever the rest is computed with


class Traffic(NamedTuple):
    """Bytes that one rank sends in a step."""

    shards: int  # to the ranks that share a copy of the model with it
    replicas: int  # to those that hold the same shard of the other copies


def traffic_per_step(
    shape: TransformerConfig,
    *,
    passes: int,
    ranks: int,
    replicas: int,
    element_bytes: int,
    keep_gathered: bool = False,
    optimizer: str = "adamw",
) -> Traffic:
    """What one rank sends in a step, by ring collectives.

    Each pass gathers every block for forward and again for backward, and the embeddings once, or with `keep_gathered`
    a step gathers all of them once; its last pass scatters the fp32 gradients, which with HSDP are then added up over
    the replicas. Muon sends every matrix to its owner and back, on GPUs in bf16.
    """
    shards = ranks // replicas
    sizes = _Sizes(shape, shards, optimizer)
    gathers = 1 if keep_gathered else passes
    gathered = gathers * element_bytes * ((1 if keep_gathered else 2) * shape.num_layers * sizes.block + sizes.root)
    scattered = STATE_BYTES * sizes.whole
    if optimizer == "muon":
        scattered += 2 * _muon_element_bytes(True) * sum(map(math.prod, hidden_matrices(shape))) // shards
    added = 2 * STATE_BYTES * sizes.shard
    return Traffic((gathered + scattered) * (shards - 1) // shards, added * (replicas - 1) // replicas)
