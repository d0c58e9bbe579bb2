"""CPU training beside transformers': a GPT-Neo of 28 M parameters at T = 1024, fp32, and what the cores could give.

    python bench/train.py [--rounds 2] [--steps 3] [--corpus data/sample]

Ours is the loop of `gloria.pretrain` with everything it does; transformers' is the Trainer where accelerate is
installed, else a plain loop with nothing around it. The rounds alternate in processes of their own; a product of two
matrices of 1024 x 1024 says what this machine gives at most.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from bench.gpu_parts import PASSES, opened, timed_steps
from bench.gpu_peer import network_of, peer_seconds
from gloria.model.config import ModelSection, flops_per_token, resolve_shape

LENGTH = 1024
SIZES = {"preset": "gpt-neo-125m", "num_layers": 8, "hidden_size": 512, "num_heads": 8, "vocab_size": 2304}


def seconds_of(who: str, steps: int, corpus: str) -> float:
    """Seconds a step of `PASSES` windows, in this process."""
    if who == "gloria":
        recipe = {f"model.{key}": value for key, value in SIZES.items()} | {"model.max_positions": 2048}
        with opened(recipe, LENGTH, 1, corpus) as run:
            return timed_steps(run, steps)
    shape = resolve_shape(ModelSection(**SIZES), vocab_size=2304, sequence_length=LENGTH)
    return peer_seconds(network_of(shape, "eager"), shape.vocab_size, LENGTH, 1, steps)[0]


def gemm_rate() -> float:
    """FLOP/s of a product of two matrices, the best of ten."""
    left, right = torch.randn(1024, 1024), torch.randn(1024, 1024)
    best = 1e9
    for _ in range(10):
        start = time.perf_counter()
        left @ right
        best = min(best, time.perf_counter() - start)
    return 2 * 1024**3 / best


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--corpus", default="data/sample")
    parser.add_argument("--only", choices=("gloria", "transformers"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.only:
        print(json.dumps(seconds_of(options.only, options.steps, options.corpus)))
        return 0
    found: dict[str, list[float]] = {"gloria": [], "transformers": []}
    for _ in range(options.rounds):
        for who, seconds in found.items():
            command = [sys.executable, __file__, "--only", who, "--steps", str(options.steps)]
            command += ["--corpus", options.corpus]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            seconds.append(json.loads(done.stdout.splitlines()[-1]))
    shape = resolve_shape(ModelSection(**SIZES), vocab_size=2304, sequence_length=LENGTH)
    rate = gemm_rate()
    print(f"{torch.get_num_threads()} threads; a product of matrices: {rate / 1e12:.3f} TFLOP/s")
    for who, seconds in found.items():
        speed = PASSES * LENGTH / statistics.median(seconds)
        share = speed * flops_per_token(shape, LENGTH) / rate
        print(f"{who:14}{speed:8.0f} tokens/s, {100 * share:5.1f} % of the product's rate; rounds {seconds}")
    print(f"gloria / transformers: {statistics.median(found['transformers']) / statistics.median(found['gloria']):.2f}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
