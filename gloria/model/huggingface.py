"""To and from Hugging Face folders of our families: safetensors only, one tensor in memory at a time.

What differs here and there: the names of parameters (`Family.names`), GPT-2's linear weights, which transformers keeps
as (in, out) (its Conv1D), the rows that pad the vocabulary; some folders hold attention masks or frequencies, or leave
`transformer.` or `model.` out.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from gloria.data.tokenizer import load_tokenizer
from gloria.errors import UserError
from gloria.files import brief, partial_folder, publish, read_json_object
from gloria.model.config import EMBEDDING, HEAD, TransformerConfig, parameter_shapes, read_shape
from gloria.model.config_json import config_of_fields

SHARD_BYTES = 5_000_000_000  # as transformers cuts; also the most that writing holds in memory

# Buffers of old versions, no parameters.
_BUFFERS = re.compile(r"\.attn(\.attention)?\.(bias|masked_bias)$|\.rotary_emb\.inv_freq$")
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")


def weight_files(folder: str | Path) -> list[Path]:
    """The safetensors files of a Hugging Face folder of any family, whose headers have been checked.

    Call it before a library loads the folder: `UserError` for pickled weights, files that are no whole safetensors
    files, and an index that names anything but safetensors files of the folder itself.
    """
    folder = Path(folder)
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    files = [single]
    if not single.is_file():
        if not index.is_file():
            pickles = sorted({path.name for pattern in _PICKLES for path in folder.glob(pattern)})
            if pickles:
                raise UserError(
                    f"{folder}: has only pickled weights ({pickles[0]}), which can run code when read; "
                    "have them converted to safetensors (transformers: save_pretrained)"
                )
            raise UserError(f"{folder}: has no model.safetensors; give the folder of a whole model")
        weight_map = read_json_object(index, "copy the folder again").get("weight_map")
        names = set(map(str, weight_map.values())) if isinstance(weight_map, dict) else set()
        if not names:
            raise UserError(f"{index}: has no weight_map; copy the folder again")
        files = [folder / name for name in sorted(names)]
        wrong = [
            f"{index}: names {name[:100]}, which is no safetensors file of the folder; copy the folder again"
            for name in sorted(names)
            if Path(name).name != name or not name.endswith(".safetensors") or not (folder / name).is_file()
        ]
        if wrong:
            raise UserError(*wrong)
    for path in files:
        _read_header(path)
    return files


class FolderTensors(Mapping[str, Tensor]):
    """The parameters of a folder by our names, each read on access: fp32, our orientation, padded.

    Where `shape` has more tokens than the folder, their rows are the mean of its own (Hewitt 2021).
    """

    def __init__(self, shape: TransformerConfig, places: dict[str, tuple[Path, str]]) -> None:
        self._shape = shape
        self._places = places  # our name -> (file, its name there)

    def __getitem__(self, name: str) -> Tensor:
        path, key = self._places[name]
        with safe_open(path, framework="pt") as file:
            tensor = file.get_tensor(key).float()
        if _is_transposed(self._shape, name):
            tensor = tensor.T.contiguous()
        if name in (EMBEDDING, HEAD):
            new = tensor.mean(dim=0).expand(self._shape.vocab_size - len(tensor), -1)
            padding = tensor.new_zeros(self._shape.padded_vocab - self._shape.vocab_size, tensor.shape[1])
            tensor = torch.cat((tensor, new, padding))
        return tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)


def read_tensors(folder: str | Path, vocab_size: int | None = None) -> FolderTensors:
    """The weights in a Hugging Face folder as a mapping that reads a tensor on access; for `vocab_size` tokens or more.

    Names and sizes are checked here, before anything is read: parameters that are missing, unknown, given twice or
    of another size than config.json says are a `UserError` with a line each.
    """
    shape = read_shape(folder)
    expected = parameter_shapes(shape)
    ours = {shape.family.folder_name(name): name for name in (*expected, HEAD)}
    body = shape.family.folder_name(EMBEDDING).partition(".")[0]
    places: dict[str, tuple[Path, str]] = {}
    problems = []
    for path in weight_files(folder):
        for key, size, dtype in _read_header(path):
            if _BUFFERS.search(key):
                continue
            name = ours.get(key) or ours.get(f"{body}.{key}") or key
            if name in places:
                problems.append(f"{path}: {key} is given twice; copy the folder again")
            places[name] = (path, key)
            if name == HEAD and shape.tied_head:
                continue
            if name not in expected:
                problems.append(f"{path}: {key} is no parameter of such a model; check config.json")
            elif size != (needed := _size_in_folder(shape, name, expected[name])):
                problems.append(f"{path}: {key} is {size}, config.json makes it {needed}; they must agree")
            if dtype not in ("F32", "F16", "BF16", "F64"):
                problems.append(f"{path}: {key} is of type {dtype}; give weights that are not quantised")
    problems += [
        f"{folder}: {key} is missing; give a whole model"
        for key, name in ours.items()
        if name in expected and name not in places
    ]
    if problems:
        raise UserError(*problems)
    if HEAD in places and shape.tied_head:
        path, key = places[HEAD]
        tensors = FolderTensors(shape, places)
        with safe_open(path, framework="pt") as file:
            tied = torch.equal(file.get_tensor(key).float(), tensors[EMBEDDING][: shape.vocab_size])
        if not tied:
            raise UserError(f"{folder}: {HEAD} is not the token embedding, to which config.json ties it; correct it")
    grown = replace(shape, vocab_size=max(shape.vocab_size, vocab_size or 0))
    return FolderTensors(grown, {name: places[name] for name in expected})


def write_folder(
    out: str | Path,
    shape: TransformerConfig,
    tensors: Iterable[tuple[str, Tensor]],
    tokenizer_folder: str | Path,
    dtype: str,
    *,
    about: Mapping[str, str] | None = None,
    texts: Mapping[str, str] | None = None,
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Write a model that `AutoModelForCausalLM` and `AutoTokenizer` load: the folder appears whole or not at all.

    `tensors` are (name, whole tensor) in our naming, orientation and padding, in any order. `dtype` is "float32" or
    "bfloat16". `about` is added to the metadata of the weights' files, `texts` are more files by name. More than
    `shard_bytes` of weights are cut into several files with an index. `UserError` where `out`
    exists already, the tokenizer has more tokens than the model, a parameter is missing or a value is not finite.
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
    # A document begins where another ended, so EOS is also what a text starts from.
    ids = {"bos_token_id": tokenizer.eos_id, "eos_token_id": tokenizer.eos_id}
    if tokenizer.pad_id is not None:
        ids["pad_token_id"] = tokenizer.pad_id
    with partial_folder(out) as work:
        made = work / "model"
        made.mkdir()
        _write_weights(made, shape, tensors, getattr(torch, dtype), shard_bytes, {"format": "pt", **(about or {})})
        for path in sorted(Path(tokenizer_folder).iterdir()):
            if path.is_file():
                shutil.copyfile(path, made / path.name)
        for name, text in (texts or {}).items():
            if not (made / name).exists():  # it came with the tokenizer, so somebody wrote it
                (made / name).write_text(text, encoding="utf-8")
        _limit_length(made / "tokenizer_config.json", shape.max_positions)
        _write_json(made / "config.json", {**config_of_fields(shape.to_dict()), "dtype": dtype, **ids})
        _write_json(made / "generation_config.json", ids)
        publish(made, out)


def _is_transposed(shape: TransformerConfig, name: str) -> bool:
    return re.search(shape.family.transposed, name) is not None


def _size_in_folder(shape: TransformerConfig, name: str, size: tuple[int, ...]) -> tuple[int, ...]:
    if name in (EMBEDDING, HEAD):
        return (shape.vocab_size, size[1])
    return size[::-1] if _is_transposed(shape, name) else size


def _read_header(path: Path) -> list[tuple[str, tuple[int, ...], str]]:
    """(name, size, dtype) of each tensor; reads no tensor."""
    try:
        with safe_open(path, framework="pt") as file:
            slices = {key: file.get_slice(key) for key in file.keys()}  # noqa: SIM118 (no mapping)
            return [(key, tuple(part.get_shape()), part.get_dtype()) for key, part in slices.items()]
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path}: is no whole safetensors file ({brief(error)}); copy it again") from None


def _write_weights(
    folder: Path,
    shape: TransformerConfig,
    tensors: Iterable[tuple[str, Tensor]],
    dtype: torch.dtype,
    shard_bytes: int,
    metadata: dict[str, str],
) -> None:
    expected = {shape.family.folder_name(name) for name in parameter_shapes(shape)}
    parts: list[list[str]] = []  # the names in each file
    total_bytes = 0
    renamed = shape.family.folder_name
    for part in _cut(((renamed(name), _to_folder(shape, name, x, dtype)) for name, x in tensors), shard_bytes):
        save_file(part, folder / f"part-{len(parts)}", metadata=metadata)
        parts.append(list(part))
        total_bytes += sum(tensor.nbytes for tensor in part.values())
        part.clear()  # else it would stay in memory while the next one fills
    written = set(chain.from_iterable(parts))
    assert written <= expected, written - expected
    if missing := expected - written:
        raise UserError(*(f"model: {name} is missing among the weights" for name in sorted(missing)))
    if len(parts) == 1:
        (folder / "part-0").rename(folder / "model.safetensors")
        return
    weight_map: dict[str, str] = {}
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
    if not tensor.isfinite().all():
        raise UserError(
            f"model: {name} holds NaN or infinity, so the model is of no use; go back to an earlier checkpoint (--step)"
        )
    if name in (EMBEDDING, HEAD):
        tensor = tensor[: shape.vocab_size]
    elif _is_transposed(shape, name):
        tensor = tensor.T
    return tensor.to(dtype).contiguous()


def _limit_length(path: Path, positions: int) -> None:
    """A tokenizer that knows no limit would let transformers' pipelines go beyond the model's positions."""
    values = read_json_object(path, "save the tokenizer again") if path.exists() else {}
    limit = values.get("model_max_length")
    values["model_max_length"] = min(limit, positions) if isinstance(limit, int | float) else positions
    _write_json(path, values)


def _write_json(path: Path, values: dict[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
