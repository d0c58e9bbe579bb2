"""Does one commit of this repository train slower than another?

    python bench/speed.py --before 6fe7d99 [--after HEAD] [--rounds 4]

Trains the demo and a GPT-Neo of 28 M parameters for some steps from the sources of both commits in turn, in processes
of one rank, and compares the medians of the time of a step, the first ones left out. The rounds alternate, so that
both have the same machine; the spread between a commit's own rounds says what the ratio is worth.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from bench.equality import checkout, flags, run

WARM = 2  # steps that allocate
COMMON = {"log.every": 1, "log.tensorboard": "false", "valid.every": 0, "checkpoint.every": 10**6, "run.device": "cpu"}
DEMO = COMMON | {"train.steps": 22}
MIDDLE = COMMON | {
    "train.steps": 8,
    "schedule.warmup_steps": 0,
    "model.num_layers": 8,
    "model.hidden_size": 512,
    "model.num_heads": 8,
    "model.max_positions": 1024,
    "train.sequence_length": 1024,
    "train.global_batch": 2,
    "train.micro_batch": 1,
}


def step_seconds(tree: Path, corpus: Path, folder: Path, options: dict[str, object]) -> list[float]:
    """The time of each step but the first ones."""
    given = flags(options | {"data.corpus": corpus, "run.dir": folder})
    run(tree, "gloria.pretrain", "--config", "launch/demo.toml", *given)
    lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [line["step_s"] for line in lines if line["kind"] == "train"][WARM:]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--before", required=True, help="a commit")
    parser.add_argument("--after", default="HEAD", help="another one")
    parser.add_argument("--rounds", type=int, default=4)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        trees = {side: checkout(getattr(options, side), Path(folder, side)) for side in ("before", "after")}
        for side, tree in trees.items():
            run(tree, "gloria.prepare", "launch/sample.toml", "--out", f"{folder}/corpus-{side}")
        for name, recipe in (("demo", DEMO), ("28 M, T = 1024", MIDDLE)):
            medians: dict[str, list[float]] = {side: [] for side in trees}
            for number in range(options.rounds):
                for side, tree in sorted(trees.items(), reverse=number % 2 == 1):
                    here = Path(folder, f"{name[:2]}-{side}-{number}")
                    times = step_seconds(tree, Path(folder, f"corpus-{side}"), here, recipe)
                    medians[side].append(statistics.median(times))
            before, after = (statistics.median(medians[side]) for side in ("before", "after"))
            spread = max(max(times) / min(times) - 1 for times in medians.values())
            print(
                f"{name}: {1000 * before:.1f} ms a step before, {1000 * after:.1f} after: "
                f"{100 * (after / before - 1):+.2f} % (a commit's own rounds differ by up to {100 * spread:.1f} %)",
                flush=True,
            )
    return 0


if __name__ == "__main__":
    sys.exit(main())
