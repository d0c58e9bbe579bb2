"""Our loader beside those of others, on the same tokens.

    pip install --no-deps litdata lightning-utilities && python bench/loader_peers.py

Three sources (.6, .3, .1) of 20 M uint16 tokens in all, windows of 512 + 1, batches of 8, from the page cache:

    gloria     the loader, with its thread
    torch      a map-style dataset over numpy.memmap, windows drawn beforehand, DataLoader with 0 and 2 workers
    litdata    CombinedStreamingDataset over TokensLoader, StreamingDataLoader with 0 and 2 workers
    megatron   BlendedDataset over GPTDataset, DataLoader with 0 workers, masks and position ids off where it can

Tokens a second of processor time, of this process and its workers, so a busy machine counts little. What is not
installed is named and left out.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from gloria.data.loader import Loader
from gloria.data.mixture import new_mixture
from gloria.data.stream import TokenStream
from gloria.data.weights import Source

LENGTH, BATCH = 512, 8
TOKENS = {"large": 12_000_000, "middle": 6_000_000, "small": 2_000_000}
WEIGHTS = {"large": 0.6, "middle": 0.3, "small": 0.1}


def gloria(folder: Path, workers: int) -> Iterator[Any]:
    mapped = {name: np.memmap(folder / f"{name}.bin", dtype=np.uint16, mode="r").view(np.ndarray) for name in TOKENS}
    streams = {name: TokenStream([tokens], "bench", 16384, [name]) for name, tokens in mapped.items()}
    sources = {name: Source(count, "bench") for name, count in TOKENS.items()}
    with Loader(streams, new_mixture(1, LENGTH, sources, WEIGHTS, global_batch=BATCH)) as loader:
        while True:
            yield next(loader)


def torch_memmap(folder: Path, workers: int) -> Iterator[Any]:
    import torch
    from torch.utils.data import DataLoader, Dataset

    random = np.random.default_rng(0)
    count = 2_000_000
    source = random.choice(len(TOKENS), count, p=list(WEIGHTS.values()))
    window = random.integers(0, (np.array(list(TOKENS.values())) // LENGTH - 1)[source])

    class Windows(Dataset):
        def __init__(self) -> None:
            self.tokens = [np.memmap(folder / f"{name}.bin", dtype=np.uint16, mode="r") for name in TOKENS]

        def __len__(self) -> int:
            return count

        def __getitem__(self, index: int) -> Any:
            start = window[index] * LENGTH
            return torch.from_numpy(self.tokens[source[index]][start : start + LENGTH + 1].astype(np.int64))

    yield from DataLoader(Windows(), batch_size=BATCH, num_workers=workers)


def litdata(folder: Path, workers: int) -> Iterator[Any]:
    from litdata import CombinedStreamingDataset, StreamingDataLoader, StreamingDataset, TokensLoader
    from litdata.streaming.writer import BinaryWriter

    parts = []
    for name in TOKENS:
        out = folder / f"litdata-{name}"
        if not out.exists():
            tokens = np.fromfile(folder / f"{name}.bin", np.uint16)
            writer = BinaryWriter(str(out), chunk_bytes="64MB", item_loader=TokensLoader(block_size=LENGTH + 1))
            for number, start in enumerate(range(0, len(tokens) - LENGTH, LENGTH + 1)):
                writer[number] = tokens[start : start + LENGTH + 1]
            writer.done()
            writer.merge()
        loader = TokensLoader(block_size=LENGTH + 1)
        parts.append(StreamingDataset(str(out), item_loader=loader, shuffle=True, drop_last=True))
    mixed = CombinedStreamingDataset(parts, weights=list(WEIGHTS.values()), iterate_over_all=False, seed=1)
    while True:
        yield from StreamingDataLoader(mixed, batch_size=BATCH, num_workers=workers)


def megatron(folder: Path, workers: int) -> Iterator[Any]:
    import torch
    from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
    from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder
    from torch.utils.data import DataLoader

    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=0, world_size=1)
    for name in TOKENS:
        if not (folder / f"megatron-{name}.idx").exists():
            builder = IndexedDatasetBuilder(str(folder / f"megatron-{name}.bin"), dtype=np.uint16)
            for document in np.array_split(np.fromfile(folder / f"{name}.bin", np.uint16), 1000):
                builder.add_document(torch.from_numpy(document.astype(np.int32)), [len(document)])
            builder.finalize(str(folder / f"megatron-{name}.idx"))
    config = GPTDatasetConfig(
        random_seed=1,
        sequence_length=LENGTH,
        blend=([str(folder / f"megatron-{name}") for name in TOKENS], list(WEIGHTS.values())),
        split="1,0,0",
        path_to_cache=str(folder / "cache"),
        tokenizer=SimpleNamespace(eod=0, pad=1, vocab_size=16384, unique_identifiers={"bench": 1}),
        reset_position_ids=False,
        reset_attention_mask=False,
        eod_mask_loss=False,
        create_attention_mask=False,
    )
    built = BlendedMegatronDatasetBuilder(GPTDataset, [500_000, 0, 0], lambda: True, config).build()
    yield from DataLoader(built[0], batch_size=BATCH, num_workers=workers)


def rate(batches: Iterator[Any], seconds: float) -> tuple[float, float]:
    """Tokens a second, by the clock and by processor time; the first 50 batches are not counted."""
    for _ in range(50):
        next(batches)
    processor, start, count = processor_seconds(), time.perf_counter(), 0
    while (now := time.perf_counter()) < start + seconds:
        for _ in range(8):
            next(batches)
        count += 8
    tokens = count * BATCH * LENGTH
    return tokens / (now - start), tokens / (processor_seconds() - processor)


def processor_seconds() -> float:
    """Of this process and of its children, also of those that are still at work."""
    total = time.process_time() + resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime
    for child in Path(f"/proc/self/task/{os.getpid()}/children").read_text().split():
        fields = Path(f"/proc/{child}/stat").read_text().rpartition(")")[2].split()
        total += (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
    return total


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=3.0, help="of each measurement")
    parser.add_argument("--rounds", type=int, default=2)
    options = parser.parse_args()
    loaders: list[tuple[str, Callable[[Path, int], Iterator[Any]], int]] = [
        ("gloria", gloria, 0),
        ("torch", torch_memmap, 0),
        ("torch", torch_memmap, 2),
        ("litdata", litdata, 0),
        ("litdata", litdata, 2),
        ("megatron", megatron, 0),
    ]
    with tempfile.TemporaryDirectory(prefix="bench-loader-") as name:
        folder = Path(name)
        random = np.random.default_rng(0)
        for source, tokens in TOKENS.items():
            random.integers(2, 16384, tokens, dtype=np.uint16).tofile(folder / f"{source}.bin")
        first: dict[int, float] = {}
        for number in range(1, options.rounds + 1):
            for label, make, workers in loaders:
                if label == "megatron" and number > 1:
                    continue  # its process group is made once
                try:
                    batches = make(folder, workers)
                    clock, processor = rate(batches, options.seconds)
                except ImportError as error:
                    print(f"{label}: left out, not installed ({error})", flush=True)
                    continue
                batches.close()  # type: ignore[attr-defined]  # generators
                first.setdefault(number, processor)
                line = {"round": number, "loader": label, "workers": workers, "tokens_per_s": round(clock)}
                line |= {
                    "tokens_per_cpu_s": round(processor),
                    "gloria_is_faster_by": round(first[number] / processor, 1),
                }
                print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()
