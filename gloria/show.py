"""Show which samples a step of a run takes, past or future.

    python -m gloria.show --run runs/demo --step 100 [--world 4] [--text]

Prints one JSON object a line: row, sample, source, window, epoch, rank, and with --text the text of the window. Steps
count from 0: step N is the one with which a run goes from N steps done to N + 1. A past step is shown as it was,
and a future one as it will be if nothing changes. One process; needs no torch.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from gloria.config.cli import option, parse
from gloria.data.corpus import Corpus, open_corpus
from gloria.data.mixture import Mixture, mixture_from_state
from gloria.data.stages import Stage, stage_at
from gloria.data.tokenizer import TextTokenizer, load_tokenizer
from gloria.dist.manifest import TRAINER, checkpoint_path, saved_steps
from gloria.errors import UserError, run_command, warn
from gloria.files import parse_json_object, read_bounded
from gloria.train.branch import START, describe_ancestors, read_ancestors


@dataclass(frozen=True)
class ShowOptions:
    """Which samples are shown, and how."""

    run: Path = option(help="the run's folder")
    step: int = option(help="which step, counted from 0", minimum=0)
    world: int = option(1, "ranks among which the rows are divided", minimum=1)
    text: bool = option(False, "with the text of each window, from the run's corpus")


def main(argv: list[str] | None = None) -> int:
    """Print the samples of one step."""
    arguments = parse(
        ShowOptions,
        argv,
        prog="python -m gloria.show",
        description="Show which samples a step of a run takes, past or future.",
        recipe=False,
    ).config
    mixture, state = read_run(arguments.run)
    if ancestors := read_ancestors(state, arguments.run):
        print(f"branch: {describe_ancestors(ancestors)}", file=sys.stderr)
    for gap in mixture.left_out:
        print(f"left out: samples {gap.start}:{gap.stop}", file=sys.stderr)
    if type(overflows := state.get("overflows")) is int and overflows:
        print(f"overflows: {overflows} so far, whose updates were left out for the loss scale", file=sys.stderr)
    samples = list(samples_of(mixture, arguments.step, arguments.world))
    if arguments.text:
        add_texts(samples, mixture, *open_data(mixture, state["recipe"]))
    for sample in samples:
        print(json.dumps(sample, ensure_ascii=False))
    return 0


def read_run(folder: Path) -> tuple[Mixture, dict[str, Any]]:
    """The newest mixture in a run's folder, and the state with the recipe that it is part of.

    It is the newest checkpoint's, or that of the last launch's start if no step was made since.
    """
    if not folder.is_dir():
        raise UserError(f"--run: {folder} is not a folder; name a run's folder (runs/NAME)")
    checkpoints = [checkpoint_path(folder, step) / TRAINER for step in reversed(saved_steps(folder))]
    found = []
    for path in [folder / START, *checkpoints] if (folder / START).is_file() else checkpoints:
        try:
            found.append(_read_state(path))
        except UserError as error:
            warn(f"{error}; passed over")
            continue
        if path.name == TRAINER:
            break
    if not found:
        raise UserError(f"--run: {folder} has no checkpoint and no {START} that can be read; name a run that was begun")
    return max(found, key=lambda run: run[0].next_sample)


def samples_of(mixture: Mixture, step: int, world: int) -> Iterator[dict[str, Any]]:
    """What each row of a step is, in the order of the rows."""
    samples = mixture.samples_of_step(step)
    if len(samples) % world:
        raise UserError(f"--world: {world} ranks cannot share the {len(samples)} rows of step {step}; give a divisor")
    planned = mixture.plan(samples.start, len(samples))
    rows = zip(samples, *(array.tolist() for array in planned))
    for row, (sample, source, epoch, window) in enumerate(rows):
        yield {
            "row": row,
            "sample": sample,
            "source": mixture.names[source],
            "window": window,
            "epoch": epoch,
            "rank": row % world,
        }


def open_data(mixture: Mixture, recipe: dict[str, Any]) -> tuple[Corpus, TextTokenizer]:
    """The corpus that the recipe names, if it is still the one that the run reads."""
    data = recipe.get("data")
    folder = data.get("corpus") if isinstance(data, dict) else None
    if not isinstance(folder, str) or not folder.isprintable():
        raise UserError("--text: the run's recipe names no data.corpus; leave --text out")
    corpus = open_corpus(folder)
    tokenizer = load_tokenizer(corpus.tokenizer_folder)
    if tokenizer.fingerprint != mixture.tokenizer:
        raise UserError(
            f"{corpus.folder}: its tokenizer is {tokenizer.fingerprint}, and the run's was {mixture.tokenizer}; "
            f"put the run's corpus back, or leave --text out"
        )
    return corpus, tokenizer


def add_texts(samples: list[dict[str, Any]], mixture: Mixture, corpus: Corpus, tokenizer: TextTokenizer) -> None:
    """Give each sample its `text`; `UserError` where a source is not what the run read."""
    for name in dict.fromkeys(sample["source"] for sample in samples):
        rows = [sample for sample in samples if sample["source"] == name]
        stage = _stage_that_read(mixture, name, rows[-1]["sample"])
        stream = corpus.stream(name)
        windows = stage.windows[stage.names.index(name)]
        if stream.fingerprint != mixture.fingerprints[name] or stream.num_windows(stage.sequence_length) != windows:
            raise UserError(
                f'{corpus.folder}: the shards of source "{name}" are {stream.fingerprint}, and the run read '
                f"{mixture.fingerprints[name]}; put the run's corpus back, or leave --text out"
            )
        tokens = np.empty((len(rows), stage.sequence_length + 1), stream.dtype)
        stream.gather(np.array([row["window"] for row in rows], np.int64), stage.sequence_length, tokens)
        for row, ids in zip(rows, tokens.tolist()):
            row["text"] = tokenizer.decode(ids)


def _stage_that_read(mixture: Mixture, name: str, sample: int) -> Stage:
    """The stage of `sample`, if `name` has had the same tokens ever since."""
    number = stage_at(mixture.stages, sample)
    for later in mixture.stages[number + 1 :]:
        if name in later.redefined and later.order is None:  # one that leaves samples out repeats what was before
            raise UserError(
                f'--text: source "{name}" has had other tokens since sample {later.start}; those before can\'t be '
                f"shown, leave --text out"
            )
    return mixture.stages[number]


def _read_state(path: Path) -> tuple[Mixture, dict[str, Any]]:
    content = parse_json_object(read_bounded(path), path)
    state = content.get("state") if path.name == TRAINER else content
    if not isinstance(state, dict) or not isinstance(state.get("recipe"), dict) or "mixture" not in state:
        raise UserError(f"{path}: holds no mixture and recipe")
    step = content.get("step") if path.name == TRAINER else None
    return mixture_from_state(state["mixture"], str(path), step), state


if __name__ == "__main__":
    raise SystemExit(run_command(main))
