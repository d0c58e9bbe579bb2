"""The recipe for a command line of the original GlórIA's pre-training (github.com/rvlopes/GlorIA).

    python -m gloria.translate "run-pretrain.py -b 128 -ga 16 -lr 1e-4 -ml 512 -ms 2000000 ..." > my-recipe.toml

Prints TOML that `gloria.pretrain --config` reads. A comment in front of it names each flag that has no counterpart, or
that meant something else than it said. The whole command may be given: `--nproc_per_node` says on how many GPUs it ran.
docs/from-gloria.md has every flag.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from gloria.config.cli import option, parse
from gloria.config.toml import write_toml
from gloria.errors import UserError, run_command

# -m of the original -> our preset, and what it began with
MODELS = {
    "GPT2-124": ("gpt2-124m", "gpt2"),
    "GPT2-355": ("gpt2-355m", "gpt2-medium"),
    "GPT2-774": ("gpt2-774m", "gpt2-large"),
    "GPT2-1.5B": ("gpt2-1.5b", "gpt2-xl"),
    "GPTNEO-125": ("gpt-neo-125m", "EleutherAI/gpt-neo-125M"),
    "GPTNEO-350": ("gpt-neo-350m", "xhyi/PT_GPTNEO350_ATG"),
    "GPTNEO-1.3B": ("gpt-neo-1.3b", "EleutherAI/gpt-neo-1.3B"),
    "GPTNEO-2.7B": ("gpt-neo-2.7b", "EleutherAI/gpt-neo-2.7B"),
}
GLORIA = {"gloria-1.3b": "glorIA-1.3B", "gloria-2.7b": "glorIA-2.7B"}  # in small letters -> the folder's name
# They stand in the original's code, whatever the flags; its last source is called "subtitles" there.
WEIGHTS = {"ptwiki": 0.1, "arquivo": 0.08, "clueweb": 0.63, "europarl": 0.06, "oscar": 0.08, "opensubtitles": 0.06}
DEFAULTS: dict[str, str] = {
    "-b": "32", "-lr": "1e-4", "-wd": "", "-ws": "0", "-ml": "128", "-e": "1", "-ms": "-1", "-d": "", "-t": "",
    "-m": "GPT2-124", "-ls": "50", "-ss": "-1", "-wandb": "no-name", "-wandb_env": "", "-ga": "1", "-fp16": "",
    "-scheduler": "cosine", "-optimizer": "adamw", "-checkpoint": "", "-hrr": "0", "-seed": "42",
}  # fmt: skip
SWITCHES = ("-resume", "--no-resume", "-debug", "--no-debug", "-deepspeed", "--no-deepspeed")
_TASKS = re.compile(r"-(assin|squad|glue)_\w+")
_SCRIPT = re.compile(r"(.*/)?run[-_]pretrain\.py")
N = TypeVar("N", int, float)


@dataclass(frozen=True)
class TranslateOptions:
    """What is translated."""

    command: str = option(help="the original's command line, in quotes", positional="COMMAND")


def main(argv: list[str] | None = None) -> int:
    """Print the recipe of a command line."""
    arguments = parse(
        TranslateOptions,
        argv,
        prog="python -m gloria.translate",
        description="Print the recipe for a command line of the original GlórIA's pre-training.",
        recipe=False,
    ).config
    print(translate(arguments.command), end="")
    return 0


def translate(command: str) -> str:
    """The recipe as TOML, with its comments in front; `UserError` has what the original's parser would refuse."""
    given, gpus, notes = read_command(command)
    recipe = make_recipe(given, gpus, notes)
    head = [f"# From: {' '.join(command.split())}", *(f"# {' '.join(note.split())}" for note in notes)]
    return "\n".join([*head, write_toml(recipe)])


def read_command(command: str) -> tuple[dict[str, str], int, list[str]]:
    """The flags that were given ("" for a switch), the number of GPUs, and first notes."""
    try:
        words = shlex.split(re.sub(r"\\\s*\n", " ", command))
    except ValueError as error:
        raise UserError(f"COMMAND: cannot be read ({error}); give the whole line in quotes") from None
    place = next((n for n, word in enumerate(words) if _SCRIPT.fullmatch(word)), None)
    if place is None:
        raise UserError("COMMAND: has no run-pretrain.py in it; give the original's pre-training command")
    launcher, words = words[:place], words[place + 1 :]
    gpus, notes = _gpus(launcher)
    given: dict[str, str] = {}
    problems = []
    while words:
        flag = words.pop(0)
        value = "" if flag in SWITCHES else words.pop(0) if words else None
        if flag == "-be":
            notes.append("-be: the README has it, and the original's parser ends there (it reads -b e); left out")
        elif _TASKS.fullmatch(flag):
            notes.append(f"{flag}: is written into params.json for a fine-tuning; give it to gloria.finetune")
        elif flag not in (*DEFAULTS, *SWITCHES):
            problems.append(f"COMMAND: {flag} is no flag of the original's run-pretrain.py; leave it out")
        elif value is None:
            problems.append(f"COMMAND: {flag} has no value; give one")
        else:
            given[flag] = value
    if problems:
        raise UserError(*problems)
    return given, gpus, notes


def _gpus(launcher: list[str]) -> tuple[int, list[str]]:
    line = " ".join(launcher)
    per_node = re.search(r"--(?:nproc[_-]per[_-]node|num_processes)[ =](\d+)", line)
    nodes = re.search(r"--nnodes[ =](\d+)", line)
    if not per_node:
        return 1, ["no --nproc_per_node: taken for one GPU; train.global_batch is -b times their number"]
    gpus = int(per_node[1]) * (int(nodes[1]) if nodes else 1)
    return gpus, [f"--nproc_per_node: {gpus} GPUs in all; -b counts windows of one of them, train.global_batch of all"]


def make_recipe(given: Mapping[str, str], gpus: int, notes: list[str]) -> dict[str, Any]:
    """The recipe's tables; what has no counterpart, or another meaning, is added to `notes`."""
    flags = {**DEFAULTS, **given}
    passes, batch = _number(flags, "-ga", int), _number(flags, "-b", int)
    for flag, value in (("-ga", passes), ("-b", batch)):
        if value < 1:
            raise UserError(f"COMMAND: {flag}: {value} is too small; give at least 1")
    micro = max(batch // passes, 1)
    if micro * passes != batch:
        notes.append(f"-b: {batch} is no multiple of -ga {passes}; the original took {micro} windows at once, as here")
    if passes > 1:
        notes.append(f"-ga: the original counts its {passes} passes as steps: -ms, -ws, -ls and -ss are divided by it")
    recipe = {
        "run": {"dir": f"runs/{flags['-wandb']}", "seed": _number(flags, "-seed", int)},
        "model": _model(flags["-m"], notes),
        "data": {"corpus": "data/gloria", "weights": WEIGHTS},
        "train": {
            **_length(flags, passes, notes),
            "global_batch": micro * passes * gpus,
            "micro_batch": micro,
            "sequence_length": _number(flags, "-ml", int),
            "precision": _precision(flags["-fp16"], notes),
            "clip_norm": 3.0,
        },
        "optim": _optimizer(flags, notes),
        "schedule": _schedule(flags, passes, notes),
        "checkpoint": _checkpoints(flags, passes, notes),
        "log": {"every": max(_number(flags, "-ls", int) // passes, 1)},
    }
    notes += _without_key(given)
    return recipe


def _without_key(given: Mapping[str, str]) -> Iterator[str]:
    """A note on each flag that gives no key or means something else, in the order in which they were given."""
    told = {
        "-d": "is never read: the six sources and their weights stand in the original's code",
        "-t": "the tokenizer is the corpus's: [tokenizer] path in its recipe",
        "-wandb": "names the run's folder",
        "-wandb_env": "has no counterpart",
        "-debug": "has no counterpart; make a small corpus",
        "-deepspeed": "has no counterpart: FSDP2 shards weights and state",
        "-resume": "the same command continues by itself; the original read its data from the start again",
        "-checkpoint": "is the original's own format, which is not read here; begin from an export (model.from)",
        "-seed": "is never passed on in the original, which used 42",
        "-ml": "the original cuts each document there and never reads its rest; here documents are packed",
    }
    if int(given.get("-ms") or -1) > 0:
        told["-e"] = "has no effect beside -ms"
    yield from (f"{flag}: {told[flag]}" for flag in given if flag in told)
    yield "data.weights: shares of documents there, which sum to 1.01; of training tokens here, normalised"
    yield "optim: weight_decay is of matrices only; the original's shrinks biases, norms and embeddings, too"
    yield "clip_norm, betas, eps: stand in the original's code; validation is ours, it has none"


def _number(flags: Mapping[str, str], flag: str, kind: Callable[[str], N]) -> N:
    try:
        return kind(flags[flag])
    except ValueError:
        raise UserError(f'COMMAND: {flag}: "{flags[flag]}" is no number; give one') from None


def _model(name: str, notes: list[str]) -> dict[str, Any]:
    if folder := GLORIA.get(name.lower()):
        notes.append(f"-m: download rvlopes/{folder} to models/{folder} first (docs/from-gloria.md)")
        return {"from": f"models/{folder}"}
    if name not in MODELS:
        raise UserError(f"COMMAND: -m: {name} is no model that is trained here; known: {', '.join((*MODELS, *GLORIA))}")
    preset, weights = MODELS[name]
    notes.append(
        f"-m: the original begins with {weights}'s weights, under another tokenizer; here they are random "
        "(for the same, from = a folder of it in place of preset)"
    )
    if name == "GPT2-124":
        notes.append("-m: the original loads GPT2-124 without a head, and ends at the first loss")
    return {"preset": preset}


def _length(flags: Mapping[str, str], passes: int, notes: list[str]) -> dict[str, Any]:
    steps = _number(flags, "-ms", int)
    if steps <= 0:
        notes.append("-e: counts documents there, windows of all sources together here")
        return {"epochs": float(_number(flags, "-e", int))}
    return {"steps": max(steps // passes, 1)}


def _precision(asked: str, notes: list[str]) -> str:
    if asked in ("bf16", "fp16"):
        return asked
    if asked not in ("", "no"):
        notes.append(f"-fp16: {asked} is refused by the original; auto is bf16 where the GPU has it")
    if not asked:
        notes.append("-fp16: left out, the original ends with an error; auto is bf16 where the GPU has it")
    return "fp32" if asked == "no" else "auto"


def _optimizer(flags: Mapping[str, str], notes: list[str]) -> dict[str, Any]:
    name = "radam" if flags["-optimizer"] == "radam" else "adamw"
    if flags["-optimizer"] not in ("radam", "adamw"):
        notes.append(f"-optimizer: {flags['-optimizer']} is AdamW in the original")
    decay = _number(flags, "-wd", float) if flags["-wd"] else 0.01
    if decay != 0.01:
        notes.append(f"-wd: {decay:g} never reaches the optimizer, which has 0.01; set 0.01 for the same")
    return {"name": name, "lr": _number(flags, "-lr", float), "weight_decay": decay, "betas": [0.9, 0.999], "eps": 1e-8}


def _schedule(flags: Mapping[str, str], passes: int, notes: list[str]) -> dict[str, Any]:
    warmup = {"warmup_steps": int(_number(flags, "-ws", float)) // passes, "min_ratio": 0.0}
    kind, restarts = flags["-scheduler"], _number(flags, "-hrr", int)
    if kind == "cosine_hard" and restarts < 1:
        notes.append("-hrr: without it the original's cosine_hard is a constant rate, as here")
        kind = "constant"
    elif kind == "cosine_hard":
        return {"kind": kind, **warmup, "restarts": restarts}
    elif kind not in ("linear", "cosine", "constant"):
        notes.append(f"-scheduler: {kind} is a constant rate in the original, as here")
        kind = "constant"
    if "-hrr" in flags and restarts and kind != "cosine_hard":
        notes.append(f"-hrr: has no effect with -scheduler {kind}")
    return {"kind": kind, **warmup}


def _checkpoints(flags: Mapping[str, str], passes: int, notes: list[str]) -> dict[str, Any]:
    every = _number(flags, "-ss", int)
    if every <= 0:
        notes.append("-ss: left out, the original saves at the end of each epoch; here every 1,000 steps")
    return {"every": max(every // passes, 1) if every > 0 else 1000}


if __name__ == "__main__":
    raise SystemExit(run_command(main))
