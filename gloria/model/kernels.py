"""Which attention kernel a run takes, chosen here alone.

Plain causal attention is `scaled_dot_product_attention` everywhere, which takes flash or cuDNN on a GPU. The choice is
about layers with a window and masked documents, for which it would need a mask, and with a mask it has no flash kernel.
"""

from __future__ import annotations

import importlib
import inspect
from typing import Any

import torch

from gloria.errors import UserError
from gloria.model.config import TransformerConfig

_NAMES = {"varlen": "varlen flash", "flex": "FlexAttention"}


def choose_kernel(
    requested: str,
    shape: TransformerConfig,
    *,
    device: torch.device,
    precision: str,
    sequence_length: int,
    mask_documents: bool,
    compiled: bool,
) -> tuple[str, str]:
    """The kernel, varlen, flex or sdpa, and the choice in words; `requested` is one of them or auto.

    `auto` is varlen flash where the GPU, torch, the precision and the model allow it, otherwise sdpa, as on CPU.
    FlexAttention is taken on request alone: where bench/attention.py measures it to be faster. `UserError` where what
    is requested by name cannot be had.
    """
    wanted = "varlen" if requested == "auto" else requested
    windows = any(0 < window < sequence_length for window in shape.windows)
    if not windows and not mask_documents:
        return "sdpa", "sdpa: every layer is plainly causal"
    layers = " and ".join(["local layers"] * windows + ["masked documents"] * mask_documents)
    if wanted == "sdpa":
        return "sdpa", f"{layers} by sdpa with a mask: as the recipe has it"
    obstacle = _obstacle(wanted, shape, device, precision, compiled)
    if not obstacle:
        return wanted, f"{layers} by {_NAMES[wanted]}, all else by sdpa"
    if requested == "auto":
        return "sdpa", f"{layers} by sdpa with a mask: {obstacle}"
    raise UserError(f"train.attention: no {_NAMES[wanted]} here: {obstacle}; set it to auto")


def _obstacle(kernel: str, shape: TransformerConfig, device: torch.device, precision: str, compiled: bool) -> str:
    """Why `kernel` cannot be taken; "" where it can."""
    name = _NAMES[kernel]
    if device.type != "cuda":
        return "no GPU is used"
    if shape.dropout:
        return f"{name} has no dropout"
    major, minor = torch.cuda.get_device_capability(device)
    if major < 8 or torch.version.hip:
        return f"{torch.cuda.get_device_name(device)} (sm_{major}{minor}) is no NVIDIA GPU from sm_80 on"
    if kernel == "flex":
        return "" if compiled else "FlexAttention is fast only when compiled (train.compile)"
    if precision == "fp32":
        return "flash attention has no fp32"
    if shape.head_dim % 8 or shape.head_dim > 192:  # above 192 some GPUs have no backward
        return f"heads of {shape.head_dim} are no multiple of 8 up to 192"
    if not torch.backends.cuda.is_flash_attention_available():
        return "this torch is built without flash attention"
    from torch.nn.attention.varlen import varlen_attn  # imports the compiler, which takes seconds

    taken = set(inspect.signature(varlen_attn).parameters)
    if not {"scale", "window_size"} <= taken:
        return f"varlen_attn of torch {torch.__version__} has no window"
    if shape.kv_heads < shape.num_heads and "enable_gqa" not in taken:
        return f"varlen_attn of torch {torch.__version__} has no grouped queries"
    return ""


def kept_operations(kernel: str) -> list[Any]:
    """What selective checkpointing keeps: the operations whose outputs are expensive to compute.

    The rest (norms, GELU, dropout) is cheap to compute again and most of the memory.
    """
    kept: list[Any] = [
        torch.ops.aten.mm.default,
        torch.ops.aten.addmm.default,
        torch.ops.aten._scaled_dot_product_flash_attention.default,
        torch.ops.aten._scaled_dot_product_efficient_attention.default,
        torch.ops.aten._scaled_dot_product_cudnn_attention.default,
        torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default,
    ]
    if kernel == "varlen":
        importlib.import_module("torch.nn.attention.varlen")  # which registers the operation
        kept.append(torch.ops.torch_attn._varlen_attn.default)
    if kernel == "flex":
        kept.append(torch.ops.higher_order.flex_attention)
    return kept


def use_cudnn_attention(on: bool) -> None:
    """Let `scaled_dot_product_attention` take cuDNN's kernel, the fastest on Hopper where shapes stay the same.

    cuDNN plans anew for each size and stride it has not seen, so a command whose batches vary in length turns it off
    (FunASR, pull request 3705: 0.244 s a decoding step with it, 0.068 s without).
    """
    torch.backends.cuda.enable_cudnn_sdp(on)
