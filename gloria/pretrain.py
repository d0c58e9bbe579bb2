"""Pre-train a language model (GPT-2, GPT-Neo, LLaMA, ...) on a weighted mixture of token shards.

    python -m gloria.pretrain                                   # one process, the demo recipe
    torchrun --nproc_per_node 4 -m gloria.pretrain --config launch/gloria-1.3b.toml --train.steps 1000

Killed at any moment and started again with the same command, it goes on from its newest checkpoint. The steps are
taken in gloria/train/loop.py; what is learnt in them is gloria/train/pretraining.py.
"""

from __future__ import annotations

import sys

from gloria.config.cli import to_toml
from gloria.dist.signals import install_stop_handlers, stop_reason
from gloria.errors import run_command, warn
from gloria.train.config import PretrainConfig, RunPlan, plan_run, read_pretrain_config
from gloria.train.demo import prepare_demo_corpus
from gloria.train.summary import describe, gathered_here, precision_here


def check(argv: list[str] | None) -> tuple[PretrainConfig, RunPlan]:
    """The recipe and what it amounts to, or a UserError with everything that is wrong with it."""
    config: PretrainConfig = read_pretrain_config(argv)
    prepare_demo_corpus(config)
    return config, plan_run(config)


if __name__ == "__main__":
    # Before torch is imported (seconds): a stop signal is kept from here on, and recipe errors are reported at once.
    install_stop_handlers()
    checked: list[tuple[PretrainConfig, RunPlan]] = []
    if status := run_command(lambda argv: checked.append(check(argv)), sys.argv[1:], stop_reason):
        raise SystemExit(status)

from gloria.train.group import process_group
from gloria.train.loop import train
from gloria.train.pretraining import open_pretraining


def main(argv: list[str] | None = None, checked: tuple[PretrainConfig, RunPlan] | None = None) -> int:
    """Check the recipe unless it is `checked`, then train; `--dry-run` stops after the check."""
    config, plan = checked or check(argv)
    if config.dry_run:
        precision, why, on_gpu = precision_here(config)
        about = describe(config, plan, precision, why, on_gpu, gathered_here(config, plan, precision))
        print(to_toml(config), about, sep="\n")
        for warning in plan.warnings:
            warn(warning)
        return 0
    with process_group(config) as process:
        status, _ = train(open_pretraining(config, plan, process))
    return status


if __name__ == "__main__":
    raise SystemExit(run_command(lambda argv: main(argv, *checked), sys.argv[1:], stop_reason))
