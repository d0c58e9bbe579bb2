"""Fine-tune a model on a task, choose the checkpoint on the task's dev set, and score it.

    python -m gloria.finetune --task assin2 --run.dir runs/assin2      # the demo's model, a small sample of the task
    torchrun --nproc_per_node 4 -m gloria.finetune --task rte --model runs/gloria-1.3b --data ../rte --run.dir runs/rte

A run's folder holds checkpoints, metrics.jsonl, `model` (the best one so far, a Hugging Face folder with
head.safetensors and task.json), `huggingface` (the same as a class of transformers, where there is one), the
predictions and results.json. Killed and started again with the same command, it goes on from its newest checkpoint,
and on CPU to the same bits. The test set is checked before the first step, and scored once, at the end.
"""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path
from typing import Any

from gloria.dist.signals import install_stop_handlers, stop_reason
from gloria.errors import UserError, run_command
from gloria.tasks.catalog import find_task
from gloria.tasks.examples import Example
from gloria.tasks.samples import describe_sample, sample_folder
from gloria.tasks.task import Task
from gloria.train.finetune_config import DEMO_MODEL, FinetuneConfig, read_finetune_config


def check(argv: list[str] | None) -> tuple[FinetuneConfig, Task, Path, list[Example], list[Example]]:
    """The recipe, its task, where its files are, the examples to train on and those that choose; or a UserError."""
    config = read_finetune_config(argv)
    task = find_task(config.task)
    if task.family not in ("pair", "span"):
        raise UserError(
            f"{task.name}: has nothing to train a head on; score a language model on it with gloria.evaluate"
        )
    if config.model == DEMO_MODEL and not Path(DEMO_MODEL).is_dir():
        raise UserError(
            f"--model: {DEMO_MODEL} is not there; make it with `make demo`, or name a run or a model's folder"
        )
    folder = sample_folder(task) if config.data is None else Path(config.data)
    train, selection = task.training(folder)
    for name, examples in (("train", train), ("selection", selection)):
        if not examples:
            raise UserError(f"{folder}: the {name} set of {task.name} has no labelled examples; check the files")
    return config, task, folder, train, selection


if __name__ == "__main__":
    # Before torch is imported (seconds): a stop signal is kept from here on, and recipe errors are reported at once.
    install_stop_handlers()
    checked: list[tuple[Any, ...]] = []
    if status := run_command(lambda argv: checked.append(check(argv)), sys.argv[1:], stop_reason):
        raise SystemExit(status)

from gloria.dist.process import rank0_decides
from gloria.dist.rank_log import open_rank_log
from gloria.files import parse_json_object, read_bounded
from gloria.tasks.report import RESULTS, mean_over_seeds, table, write_results
from gloria.train.finetuning import Plan, check_seeds, is_done, open_finetuning
from gloria.train.group import process_group
from gloria.train.loop import train
from gloria.train.run import require_same_recipe


def main(argv: list[str] | None = None, checked: tuple[Any, ...] | None = None) -> int:
    """Fine-tune with each seed; several give a mean and a deviation. `checked`: what `check` returned before."""
    plan = Plan(*(checked or check(argv)))
    config = plan.config
    folder, seeds, status = Path(config.run.dir), config.run.seeds, 0
    own = {seed: folder / f"seed-{seed}" if len(seeds) > 1 else folder for seed in seeds}
    with process_group(config) as process:
        require_same_recipe(process, config)
        rank0_decides(process, lambda: check_seeds(folder, seeds))
        open_rank_log(folder, process.rank, process.world)
        if process.is_main and config.data is None:
            print(describe_sample(plan.task), flush=True)
        for seed in seeds:
            if rank0_decides(process, partial(is_done, own[seed], config, seed)):
                if process.is_main:
                    print(f"{own[seed]}: done before", flush=True)
                continue
            status, done = train(open_finetuning(plan, seed, own[seed], process))
            if not done:
                break
        else:
            if process.is_main:
                report_results(folder, own, config.model)
    return status


def report_results(folder: Path, own: dict[int, Path], model: str) -> None:
    """Print the scores of each seed, whose results are in its `own` folder; of several write and print the mean."""
    found = {seed: parse_json_object(read_bounded(path / RESULTS), path / RESULTS) for seed, path in own.items()}
    for seed, results in found.items():
        print(f"seed {seed}:", table(results), sep="\n")
    if len(found) > 1:
        about = {"seeds": list(found), "from": model}
        summary = write_results(folder / RESULTS, about, mean_over_seeds(found))
        print("mean over the seeds:", table(summary), sep="\n", flush=True)


if __name__ == "__main__":
    raise SystemExit(run_command(lambda argv: main(argv, *checked), sys.argv[1:], stop_reason))
