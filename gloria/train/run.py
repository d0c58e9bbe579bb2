"""What every training run has, pre-training and fine-tuning alike."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor

from gloria.config.cli import to_mapping
from gloria.config.schema import flatten
from gloria.data.corpus import Manifest, source_fingerprint
from gloria.dist.agreement import require_same
from gloria.dist.checkpoint import Save, SaveState
from gloria.dist.process import Process
from gloria.dist.run_lock import RunLock, release_run, write_status
from gloria.dist.signals import stop_reason
from gloria.dist.step_sums import Flags
from gloria.dist.watchdog import Watchdog
from gloria.train.metrics import RunLog

# Why a run ends as its last checkpoint has it, before its plan is done (asked to stop, it saves first).
SKIPS, TAKEN_OVER = UNSAVED = "too many skips", "another launch has taken the run over"


class Run:
    """The fields that checkpoints, status and failures need of a run."""

    config: Any
    process: Process
    folder: Path
    launch: str
    watch: Watchdog
    claim: RunLock | None
    log: RunLog | None
    step: int
    save: Save | None
    saved_step: int
    staging: dict[str, Tensor]


def close_folder(run: Run, status: str, reason: str) -> None:
    """Write a run's last event and status, and let go of its folder."""
    if run.log and not (run.claim and run.claim.lost):
        run.log.event(run.step, status, **({"reason": reason} if reason else {}))
        run.log.close()
    if run.claim:
        write_status(run.claim, status, run.step, reason)
        release_run(run.claim)


def flags_of(run: Run) -> Flags:
    """What this rank has to say in the step's all-reduce."""
    state = run.save.state() if run.save else SaveState.PENDING
    return Flags(
        stop=bool(stop_reason()),
        save_done=state == SaveState.DONE,
        save_failed=state == SaveState.FAILED,
        lock_lost=run.claim is not None and run.claim.lost,
    )


def require_same_recipe(process: Process, recipe: object, corpus: Manifest | None = None, **more: Any) -> None:
    """`require_same` of every key of a recipe, of what lies in the corpus folder on each node, and `more`."""
    own = flatten(to_mapping(recipe)) | more
    if corpus:
        own["data.corpus: tokenizer"] = corpus.tokenizer["fingerprint"]
        own |= {f"data.corpus: source {entry.name}": source_fingerprint(entry) for entry in corpus.sources}
    require_same(process, own)
