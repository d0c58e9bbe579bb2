"""How fast is the loader? Its tokens/s against the bare numpy gather of the same windows, and what a plan costs.

    python bench/loader.py [--seconds 3] [--rounds 3]

Three sources (.6, .3, .1) of 200 M uint16 tokens in all, windows of 512 + 1, batches of 8, from the page cache. The
bare gather copies slice by slice into a fresh array a batch, and its windows are known beforehand; the loader plans
them, reads them ahead in its thread and hands out the same batches. The rounds alternate, so that both have the same
machine; where others use it too, the ratio per second of processor time (of all threads) says more. Prints one JSON
object a line.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from gloria.data.loader import Loader
from gloria.data.mixture import new_mixture
from gloria.data.stages import plan_period
from gloria.data.stream import TokenStream
from gloria.data.weights import Source
from gloria.errors import run_command

LENGTH, BATCH = 512, 8
TOKENS = {"large": 120_000_000, "middle": 60_000_000, "small": 20_000_000}
WEIGHTS = {"large": 0.6, "middle": 0.3, "small": 0.1}
STEPS = 8192  # of the bare gather's list of windows


def main(argv: list[str] | None = None) -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=3.0, help="of each measurement")
    parser.add_argument("--rounds", type=int, default=3, help="of both measurements, in turn")
    options = parser.parse_args(argv)
    with tempfile.TemporaryDirectory(prefix="bench-loader-") as folder:
        streams = write_streams(Path(folder))
        sources = {name: Source(stream.num_tokens, "bench") for name, stream in streams.items()}
        mixture = new_mixture(1, LENGTH, sources, WEIGHTS, global_batch=BATCH)
        for number in range(1, options.rounds + 1):
            bare = rate(bare_gather(streams, mixture), options.seconds)
            with Loader(streams, new_mixture(1, LENGTH, sources, WEIGHTS, global_batch=BATCH)) as loader:
                ours = rate(lambda loader=loader: next(loader), options.seconds)
            line = {
                "round": number,
                "bare_tokens_per_s": round(bare[0]),
                "loader_tokens_per_s": round(ours[0]),
                "ratio": round(ours[0] / bare[0], 2),
                "ratio_per_cpu_second": round(ours[1] / bare[1], 2),
            }
            print(json.dumps(line), flush=True)
    for count, tokens in ((3, 2 * 10**8), (1000, 10**13)):
        print(json.dumps(plan_cost(count, tokens)), flush=True)
    return 0


def write_streams(folder: Path) -> dict[str, TokenStream]:
    """Sources of random tokens in files, mapped as shards are, every page touched once."""
    random = np.random.default_rng(0)
    streams = {}
    for name, tokens in TOKENS.items():
        random.integers(0, 16384, tokens, dtype=np.uint16).tofile(folder / name)
        mapped = np.memmap(folder / name, dtype=np.uint16, mode="r").view(np.ndarray)
        mapped[::2048].sum()
        streams[name] = TokenStream([mapped], "bench", 16384, [name])
    return streams


def bare_gather(streams: dict[str, TokenStream], mixture) -> Callable[[], np.ndarray]:
    """The floor: one slice a window, from a list of windows made beforehand."""
    planned = mixture.plan(0, STEPS * BATCH)
    shards = [streams[name].shards[0] for name in mixture.names]
    source, start = planned.source.tolist(), (planned.window * LENGTH).tolist()
    place = 0

    def next_batch() -> np.ndarray:
        nonlocal place
        out = np.empty((BATCH, LENGTH + 1), np.uint16)
        for row in range(BATCH):
            begin = start[place + row]
            out[row] = shards[source[place + row]][begin : begin + LENGTH + 1]
        place = (place + BATCH) % (STEPS * BATCH)
        return out

    return next_batch


def rate(next_batch: Callable[[], object], seconds: float) -> tuple[float, float]:
    """Tokens a second and tokens a second of processor time (of all threads), after a tenth of the time to warm up."""
    end = time.perf_counter() + seconds / 10
    while time.perf_counter() < end:
        next_batch()
    batches, start, processor = 0, time.perf_counter(), time.process_time()
    while (now := time.perf_counter()) < start + seconds:
        for _ in range(64):
            next_batch()
        batches += 64
    tokens = batches * BATCH * LENGTH
    return tokens / (now - start), tokens / (time.process_time() - processor)


def plan_cost(count: int, tokens: int) -> dict[str, float | int]:
    """Nanoseconds a sample to plan periods at the beginning and at sample 10^15, and the size of the state."""
    sources = {f"source-{number:04}": Source(tokens // count, f"{number:032x}") for number in range(count)}
    weights = {name: 1 / (number + 1) for number, name in enumerate(sources)}
    mixture = new_mixture(1, LENGTH, sources, weights, global_batch=BATCH)
    stage = mixture.stages[-1]
    cost = {}
    for label, first in (("beginning", 0), ("at_1e15", 10**15 // stage.period)):
        times = []
        for number in range(first, first + 8):
            start = time.perf_counter()
            plan_period(mixture.seed, stage, number)
            times.append(time.perf_counter() - start)
        cost[f"plan_ns_per_sample_{label}"] = round(min(times) / stage.period * 1e9, 1)
    return {
        "sources": count,
        "tokens": tokens,
        **cost,
        "state_bytes": len(json.dumps(mixture.state_dict())),
    }


if __name__ == "__main__":
    raise SystemExit(run_command(main))
