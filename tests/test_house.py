"""Prevents: import circles, rooms that reach into the rooms above them, a root that fills up again, files that outgrow
one subject, and a drawing of the house that is no longer true.

`python -m tests.test_house` prints the drawing, `--write` puts it into docs/architecture.md.
"""

from __future__ import annotations

import ast
import graphlib
import re
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parent.parent
PAGE = REPOSITORY / "docs/architecture.md"
# From the ground up. A room imports from its own files and from the floors below its own, never from its neighbours.
FLOORS = (
    ("gloria",),  # the version
    ("errors",),
    ("files",),
    ("config",),
    ("data", "dist", "optim"),
    ("model",),
    ("tasks",),
    ("train",),
    ("page", "record"),
    ("commands",),  # gloria/VERB.py
    ("__main__",),
)
FLOOR = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}
MOST_LINES = 400


def modules(root: Path = REPOSITORY) -> dict[str, Path]:
    """The file of every module of the package, by dotted name."""
    paths = sorted((root / "gloria").rglob("*.py"))
    return {".".join(path.relative_to(root).with_suffix("").parts).removesuffix(".__init__"): path for path in paths}


def imports(path: Path, known: set[str]) -> set[str]:
    """The modules of `known` that a file imports anywhere: in functions and under TYPE_CHECKING too."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path}:{node.lineno}: imports are absolute"
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= {name if name in known else str(node.module) for name in names}
    return found & known


def graph(root: Path = REPOSITORY) -> dict[str, set[str]]:
    """What each module imports."""
    files = modules(root)
    return {name: imports(path, set(files)) for name, path in files.items()}


def room(module: str) -> str:
    """The folder below gloria/ that a module lies in; files of the root are rooms of their own, or commands."""
    name = module.split(".")[1] if "." in module else "errors"  # the package itself holds its version and no more
    return name if name in FLOOR else "commands"


def circle(arrows: dict[str, set[str]]) -> list[str]:
    """One circle of imports (its first module stands at both ends), or nothing."""
    try:
        graphlib.TopologicalSorter(arrows).prepare()
    except graphlib.CycleError as error:
        return error.args[1]
    return []


def upward(arrows: dict[str, set[str]]) -> list[str]:
    """The imports from a floor above, or from a neighbour on the same floor."""
    pairs = sorted((name, other) for name, others in arrows.items() for other in others)
    return [
        f"{name} imports {other}"
        for name, other in pairs
        if (room(name) != room(other) or room(name) == "commands") and FLOOR[room(name)] <= FLOOR[room(other)]
    ]


def drawing(arrows: dict[str, set[str]]) -> str:
    """The rooms and their imports as mermaid text; what every room may import stands in one line of its own."""
    ground = FLOOR["config"]
    rooms = {(room(name), room(other)) for name, others in arrows.items() for other in others}
    drawn = sorted(
        ((a, b) for a, b in rooms if a != b and FLOOR[b] > ground),
        key=lambda pair: (-FLOOR[pair[0]], pair[0], -FLOOR[pair[1]], pair[1]),
    )
    lines = ["flowchart TD", *(f"    {a} --> {b}" for a, b in drawn)]
    return "\n".join([*lines, "    config --> files --> errors", f"    {' & '.join(FLOORS[ground + 1])} --> config"])


def page(text: str) -> str:
    """The page with today's drawing."""
    return re.sub(r"(?s)(?<=```mermaid\n).*?(?=\n```)", lambda _: drawing(graph()), text, count=1)


def test_there_is_no_circle_of_imports():
    assert circle(graph()) == []


def test_no_room_imports_from_its_own_floor_or_above():
    assert upward(graph()) == []


def test_the_root_holds_commands_and_two_foundations():
    for path in sorted((REPOSITORY / "gloria").glob("*.py")):
        if path.stem not in ("__init__", "__main__", "errors", "files"):
            found = {node.name for node in ast.parse(path.read_text()).body if isinstance(node, ast.FunctionDef)}
            assert "main" in found, f"{path}: not a command: it belongs into a room"
    rooms = {path.parent.name for path in (REPOSITORY / "gloria").glob("*/*.py")}
    assert rooms <= set(FLOOR), "a new room needs a floor"


@pytest.mark.parametrize("folder", ["gloria", "bench"])
def test_a_file_holds_one_subject(folder):
    lines = {path: path.read_text().count("\n") for path in (REPOSITORY / folder).rglob("*.py")}
    assert {str(path): count for path, count in lines.items() if count > MOST_LINES} == {}


def test_the_drawing_is_todays():
    text = PAGE.read_text()
    assert text == page(text), "run: python -m tests.test_house --write"


def test_every_kind_of_import_is_seen(tmp_path):
    """Planted: a circle through TYPE_CHECKING and a function, a room above, a neighbour, and one command in another."""
    planted = {
        "data/one.py": "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from gloria.data import two\n",
        "data/two.py": "def late():\n    import gloria.data.one\n",
        "dist/low.py": "from gloria.model.high import x\nfrom gloria.data.one import y\n",
        "model/high.py": "",
        "first.py": "from gloria.second import main",
        "second.py": "",
    }
    for name, text in planted.items():
        path = tmp_path / "gloria" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    arrows = graph(tmp_path)
    assert sorted(circle(arrows)[1:]) == ["gloria.data.one", "gloria.data.two"]
    assert upward(arrows) == [
        "gloria.dist.low imports gloria.data.one",
        "gloria.dist.low imports gloria.model.high",
        "gloria.first imports gloria.second",
    ]


if __name__ == "__main__":
    if "--write" in sys.argv:
        PAGE.write_text(page(PAGE.read_text()))
    print(drawing(graph()))
