"""Does a ladder of three tiny runs predict a fourth, larger one that it has not seen?

    python bench/ladder.py --text 'DIR/*/*.jsonl' [--folder DIR] [--tokens-per-parameter 40]

Prepares the text (a vocabulary of 1,024) and trains GPT-Neos of 6 to 100 thousand parameters on so many tokens for each
parameter of their layers, with rates as `gloria.plan --ladder` scales them. That predicts the last one from the others;
leaves with status 1 where its loss is not in the interval. All have two layers: one layer can't do what two can.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from gloria.config.toml import show_value
from gloria.model.config import PRESETS
from gloria.train.ladder import layer_parameters, predict, read_points

ROOT = Path(__file__).resolve().parent.parent
BATCH, LENGTH = 16, 64
SIZES = ((2, 16), (2, 32), (2, 48), (2, 64))  # layers and width; the last one is held back
RECIPE = {
    "model.preset": "demo",
    "train.global_batch": BATCH,
    "train.sequence_length": LENGTH,
    "schedule.min_ratio": 0.1,
    "valid.windows": 256,
    "log.every": 50,
    "log.tensorboard": "false",
}


def flags_of(layers: int, width: int, folder: Path, tokens_per_parameter: float) -> list[str]:
    """The recipe of one of the runs."""
    shape = replace(PRESETS["demo"], num_layers=layers, hidden_size=width, num_heads=width // 16)
    shape = replace(shape, intermediate_size=4 * width, attention_layers=shape.attention_layers[:layers])
    parameters = layer_parameters(shape)
    steps = round(tokens_per_parameter * parameters / (BATCH * LENGTH))
    own = {
        "model.num_layers": layers,
        "model.hidden_size": width,
        "model.num_heads": width // 16,
        "optim.lr": round(4e-3 * (parameters / 1e5) ** (-1 / 3), 5),
        "schedule.warmup_steps": steps // 40,
        "data.corpus": folder / "corpus",
        "run.dir": folder / f"{layers}x{width}",
    }
    own |= dict.fromkeys(("train.steps", "valid.every", "checkpoint.every"), steps)
    return ["--config", "launch/demo.toml", *(f"--{key}={value}" for key, value in (RECIPE | own).items())]


def run(*words: str) -> str:
    done = subprocess.run([sys.executable, "-m", *words], cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True)
    return done.stdout


def prepare(text: str, folder: Path) -> None:
    """A corpus of the text, one source."""
    recipe = folder / "corpus.toml"
    recipe.write_text(
        f'[tokenizer]\nkind = "bpe"\nvocab_size = 1024\n[[source]]\nname = "text"\npaths = [{show_value(text)}]\n'
    )
    run("gloria.prepare", str(recipe), "--out", str(folder / "corpus"))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", required=True, help="JSON lines, a glob")
    parser.add_argument("--folder", type=Path, help="where the runs stay; by default they go")
    parser.add_argument("--tokens-per-parameter", type=float, default=40.0)
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = asked.folder or Path(temporary)
        folder.mkdir(exist_ok=True)
        prepare(asked.text, folder)
        recipes = [flags_of(*size, folder, asked.tokens_per_parameter) for size in SIZES]
        runs = [str(folder / f"{layers}x{width}") for layers, width in SIZES]
        for recipe in recipes[:-1]:
            run("gloria.pretrain", *recipe)
        print(run("gloria.plan", *recipes[-1], "--ladder", *runs[:-1]), flush=True)
        run("gloria.pretrain", *recipes[-1])
        *points, large = read_points(runs)
        found = predict(points, large.parameters, large.tokens)
    off = large.loss - found.loss
    print(f"held back: loss {large.loss:.4f}, predicted {found.loss:.4f} +- {found.half_width:.4f}: off by {off:+.4f}")
    return int(abs(off) > found.half_width)


if __name__ == "__main__":
    sys.exit(main())
