"""Models to fine-tune or score: our checkpoints, and Hugging Face models of any family.

GPT-2, GPT-Neo, LLaMA, Mistral and Qwen run through `gloria.model`, everything else, variants of these too, through
transformers, as fp32. Weights are read from
safetensors files by this module alone; code in a folder never runs. What a model can do is found from its configuration
and its outputs, never from its name.
"""

from __future__ import annotations

import inspect
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging as transformers_logging

from gloria.dist.checkpoint_read import find_checkpoint, read_full_tensors, read_trainer
from gloria.dist.manifest import run_and_step
from gloria.errors import UserError, warn
from gloria.files import read_json_object
from gloria.model.config import TransformerConfig, read_shape
from gloria.model.config_json import obstacles, read_config
from gloria.model.decode import begin
from gloria.model.huggingface import read_tensors, weight_files, write_folder
from gloria.model.transformer import Block, Transformer

_NO_LIMIT = 1_000_000  # a tokenizer without a length limit has a number far above
_PROBE = "O gato dorme."


class Backbone(nn.Module):
    """A model without its head: token ids to hidden states."""

    def __init__(self, body: nn.Module, *, causal: bool, hidden_size: int, token_types: bool) -> None:
        super().__init__()
        self.body = body
        self.causal = causal  # a token sees only those before it
        self.hidden_size = hidden_size
        self.token_types = token_types  # an embedding distinguishes the two parts of a pair
        # A cache that nobody reads takes memory, and a compiled layer is compiled again for each of them.
        self.extra = {"use_cache": False} if "use_cache" in inspect.signature(body.forward).parameters else {}

    def forward(self, ids: Tensor, mask: Tensor, types: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """ids, mask (1: a token, 0: padding on the right) and types, (batch, seq) each, to the hidden states
        (batch, seq, hidden), and to the output of the model's own pooler, (batch, hidden), if it has one.
        """
        if isinstance(self.body, Transformer):
            return self.body.hidden_states(ids), None
        extra = self.extra | ({"token_type_ids": types} if self.token_types else {})
        output = self.body(input_ids=ids, attention_mask=mask, **extra)
        return output.last_hidden_state, getattr(output, "pooler_output", None)

    def blocks(self) -> nn.ModuleList:
        """The layers: the longest list of modules of one type."""
        return longest_block_list(self.body)


@dataclass(frozen=True)
class LoadedModel:
    """A model and what belongs to it."""

    source: str  # as the user named it, and of a run the step
    backbone: Backbone
    tokenizer: PreTrainedTokenizerBase
    max_length: int | None  # tokens the model can see at once; None: no limit is known
    language_model: nn.Module | None  # with the head that predicts the next token, where it was requested
    pads_left: bool = True  # padding on the left changes nothing that the language model writes
    at_random: tuple[str, ...] = ()  # weights of the body that the folder lacks
    behind_eos: bool = False  # its documents began behind an EOS, see `encode.start_ids`
    more_ends: frozenset[int] = frozenset()  # tokens that end a text besides the tokenizer's EOS

    def require_language_model(self) -> nn.Module:
        """The language model of a model that was loaded with it."""
        assert self.language_model is not None, f"{self.source} was loaded without its language model"
        return self.language_model

    def end_ids(self) -> set[int]:
        """The tokens that end a text."""
        return {self.tokenizer.eos_token_id, *self.more_ends} - {None}


def load_model(name: str, *, language_model: bool = False) -> LoadedModel:
    """A run (its newest whole checkpoint), one of its checkpoints, a Hugging Face folder or hub name; on CPU, fp32.

    With `language_model` the head that predicts the next token is loaded too, and a model that has none, or whose
    tokens see those after them, is a `UserError`.
    """
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    if named := run_and_step(Path(name)):
        loaded = _load_checkpoint(find_checkpoint(*named))
    else:
        loaded = _load_folder(name, find_folder(name), language_model)
    parameters = dict((loaded.language_model or loaded.backbone).named_parameters())
    if bad := [key for key, parameter in parameters.items() if not parameter.isfinite().all()]:
        warn(f"{name}: {len(bad)} of {len(parameters)} tensors are not finite ({bad[0]}); its scores mean nothing")
    return loaded


def find_folder(name: str) -> Path:
    """The folder of a model: a local one, or for a hub name (owner/name) where its files are after a download.

    A name whose first part is a folder here is never a hub name.
    """
    path = Path(name)
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise UserError(
                f"--model: {name} has neither checkpoints nor a config.json; name a run or a model's folder"
            )
        return path
    if not re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", name) or Path(name).parent.exists():
        raise UserError(f"--model: {name} does not exist; name a run's folder or a Hugging Face folder")
    wanted = ["*.json", "*.safetensors", "*.model", "*.txt"]
    try:
        return Path(snapshot_download(name, allow_patterns=wanted, ignore_patterns="*/*"))
    except Exception as error:  # of huggingface_hub, of its HTTP client, of the disk
        raise UserError(
            f"--model: {name} is no folder here, and the Hugging Face hub does not give it ({_reason(error)}); "
            "name a run or a model's folder"
        ) from None


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """A model's tokenizer, a fast one: spans need the characters that a token stands for."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        known = tokenizer(_PROBE, add_special_tokens=False)["input_ids"]
    except Exception as error:  # OSError, ValueError, ImportError, ...: whatever foreign files provoke
        raise _unloadable(folder, error) from None
    # Without a vocabulary, transformers makes a tokenizer of special tokens alone.
    if not any((folder / name).is_file() for name in ("tokenizer.json", *tokenizer.vocab_files_names.values())):
        raise UserError(f"--model: {folder} has no tokenizer.json; copy the tokenizer's files there")
    if not tokenizer.is_fast:
        raise UserError(f"--model: {folder} has no tokenizer.json; save its tokenizer as a fast one")
    if set(known) <= {tokenizer.unk_token_id}:
        raise UserError(f'--model: the tokenizer of {folder} knows nothing of "{_PROBE}"; copy its files again')
    return tokenizer


def build(kind: Any, folder: Path, config: PretrainedConfig) -> tuple[PreTrainedModel, dict[str, Any]]:
    """The model that `kind` (AutoModel, ...) has for `config`, fp32, with the safetensors weights of a folder.

    Returns also what transformers reports of the loading. It is given tensors, for of files it would accept pickled
    ones. Raises what it raises, and `UserError` for files that are not whole.
    """
    tensors = {name: tensor for file in weight_files(folder) for name, tensor in load_file(file).items()}
    layers = getattr(config.get_text_config(), "num_hidden_layers", 1)
    if layers > len(tensors):  # before they are made
        raise UserError(f"{folder}: config.json has {layers} layers, the weights {len(tensors)} tensors; copy it again")
    with torch.device("meta"):
        model_class = type(kind.from_config(config))
    if not any(name.startswith(f"{model_class.base_model_prefix}.") for name in tensors):
        # LlamaForQuestionAnswering has another name for its body than LlamaForCausalLM; a body alone suits both.
        tensors = {name.removeprefix("model."): tensor for name, tensor in tensors.items()}
    options = {"config": config, "state_dict": tensors, "dtype": torch.float32, "output_loading_info": True}
    return model_class.from_pretrained(None, **options)


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
            assert isinstance(block, Block)
            block.activation_checkpointing = kind
        return
    if kind == "selective":
        raise UserError(
            "train.activation_checkpointing: selective is not for models of transformers; set it to full or none"
        )
    if kind == "full":
        # The older name goes with transformers 6, and 5.17 does not have the newer one.
        names = ("activation_checkpointing_enable", "gradient_checkpointing_enable")
        name = next(name for name in names if hasattr(backbone.body, name))
        try:
            getattr(backbone.body, name)({"use_reentrant": False})
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
        assert isinstance(backbone.body, PreTrainedModel)
        backbone.body.save_pretrained(folder, state_dict=state)
        for file in Path(work).iterdir():
            shutil.copy2(file, folder / file.name)


def _load_checkpoint(checkpoint: Path) -> LoadedModel:
    state = read_trainer(checkpoint)
    if "task" in state:
        run = checkpoint.parent.parent
        raise UserError(f"--model: {run} is an unfinished fine-tuning; its best model so far is {run / 'model'}")
    shape = TransformerConfig.from_dict(state["model"])
    tokenizer = load_tokenizer(checkpoint.parent.parent / "tokenizer")
    return replace(_own(str(checkpoint), shape, read_full_tensors(checkpoint, "model."), tokenizer), behind_eos=True)


def _load_folder(name: str, folder: Path, language_model: bool) -> LoadedModel:
    weight_files(folder)
    values, behind_eos = read_config(folder), False
    if obstacles(values):
        loaded = _load_foreign(name, folder, language_model)
    else:
        shape = read_shape(folder)  # no config of ours reaches transformers
        _check_ids(folder, shape.vocab_size)
        loaded = _own(name, shape, read_tensors(folder).items(), load_tokenizer(folder))
        behind_eos = (bos := values.get("bos_token_id")) is not None and bos == values.get("eos_token_id")
    generation = folder / "generation_config.json"
    ends = (read_json_object(generation, "copy the folder again") if generation.is_file() else values).get(
        "eos_token_id"
    )
    more_ends = frozenset(ends if isinstance(ends, list) else [ends]) - {None}
    return replace(loaded, behind_eos=behind_eos, more_ends=more_ends)


def _own(
    source: str,
    shape: TransformerConfig,
    tensors: Iterable[tuple[str, Tensor]],
    tokenizer: PreTrainedTokenizerBase,
) -> LoadedModel:
    _check_vocabulary(source, tokenizer, shape.vocab_size)
    with torch.device("meta"):
        model = Transformer(shape)
    model.load_state_dict(dict(tensors), strict=True, assign=True)
    model.requires_grad_(True)  # tensors read from a file have no gradients
    if model.lm_head is not None:
        model.lm_head.requires_grad_(False)  # tasks have heads of their own
    backbone = Backbone(model, causal=True, hidden_size=shape.hidden_size, token_types=False)
    return LoadedModel(source, backbone, tokenizer, _shorter(shape.max_positions, tokenizer), model)


def _load_foreign(name: str, folder: Path, language_model: bool) -> LoadedModel:
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
        tokenizer = load_tokenizer(folder)
        text = config.get_text_config()
        _check_vocabulary(name, tokenizer, text.vocab_size)
        _check_ids(folder, text.vocab_size)
        if config.is_encoder_decoder:
            raise UserError(
                f"--model: {name} ({config.model_type}) is an encoder-decoder; name an encoder or a decoder"
            )
        if language_model and type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
            raise _no_language_model(name, config)
        model, info = build(AutoModelForCausalLM if language_model else AutoModel, folder, config)
        backbone = Backbone(
            model.base_model if language_model else model,
            causal=False,
            hidden_size=text.hidden_size,
            token_types=getattr(text, "type_vocab_size", 0) >= 2 and "token_type_ids" in tokenizer("a"),
        )
        backbone.causal = not _sees_ahead(backbone, text.vocab_size)
        pads_left = not language_model or _pads_left(model, text.vocab_size)
    except UserError:
        raise
    except Exception as error:  # whatever foreign files provoke
        raise _unloadable(name, error) from None
    if language_model and not backbone.causal:
        raise _no_language_model(name, config)
    if not pads_left:
        warn(f"{name}: padding changes what it writes, so it continues one text at a time")
    if missing := sorted(info["missing_keys"]):
        if language_model or any(re.search(r"\.\d+\.", key) for key in missing):  # of a layer
            raise UserError(f"--model: {name} has no weights for {missing[0]}; give a whole model")
        warn(f"{name}: {len(missing)} weights are not in the folder and start at random: {', '.join(missing[:4])}")
    limit = _shorter(getattr(text, "max_position_embeddings", None), tokenizer)
    return LoadedModel(name, backbone, tokenizer, limit, model if language_model else None, pads_left, tuple(missing))


@torch.no_grad()
def _sees_ahead(backbone: Backbone, vocab_size: int) -> bool:
    """Whether a token's hidden state depends on tokens after it, by trying: configurations do not say it."""
    ids = ((torch.arange(8) + vocab_size // 2) % vocab_size).repeat(2, 1)
    ids[1, -1] = (ids[1, -1] + 1) % vocab_size
    hidden, _ = backbone.eval()(ids, torch.ones_like(ids), torch.zeros_like(ids))
    difference = (hidden[0, :-1] - hidden[1, :-1]).abs().max()
    return bool(difference > 1e-5 * hidden.abs().max())  # 0 for a causal model, above 1e-3 for any other


@torch.no_grad()
def _pads_left(model: nn.Module, vocab_size: int) -> bool:
    """Whether a prompt has the same next token beside a longer one as alone, by trying."""
    ids = [(number + vocab_size // 2) % vocab_size for number in range(8)]
    (_, beside), (_, alone) = (begin(model, prompts, 1, torch.device("cpu")) for prompts in ([ids, ids[:4]], [ids[:4]]))
    return bool((beside[1] - alone[0]).abs().max() < 1e-3 * alone.abs().max())  # rounding alone is below 1e-5


def _check_ids(folder: Path, rows: int) -> None:
    """Refuse configurations that name a token outside the embedding, which has so many rows."""
    for path in (folder / "config.json", folder / "generation_config.json"):
        values = read_json_object(path, "copy the folder again") if path.is_file() else {}
        for key in ("pad_token_id", "eos_token_id"):
            ids = values.get(key)
            for number in ids if isinstance(ids, list) else [ids]:
                if number is not None and not (type(number) is int and -1 <= number < rows):
                    raise UserError(f"{path}: {key} {json.dumps(ids)} is no token of {rows}; correct it")


def _check_vocabulary(source: str, tokenizer: PreTrainedTokenizerBase, rows: int) -> None:
    tokens = len(tokenizer)
    if tokens > rows:
        raise UserError(
            f"--model: {source}: its tokenizer has {tokens} tokens, its model {rows}; "
            "give the tokenizer that the model was trained with"
        )
    if rows - tokens > max(1024, rows // 20):  # more than published models have as padding
        warn(f"{source}: its tokenizer has only {tokens} tokens, its model {rows}; check that they belong together")


def _shorter(positions: int | None, tokenizer: PreTrainedTokenizerBase) -> int | None:
    limits = [positions or 0, tokenizer.model_max_length]  # XLNet has -1 positions for no limit
    return min((limit for limit in limits if 0 < limit < _NO_LIMIT), default=None)


def _no_language_model(name: str, config: PretrainedConfig) -> UserError:
    return UserError(
        f"--model: {name} ({config.model_type}) is no causal language model, and gives no text a likelihood; "
        "fine-tune it on the task first"
    )


def _unloadable(name: str | os.PathLike[str], error: Exception) -> UserError:
    return UserError(f"--model: {name} cannot be loaded ({_reason(error)}); name a run or a model's folder")


def _reason(error: Exception) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__
