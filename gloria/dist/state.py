"""What a run must remember of its model, its optimizer and its random numbers, as plain named tensors.

A state dict here is `{name: Shard}`: the rows of each tensor that this rank holds, and where they belong.
Names are `model.NAME` and `optim.KEY.NAME` with the parameter's own NAME and the optimizer's KEY (exp_avg, step,
...). Works for FSDP2 (one shard dimension), HSDP (replicate x shard) and parameters that are not sharded
at all. Nothing here communicates.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Replicate
from torch.distributed.tensor import Shard as ShardPlacement

from gloria.errors import warn

# Fills a local tensor: read(name, tensor, first row on dim 0, global shape)
ReadInto = Callable[[str, Tensor, int, tuple[int, ...]], None]


@dataclass(frozen=True)
class Shard:
    """The rows `offset : offset + len(tensor)` of a tensor of the global `shape`; a scalar is one whole piece.

    `tensor` shares memory with the live state. `owner` is False where another rank writes the very same piece
    (an HSDP replica, a scalar that all ranks hold).
    """

    tensor: Tensor  # (rows, ...) or ()
    shape: tuple[int, ...]
    offset: int
    owner: bool


def model_state_dict(model: nn.Module) -> dict[str, Shard]:
    """This rank's rows of every parameter and persistent buffer, as `model.NAME`; frozen parameters are left out, for
    who froze them has them from elsewhere.
    """
    # nn.Module.state_dict and not named_parameters: its FSDP2 hook takes back a root that a forward has left
    # whole.
    tensors = model.state_dict()
    frozen = {name for name, tensor in model.named_parameters(remove_duplicate=False) if not tensor.requires_grad}
    return {f"model.{name}": _local_shard(tensor) for name, tensor in tensors.items() if name not in frozen}


def optimizer_state_dict(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Shard]:
    """This rank's rows of the optimizer's state, as `optim.KEY.NAME`; `build_optimizer` has made it before any step."""
    model.state_dict()  # takes the sharded parameters back, see model_state_dict
    names = {parameter: name for name, parameter in model.named_parameters()}
    found = {}
    for group in optimizer.param_groups:
        for parameter, rows in zip(group["model_params"], group["params"]):
            name = names[parameter]
            assert optimizer.state[rows], f"{name} has no state: build the optimizer with build_optimizer"
            assert rows.data_ptr() == _local_rows(parameter).data_ptr(), f"{name} is not what its optimizer updates"
            for key, value in optimizer.state[rows].items():
                found[f"optim.{key}.{name}"] = _local_shard(value, parameter if value.dim() else value)
    return found


def training_state(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Shard]:
    """This rank's shards of the model and its optimizer."""
    return model_state_dict(model) | optimizer_state_dict(model, optimizer)


def load_training_state(model: nn.Module, optimizer: torch.optim.Optimizer, read: ReadInto) -> None:
    """Fill every parameter, persistent buffer and the optimizer's state in place, without taking a step.

    They must have memory (`to_empty` first, not meta). Learning rates are no part of it: they are a function of the
    step.
    """
    for name, shard in training_state(model, optimizer).items():
        assert not shard.tensor.is_meta, f"{name} is on the meta device: call model.to_empty(device=...) before loading"
        read(name, shard.tensor, shard.offset, shard.shape)


def first_non_finite(tensors: Mapping[str, Tensor]) -> str | None:
    """The name of the first tensor that holds a NaN or an infinity, or None. One pass, on the tensors' own device."""
    for name, tensor in tensors.items():
        if (
            tensor.is_floating_point()
            and tensor.numel()
            and not torch.isfinite(torch.stack(torch.aminmax(tensor))).all()
        ):
            return name
    return None


def rng_state_dict() -> dict[str, Tensor]:
    """The raw states of torch's generators on this rank, as uint8 tensors on the host: `cpu`, and `cuda` if any."""
    states = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state()
    return states


def load_rng_state_dict(states: dict[str, Tensor]) -> None:
    """Set torch's generators to saved states. A device's state without such a device here is said, not used."""
    torch.set_rng_state(states["cpu"])
    if "cuda" in states:
        if torch.cuda.is_available():
            torch.cuda.set_rng_state(states["cuda"])
        else:
            warn("the checkpoint holds a CUDA generator's state, which is not used: no CUDA device is here")


def shard_rows(rows: int, parts: int, index: int) -> tuple[int, int]:
    """First row and number of rows of part `index`, as FSDP2 cuts dim 0: equal parts rounded up, the last
    ones less or nothing.
    """
    size = -(-rows // parts)
    first = min(index * size, rows)
    return first, min(size, rows - first)


def _local_shard(tensor: Tensor, like: Tensor | None = None) -> Shard:
    """What this rank holds of a tensor, or of one that is sharded as `like` is and of which `tensor` is its rows."""
    like = tensor if like is None else like
    if not isinstance(like, DTensor):
        shape = tuple(tensor.shape)
        return Shard(tensor.detach(), shape, 0, owner=not dist.is_initialized() or dist.get_rank() == 0)
    shape, mesh = tuple(like.shape), like.device_mesh
    coordinate = mesh.get_coordinate()
    assert coordinate is not None, "a parameter on a mesh that this rank is no part of"
    first, rows, owner = 0, shape[0] if shape else 0, True
    for dimension, placement in enumerate(like.placements):
        if type(placement) is Replicate:
            owner = owner and coordinate[dimension] == 0
        else:
            assert placement == ShardPlacement(0), f"placement {placement}: only rows (dim 0) are sharded here"
            begin, rows = shard_rows(rows, mesh.size(dimension), coordinate[dimension])
            first += begin
    local = _local_rows(tensor)
    assert not shape or local.shape[0] == rows, f"{local.shape[0]} rows here, {rows} expected"
    return Shard(local, shape, first, owner)


@torch.no_grad()
def _local_rows(tensor: Tensor) -> Tensor:
    return (tensor.to_local() if isinstance(tensor, DTensor) else tensor).detach()
