"""An exported folder against the checkpoint that it was made from."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors import safe_open

from gloria.data.tokenizer import tokenizer_fingerprint
from gloria.dist.checkpoint_read import read_full_tensors
from gloria.errors import UserError
from gloria.files import read_json_object
from gloria.model.config import EMBEDDING, HEAD, TransformerConfig, read_shape
from gloria.model.huggingface import read_tensors, weight_files
from gloria.record.findings import Finding, conclude
from gloria.record.history import History, Saved

STEP, LAUNCH = "gloria.step", "gloria.launch"  # metadata of an exported safetensors file


def check_export(export: Path, history: History) -> Iterator[Finding]:
    """The folder's weights are those of the checkpoint that it names, in its precision; its tokenizer is the run's."""
    try:
        problems, what = _compare(export, history)
    except UserError as error:
        problems, what = list(error.problems), ""
    yield from conclude("export", problems, what)


def exported_from(export: Path) -> tuple[int | None, str]:
    """The step and the launch that the weights of a folder were exported from, by their files' metadata."""
    found = set()
    for path in weight_files(export):
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
        step = metadata.get(STEP, "")
        found.add((int(step) if step.isdecimal() else None, metadata.get(LAUNCH, "")))
    if len(found) != 1:
        raise UserError(f"{export}: its weights' files are of different exports")
    return found.pop()


def _compare(export: Path, history: History) -> tuple[list[str], str]:
    step, launch = exported_from(export)
    by_step = {saved.step: saved for saved in history.saved}
    if not by_step:
        return [f"{export}: the run has no checkpoint to compare it with"], ""
    if step is None:
        step = history.steps  # an older version did not record it
    elif step not in by_step:
        return [f"{export}: is of step {step}, whose checkpoint is not here any more"], ""
    saved = by_step[step]
    if launch not in ("", saved.launch):
        return [
            f"{export}: was exported from a checkpoint of launch {launch}, step {step} here is of {saved.launch}"
        ], ""
    found = tokenizer_fingerprint(export)
    if found != history.mixture.tokenizer:
        return [f"{export}: its tokenizer is {found}, the run's {history.mixture.tokenizer}"], ""
    shape = TransformerConfig.from_dict(dict(saved.state["model"]))
    if (there := read_shape(export).to_dict()) != shape.to_dict():
        keys = [key for key, value in shape.to_dict().items() if there.get(key) != value]
        return [f"{export}: its config.json has another {', '.join(keys)} than the checkpoint"], ""
    dtype = str(read_json_object(export / "config.json", "export it again").get("dtype", "float32"))
    different = list(_different(export, saved, shape.vocab_size, getattr(torch, dtype)))
    problems = [f"{export}: {name} is not that of step {step}" for name in different]
    return problems, f"{export}: every weight is that of step {step:,} in {dtype}"


def _different(export: Path, saved: Saved, vocab_size: int, dtype: torch.dtype) -> Iterator[str]:
    """The names of the tensors that differ; one tensor of each side is in memory at a time."""
    there = read_tensors(export)
    for name, tensor in read_full_tensors(saved.path, "model."):
        rows = vocab_size if name in (EMBEDDING, HEAD) else len(tensor)  # the others pad the vocabulary
        if name not in there or not torch.equal(there[name][:rows], tensor[:rows].to(dtype).float()):
            yield name
