"""The facts of a model card: what a run's record, its corpus and its author's FACTS.toml say. None is invented."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gloria.config.cli import from_mapping, option, read_toml
from gloria.data.corpus import MANIFEST, Manifest, read_manifest
from gloria.dist.manifest import read_manifest as read_checkpoint
from gloria.errors import UserError, warn
from gloria.files import open_plain, parse_json_object
from gloria.record.history import History, Launch, read_history, read_lines
from gloria.record.ledger import Read, ledger
from gloria.tasks.watch import SCORES


@dataclass(frozen=True)
class CardFacts:
    """What only the authors of a model know, from FACTS.toml; what is left out stands as `not recorded`."""

    name: str | None = option(None, "of the model")
    authors: list[str] = option([], "persons or institutions")
    contact: str | None = option(None, "an address, for questions and complaints")
    licence: str | None = option(None, "of the model, as the hub names it: apache-2.0, cc-by-4.0, ...")
    language: list[str] = option([], "codes of ISO 639-1 (pt) or BCP 47 (pt-PT)")
    datasets: list[str] = option([], "of the training text that are on the hub, by their names there")
    collected_until: str | None = option(None, "date of the newest text")
    uses: str | None = option(None, "what the model is for, and what not")
    limits: str | None = option(None, "what is known of its faults")
    opt_outs: str | None = option(None, "how reservations of rights against text mining were respected")
    illegal_content: str | None = option(None, "what was done to leave out illegal content")
    citation: str | None = option(None, "BibTeX of the model or its corpus")


@dataclass(frozen=True)
class RunFacts:
    """What a run's folder and its corpus record of one checkpoint."""

    step: int
    launch: str
    saved_at: int  # seconds since 1970
    trainer: Mapping[str, Any]  # the checkpoint's state
    reads: list[Read] = field(default_factory=list)  # by source
    launches: list[Launch] = field(default_factory=list)  # up to this checkpoint
    rank_seconds: float = 0.0  # in steps that count, over all ranks of this run
    seconds: float = 0.0
    ancestors: list[tuple[Path, int]] = field(default_factory=list)
    skipped: int = 0
    corpus: Manifest | None = None
    records: list[Mapping[str, Any]] = field(default_factory=list)  # scores, as results.json has them


def read_facts(path: Path | None) -> CardFacts:
    """The authors' facts; `UserError` has every problem of the file."""
    return from_mapping(CardFacts, read_toml(path), str(path)) if path else CardFacts()


def gather(run: Path, checkpoint: Path, trainer: Mapping[str, Any]) -> RunFacts:
    """All that is known of a checkpoint; what the folders do not have any more is empty."""
    manifest = read_checkpoint(checkpoint)
    known: dict[str, Any] = {"corpus": _corpus(trainer), "records": _scores(run, manifest.step, manifest.launch)}
    try:
        history = read_history(run)
    except UserError as error:
        warn(f"{error}; the model card says less of the training")
    else:
        known |= _training(history, manifest.step)
    return RunFacts(manifest.step, manifest.launch, manifest.saved_at, trainer, **known)


def _corpus(trainer: Mapping[str, Any]) -> Manifest | None:
    folder = trainer.get("recipe", {}).get("data", {}).get("corpus")
    if not folder or not Path(folder, MANIFEST).exists():
        return None
    manifest = read_manifest(folder)
    used = trainer.get("mixture", {}).get("fingerprints", {})
    if used.get("tokenizer") not in (None, manifest.tokenizer.fingerprint):
        warn(f"{folder}: is another corpus than the run read; the model card does not describe it")
        return None
    return manifest


def _training(history: History, step: int) -> dict[str, Any]:
    launches = [launch for launch in history.launches if launch.step < step]
    seconds = rank_seconds = 0.0
    before, skipped = 0, 0
    for line, values in read_lines(history.folder):
        launch = history.launch_of(line)
        if values is None or launch is None or values["kind"] != "train" or values["step"] > step:
            continue
        spent = float(values.get("step_s") or 0.0) * (values["step"] - max(before, launch.step))
        seconds, rank_seconds = seconds + spent, rank_seconds + spent * launch.about.get("ranks", 1)
        before, skipped = values["step"], skipped + values.get("skipped", 0)
    end = history.mixture.samples_of_step(step).start
    return {
        "reads": ledger(history.mixture, end),
        "launches": launches,
        "seconds": seconds,
        "rank_seconds": rank_seconds,
        "ancestors": history.ancestors,
        "skipped": skipped,
    }


def _scores(run: Path, step: int, launch: str) -> list[Mapping[str, Any]]:
    """What `gloria.evaluate --watch` found of this very checkpoint."""
    path = run / SCORES
    if not path.exists():
        return []
    with open(open_plain(path), "rb") as file:
        found = [parse_json_object(line, path) for line in file if line.endswith(b"\n")]
    return [record for record in found if (record.get("step"), record.get("launch")) == (step, launch)]


def results_of(folder: Path) -> Mapping[str, Any]:
    """results.json of a fine-tuning, or nothing where it is not there (yet)."""
    path = folder / "results.json"
    return json.loads(path.read_text("utf-8")) if path.exists() else {}
