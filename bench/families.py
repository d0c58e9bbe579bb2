"""GPT-Neo or Llama, AdamW or Muon: what each makes of the same tokens in the same order.

    python bench/families.py --text '/path/*/*.jsonl' --folder runs/families [--tokens 2_000_000] [--seeds 3] [--jobs 2]

A source for each file, weighted by the root of its size. Models of about 5 M parameters; each pair of family and
optimizer takes the best of three learning rates by seed 0, and then the other seeds. Prints validation bits per byte by
source, mean and spread over the seeds, the tokens a pair takes to reach the final loss of GPT-Neo with AdamW, and the
seconds of a step. A run that is done is not run again, so that the command can be stopped and started.
"""

from __future__ import annotations

import argparse
import glob
import math
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from tests.launch import metrics

ROOT = Path(__file__).resolve().parent.parent
LENGTH, BATCH = 256, 16
COMMON = {"num_layers": 5, "hidden_size": 256, "num_heads": 4, "max_positions": LENGTH}
FAMILIES = {
    "gpt-neo": {"preset": "gpt-neo-125m", "window_size": 128},
    # As many parameters: SwiGLU has three matrices where GELU has two.
    "llama": {"preset": "smollm-135m", "num_kv_heads": 4, "intermediate_size": 683},
}
OPTIMIZERS = ("adamw", "muon")
RATES = (1e-3, 2e-3, 4e-3)


def prepare(pattern: str, folder: Path, vocab_size: int) -> Path:
    """The corpus of all files, made once."""
    files = [Path(name) for name in sorted(glob.glob(pattern))]
    assert files, f"{pattern}: no such files"
    lines = [f'out = "{folder}/corpus"', "[tokenizer]", f"vocab_size = {vocab_size}"]
    for file in files:
        weight = math.sqrt(file.stat().st_size)
        lines += ["[[source]]", f'name = "{file.stem}"', f'paths = ["{file.resolve()}"]', f"weight = {weight:.0f}"]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "corpus.toml").write_text("\n".join(lines))
    if not (folder / "corpus/manifest.json").exists():
        subprocess.run([sys.executable, "-m", "gloria.prepare", str(folder / "corpus.toml")], cwd=ROOT, check=True)
    return folder / "corpus"


def train(folder: Path, steps: int, family: str, optimizer: str, rate: float, seed: int) -> Path:
    """One run, or what is left of it; its folder."""
    run = folder / f"{family}-{optimizer}-{rate:g}-{seed}"
    recipe: dict[str, Any] = {f"model.{key}": value for key, value in {**COMMON, **FAMILIES[family]}.items()}
    recipe |= {"run.dir": run, "run.seed": seed, "data.corpus": folder / "corpus"}
    recipe |= {"train.steps": steps, "train.global_batch": BATCH, "train.sequence_length": LENGTH}
    recipe |= {"optim.name": optimizer, "optim.lr": rate, "optim.weight_decay": 0.1}
    recipe |= {"schedule.warmup_steps": steps // 20, "schedule.min_ratio": 0.1}
    recipe |= {
        "log.every": max(1, steps // 100),
        "valid.every": max(1, steps // 20),
        "valid.windows": 32,
        "checkpoint.every": steps,
    }
    recipe |= {"log.tensorboard": "false"}
    flags = [f"--{key}={value}" for key, value in recipe.items()]
    command = [sys.executable, "-m", "gloria.pretrain", "--config", "launch/demo.toml", *flags]
    subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    return run


def tokens_to(run: Path, loss: float) -> float | None:
    """Tokens until validation first has a loss as low, between two validations by a straight line."""
    lines = metrics(run, "valid")
    for before, after in pairwise(lines):
        if after["loss"] <= loss:
            share = (before["loss"] - loss) / (before["loss"] - after["loss"])
            return (before["step"] + share * (after["step"] - before["step"])) * BATCH * LENGTH
    return None


def spread(values: list[float]) -> str:
    return f"{statistics.mean(values):.3f} +- {statistics.stdev(values) if len(values) > 1 else 0:.3f}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", required=True, help="glob of .jsonl files, a source each")
    parser.add_argument("--folder", type=Path, required=True, help="where corpus and runs stay")
    parser.add_argument("--tokens", type=int, default=2_000_000, help="of each run")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--vocab-size", type=int, default=4096)
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time")
    asked = parser.parse_args()
    folder = asked.folder.resolve()
    prepare(asked.text, folder, asked.vocab_size)
    steps = asked.tokens // (BATCH * LENGTH)
    pairs = [(family, optimizer) for family in FAMILIES for optimizer in OPTIMIZERS]
    with ThreadPoolExecutor(asked.jobs) as pool:
        tries = {(*pair, rate): pool.submit(train, folder, steps, *pair, rate, 0) for pair in pairs for rate in RATES}
        losses = {key: metrics(future.result(), "valid")[-1]["loss"] for key, future in tries.items()}
        best = {pair: min(RATES, key=lambda rate: losses[*pair, rate]) for pair in pairs}
        futures = {
            pair: [pool.submit(train, folder, steps, *pair, best[pair], seed) for seed in range(asked.seeds)]
            for pair in pairs
        }
        runs = {pair: [future.result() for future in found] for pair, found in futures.items()}
    goals = [metrics(run, "valid")[-1]["loss"] for run in runs["gpt-neo", "adamw"]]
    print(f"{steps * BATCH * LENGTH:,} tokens, {asked.seeds} seeds")
    for (family, optimizer), found in runs.items():
        lines = [metrics(run, "valid")[-1] for run in found]
        reached = [tokens_to(run, goal) for run, goal in zip(found, goals)]
        share = [value / (steps * BATCH * LENGTH) for value in reached if value is not None]
        seconds = [line["step_s"] for run in found for line in metrics(run, "train")]
        rates = ", ".join(f"{rate:g}: {losses[family, optimizer, rate]:.3f}" for rate in RATES)
        print(f"\n{family} / {optimizer}: loss {spread([line['loss'] for line in lines])} (rates {rates})")
        print(f"  bits per byte {spread([line['bits_per_byte'] for line in lines])}")
        for source in lines[0]["source_bits_per_byte"]:
            print(f"    {source:30}{spread([line['source_bits_per_byte'][source] for line in lines])}")
        to_reach = f"{spread(share)} of the tokens" if len(share) == len(found) else f"by {len(share)} of {len(found)}"
        print(f"  loss of gpt-neo / adamw reached: {to_reach}")
        print(f"  seconds a step, median: {statistics.median(seconds):.3f}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
