"""Do two commits of this repository train to the same bits?

    python bench/equality.py --before 6fe7d99 [--after HEAD]

Checks out both beside each other and runs, from each, the same pre-training (mixture, dropout, background saves) and
the same fine-tuning on 1 and on 2 ranks, on CPU. Compares the loss and gradient norm of every step, the samples of
some (as `gloria.show` lists them), and every tensor of every checkpoint (weights, moments, generators) by hash. Exits
1 where anything differs.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import xxhash
from safetensors import safe_open

ROOT = Path(__file__).resolve().parent.parent
STEPS = 24
PRETRAIN = {
    "train.steps": STEPS,
    "checkpoint.every": 8,
    "checkpoint.keep": 9,
    "log.every": 1,
    "log.tensorboard": "false",
    "model.dropout": 0.1,
    "valid.every": 12,
    "run.device": "cpu",
}
FINETUNE = {
    "train.epochs": 2,
    "checkpoint.every": 4,
    "checkpoint.keep": 9,
    "log.every": 1,
    "log.tensorboard": "false",
    "run.device": "cpu",
}


def checkout(commit: str, tree: Path) -> Path:
    """The sources of a commit in the new folder `tree`."""
    archive = subprocess.run(["git", "-C", str(ROOT), "archive", commit], capture_output=True)
    if archive.returncode:
        raise SystemExit(f"{commit}: {archive.stderr.decode().strip()}")
    tree.mkdir()
    subprocess.run(["tar", "-x", "-C", str(tree)], input=archive.stdout, check=True)
    return tree


def run(tree: Path, *command: str) -> str:
    """What a command prints that runs from the sources of `tree`; ends this one where it fails."""
    environment = os.environ | {"PYTHONPATH": str(tree), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-m", *command], cwd=tree, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{tree}: {' '.join(command)} ended with {done.returncode}\n{done.stdout}{done.stderr}")
    return done.stdout


def flags(options: dict[str, object]) -> list[str]:
    return [f"--{key}={value}" for key, value in options.items()]


def torchrun(ranks: int) -> list[str]:
    return ["torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}", "-m"]


def facts_of(folder: Path) -> dict[str, object]:
    """Losses, norms and the hash of every saved tensor of a run."""
    facts: dict[str, object] = {}
    for line in map(json.loads, (folder / "metrics.jsonl").read_text().splitlines()):
        if line["kind"] in ("train", "valid"):
            facts[f"{line['kind']} {line['step']}"] = (line["loss"], line.get("grad_norm"))
    for path in sorted(folder.glob("checkpoints/step-*/rank-*.safetensors")):
        with safe_open(path, "numpy") as file:
            for name in file.keys():  # noqa: SIM118  (no dict: it has no iterator)
                key = f"{path.parent.name} {path.stem} {name}"
                facts[key] = xxhash.xxh3_128_hexdigest(file.get_tensor(name).tobytes())
    return facts


def facts_from(tree: Path, work: Path) -> dict[str, object]:
    """Everything that is compared, from the sources of `tree`; runs are kept in `work`."""
    facts: dict[str, object] = {}
    run(tree, "gloria.prepare", "launch/sample.toml", "--out", str(work / "corpus"))
    for ranks in (1, 2):
        folder = work / f"pretrain-{ranks}"
        options = flags(PRETRAIN | {"data.corpus": work / "corpus", "run.dir": folder})
        run(tree, *torchrun(ranks), "gloria.pretrain", "--config", "launch/demo.toml", *options)
        facts |= {f"pre-training on {ranks}: {key}": value for key, value in facts_of(folder).items()}
        for step in (1, STEPS // 2, STEPS):
            listed = run(tree, "gloria.show", "--run", str(folder), "--step", str(step))
            facts[f"pre-training on {ranks}: samples of step {step}"] = listed
        print(f"{tree}: pre-training on {ranks} done", flush=True)
    run(tree, "gloria.export", "--run", str(work / "pretrain-1"), "--out", str(work / "model"))
    for ranks in (1, 2):
        folder = work / f"finetune-{ranks}"
        options = flags(FINETUNE | {"run.dir": folder})
        run(tree, *torchrun(ranks), "gloria.finetune", "--task", "assin2", "--model", str(work / "model"), *options)
        facts |= {f"fine-tuning on {ranks}: {key}": value for key, value in facts_of(folder).items()}
        scores = json.loads((folder / "results.json").read_text())["results"]
        facts[f"fine-tuning on {ranks}: scores"] = [record.get("scores") for record in scores]
        print(f"{tree}: fine-tuning on {ranks} done", flush=True)
    return facts


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--before", required=True, help="a commit")
    parser.add_argument("--after", default="HEAD", help="another one")
    asked = parser.parse_args()
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        for side in ("before", "after"):
            work = Path(folder, f"{side}-work")
            work.mkdir()
            found[side] = facts_from(checkout(getattr(asked, side), Path(folder, f"{side}-tree")), work)
    before, after = found["before"], found["after"]
    other = sorted(key for key in before.keys() | after.keys() if before.get(key) != after.get(key))
    for key in other[:20]:
        print(f"differs: {key}\n  before {before.get(key)}\n  after  {after.get(key)}")
    tensors = sum("step-" in key for key in before)
    print(f"{len(before)} facts compared ({tensors} of them tensors): {len(other)} differ")
    return int(bool(other))


if __name__ == "__main__":
    raise SystemExit(main())
