"""The small samples that come with the package, for trying a task out without its files."""

from __future__ import annotations

from pathlib import Path

from gloria.errors import UserError
from gloria.tasks.task import Task

SAMPLES = Path(__file__).with_name("sample")


def describe_sample(task: Task) -> str:
    """The line that is printed where a sample is used."""
    split, kind = ("train", "training examples") if "train" in task.splits else (task.splits[0], "examples")
    if task.source:
        return f"data       {sample_folder(task)}"
    count = len(task.load(sample_folder(task), split).examples)
    return (
        f"data       sample of {task.name} that comes with gloria ({count} {kind}, written for it): "
        "for trying out, its scores mean nothing"
    )


def sample_folder(task: Task) -> Path:
    """The folder that comes with the package and from which `task.load` reads all of the task's splits.

    Its examples were written for this project, in the format of the published files; scores on them mean nothing.
    The forms of a set share a folder, which has the name up to the hyphen: GLUE's tasks have files of the same names,
    so files alone do not show whose they are. Raises `UserError` where there is no sample of the task. The files of a
    task of the user's own lie beside the file that says what it is.
    """
    if task.source:
        return Path(task.source).parent
    folder = SAMPLES / task.name.partition("-")[0]
    if not all(task.has(folder, split) for split in task.splits):
        raise UserError(f"{task.name}: no sample of it comes with gloria; give --data the folder of its files")
    return folder
