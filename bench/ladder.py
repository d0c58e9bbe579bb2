"""Does a ladder of three tiny runs predict a fourth, larger one that it has not seen?

    python bench/ladder.py --text 'DIR/*/*.jsonl' [--folder DIR] [--tokens-per-parameter 5]

Prepares the text (a vocabulary of 1,024), takes what `gloria.plan --ladder` proposes for a GPT-Neo of 4 layers x 128,
runs those commands as they are printed and then the large run itself, and compares: leaves with status 1 where its
loss is not in the predicted interval.
"""

from __future__ import annotations

import argparse
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from gloria.config.toml import show_value
from gloria.model.config import PRESETS
from gloria.train.ladder import layer_parameters, predict, read_points

ROOT = Path(__file__).resolve().parent.parent
BATCH, LENGTH = 16, 64
RECIPE = {
    "model.preset": "demo",
    "model.num_heads": 8,
    "train.global_batch": BATCH,
    "train.sequence_length": LENGTH,
    "optim.lr": 2e-3,
    "schedule.min_ratio": 0.1,
    "valid.windows": 256,
    "log.every": 50,
    "log.tensorboard": "false",
}


def run(*words: str) -> str:
    done = subprocess.run([sys.executable, "-m", *words], cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True)
    return done.stdout


def prepare(text: str, folder: Path) -> Path:
    """A corpus of the text, one source."""
    recipe = folder / "corpus.toml"
    recipe.write_text(
        f'[tokenizer]\nkind = "bpe"\nvocab_size = 1024\n[[source]]\nname = "text"\npaths = [{show_value(text)}]\n'
    )
    run("gloria.prepare", str(recipe), "--out", str(folder / "corpus"))
    return folder / "corpus"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", required=True, help="JSON lines, a glob")
    parser.add_argument("--folder", type=Path, help="where the runs stay; by default they go")
    parser.add_argument("--tokens-per-parameter", type=float, default=5.0)
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = asked.folder or Path(temporary)
        folder.mkdir(exist_ok=True)
        corpus = prepare(asked.text, folder)
        steps = round(asked.tokens_per_parameter * layer_parameters(PRESETS["demo"]) / (BATCH * LENGTH))
        recipe = RECIPE | {"train.steps": steps, "valid.every": steps, "checkpoint.every": steps}
        recipe |= {"data.corpus": corpus, "run.dir": folder / "large", "schedule.warmup_steps": steps // 40}
        flags = ["--config", "launch/demo.toml", *(f"--{key}={value}" for key, value in recipe.items())]
        printed = run("gloria.plan", *flags, "--ladder")
        print(printed)
        commands = [shlex.split(line)[2:] for line in printed.splitlines() if " gloria.pretrain " in line]
        for command in commands:
            run(*command)
        runs = [command[command.index("--run.dir") + 1] for command in commands]
        print(run("gloria.plan", *flags, "--ladder", *runs), flush=True)
        run("gloria.pretrain", *flags)
        large = read_points([*runs, str(folder / "large")])[-1]
        found = predict(read_points(runs), large.parameters, large.tokens)
    off = large.loss - found.loss
    print(f"held back: loss {large.loss:.4f}, predicted {found.loss:.4f} +- {found.half_width:.4f}: off by {off:+.4f}")
    return int(abs(off) > found.half_width)


if __name__ == "__main__":
    sys.exit(main())
