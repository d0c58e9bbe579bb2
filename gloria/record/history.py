"""A run as its folder records it: launches, events, checkpoints, the newest mixture. Nothing here is proved yet."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from gloria.config.cli import from_mapping
from gloria.data.mixture import Mixture, mixture_from_state
from gloria.dist.checkpoint_read import read_trainer
from gloria.dist.manifest import TRAINER, checkpoint_path, read_manifest, saved_steps
from gloria.errors import UserError
from gloria.files import open_plain, parse_json_object, read_bounded
from gloria.optim.schedules import ScheduleConfig, learning_rate
from gloria.train.branch import START, read_ancestors
from gloria.train.metrics import METRICS


@dataclass(frozen=True)
class Launch:
    """What one launch wrote into the log when it began."""

    name: str
    line: int  # of metrics.jsonl, from 1
    step: int  # steps that were done
    about: Mapping[str, Any]  # the event's other fields
    recipe: Mapping[str, Any] | None  # None: an older version did not record it, and its checkpoints are gone
    total_steps: int | None
    last_step: int | None  # of the steps that still count: where a later launch took over; None for the last one

    @cached_property
    def _schedule(self) -> ScheduleConfig | None:
        return schedule_of(self.recipe) if self.recipe else None

    def rate(self, step: int) -> float | None:
        """The learning rate of a step, counted from 0, where the recipe is known."""
        if self._schedule is None or self.recipe is None or self.total_steps is None:
            return None
        return learning_rate(self._schedule, self.recipe["optim"]["lr"], step, self.total_steps)

    @property
    def log_every(self) -> int | None:
        """Steps between two lines."""
        return self.recipe["log"]["every"] if self.recipe else None


@dataclass(frozen=True)
class Saved:
    """One checkpoint that is there, by its small files."""

    step: int
    path: Path
    launch: str
    world: int
    state: Mapping[str, Any]
    mixture: Mixture


@dataclass
class History:
    """The record of one run."""

    folder: Path
    mixture: Mixture  # as the newest checkpoint, or the last launch's start, has it
    state: Mapping[str, Any]  # it is part of
    begun: Mixture  # as the last launch found it
    launches: list[Launch]
    events: list[tuple[int, Mapping[str, Any]]]  # line number and event
    saved: list[Saved]
    problems: list[str] = field(default_factory=list)  # what could not be read

    @property
    def steps(self) -> int:
        """Steps that the newest checkpoint has done; 0 without one."""
        return self.saved[-1].step if self.saved else 0

    @property
    def ancestors(self) -> list[tuple[Path, int]]:
        """Of a branch: the runs it comes from, the nearest first, and the steps at which it left them."""
        found = read_ancestors(self.state, self.folder / START)
        return [(Path(ancestor.run), ancestor.step) for ancestor in found]

    @property
    def skipped(self) -> dict[int, Mapping[str, Any]]:
        """The events of updates that were left out, by steps done; those of steps taken again are not among them."""
        found = {}
        for line, event in self.events:
            launch = self.launch_of(line)
            if event.get("event") == "skipped" and launch and event["step"] <= (launch.last_step or event["step"]):
                found[event["step"]] = event
        return found

    def launch_of(self, line: int) -> Launch | None:
        """The launch that wrote a line of the log."""
        place = bisect_right(self.launches, line, key=lambda launch: launch.line)
        return self.launches[place - 1] if place else None


def schedule_of(recipe: Mapping[str, Any]) -> ScheduleConfig:
    """The [schedule] section of a recorded recipe."""
    section = {key: value for key, value in recipe["schedule"].items() if value is not None}
    return from_mapping(ScheduleConfig, section, "schedule")


def read_history(folder: Path) -> History:
    """The record in a run's folder; `UserError` where there is no pre-training run in it."""
    if not folder.is_dir():
        raise UserError(f"RUN: {folder} is not a folder; name a run's folder (runs/NAME)")
    if not (folder / START).exists():
        raise UserError(f"RUN: {folder} has no {START}, so it is no pre-training run; name one")
    problems: list[str] = []
    saved = []
    for step in saved_steps(folder):
        try:
            saved.append(_read_saved(folder, step))
        except UserError as error:
            problems += error.problems
    start = {}
    try:
        start = parse_json_object(read_bounded(folder / START), folder / START)
        begun = mixture_from_state(start.get("mixture", {}), str(folder / START))
    except UserError as error:
        if not saved:
            raise
        problems += error.problems
        begun = saved[-1].mixture
    mixture, state = begun, start
    if saved:
        state = {**start, **saved[-1].state}
        mixture = max(
            begun, saved[-1].mixture, key=lambda mixture: mixture.next_sample
        )  # of two equal ones the launch's
    events: list[tuple[int, Mapping[str, Any]]] = []
    try:
        lines = read_lines(folder, b'"event"')
        events += [(line, values) for line, values in lines if values and values["kind"] == "event"]
    except UserError as error:
        problems += error.problems
    recipes = {entry.launch: entry.state.get("recipe") for entry in saved}
    totals = {entry.launch: entry.state.get("schedule", {}).get("total_steps") for entry in saved}
    return History(folder, mixture, state, begun, _launches(events, recipes, totals), events, saved, problems)


def read_lines(folder: Path, holding: bytes = b"") -> Iterator[tuple[int, dict[str, Any] | None]]:
    """(number from 1, values) of each line of a run's log, read as one goes; None for a line that is damaged.

    Only lines with the bytes `holding` in them are read.
    """
    path = folder / METRICS
    with open(open_plain(path), "rb") as file:
        for number, line in enumerate(file, start=1):
            if holding in line:
                yield number, _read_line(line, path)


def _read_line(line: bytes, path: Path) -> dict[str, Any] | None:
    try:
        values = parse_json_object(line, path)
    except UserError:
        return None
    good = type(values.get("step")) is int and values.get("kind") in ("event", "train", "valid")
    return values if good else None


def _read_saved(folder: Path, step: int) -> Saved:
    path = checkpoint_path(folder, step)
    manifest, state = read_manifest(path), read_trainer(path)
    if not isinstance(state.get("recipe"), dict) or not isinstance(state.get("mixture"), dict):
        raise UserError(f"{path / TRAINER}: holds no mixture and recipe")
    mixture = mixture_from_state(state["mixture"], str(path / TRAINER), step)
    return Saved(step, path, manifest.launch, manifest.world, state, mixture)


def _launches(
    events: list[tuple[int, Mapping[str, Any]]], recipes: Mapping[str, Any], totals: Mapping[str, Any]
) -> list[Launch]:
    begun = [(line, event) for line, event in events if event.get("event") in ("start", "resume")]
    found: list[Launch] = []
    last_step: int | None = None
    for line, event in reversed(begun):
        name = str(event.get("launch"))
        recipe, total = event.get("recipe", recipes.get(name)), event.get("planned_steps", totals.get(name))
        found.insert(0, Launch(name, line, event["step"], event, recipe, total, last_step))
        last_step = event["step"] if last_step is None else min(last_step, event["step"])
    return found
