"""The house keeps its floors: a folder's modules import only from it and from folders below its own."""

import ast
from pathlib import Path

import pytest

from harness.runs import REPOSITORY
from nanogpt.__main__ import COMMANDS

FLOORS = [
    "utils", "config", "model", "data", "distributed", "storage", "optim", "evaluate", "engine", "plots",
    "token_losses", "plan", "monitor", "training", "acceptance", "commands",
]  # fmt: skip
PACKAGE = REPOSITORY / "nanogpt"
SOURCES = sorted(PACKAGE.rglob("*.py"))
MOST_MODULES = 9  # of a folder, but for commands, which has a module for each


def imported(path: Path) -> list[str]:
    """What a file imports of the package, by module; nothing by a relative import, which would hide its floor."""
    names = []
    for node in ast.walk(ast.parse(path.read_text())):
        assert getattr(node, "level", 0) == 0, "a relative import hides its floor"
        names += [a.name for a in node.names] if isinstance(node, ast.Import) else [getattr(node, "module", None)]
    return [name for name in names if name and name.startswith("nanogpt")]


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_come_from_below(path):
    """Invariant: floor(imported) <= floor(importer), where the package's own files stand above all folders."""
    own = path.relative_to(PACKAGE).parts[0]
    assert own in FLOORS or path.parent == PACKAGE, f"{own}/ is no floor"
    for name in imported(path):
        other = name.split(".")[1]
        if path.parent != PACKAGE:
            assert FLOORS.index(other) <= FLOORS.index(own), f"{own}/ imports {name} from above"


def test_a_folder_is_a_room():
    """Invariant: the package's own files are its face and its commands, and no folder has more than nine modules.

    Those of commands are what `nanogpt --help` lists.
    """
    assert {path.name for path in PACKAGE.glob("*.py")} == {"__init__.py", "__main__.py"}
    rooms: dict[str, set[str]] = {}
    for path in SOURCES:
        if path.name != "__init__.py" and path.parent != PACKAGE:
            rooms.setdefault(str(path.parent.relative_to(PACKAGE)), set()).add(path.stem)
    assert rooms.pop("commands") == COMMANDS.keys()
    assert {name: len(modules) for name, modules in rooms.items() if len(modules) > MOST_MODULES} == {}


def test_it_fits_a_screen():
    """Invariant: no module is longer than 300 lines, no function than 50."""
    lines = {path: path.read_text().count("\n") for path in SOURCES}
    assert {path.name: count for path, count in lines.items() if count > 300} == {}
    functions = [
        (path.name, node.name, node.end_lineno - node.lineno + 1)
        for path in SOURCES
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    ]
    assert [each for each in functions if each[2] > 50] == []


def test_the_model_knows_torch_only():
    """Invariant: model/gpt.py imports nothing but torch and the standard library."""
    tree = ast.parse((PACKAGE / "model" / "gpt.py").read_text())
    names = {
        name.split(".")[0]
        for node in ast.walk(tree)
        if isinstance(node, ast.Import | ast.ImportFrom)
        for name in ([node.module] if isinstance(node, ast.ImportFrom) else [each.name for each in node.names])
    }
    assert names == {"torch", "math", "dataclasses", "collections", "contextlib", "typing"}


def test_the_tests_mirror_the_folders():
    """Invariant: each folder of the package with modules has one of its name in tests/unit, with tests, and no other.

    Those of a folder within one are in the outer one's.
    """
    below = (path.relative_to(PACKAGE).parts for path in SOURCES if path.name != "__init__.py")
    rooms = {parts[0] for parts in below if len(parts) > 1}
    unit = REPOSITORY / "tests" / "unit"
    tested = {path.relative_to(unit).parts[0] for path in unit.glob("*/**/test_*.py")}
    assert tested == rooms
