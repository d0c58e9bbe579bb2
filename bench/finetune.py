"""Fine-tuning of a pre-trained model beside the same model from random weights and beside a constant answer.

    python bench/finetune.py --model runs/small --data folder-with-assin2-plue-faquad [--tasks assin2,rte,stsb,faquad]

Without --data the sample that comes with gloria is taken, to try the script: its scores mean nothing.
Every number is of a set that is reported (ASSIN-2's test set; dev where tests are hidden), with its 95 % interval.
The learning rate is a small model's; both starts are given the same one, the same epochs and the same seed.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from gloria.model.huggingface import write_folder
from gloria.model.transformer import Transformer, initial_value
from gloria.tasks.catalog import Task, find_task
from gloria.tasks.examples import Example, Pair, PairPrediction, Prediction, SpanPrediction
from gloria.tasks.metrics import score
from gloria.tasks.models.backbones import load_model
from gloria.tasks.report import RESULTS
from gloria.tasks.samples import SAMPLES, sample_folder


def random_twin(model: str, folder: Path, seed: int) -> str:
    """A Hugging Face folder of the model's shape and tokenizer with the weights that a pre-training starts from."""
    loaded = load_model(model, language_model=True)
    own = loaded.language_model
    assert isinstance(own, Transformer), f"{model}: only GPT-2 and GPT-Neo have a start of ours"
    names = [(name, initial_value(name, value.shape, own.shape, seed)) for name, value in own.named_parameters()]
    loaded.tokenizer.save_pretrained(folder / "tokenizer")
    write_folder(folder / "random", own.shape, iter(names), folder / "tokenizer", "float32")
    return str(folder / "random")


def constant_answers(train: list[Example], examples: list[Example]) -> dict[str, Prediction]:
    """The most frequent label and the mean score of the training set; to a question, the whole context."""
    if isinstance(train[0], Pair):
        labels = Counter(example.label for example in train if example.label is not None)
        scores = [example.score for example in train if example.score is not None]
        label = labels.most_common(1)[0][0] if labels else None
        prediction = PairPrediction(label, statistics.fmean(scores) if scores else None)
        return {example.id: prediction for example in examples}
    return {example.id: SpanPrediction(example.context) for example in examples}


def tune(task: Task, model: str, data: Path, folder: Path, flags: list[str]) -> dict[str, Any]:
    """The results of a fine-tuning; one that is done is not done again."""
    command = [sys.executable, "-m", "gloria.finetune", "--task", task.name, "--model", model, "--data", str(data)]
    subprocess.run([*command, "--run.dir", str(folder), *flags], check=True, stdout=subprocess.DEVNULL)
    return json.loads((folder / RESULTS).read_text(encoding="utf-8"))


def rows(task: Task, data: Path, found: dict[str, dict[str, Any]]) -> Iterator[str]:
    """A line for each metric: each start's score and interval, with the constant answer first."""
    train, _ = task.training(data)
    first = next(iter(found.values()))
    for number, record in enumerate(first["results"]):
        examples = task.read(data, record["split"])
        constant = score(task, examples, constant_answers(train, examples))
        scores = {"constant": {metric: asdict(value) for metric, value in constant.items()}}
        for name, results in found.items():
            scores[name] = results["results"][number].get("scores", {})
        for metric in record.get("scores", {}):
            cells = [_cell(of[metric]) for of in scores.values()]
            yield f"{task.name:<10}{record['split']:<6}{metric:<18}" + "".join(f"{cell:<28}" for cell in cells)


def _cell(value: dict[str, Any]) -> str:
    if value["value"] is None:
        return "-"
    interval = f" ({value['low']:.4f} to {value['high']:.4f})" if value["low"] is not None else ""
    return f"{value['value']:.4f}{interval}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="models/demo", help="a run or a folder of GPT-2 or GPT-Neo")
    parser.add_argument("--data", type=Path, default=SAMPLES, help="folder of the tasks' files, or of their folders")
    parser.add_argument("--tasks", default="assin2,rte,stsb,faquad")
    parser.add_argument("--out", type=Path, default=Path("runs/bench-finetune"))
    parser.add_argument("--epochs", default="3")
    parser.add_argument("--lr", default="5e-4")
    parser.add_argument("--seed", type=int, default=42)
    arguments, flags = parser.parse_known_args()
    torch.set_num_threads(2)
    arguments.out.mkdir(parents=True, exist_ok=True)
    twin = arguments.out / "random"
    starts = {
        "random": str(twin) if twin.exists() else random_twin(arguments.model, arguments.out, arguments.seed),
        "pre-trained": arguments.model,
    }
    flags += ["--train.epochs", arguments.epochs, "--optim.lr", arguments.lr, "--run.seeds", f"[{arguments.seed}]"]
    print(f"{'task':<10}{'split':<6}{'metric':<18}{'constant answer':<28}{'random start':<28}{'pre-trained':<28}")
    for name in arguments.tasks.split(","):
        task = find_task(name)
        if arguments.data == SAMPLES:
            data = sample_folder(task)
        else:
            data = next(path for path in _folders(arguments.data) if _holds(task, path))
        found = {
            start: tune(task, model, data, arguments.out / f"{name}-{start}", flags) for start, model in starts.items()
        }
        print(*rows(task, data, found), sep="\n", flush=True)


def _folders(data: Path) -> list[Path]:
    return [data, *sorted(path for path in data.iterdir() if path.is_dir())]


def _holds(task: Task, folder: Path) -> bool:
    return any((folder / name).is_file() for name in task.files["train"])


if __name__ == "__main__":
    main()
