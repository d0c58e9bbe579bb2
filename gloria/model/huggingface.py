"""To and from Hugging Face folders of GPT-2 and GPT-Neo: safetensors only, one tensor in memory at a time.

Parameters have the same names here and there. What differs: transformers keeps GPT-2's linear weights as (in,
out) (its Conv1D), has no rows that pad the vocabulary, and some folders hold attention masks or leave
`transformer.` out.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterable, Iterator, Mapping
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from gloria.data.tokenizer import TextTokenizer, load_tokenizer
from gloria.errors import UserError
from gloria.files import partial_folder, publish
from gloria.model.config import TransformerConfig, parameter_shapes, read_shape

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
SHARD_BYTES = 5_000_000_000  # as transformers cuts; also the most that writing holds in memory

_EMBEDDING = "transformer.wte.weight"
_HEAD = "lm_head.weight"
_CONV1D = re.compile(r"\.(attn\.c_attn|attn\.c_proj|mlp\.c_fc|mlp\.c_proj)\.weight$")
_MASKS = re.compile(r"\.attn(\.attention)?\.(bias|masked_bias)$")  # buffers of old versions, no parameters
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")


def weight_files(folder: str | Path) -> list[Path]:
    """The safetensors files of a Hugging Face folder; `UserError` where it has none, or pickled weights only."""
    folder = Path(folder)
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if single.is_file():
        return [single]
    if not index.is_file():
        pickles = sorted({path.name for pattern in _PICKLES for path in folder.glob(pattern)})
        if pickles:
            raise UserError(
                f"{folder}: has only pickled weights ({pickles[0]}), which can run code when read; "
                "have them converted to safetensors (transformers: save_pretrained)"
            )
        raise UserError(f"{folder}: has no model.safetensors; give the folder of a whole model")
    try:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (UnicodeDecodeError, json.JSONDecodeError, AttributeError, KeyError, TypeError) as error:
        raise UserError(f"{index}: is not an index of weights ({error}); copy the folder again") from None
    missing = [name for name in names if Path(name).name != name or not (folder / name).is_file()]
    if missing:
        raise UserError(*(f"{index}: names {name}, which is not in the folder; copy it again" for name in missing))
    return [folder / name for name in names]


class FolderTensors(Mapping[str, Tensor]):
    """The parameters of a folder by our names, each read when asked for: fp32, our orientation, padded."""

    def __init__(self, shape: TransformerConfig, places: dict[str, tuple[Path, str]]) -> None:
        self._shape = shape
        self._places = places  # our name -> (file, its name there)

    def __getitem__(self, name: str) -> Tensor:
        path, key = self._places[name]
        with safe_open(path, framework="pt") as file:
            tensor = file.get_tensor(key).float()
        if _is_transposed(self._shape, name):
            tensor = tensor.T.contiguous()
        if name == _EMBEDDING:
            tensor = torch.cat((tensor, tensor.new_zeros(self._shape.padded_vocab - len(tensor), tensor.shape[1])))
        return tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)


def read_tensors(folder: str | Path) -> FolderTensors:
    """The weights in a Hugging Face folder as a mapping that reads a tensor when asked for it.

    Names and sizes are checked here, before anything is read: parameters that are missing, unknown or of
    another size than config.json says are a `UserError` with a line each.
    """
    shape = read_shape(folder)
    expected = parameter_shapes(shape)
    places: dict[str, tuple[Path, str]] = {}
    problems = []
    head = None
    for path in weight_files(folder):
        for key, size, dtype in _read_header(path):
            name = key if key == _HEAD or key.startswith("transformer.") else f"transformer.{key}"
            if _MASKS.search(name):
                continue
            if name == _HEAD:
                head = (path, key)
                continue
            if name not in expected:
                problems.append(f"{path}: {key} is no parameter of such a model; check config.json")
                continue
            if size != (wanted := _size_in_folder(shape, name, expected[name])):
                problems.append(f"{path}: {key} is {size}, config.json makes it {wanted}; they must agree")
            if dtype not in ("F32", "F16", "BF16", "F64"):
                problems.append(f"{path}: {key} is of type {dtype}; give weights that are not quantised")
            places[name] = (path, key)
    problems += [f"{folder}: {name} is missing; give a whole model" for name in expected if name not in places]
    if problems:
        raise UserError(*problems)
    tensors = FolderTensors(shape, {name: places[name] for name in expected})
    if head is not None:
        with safe_open(head[0], framework="pt") as file:
            tied = torch.equal(file.get_tensor(head[1]).float(), tensors[_EMBEDDING][: shape.vocab_size])
        if not tied:
            raise UserError(f"{folder}: {_HEAD} is not the token embedding; only models with a tied head are read")
    return tensors


def write_folder(
    out: str | Path,
    shape: TransformerConfig,
    tensors: Iterable[tuple[str, Tensor]],
    tokenizer_folder: str | Path,
    dtype: str,
    *,
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Write a model that `AutoModelForCausalLM` and `AutoTokenizer` load: the folder appears whole or not at all.

    `tensors` are (name, whole tensor) in our naming, orientation and padding, in any order. `dtype` is one of
    `DTYPES`. More than `shard_bytes` of weights are cut into several files with an index. `UserError` where
    `out` is there already, the tokenizer has more tokens than the model, or a parameter is missing.
    """
    out = Path(out)
    if out.exists():
        raise UserError(f"{out}: is there already; remove it or choose another --out")
    tokenizer = load_tokenizer(tokenizer_folder)
    if tokenizer.vocab_size > shape.vocab_size:
        raise UserError(
            f"{tokenizer_folder}: has {tokenizer.vocab_size} tokens, the model only {shape.vocab_size}; "
            "give the tokenizer that the model was trained with"
        )
    with partial_folder(out) as work:
        made = work / "model"
        made.mkdir()
        _write_weights(made, shape, tensors, DTYPES[dtype], shard_bytes)
        for path in sorted(Path(tokenizer_folder).iterdir()):
            if path.is_file():
                shutil.copyfile(path, made / path.name)
        _write_json(made / "config.json", _config(shape, tokenizer, dtype))
        _write_json(made / "generation_config.json", _special_ids(tokenizer))
        publish(made, out)


def _is_transposed(shape: TransformerConfig, name: str) -> bool:
    return shape.architecture == "gpt2" and _CONV1D.search(name) is not None


def _size_in_folder(shape: TransformerConfig, name: str, size: tuple[int, ...]) -> tuple[int, ...]:
    if name == _EMBEDDING:
        return (shape.vocab_size, size[1])
    return size[::-1] if _is_transposed(shape, name) else size


def _read_header(path: Path) -> list[tuple[str, tuple[int, ...], str]]:
    """(name, size, dtype) of each tensor; reads no tensor."""
    try:
        with safe_open(path, framework="pt") as file:
            slices = {key: file.get_slice(key) for key in file.keys()}  # noqa: SIM118 (no mapping)
            return [(key, tuple(part.get_shape()), part.get_dtype()) for key, part in slices.items()]
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path}: is no whole safetensors file ({error}); copy it again") from None


def _write_weights(
    folder: Path,
    shape: TransformerConfig,
    tensors: Iterable[tuple[str, Tensor]],
    dtype: torch.dtype,
    shard_bytes: int,
) -> None:
    expected = parameter_shapes(shape)
    parts: list[list[str]] = []  # the names in each file
    total_bytes = 0
    for part in _cut(((name, _to_folder(shape, name, x, dtype)) for name, x in tensors), shard_bytes):
        save_file(part, folder / f"part-{len(parts)}", metadata={"format": "pt"})
        parts.append(list(part))
        total_bytes += sum(tensor.nbytes for tensor in part.values())
        part.clear()  # else it would stay in memory while the next one fills
    written = set(chain.from_iterable(parts))
    assert written <= expected.keys(), written - expected.keys()
    if missing := expected.keys() - written:
        raise UserError(*(f"model: {name} is missing among the weights" for name in sorted(missing)))
    if len(parts) == 1:
        (folder / "part-0").rename(folder / "model.safetensors")
        return
    weight_map = {}
    for number, names in enumerate(parts):
        file = f"model-{number + 1:05d}-of-{len(parts):05d}.safetensors"
        (folder / f"part-{number}").rename(folder / file)
        weight_map |= dict.fromkeys(names, file)
    index = {"metadata": {"total_size": total_bytes}, "weight_map": weight_map}
    _write_json(folder / "model.safetensors.index.json", index)


def _cut(tensors: Iterable[tuple[str, Tensor]], part_bytes: int) -> Iterator[dict[str, Tensor]]:
    """The tensors in groups of at most `part_bytes`, or of one that is larger."""
    part: dict[str, Tensor] = {}
    size = 0
    for name, tensor in tensors:
        if part and size + tensor.nbytes > part_bytes:
            yield part
            part, size = {}, 0
        part[name] = tensor
        size += tensor.nbytes
    if part:
        yield part


def _to_folder(shape: TransformerConfig, name: str, tensor: Tensor, dtype: torch.dtype) -> Tensor:
    if name == _EMBEDDING:
        tensor = tensor[: shape.vocab_size]
    elif _is_transposed(shape, name):
        tensor = tensor.T
    return tensor.to(dtype).contiguous()


def _special_ids(tokenizer: TextTokenizer) -> dict[str, int]:
    # A document begins where another ended, so EOS is also what a text starts from.
    ids = {"bos_token_id": tokenizer.eos_id, "eos_token_id": tokenizer.eos_id}
    return ids if tokenizer.pad_id is None else {**ids, "pad_token_id": tokenizer.pad_id}


def _config(shape: TransformerConfig, tokenizer: TextTokenizer, dtype: str) -> dict[str, Any]:
    common = {
        "activation_function": "gelu_new",
        "layer_norm_epsilon": shape.layer_norm_epsilon,
        "initializer_range": shape.init_std,
        "vocab_size": shape.vocab_size,
        "tie_word_embeddings": True,
        "use_cache": True,
        "dtype": dtype,
        **_special_ids(tokenizer),
    }
    if shape.architecture == "gpt2":
        return {
            "architectures": ["GPT2LMHeadModel"],
            "model_type": "gpt2",
            "n_layer": shape.num_layers,
            "n_embd": shape.hidden_size,
            "n_head": shape.num_heads,
            "n_inner": shape.intermediate_size,
            "n_positions": shape.max_positions,
            "embd_pdrop": shape.dropout,
            "attn_pdrop": shape.dropout,
            "resid_pdrop": shape.dropout,
            **common,
        }
    layers = list(shape.attention_layers)
    halves, odd = divmod(len(layers), 2)
    by_turns = not odd and layers == layers[:2] * halves
    return {
        "architectures": ["GPTNeoForCausalLM"],
        "model_type": "gpt_neo",
        "num_layers": shape.num_layers,
        "hidden_size": shape.hidden_size,
        "num_heads": shape.num_heads,
        "intermediate_size": shape.intermediate_size,
        "max_position_embeddings": shape.max_positions,
        "attention_types": [[layers[:2], halves]] if by_turns else [[layers, 1]],
        "attention_layers": layers,
        "window_size": shape.window_size,
        "embed_dropout": shape.dropout,
        "attention_dropout": shape.dropout,
        "resid_dropout": shape.dropout,
        **common,
    }


def _write_json(path: Path, values: dict[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
