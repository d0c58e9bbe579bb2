"""Models to fine-tune or score: our checkpoints, and Hugging Face folders of any family.

GPT-2 and GPT-Neo run through `gloria.model`; everything else through transformers, as fp32 and without code
of the folder's own. What a model is, and what its tokenizer does, is asked of their configurations: no name of
a model is looked at. Rows are padded on the right, where a causal model never looks; with positions, on the left.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedTokenizerBase,
)
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_MASKED_LM_MAPPING_NAMES,
)
from transformers.utils import logging as transformers_logging

from gloria.dist.checkpoint_read import find_checkpoint, read_full_tensors, read_trainer
from gloria.dist.manifest import run_and_step
from gloria.errors import UserError, warn
from gloria.model.config import TransformerConfig, read_shape
from gloria.model.families import find_family, read_config
from gloria.model.huggingface import read_tensors, weight_files, write_folder
from gloria.model.transformer import Transformer

_NO_LIMIT = 1_000_000  # a tokenizer without a length limit says something far above


class Backbone(nn.Module):
    """A model without its head: token ids to hidden states."""

    def __init__(self, body: nn.Module, *, causal: bool, hidden_size: int, token_types: bool) -> None:
        super().__init__()
        self.body = body
        self.causal = causal  # a token sees only those before it
        self.hidden_size = hidden_size
        self.token_types = token_types  # tells the two parts of a pair apart by an embedding

    def forward(
        self, ids: Tensor, mask: Tensor, types: Tensor | None = None, positions: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """ids, mask (1: a token, 0: padding) and types, (batch, seq) each, to the hidden states (batch, seq, hidden),
        and to what the model itself makes of the whole, (batch, hidden), if anything.

        `positions` (batch, seq), -1 at padding, are for rows padded on the left, and only for those.
        """
        if isinstance(self.body, Transformer):
            documents = None if positions is None else mask
            return self.body.hidden_states(ids, documents, positions), None
        extra = {"token_type_ids": types} if self.token_types else {}
        if positions is not None:
            extra["position_ids"] = positions.clamp(min=0)
        output = self.body(input_ids=ids, attention_mask=mask, **extra)
        hidden, pooled = output.last_hidden_state, getattr(output, "pooler_output", None)
        if pooled is not None and positions is not None:  # it was made of padding
            first = hidden[torch.arange(len(hidden), device=hidden.device), mask.argmax(dim=1)]
            pooled = self.body.pooler(first.unsqueeze(1))
        return hidden, pooled

    def blocks(self) -> nn.ModuleList:
        """The layers: the longest list of modules of one type."""
        return longest_block_list(self.body)


@dataclass(frozen=True)
class Loaded:
    """A model and what belongs to it."""

    source: str  # as the user named it, and of a run the step
    backbone: Backbone
    tokenizer: PreTrainedTokenizerBase
    max_length: int | None  # tokens the model can see at once; None: no limit is known
    language_model: nn.Module | None  # the whole of it, where it was asked for


def load_model(name: str, *, language_model: bool = False) -> Loaded:
    """A run (its newest whole checkpoint), one of its checkpoints, or a Hugging Face folder or hub name; on CPU, fp32.

    With `language_model` the head that predicts the next token comes along, and a model that has none, or
    that looks ahead, is a `UserError`.
    """
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    path = Path(name)
    if named := run_and_step(path):
        return _load_checkpoint(find_checkpoint(*named))
    if path.is_dir() and not (path / "config.json").is_file():
        raise UserError(f"--model: {name} holds neither checkpoints nor a config.json; name a run or a model's folder")
    if not path.exists() and (name.startswith((".", "/", "~")) or name.count("/") > 1):
        raise UserError(f"--model: {name} does not exist; name a run's folder or a Hugging Face folder")
    if path.is_dir():
        weight_files(path)
        if find_family(read_config(path).get("model_type")):  # no config of ours reaches transformers
            shape, tensors = read_shape(path), read_tensors(path)
            return _own(name, shape, tensors.items(), load_tokenizer(name))
    try:
        config = AutoConfig.from_pretrained(name, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        raise _unloadable(name, error) from None
    causal = is_causal(config)
    if language_model and not causal:
        raise UserError(
            f"--model: {name} ({config.model_type}) is no causal language model, and gives no text a likelihood; "
            "fine-tune it on the task first"
        )
    tokenizer = load_tokenizer(name)
    return _load_foreign(name, config, tokenizer, language_model)


def is_causal(config: PretrainedConfig) -> bool:
    """Whether a token of such a model sees only those before it.

    BERT's family is on transformers' list of causal models as well, for use as a decoder, which its
    configuration then says.
    """
    kind = config.get_text_config().model_type
    if kind in MODEL_FOR_MASKED_LM_MAPPING_NAMES:
        return bool(getattr(config, "is_decoder", False))
    return kind in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES


def load_tokenizer(name: str) -> PreTrainedTokenizerBase:
    """A model's tokenizer, a fast one: spans need to know which characters a token stands for."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False)
    except Exception as error:  # OSError, ValueError, ImportError, ...: whatever foreign files provoke
        raise _unloadable(name, error) from None
    if not tokenizer.is_fast:
        raise UserError(f"--model: {name} has no tokenizer.json; save its tokenizer as a fast one")
    return tokenizer


def longest_block_list(module: nn.Module) -> nn.ModuleList:
    """The longest ModuleList whose members are all of one type."""
    lists = [
        found
        for found in module.modules()
        if isinstance(found, nn.ModuleList) and len({type(member) for member in found}) == 1
    ]
    assert lists, f"{type(module).__name__} has no list of layers"
    return max(lists, key=len)


def checkpoint_activations(backbone: Backbone, kind: str) -> None:
    """Let the backward pass compute activations again instead of keeping them: "none", "full" or "selective".

    Before sharding. The last is for models that run through `gloria.model`. Raises `UserError` where a model cannot.
    """
    if isinstance(backbone.body, Transformer):
        for block in backbone.blocks():
            block.activation_checkpointing = kind
        return
    if kind == "selective":
        raise UserError("train.activation_checkpointing: selective is for GPT-2 and GPT-Neo; set it to full or none")
    if kind == "full":
        # Its older name goes with transformers 6, and 5.17 has not the newer one.
        name = "activation_checkpointing_enable"
        enable = getattr(backbone.body, name, None) or backbone.body.gradient_checkpointing_enable
        try:
            enable({"use_reentrant": False})
        except ValueError as error:
            raise UserError(f"train.activation_checkpointing: the model cannot ({error}); set it to none") from None


def save_model(
    backbone: Backbone, state: dict[str, Tensor], tokenizer: PreTrainedTokenizerBase, folder: Path, dtype: str
) -> None:
    """Write the backbone with the whole tensors of `state` (by the body's names), and the tokenizer, to `folder`."""
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}-tokenizer-") as work:
        tokenizer.save_pretrained(work)
        if isinstance(backbone.body, Transformer):
            write_folder(folder, backbone.body.shape, state.items(), work, dtype)
            return
        backbone.body.save_pretrained(folder, state_dict=state)
        for file in Path(work).iterdir():
            shutil.copy2(file, folder / file.name)


def _load_checkpoint(checkpoint: Path) -> Loaded:
    state = read_trainer(checkpoint)
    if "task" in state:
        run = checkpoint.parent.parent
        raise UserError(f"--model: {run} is a fine-tuning under way; its best model so far is {run / 'model'}")
    shape = TransformerConfig.from_dict(state["model"])
    tokenizer = load_tokenizer(str(checkpoint.parent.parent / "tokenizer"))
    return _own(str(checkpoint), shape, read_full_tensors(checkpoint, "model."), tokenizer)


def _own(
    source: str,
    shape: TransformerConfig,
    tensors: Iterator[tuple[str, Tensor]] | Any,
    tokenizer: PreTrainedTokenizerBase,
) -> Loaded:
    with torch.device("meta"):
        model = Transformer(shape)
    model.load_state_dict(dict(tensors), strict=True, assign=True)
    # Tensors read from a file would not ask for gradients.
    model.requires_grad_(True)
    _check_vocabulary(source, len(tokenizer), shape.vocab_size)
    backbone = Backbone(model, causal=True, hidden_size=shape.hidden_size, token_types=False)
    return Loaded(source, backbone, tokenizer, _shorter(shape.max_positions, tokenizer), model)


def _load_foreign(
    name: str, config: PretrainedConfig, tokenizer: PreTrainedTokenizerBase, language_model: bool
) -> Loaded:
    kind = AutoModelForCausalLM if language_model else AutoModel
    try:
        model, info = kind.from_pretrained(
            name,
            trust_remote_code=False,
            use_safetensors=True,
            dtype=torch.float32,  # transformers keeps a folder's bf16 otherwise
            output_loading_info=True,
        )
    except (OSError, ValueError, RuntimeError, ImportError) as error:
        raise _unloadable(name, error) from None
    if missing := sorted(info["missing_keys"]):
        if language_model:
            raise UserError(f"--model: {name} has no weights for {missing[0]}; give a whole language model")
        warn(f"{name}: {len(missing)} weights are not in the folder and start at random: {', '.join(missing[:4])}")
    text = config.get_text_config()
    _check_vocabulary(name, len(tokenizer), text.vocab_size)
    backbone = Backbone(
        model.base_model if language_model else model,
        causal=is_causal(config),
        hidden_size=text.hidden_size,
        token_types=getattr(text, "type_vocab_size", 0) >= 2 and "token_type_ids" in tokenizer("a"),
    )
    limit = _shorter(getattr(text, "max_position_embeddings", None), tokenizer)
    return Loaded(name, backbone, tokenizer, limit, model if language_model else None)


def _check_vocabulary(source: str, tokens: int, rows: int) -> None:
    if tokens > rows:
        raise UserError(
            f"--model: {source}: its tokenizer has {tokens} tokens, its model {rows}; "
            "give the tokenizer that the model was trained with"
        )


def _shorter(positions: int | None, tokenizer: PreTrainedTokenizerBase) -> int | None:
    limits = [positions, tokenizer.model_max_length if tokenizer.model_max_length < _NO_LIMIT else None]
    return min((limit for limit in limits if limit), default=None)


def _unloadable(name: str | os.PathLike[str], error: Exception) -> UserError:
    reason = (str(error).strip() or type(error).__name__).partition("\n")[0]
    return UserError(f"--model: {name} cannot be loaded ({reason}); name a run or a model's folder")
