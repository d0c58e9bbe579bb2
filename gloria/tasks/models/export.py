"""A fine-tuned model with one head as the class of transformers that has such a head, with equal logits.

By rule, not by a model's name: the class is built from the configuration, its last projection becomes our head, and
the layers in between are made to do what ours do. Whether that has worked is always tried on a batch.

    AutoModelForSequenceClassification   labels, or one number (problem_type "regression")
    AutoModelForQuestionAnswering        first and last token of an answer

Such a class finds the last token of a row as the last that is not padding, so the pad token is one that ends no row.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from tokenizers.processors import TemplateProcessing
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from gloria.files import partial_folder, publish
from gloria.tasks.models.backbones import build, load_tokenizer
from gloria.tasks.models.encode import Row, Template, collate, read_template
from gloria.tasks.models.finetuned import HEAD, FinetunedModel, load_finetuned
from gloria.tasks.models.heads import SCORE, SPAN

TOLERANCE = 1e-4
_PAD = "<|pad|>"


class CannotExport(Exception):
    """Why a model is not a class of transformers, in a line."""


def export_head(folder: Path, out: Path) -> str:
    """Write `out`, in the place of an older one, from a folder of `finetuned.py`; return a line about it.

    Where no class of transformers gives the same logits, the line begins with "none: ", and there is no folder.
    """
    try:
        with partial_folder(out) as work:
            name, difference = _write(load_finetuned(folder, torch.device("cpu")), folder, work / out.name)
            publish(work / out.name, out, replace=True)
    except CannotExport as reason:
        return f"none: {reason}"
    return f"{out}: {name}, its logits differ from ours by {difference:.1g} at most"


def _write(finetuned: FinetunedModel, folder: Path, work: Path) -> tuple[str, float]:
    heads = finetuned.inputs.heads
    if len(heads) > 1:
        raise CannotExport(f"no class of transformers has two heads, {' and '.join(heads)}")
    template = read_template(finetuned.tokenizer)
    tokenizer = _tokenizer(finetuned, template)
    model = _build(finetuned, folder)
    if len(tokenizer) > _embedding(model).num_embeddings:
        _add_padding_row(model, len(tokenizer))
    model.config.pad_token_id = tokenizer.pad_token_id  # not before: the embedding may have had no such row
    weights = load_file(folder / HEAD)
    (name,) = heads
    projections = _projections(model)
    if not projections or projections[-1].out_features != heads[name]:
        raise CannotExport(f"{type(model).__name__} does not end in a projection to {heads[name]}")
    final = projections[-1]
    with torch.no_grad():
        final.weight.copy_(weights[f"{name}.weight"])
        bias = weights.get(f"{name}.bias", torch.zeros(heads[name]))
        if final.bias is not None:
            final.bias.copy_(bias)
        elif bias.any():
            _fold(bias, final.weight, model.base_model)
        _set_between(model, final, getattr(finetuned.model.backbone.body, "pooler", None))
    model.save_pretrained(work)
    tokenizer.save_pretrained(work)
    loaded = type(model).from_pretrained(work, dtype=torch.float32).eval()
    difference = _difference(finetuned, loaded, template, tokenizer.pad_token_id)
    if not difference <= TOLERANCE:
        raise CannotExport(f"the logits of {type(model).__name__} differ from ours by {difference:.2g}")
    _check_tokenizer(load_tokenizer(work), template, finetuned.tokenizer)
    return type(model).__name__, difference


def _tokenizer(finetuned: FinetunedModel, template: Template) -> PreTrainedTokenizerBase:
    """The tokenizer, which pads on the right with a token that ends no row, and makes our rows of two texts."""
    tokenizer = load_tokenizer(Path(finetuned.source))
    if tokenizer.pad_token_id in (None, template.end[-1]):
        tokenizer.add_special_tokens({"pad_token": _PAD})
    tokenizer.padding_side = "right"
    tokenizer.model_max_length = finetuned.inputs.max_length
    names = tokenizer.convert_ids_to_tokens
    start, middle, end = (
        [str(names(number)) for number in part] for part in (template.start, template.middle, template.end)
    )
    # "$A:0" is the first text, of type 0.
    parts: list[list[str]] = [start, ["$A"], middle, ["$B"], end]
    pair = [f"{piece}:{kind}" for part, kind in zip(parts, template.types) for piece in part]
    single = [f"{piece}:{template.types[0]}" for part in (start, ["$A"], end) for piece in part]
    special = {*template.start, *template.middle, *template.end}
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=single, pair=pair, special_tokens=[(names(number), number) for number in special]
    )
    return tokenizer


def _build(finetuned: FinetunedModel, folder: Path) -> PreTrainedModel:
    """The class with the backbone's weights; its head's are still random."""
    config: PretrainedConfig = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    inputs = finetuned.inputs
    if SPAN in inputs.heads:
        kind: Any = AutoModelForQuestionAnswering
        config.num_labels = 2
    elif SCORE in inputs.heads:
        kind = AutoModelForSequenceClassification
        config.num_labels, config.problem_type = 1, "regression"
    else:
        kind = AutoModelForSequenceClassification
        config.id2label = dict(enumerate(inputs.labels))
        config.label2id = {label: number for number, label in enumerate(inputs.labels)}
        config.problem_type = "single_label_classification"
    try:
        model, info = build(kind, folder, config)
    except (ValueError, RuntimeError, OSError) as error:
        reason = str(error).strip().partition("\n")[0][:100]
        raise CannotExport(f"transformers has no {kind.__name__.removeprefix('Auto')} of it ({reason})") from None
    prefix = f"{model.base_model_prefix}."
    if lost := sorted(name for name in info["missing_keys"] if name.startswith(prefix)):
        raise CannotExport(f"{type(model).__name__} has a {lost[0]}, which our model lacks")
    return model.eval()


def _projections(model: PreTrainedModel) -> list[nn.Linear]:
    """The linear layers outside the backbone, in their order."""
    inside = {id(module) for module in model.base_model.modules()}
    return [module for module in model.modules() if isinstance(module, nn.Linear) and id(module) not in inside]


def _set_between(model: PreTrainedModel, final: nn.Linear, pooler: nn.Module | None) -> None:
    """Make a square layer before the final projection our pooler where the class has none, and otherwise undo it.

    With z = Wx that layer gives z and -z, and the projection subtracts what has become of them: f(z) - f(-z) is z for
    f = GELU, ReLU and SiLU.
    """
    between = [layer for layer in _projections(model)[:-1] if layer.in_features == layer.out_features]
    if not between:
        return
    (layer,) = between
    if pooler is not None:
        layer.load_state_dict(pooler.get_submodule("dense").state_dict())
        return
    for parameter in layer.parameters():
        parameter.zero_()
    count = final.out_features
    layer.weight[: 2 * count] = torch.cat([final.weight, -final.weight])
    final.weight.zero_()
    final.weight[:, : 2 * count] = torch.cat([torch.eye(count), -torch.eye(count)], dim=1)


def _fold(bias: Tensor, weight: Tensor, body: nn.Module) -> None:
    """A number's bias, for a projection without one, as a shift of the last norm along the projection's weights."""
    # The one behind all layers is the last of those that are in no layer.
    norms = [(-name.count("."), number, module) for number, (name, module) in enumerate(body.named_modules())
             if type(module).__name__.endswith("Norm")]  # fmt: skip
    shift = getattr(max(norms)[2], "bias", None) if norms else None
    if shift is None or len(weight) != 1 or shift.shape != weight[0].shape or not weight.any():
        raise CannotExport("its class has a head without a bias, and no bias in its last norm that could stand in")
    shift += bias * weight[0] / weight[0].square().sum()


def _embedding(model: PreTrainedModel) -> nn.Embedding:
    embedding = model.get_input_embeddings()
    if not isinstance(embedding, nn.Embedding):
        raise CannotExport(f"{type(model).__name__} has no table of embeddings")
    return embedding


def _add_padding_row(model: PreTrainedModel, tokens: int) -> None:
    """Room for a pad token; what its embedding is no mask lets through."""
    model.resize_token_embeddings(tokens, mean_resizing=False)
    _embedding(model).weight.data[-1] = 0.0


@torch.no_grad()
def _difference(finetuned: FinetunedModel, model: PreTrainedModel, template: Template, pad_id: int) -> float:
    """How far the logits of both are apart at most, on random rows of different lengths."""
    generator = torch.Generator().manual_seed(0)
    limit = min(finetuned.inputs.max_length, 48) - template.special(True)
    rows = []
    for length in (limit, max(limit // 2, 2), max(limit // 3, 2), 2):
        ids = torch.randint(len(finetuned.tokenizer), (length,), generator=generator).tolist()
        cut = length // 2
        parts = [[*template.start], ids[:cut], [*template.middle], ids[cut:], [*template.end]]
        types = [kind for part, kind in zip(parts, template.types) for _ in part]
        whole = [number for part in parts for number in part]
        # Every token may begin or end an answer here, so that no logit is left out of the comparison.
        rows.append(Row(whole, types, 0, first=0, offsets=((0, 0),) * len(whole)))
    batch = collate(rows, pad_id, torch.device("cpu"))
    extra = {"token_type_ids": batch["types"]} if finetuned.model.backbone.token_types else {}
    (ours,) = finetuned.model.eval()({**batch, "ids": batch["ids"].clamp(max=len(finetuned.tokenizer) - 1)}).values()
    theirs = model(input_ids=batch["ids"], attention_mask=batch["mask"], **extra)
    if SPAN not in finetuned.inputs.heads:
        return float((ours - theirs.logits).abs().max())
    both = torch.stack([theirs.start_logits, theirs.end_logits], dim=-1)
    return float((ours - both)[batch["mask"].bool()].abs().max())


def _check_tokenizer(tokenizer: PreTrainedTokenizerBase, template: Template, own: PreTrainedTokenizerBase) -> None:
    """The saved tokenizer must make the rows that the model was trained on."""
    first, second = (own(text, add_special_tokens=False)["input_ids"] for text in ("um", "dois"))
    if tokenizer("um", "dois")["input_ids"] != [*template.start, *first, *template.middle, *second, *template.end]:
        raise CannotExport("its tokenizer, once saved, does not put the separators where the model has learned them")
