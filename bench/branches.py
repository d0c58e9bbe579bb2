"""A trunk of 300 steps at the peak rate and what branches off it: the recipe launch/trunk.toml, on the sample corpus.

    python bench/branches.py [--folder DIR] [--out bench/branches.png]

Runs the trunk (400 steps, the last 100 its decay) and three branches: one at 200 that decays to 300, one at 300 without
a change, which is killed once and started again, and one at 300 with more of one source. Draws validation losses and
rates (matplotlib), and leaves with status 1 unless the branch without a change is the trunk's own decay to the bit:
losses, samples, weights and moments.
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from gloria.dist.checkpoint_read import find_checkpoint, read_full_tensors
from gloria.show import read_run, samples_of
from tests.launch import losses, metrics

ROOT = Path(__file__).resolve().parent.parent
BRANCHES = {
    "at 200, to 300": ["@200", "--train.steps", "300"],
    "at 300, no change": ["@300"],
    "at 300, dialogos 0.6": ["@300", "--data.weights.dialogos", "0.6"],
}


def command(folder: Path, name: str, *flags: str) -> list[str]:
    """A run by launch/trunk.toml."""
    recipe = ["--config", "launch/trunk.toml", "--data.corpus", str(folder / "corpus")]
    own = ["--run.dir", str(folder / name), "--log.tensorboard", "false"]
    return [sys.executable, "-m", "gloria.pretrain", *recipe, *own, *flags]


def run(arguments: list[str]) -> None:
    subprocess.run(arguments, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)


def kill_once(arguments: list[str], folder: Path, step: int) -> int:
    """Start a run and kill it once its log has a step at or behind `step`; the step."""
    with subprocess.Popen(arguments, cwd=ROOT, stdout=subprocess.DEVNULL, start_new_session=True) as started:
        while not (done := [at for at in losses(folder) if at >= step]):
            assert started.poll() is None, f"ended before step {step}"
            time.sleep(0.05)
        os.killpg(started.pid, signal.SIGKILL)
    return max(done)


def differences(branch: Path, trunk: Path, steps: int) -> list[str]:
    """In what the end of a branch differs from its trunk's."""
    found = []
    own, trunks = losses(branch), losses(trunk)
    found += [f"loss of step {step}" for step, loss in own.items() if trunks[step] != loss]
    rows = [[list(samples_of(read_run(run)[0], step, 1)) for step in range(steps)] for run in (branch, trunk)]
    found += [f"samples of step {step}" for step in range(steps) if rows[0][step] != rows[1][step]]
    tensors = [dict(read_full_tensors(find_checkpoint(run))) for run in (branch, trunk)]
    found += [name for name, tensor in tensors[1].items() if not torch.equal(tensors[0][name], tensor)]
    print(f"compared: {len(own)} losses, samples of {steps} steps, {len(tensors[1])} tensors; {len(found)} differ")
    return found


def draw(runs: dict[str, Path], out: Path) -> None:
    """Validation loss and rate over the steps, one line a run."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (above, below) = pyplot.subplots(2, 1, sharex=True, figsize=(8, 6), height_ratios=(3, 1))
    for name, folder in runs.items():
        valid, train = metrics(folder, "valid"), metrics(folder, "train")
        style = {"label": name, "linewidth": 4 if name == "trunk" else 1.5, "alpha": 0.4 if name == "trunk" else 1}
        above.plot([line["step"] for line in valid], [line["loss"] for line in valid], marker="o", **style)
        below.plot([line["step"] for line in train], [line["lr"] for line in train], **style)
    above.set(ylabel="validation loss", ylim=(None, 6.0), title="launch/trunk.toml: a trunk and its branches")
    above.legend()
    below.set(xlabel="step", ylabel="rate")
    figure.savefig(out, dpi=90, bbox_inches="tight")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, help="where the runs stay; by default they go")
    parser.add_argument("--out", type=Path, default=Path("branches.png"))
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = asked.folder or Path(temporary)
        run([sys.executable, "-m", "gloria.prepare", "launch/sample.toml", "--out", str(folder / "corpus")])
        trunk = folder / "trunk"
        run(command(folder, "trunk"))
        runs = {"trunk": trunk}
        for name, (step, *changes) in BRANCHES.items():
            runs[name] = folder / name.replace(" ", "-").replace(",", "")
            arguments = command(folder, runs[name].name, "--run.branch", f"{trunk}{step}", *changes)
            if name == "at 300, no change":
                print(f"{name}: killed at step {kill_once(arguments, runs[name], 360)}, and started again")
            run(arguments)
        for name, path in runs.items():
            line = metrics(path, "valid")[-1]
            sources = ", ".join(f"{source} {loss:.3f}" for source, loss in line["sources"].items())
            print(f"{name:<22} step {line['step']}: {line['loss']:.4f} ({sources})")
        draw(runs, asked.out)
        found = differences(runs["at 300, no change"], trunk, 400)
    for what in found[:20]:
        print(f"differs: {what}")
    return int(bool(found))


if __name__ == "__main__":
    sys.exit(main())
