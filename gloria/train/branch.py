"""A branch: a new run that begins from another run's checkpoint, with all that it holds. Imports no torch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gloria.config.cli import from_mapping, option
from gloria.dist.manifest import checkpoints_folder, saved_steps
from gloria.errors import UserError
from gloria.train.sections import Problem

START = "mixture.json"  # what a launch writes into its run's folder before its first step


@dataclass(frozen=True)
class BranchSection:
    """From where a run begins."""

    branch: str = option(
        "",
        "RUN or RUN@STEP: a new run begins from that run's checkpoint, by default its newest: weights, moments, place "
        "in the mixture, counters; steps count on from there, and all else is this recipe's",
    )

    @property
    def trunk(self) -> tuple[Path, int | None]:
        """The run that `branch` names, and the step; None: its newest checkpoint."""
        folder, _, step = self.branch.rpartition("@")
        return (Path(folder), int(step)) if folder and step.isdecimal() else (Path(self.branch), None)


@dataclass(frozen=True)
class Ancestor:
    """The checkpoint of another run that a run began from."""

    run: str = option(help="folder, as the recipe named it")
    step: int = option(help="of the checkpoint", minimum=0)


@dataclass(frozen=True)
class Ancestry:
    """The line of runs that a run comes from, the nearest first; empty where it is no branch."""

    ancestors: list[Ancestor] = option([])


def read_ancestors(state: Mapping[str, Any], where: object) -> list[Ancestor]:
    """The ancestors in a checkpoint's state or a run's mixture.json, checked."""
    return from_mapping(Ancestry, {key: state[key] for key in state.keys() & {"ancestors"}}, str(where)).ancestors


def describe_ancestors(ancestors: Sequence[Ancestor]) -> str:
    """`of runs/b at step 300, a branch of runs/a at step 200`."""
    return ", a branch ".join(f"of {ancestor.run} at step {ancestor.step}" for ancestor in ancestors)


def branch_problems(branch: str, trunk: Path, folder: str, resume: int | str) -> Iterator[Problem]:
    """What a branch cannot go with in one recipe."""
    if branch and isinstance(resume, int):
        yield (
            ("run.resume", "run.branch"),
            f"{resume} goes back in a run, and run.branch begins one; leave one of them out",
        )
    if branch and folder and trunk.resolve() == Path(folder).resolve():
        yield ("run.branch", "run.dir"), f"{trunk} is this run itself; give the branch another run.dir"


def require_trunk(section: BranchSection, folder: str | Path) -> None:
    """`UserError` where the checkpoint that a branch begins from is not there. One that has its own needs none."""
    if not (section.branch and folder) or saved_steps(Path(folder)):
        return
    run, step = section.trunk
    steps = saved_steps(run)
    if not run.is_dir():
        raise UserError(f"run.branch: {run} is not a folder; name a run's folder, RUN or RUN@STEP")
    if not steps:
        raise UserError(f"run.branch: {checkpoints_folder(run)} holds no checkpoint; name a run that has one")
    if step is not None and step not in steps:
        there = ", ".join(map(str, steps))
        raise UserError(f"run.branch: {run} holds no checkpoint of step {step}; there are steps {there}")


def require_same_trunk(section: BranchSection, ancestors: Sequence[Ancestor], folder: Path) -> None:
    """`UserError` where a run that has checkpoints was not begun as the branch that its recipe asks for."""
    if not section.branch:
        return
    run, step = section.trunk
    if not ancestors:
        raise UserError(f"run.branch: {folder} holds a run that is no branch; choose another run.dir")
    began = ancestors[0]
    if Path(began.run).resolve() != run.resolve() or step not in (None, began.step):
        raise UserError(
            f"run.branch: {folder} is a branch {describe_ancestors(ancestors[:1])}, not of {section.branch}; "
            "choose another run.dir, or leave run.branch out to continue"
        )


def require_fitting(section: BranchSection, start: str | None, trunks: str | None, total_steps: int, step: int) -> None:
    """`UserError` where a branch at `step` asks for other weights, or has no steps left.

    `start` is its model.from: where it is the trunk's own, it only names the shape.
    """
    if start not in (None, trunks):
        raise UserError(f"model.from: the weights are those of {section.branch}; leave model.from or run.branch out")
    if total_steps <= step:
        raise UserError(
            f"train.steps: {total_steps} in all, and the branch begins after step {step} of {section.trunk[0]}, which "
            f"counts; set more than {step}"
        )
