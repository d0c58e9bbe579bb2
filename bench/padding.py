"""One epoch of fine-tuning on ASSIN-2, its batches by length and padded to their longest row, or to a fixed length.

    python bench/padding.py [--data folder-of-assin2] [--rows 6500] [--length 128]

The same model (GPT-Neo of random weights), rows, batch size and optimizer. The two are timed in turns, a slice of
the epoch each, so that what else the machine does falls on both. Without --data the rows are those of the sample that
comes with gloria, over and over.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from time import perf_counter

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from gloria.data.tokenizer import TokenizerConfig, load_tokenizer, train_tokenizer
from gloria.model.config import PRESETS
from gloria.tasks.catalog import find_task
from gloria.tasks.models.backbones import Backbone
from gloria.tasks.models.backbones import load_tokenizer as load_transformers_tokenizer
from gloria.tasks.models.encode import Row, collate, encode_pairs, epoch_batches
from gloria.tasks.models.finetuned import task_heads
from gloria.tasks.models.heads import TaskModel, initialise_heads, row_losses
from gloria.tasks.samples import sample_folder
from tests.tiny_models import build_model

SHAPE = replace(PRESETS["gpt-neo-125m"], num_layers=4, hidden_size=192, num_heads=6, intermediate_size=768)
SHAPE = replace(SHAPE, max_positions=512, attention_layers=("global", "local") * 2)


def build(vocab_size: int) -> TaskModel:
    """A fresh model with ASSIN-2's two heads."""
    shape = replace(SHAPE, vocab_size=vocab_size)
    body = build_model(shape)
    heads = task_heads(find_task("assin2"))
    model = TaskModel(Backbone(body, causal=True, hidden_size=192, token_types=False), heads, dropout=0.1)
    initialise_heads(model, 0, 3.0)
    return model.train()


def pad_to(batch: dict[str, Tensor], length: int) -> dict[str, Tensor]:
    """Every tensor by token at a fixed length."""
    return {
        name: torch.nn.functional.pad(tensor, (0, length - tensor.shape[1])) if tensor.dim() == 2 else tensor
        for name, tensor in batch.items()
    }


def take_steps(
    model: TaskModel, optimizer: torch.optim.Optimizer, rows: list[Row], batches: list[list[int]], fixed: int
) -> float:
    """Seconds that the steps of some batches take, padded to `fixed` tokens, or where that is 0 to the longest row."""
    started = perf_counter()
    for numbers in batches:
        batch = collate([rows[number] for number in numbers], 0, torch.device("cpu"), model.heads)
        batch = pad_to(batch, fixed) if fixed else batch
        row_losses(model(batch), batch).mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, help="folder with assin2-train-only.xml; default: gloria's sample")
    parser.add_argument("--rows", type=int, default=640, help="rows of an epoch (ASSIN-2 has 6,500)")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--length", type=int, default=128, help="the fixed length")
    parser.add_argument("--slice", type=int, default=8, help="steps in a turn")
    arguments = parser.parse_args()
    task = find_task("assin2")
    pairs = task.read(arguments.data or sample_folder(task), "train")
    pairs = (pairs * (arguments.rows // len(pairs) + 1))[: arguments.rows]
    with tempfile.TemporaryDirectory() as folder:
        texts = [text for pair in pairs for text in (pair.first, pair.second)]
        train_tokenizer(TokenizerConfig(vocab_size=4096 if arguments.data else 700), texts, folder)
        vocab_size = load_tokenizer(folder).vocab_size
        rows = encode_pairs(task, pairs, load_transformers_tokenizer(folder), arguments.length).rows
    lengths = [len(row.ids) for row in rows]
    by_length = epoch_batches(lengths, arguments.batch, 0, 0)
    any_order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(0)).tolist()
    shuffled = [any_order[at : at + arguments.batch] for at in range(0, len(rows), arguments.batch)]
    ways = {"longest": (by_length, 0), f"fixed {arguments.length}": (shuffled, arguments.length)}
    models = {way: build(vocab_size) for way in ways}
    optimizers = {way: torch.optim.AdamW(model.parameters(), 1e-4, fused=True) for way, model in models.items()}
    seconds = dict.fromkeys(ways, 0.0)
    for way, (batches, fixed) in ways.items():  # the first step of a model is slower
        take_steps(models[way], optimizers[way], rows, batches[:1], fixed)
    for at in range(0, len(by_length), arguments.slice):
        for way, (batches, fixed) in ways.items():
            part = batches[at : at + arguments.slice]
            seconds[way] += take_steps(models[way], optimizers[way], rows, part, fixed)
    computed = {"longest": sum(max(lengths[n] for n in batch) * len(batch) for batch in by_length)}
    computed[f"fixed {arguments.length}"] = len(rows) * arguments.length
    print(
        f"{len(rows)} pairs of {sum(lengths) / len(rows):.1f} tokens (longest {max(lengths)}), batches of "
        f"{arguments.batch}, GPT-Neo 4 x 192, {torch.get_num_threads()} threads"
    )
    print(f"{'padded to':<12}{'seconds':>9}{'tokens/s':>10}{'padding':>9}")
    for way in ways:
        padding = 1 - sum(lengths) / computed[way]
        print(f"{way:<12}{seconds[way]:>9.1f}{sum(lengths) / seconds[way]:>10.0f}{padding:>9.1%}")
    longest, fixed = seconds.values()
    print(f"batches by length are {fixed / longest:.2f} times as fast")


if __name__ == "__main__":
    main()
