"""The model spread over the ranks with FSDP2, and the pieces of a step that know it is spread.

The calls and their order were each tried against their near misses, which are silently wrong: see `shard_model`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from gloria.dist.gpus import resolve_precision
from gloria.dist.process import Process, on_any_rank
from gloria.dist.state import model_state_dict
from gloria.errors import UserError


def build_mesh(process: Process, replicas: int) -> DeviceMesh:
    """All ranks in one shard dimension, or HSDP: `replicas` copies of a model sharded over world / replicas ranks."""
    if process.world % replicas:
        raise UserError(
            f"dist.replicas: {replicas} does not divide the {process.world} ranks; choose a divisor of {process.world}"
        )
    if replicas == 1:
        return init_device_mesh(process.device.type, (process.world,), mesh_dim_names=("shard",))
    return init_device_mesh(
        process.device.type, (replicas, process.world // replicas), mesh_dim_names=("replicate", "shard")
    )


def precision_and_reason(precision: str, device: torch.device) -> tuple[str, str]:
    """The precision (what was asked, or for `auto` the best that the cards of all ranks have), and why, in words.

    Every rank calls this, and gets the same answer. Raises UserError for bf16 on a card without it.
    """
    if device.type != "cuda":
        return resolve_precision(precision, None)
    has = torch.cuda.is_bf16_supported(including_emulation=False)
    without = on_any_rank(not has)
    name = "the card of another rank" if without and has else torch.cuda.get_device_name(device)
    return resolve_precision(precision, name, has_bf16=not without)


def mixed_precision(precision: str, *, cast_inputs: bool) -> MixedPrecisionPolicy:
    """What FSDP2 is to compute with; weights and the sum of gradients over the ranks stay fp32."""
    if precision == "fp32":
        return MixedPrecisionPolicy()
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}[precision]
    return MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=cast_inputs)


def shard(
    model: nn.Module,
    blocks: Iterable[nn.Module],
    mesh: DeviceMesh,
    precision: str,
    *,
    keep_gathered: bool = False,
    cast_inputs: bool = True,
) -> None:
    """Spread a model over `mesh` in place: each block, and the rest with the root; gradients are sums over the ranks.

    With `keep_gathered` a block's whole weights stay from forward to backward, and with `begin_pass` until a step's
    last one. `cast_inputs` is for models that may give a block fp32 inputs beside 16-bit weights.

    The two setters are not recursive: without them on every FSDPModule gradients are averaged, or wrong by a factor.
    One process divides by 1 without them, and with a factor would do so in a pass over all gradients.
    """
    policy = mixed_precision(precision, cast_inputs=cast_inputs)
    for block in blocks:
        fully_shard(block, mesh=mesh, mp_policy=policy, reshard_after_forward=not keep_gathered)
    fully_shard(model, mesh=mesh, mp_policy=policy)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            if mesh.size() > 1:
                module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)  # gloo has no PREMUL_SUM


def begin_pass(model: Any, *, last: bool, keep_gathered: bool) -> None:
    """Before a pass over a micro-batch: gradients travel between the ranks in the `last` one of a step alone.

    With `keep_gathered` the whole weights stay until it: they change only after it, and are gathered once a step.
    """
    model.set_requires_gradient_sync(last)
    if keep_gathered:
        model.set_reshard_after_backward(last)


@torch.no_grad()
def fill_parameters(model: nn.Module, full_value: Callable[[str, torch.Size], Tensor]) -> None:
    """Set every parameter from its whole value, of which each rank keeps its rows: one tensor whole at a time.

    `full_value(name, shape)` must give the same tensor on all ranks, so the start is the same for any number of them.
    """
    for key, shard in model_state_dict(model).items():
        full = full_value(key.removeprefix("model."), torch.Size(shard.shape))
        rows = shard.tensor.shape[0] if shard.tensor.dim() else 1
        shard.tensor.copy_(full[shard.offset : shard.offset + rows] if shard.tensor.dim() else full)


@torch.no_grad()  # with autograd taking part, `to_local` would cost more than all that follows
def local_gradients(model: nn.Module) -> list[Tensor]:
    """This rank's piece of every gradient, as ordinary tensors: DTensor dispatch would cost more than the sums.

    A parameter that the loss does not depend on (BERT's pooler, under a span head) has none.
    """
    gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    return [gradient.to_local() if isinstance(gradient, DTensor) else gradient for gradient in gradients]


def gradient_square_sum(gradients: list[Tensor], mesh: DeviceMesh) -> Tensor:
    """This rank's part of the squared gradient norm, a float64 scalar on the gradients' device.

    In float64 because the float32 sum of torch's CPU `clip_grad_norm_` is off by up to 2.7e-3 and depends on the
    shards. With HSDP every replica holds the same shards, so only the first counts them.
    """
    if mesh.ndim == 2 and mesh.get_local_rank("replicate") != 0:
        return torch.zeros((), dtype=torch.float64, device=gradients[0].device)
    norms = torch._foreach_norm(gradients, 2, dtype=torch.float64)
    return torch.stack(norms).square().sum()


def clip_coefficient(grad_norm: Tensor, clip_norm: float) -> Tensor:
    """What the gradients are to be multiplied by so that their global norm is at most `clip_norm`: a device scalar.

    Of gradients under a loss scale `grad_norm` is the unscaled one, and this is to be divided by the scale.
    """
    return (clip_norm / (grad_norm + 1e-6)).clamp(max=1.0).to(torch.float32)


@torch.no_grad()
def update(optimizer: torch.optim.Optimizer, gradients: list[Tensor], coefficient: Tensor, good: Tensor) -> None:
    """Clip and take an optimizer step, left out on every rank alike where `good` (equal on all ranks) is false.

    `gradients` are the `local_gradients` of the model whose optimizer this is; they are let go of in the end.
    Fused AdamW does both on the device while it reads the gradients anyway (`grad_scale` divides them, `found_inf`
    leaves the step out). RAdam does neither, so there the gradients are scaled first and the host waits for `good`.
    """
    pairs = [pair for group in optimizer.param_groups for pair in zip(group["model_params"], group["params"])]
    for parameter, rows in pairs:
        if isinstance(parameter, DTensor):
            rows.grad = None if parameter.grad is None else cast(DTensor, parameter.grad).to_local()
    if optimizer.defaults.get("fused"):
        scaling: Any = optimizer  # the attributes are torch's own, for GradScaler
        scaling.grad_scale = coefficient.reciprocal()
        scaling.found_inf = (~good).to(torch.float32)
        optimizer.step()
    elif bool(good):
        torch._foreach_mul_(gradients, coefficient)
        optimizer.step()
    for parameter, rows in pairs:
        parameter.grad = rows.grad = None


def reseed(seed: int, step: int, rank: int) -> None:
    """Random numbers of a step (dropout) from (seed, step, rank) alone: a resumed step draws what it would have."""
    digest = hashlib.blake2b(f"{seed}/{step}/{rank}".encode(), digest_size=8).digest()
    torch.manual_seed(int.from_bytes(digest, "little") >> 1)


def all_reduce_sums(sums: Tensor) -> None:
    """The one collective of a step outside FSDP: add the packed sums of all ranks, in place."""
    dist.all_reduce(sums, op=dist.ReduceOp.SUM)
