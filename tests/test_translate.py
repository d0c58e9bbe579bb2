"""Prevents: a translated recipe that the checker refuses, or that trains for another time or at another rate than the
original did without a line that says so."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest

from gloria import plan, pretrain
from gloria.errors import run_command
from gloria.prepare import main as prepare
from gloria.translate import DEFAULTS, MODELS, SWITCHES, WEIGHTS, main, translate

README = """python -m torch.distributed.launch --nproc_per_node 4 --master_port $master_port \\
--use_env run-pretrain.py -b 128 -be 8 -lr 1e-4 -ml 512 -ga 16 -e 1 -wd 0.01 -ws 10000 -ms 2000000 -ls 100 \\
-ss 250000 -fp16 bf16 -hrr 4 -deepspeed -t gptuga-tk-512 -m GPTNEO-1.3B -wandb run-2M -scheduler cosine_hard"""


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The six sources of the original, each with a few words."""
    folder = tmp_path_factory.mktemp("translate")
    sources = ""
    for name in WEIGHTS:
        blocks = (f"{name} {i} " + "palavras e mais palavras " * 9 for i in range(80))
        (folder / f"{name}.txt").write_text("\n\n".join(blocks))
        sources += f'[[source]]\nname = "{name}"\npaths = ["{name}.txt"]\ndocuments = "block"\n'
    (folder / "c.toml").write_text(f'out = "{folder}/corpus"\n[tokenizer]\nvocab_size = 512\n{sources}')
    assert prepare([str(folder / "c.toml"), "--workers", "1"]) == 0
    return folder / "corpus"


def recipe_file(command: str, folder: Path) -> Path:
    (folder / "recipe.toml").write_text(translate(command))
    return folder / "recipe.toml"


def test_the_command_of_its_readme(tmp_path, corpus, capsys):
    """2,000,000 passes of 8 windows on 4 GPUs, 16 to an update, a restart every 500,000."""
    recipe = tomllib.loads(translate(README))
    assert recipe["train"] == {
        "steps": 125_000,
        "global_batch": 512,
        "micro_batch": 8,
        "sequence_length": 512,
        "precision": "bf16",
        "clip_norm": 3.0,
    }
    assert recipe["schedule"] == {"kind": "cosine_hard", "warmup_steps": 625, "min_ratio": 0.0, "restarts": 4}
    assert (recipe["checkpoint"], recipe["log"]) == ({"every": 15_625}, {"every": 6})
    assert (recipe["run"]["dir"], recipe["model"]) == ("runs/run-2M", {"preset": "gpt-neo-1.3b"})
    notes = [line for line in translate(README).splitlines() if line.startswith("# ")]
    for flag in ("-be", "-ga", "-m", "-ml", "-e", "-deepspeed", "-t", "-wandb", "--nproc_per_node"):
        assert sum(line.startswith(f"# {flag}: ") for line in notes) == 1, flag

    file = recipe_file(README, tmp_path)
    small = ["--train.precision=fp32", "--data.corpus", str(corpus), "--run.dir", str(tmp_path / "run")]
    assert run_command(pretrain.main, ["--config", str(file), *small, "--dry-run"]) == 0
    assert "125,000 steps" in capsys.readouterr().out
    assert run_command(plan.main, ["--config", str(file), "--gpus", "4xA100-40GB"]) == 0


@pytest.mark.parametrize(
    "command",
    [
        "run-pretrain.py",
        "python run_pretrain.py -m GPT2-774 -scheduler linear -ws 1 -fp16 no -optimizer radam -wd 0.1",
        "torchrun --nproc-per-node=2 --nnodes=2 run-pretrain.py -b 30 -ga 4 -ms 40 -scheduler cosine_hard -fp16 fp16",
        "run-pretrain.py -scheduler other -optimizer other -fp16 tf32 -hrr 3 -debug -resume -checkpoint checkpoint-1",
        "accelerate launch --num_processes 2 run-pretrain.py -assin_lr 1e-5 -d x -wandb_env y -seed 7 -e 2 -ss 100",
    ],
)
def test_every_recipe_passes_the_checker(command, corpus, tmp_path, capsys):
    small = ["--train.precision=fp32", "--data.corpus", str(corpus), "--run.dir", str(tmp_path / "run")]
    assert run_command(pretrain.main, ["--config", str(recipe_file(command, tmp_path)), *small, "--dry-run"]) == 0
    assert "error" not in capsys.readouterr().err


def test_what_the_original_did_is_what_the_recipe_does():
    epochs = tomllib.loads(translate("run-pretrain.py -e 3"))
    assert epochs["train"]["epochs"] == 3
    assert "steps" not in epochs["train"]
    constant = translate("run-pretrain.py -ms 10 -scheduler cosine_hard")  # no restarts: the multiplier is 1 throughout
    assert tomllib.loads(constant)["schedule"] == {"kind": "constant", "warmup_steps": 0, "min_ratio": 0.0}
    assert "# -hrr: without it" in constant
    uneven = tomllib.loads(translate("torchrun --nproc-per-node=2 --nnodes=2 run-pretrain.py -b 30 -ga 4"))["train"]
    assert (uneven["micro_batch"], uneven["global_batch"]) == (7, 112)
    assert tomllib.loads(translate("run-pretrain.py"))["optim"]["weight_decay"] == 0.01
    decayed = translate("run-pretrain.py -wd 0.1")
    assert tomllib.loads(decayed)["optim"]["weight_decay"] == 0.1
    assert "# -wd: 0.1 never reaches the optimizer, which has 0.01; set 0.01 for the same" in decayed
    assert tomllib.loads(translate("run-pretrain.py -m glorIA-1.3B"))["model"] == {"from": "models/glorIA-1.3B"}


@pytest.mark.parametrize(
    ("command", "error"),
    [
        ("train.py -b 3", "COMMAND: has no run-pretrain.py in it; give the original's pre-training command"),
        ("run-pretrain.py -zz 3", "COMMAND: -zz is no flag of the original's run-pretrain.py; leave it out"),
        ("run-pretrain.py -b", "COMMAND: -b has no value; give one"),
        ("run-pretrain.py -b x", 'COMMAND: -b: "x" is no number; give one'),
        ("run-pretrain.py -ga 0", "COMMAND: -ga: 0 is too small; give at least 1"),
        ("run-pretrain.py 'a", "COMMAND: cannot be read (No closing quotation); give the whole line in quotes"),
    ],
)
def test_a_mistake_is_one_line(command, error, capsys):
    assert run_command(main, [command]) == 2
    assert capsys.readouterr().err == f"error: {error}\n"


def test_the_page_has_every_flag_and_model(repository):
    page = (repository / "docs/from-gloria.md").read_text("utf-8")
    rows = set(re.findall(r"^\| `(-[\w-]+)", page, re.MULTILINE))
    assert {*DEFAULTS, *(flag for flag in SWITCHES if not flag.startswith("--"))} <= rows
    assert all(f"`{name}`" in page for name in MODELS)
    assert len(re.findall(r"^\| \d+ \|", page, re.MULTILINE)) == 45
