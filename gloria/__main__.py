"""`gloria VERB` and `python -m gloria VERB`: the commands under one name."""

from __future__ import annotations

import runpy
import sys

import gloria
from gloria.config.schema import suggest
from gloria.errors import UserError, end_without_traceback, run_command

COMMANDS = {
    "refine": "clean raw text, as a corpus recipe asks",
    "prepare": "make a corpus of token shards from raw text",
    "plan": "what a pre-training run will need and cost",
    "doctor": "check whether this machine, or every node of a job, is fit for a run",
    "pretrain": "pre-train a language model on a weighted mixture of sources",
    "show": "show which samples a step of a run takes",
    "audit": "prove what a run was trained on, or when it read a document",
    "checkpoints": "list, verify or prune a run's checkpoints, and report its status",
    "translate": "the recipe for a command line of the original GlórIA",
    "report": "make one page of plots, tables and text from the folders of runs",
    "export": "turn a run or a fine-tuned model into a Hugging Face folder",
    "generate": "continue a text",
    "finetune": "fine-tune a model on a task",
    "evaluate": "score a model on tasks",
}


def main(argv: list[str] | None = None) -> int:
    """Run a command as `python -m gloria.VERB` does, or list them."""
    words = sys.argv[1:] if argv is None else argv
    if not words or words[0] in ("-h", "--help"):
        lines = [f"  {name:<12} {line}" for name, line in COMMANDS.items()]
        print("usage: gloria VERB [--flag VALUE ...]", *lines, "`gloria VERB --help` lists its flags.", sep="\n")
        return 0
    if words[0] == "--version":
        print(f"gloria {gloria.__version__}")
        return 0
    if words[0] not in COMMANDS:
        raise UserError(f"{words[0]}: unknown command; {suggest(words[0], COMMANDS)}")
    sys.argv = [f"gloria {words[0]}", *words[1:]]
    runpy.run_module(f"gloria.{words[0]}", run_name="__main__", alter_sys=True)
    return 0


def console() -> int:
    """The entry of the installed `gloria`."""
    sys.excepthook = end_without_traceback
    return run_command(main)


if __name__ == "__main__":
    raise SystemExit(run_command(main))
