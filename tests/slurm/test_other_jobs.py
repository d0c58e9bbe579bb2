"""Prevents: a watch that scores a checkpoint twice or never when it or the training is requeued, and a fine-tuning that
ends elsewhere once it was stopped."""

from __future__ import annotations

import json
import random
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import gloria.finetune as finetune
from gloria.dist.manifest import saved_steps
from tests.slurm.jobs import PATIENCE, submit, submit_script
from tests.tasks.tiny import WORDS, make_folder, sentence, write_assin, write_lines

pytestmark = [pytest.mark.timeout(900), pytest.mark.slurm]


def scored(run: Path) -> list[dict[str, Any]]:
    path = run / "scores.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def test_a_watch_scores_every_checkpoint_once_while_both_are_stopped_and_requeued(cluster, recipe, tmp_path):
    generator = random.Random(3)
    rows = [{"id": n, "sentence": sentence(generator, 2 + n), "last_word": generator.choice(WORDS)} for n in range(5)]
    data = write_lines(tmp_path / "data" / "calamept_all.jsonl", rows)
    given = ["--task=calame,perplexity", f"--data={data},", "--rule=first-word,strict", "--length=32", "--poll=0.5"]
    watch = submit_script(cluster, tmp_path, "evaluate", [f"--watch={tmp_path / 'run'}", *given], launcher="torchrun")
    training = submit(cluster, tmp_path, recipe | {"train.steps": 30, "checkpoint.keep": 30}, nodes="1", pause=0.3)
    training.wait_for_step(9)
    cluster.call("scancel", "--signal=USR1", training.id)
    cluster.wait_for("the watch at work", lambda: scored(training.run), PATIENCE, watch.log)
    cluster.call("scancel", "--batch", "--signal=USR1", watch.id)  # as before its time limit
    cluster.wait_for("the watch's requeue", lambda: watch.restarts() == 1, PATIENCE, watch.log)
    training.wait_for_state("COMPLETED")
    watch.wait_for_state("COMPLETED")
    assert (training.restarts(), watch.restarts()) == (1, 1)
    records = Counter((record["step"], record["task"]) for record in scored(training.run))
    steps = saved_steps(training.run)
    assert {8, 16, 24, 30} < set(steps)  # and the one of the stop
    assert records == {(step, task): count for step in steps for task, count in (("calame", 2), ("perplexity", 4))}
    log = watch.log.read_text()
    assert "the watch stops as requested; the same command continues it" in log
    assert f"{training.run}: done; {len(steps)} checkpoints are scored, " in log


@pytest.mark.parametrize(("seeds", "launcher"), [("[0]", "torchrun"), ("[0, 1]", "srun")], ids=["one", "two"])
def test_a_fine_tuning_stopped_and_requeued_has_the_results_of_an_undisturbed_one(cluster, tmp_path, seeds, launcher):
    model = make_folder("gpt_neo", tmp_path / "model")
    data = write_assin(tmp_path / "data", {"train": 16, "dev": 8, "test": 8})
    given = ["--task=assin2", f"--model={model}", f"--data={data}", "--train.steps=16", "--train.global_batch=8"]
    given += ["--train.max_length=64", "--eval.every=6", "--log.every=1", "--log.tensorboard=false", "--run.device=cpu"]
    given += [f"--run.seeds={seeds}"]
    to = f"--run.dir={tmp_path / 'run'}"
    slow = {"TEST_TUNE_SECONDS": "0.5"}
    job = submit_script(cluster, tmp_path, "finetune", [*given, to], launcher=launcher, more=slow)
    job.wait_for_step(4, "run/seed-0" if "," in seeds else "run")
    cluster.call("scancel", "--signal=USR1", job.id)
    job.wait_for_state("COMPLETED")
    assert job.restarts() == 1
    assert "stopped, step " in job.log.read_text()
    assert finetune.main([*given, f"--run.dir={tmp_path / 'whole'}"]) == 0
    for results in (tmp_path / "run").rglob("results.json"):
        other = tmp_path / "whole" / results.relative_to(tmp_path / "run")
        one, two = (json.loads(path.read_text())["results"] for path in (results, other))
        assert [record["scores"] for record in one] == [record["scores"] for record in two]
    for name in ("model.safetensors", "head.safetensors"):
        for file in (tmp_path / "run").rglob(name):
            one, two = load_file(file), load_file(tmp_path / "whole" / file.relative_to(tmp_path / "run"))
            assert all(torch.equal(one[key], two[key]) for key in one)
