"""LoRA (Hu et al., arXiv 2106.09685) by the library peft: the backbone's matrices stand still, low-rank ones beside
them learn. They are folded into a whole model, or kept alone in peft's format.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor, nn

from gloria.errors import UserError
from gloria.model.families import Family
from gloria.model.transformer import Transformer
from gloria.tasks.models.backbones import Backbone

SCALE = 2.0  # alpha / rank: the update is SCALE * B A, whatever the rank
_A, _B, _BASE = "lora_A.default.weight", "lora_B.default.weight", "base_layer."


def add_adapters(backbone: Backbone, rank: int, at_random: Iterable[str]) -> None:
    """Freeze the backbone in place, but for the weights `at_random`; put an adapter on each linear layer of its blocks.

    B starts at 0, so the model computes what it did; A is drawn from torch's generator. Before sharding. `UserError`
    where peft is not installed.
    """
    try:
        from peft import inject_adapter_in_model
    except ImportError as error:
        problem = f'train.lora_rank: needs peft ({error}); pip install "gloria[lora]", or leave it out'
        raise UserError(problem) from None
    inside = {module for block in backbone.blocks() for module in block.modules()}
    names = [name for name, module in backbone.body.named_modules() if module in inside and type(module) is nn.Linear]
    if not names:
        raise UserError(f"train.lora_rank: no block of {type(backbone.body).__name__} has a linear layer; leave it out")
    inject_adapter_in_model(_config(rank, names), backbone.body)
    for name in at_random:
        backbone.body.get_parameter(name).requires_grad_(True)


def has_adapters(state: dict[str, Tensor]) -> bool:
    """Whether a model's tensors are those of one with adapters."""
    return any(name.endswith(_A) for name in state)


def merge_adapters(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The whole tensors of a model with adapters as those of one without: each W becomes W + SCALE * B A."""
    merged = {}
    for name, value in state.items():
        if name.endswith((_A, _B)):
            continue
        if (layer := name.removesuffix(f"{_BASE}weight")) != name:
            value = value + SCALE * (state[layer + _B] @ state[layer + _A])
        merged[name.replace(_BASE, "")] = value
    return merged


def save_adapter(backbone: Backbone, state: dict[str, Tensor], folder: Path, source: str) -> None:
    """Write the adapters of `state` (whole tensors, by the body's names) to the new folder `folder`.

    `PeftModel.from_pretrained(AutoModel.from_pretrained(source), folder)` is the backbone with them: names are those
    of transformers' AutoModel.
    """
    folder.mkdir()
    tensors, layers = {}, dict[str, int]()
    for name, value in state.items():
        for part in (_A, _B):
            if name.endswith(f".{part}"):
                layer = _name_in_transformers(backbone.body, name.removesuffix(f".{part}"))
                tensors[f"{layer}.{part.replace('.default', '')}"] = value
                layers[layer] = min(value.shape)
    trained = [name for name, parameter in backbone.body.named_parameters() if parameter.requires_grad]
    whole = [name for name in trained if not name.endswith((_A, _B))]  # that had no weights before
    tensors |= {name: state[name] for name in whole}
    more: dict[str, Any] = {"base_model_name_or_path": source, "inference_mode": True}
    if whole:
        more["modules_to_save"] = sorted({name.rpartition(".")[0] for name in whole})
    if isinstance(backbone.body, Transformer):
        more["fan_in_fan_out"] = backbone.body.shape.family.transposed != Family.transposed
    config = _config(max(layers.values()), list(layers), **more)
    config.save_pretrained(folder)
    named = {f"base_model.model.{name}": tensor.contiguous() for name, tensor in tensors.items()}
    save_file(named, folder / "adapter_model.safetensors", metadata={"format": "pt"})


def _config(rank: int, layers: list[str], **more: Any) -> Any:
    from peft import LoraConfig

    return LoraConfig(r=rank, lora_alpha=int(SCALE * rank), target_modules=layers, **more)


def _name_in_transformers(body: nn.Module, layer: str) -> str:
    """What the class of AutoModel calls a layer: ours has the names of the language model, whose body that is."""
    if not isinstance(body, Transformer):
        return layer
    whole = body.shape.family.folder_name(f"{layer}.weight").removesuffix(".weight")
    return whole.partition(".")[2]
