"""Modules and folders of the package import each other in one direction, and not in functions."""

from __future__ import annotations

import ast
import tomllib
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import mosaic
from mosaic import passes

FOLDERS = {"mosaic": Path(mosaic.__file__).parent, "mosaic.passes": Path(passes.__file__).parent}


def modules() -> dict[str, Path]:
    """All modules by name; a package is named as its folder."""
    found = {}
    for package, folder in FOLDERS.items():
        for path in sorted(folder.rglob("*.py")):
            parts = path.relative_to(folder).with_suffix("").parts
            if package == "mosaic" and parts[0] == "passes":
                continue  # where the folder is linked into the package
            name = ".".join((package, *parts))
            found[name.removesuffix(".__init__")] = path
    return found


def imported(node: ast.AST) -> Iterator[str]:
    """Names of modules that a file imports when it runs, in functions as well."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
            continue
        if isinstance(child, ast.ImportFrom) and child.module:
            yield child.module
            yield from (f"{child.module}.{alias.name}" for alias in child.names)
        elif isinstance(child, ast.Import):
            yield from (alias.name for alias in child.names)
        yield from imported(child)


def needs() -> dict[str, set[str]]:
    """For each module those that it imports."""
    paths = modules()
    found = {
        name: {m for m in imported(ast.parse(path.read_text())) if m in paths} - {name, "mosaic"}
        for name, path in paths.items()
    }
    for name, others in found.items():  # a module, and not the package that it is in
        others -= {other for other in others if any(m.startswith(f"{other}.") for m in others)}
        others -= {other for other in others if name.startswith(f"{other}.")}
    return found


def test_imports_have_no_circle() -> None:
    found = needs()
    assert len(list(TopologicalSorter(found).static_order())) == len(found)


def test_every_folder_is_installed() -> None:
    """By ``pip install .``, which copies what pyproject.toml lists."""
    project = Path(__file__).parents[2] / "pyproject.toml"
    listed = tomllib.loads(project.read_text())["tool"]["setuptools"]["packages"]
    folders = {path.parent for path in modules().values()}
    names = (
        (name, path.relative_to(root).parts)
        for name, root in FOLDERS.items()
        for path in folders
        if path.is_relative_to(root)
    )
    assert {*listed} == {".".join((name, *parts)) for name, parts in names}


#: Each folder imports those before it only. (``docs/architecture.md`` says so, too.)
FLOORS = (
    ("api",),
    ("torch_private", "layout"),
    ("runtime",),
    ("graph", "attention"),
    ("losses", "masks", "eager", "recurrences"),
    ("partition",),
    ("padding",),
    ("report", "passes"),
    ("frontend",),
    ("integrations",),
)


def test_folders_import_those_below_them() -> None:
    floor = {folder: number for number, folders in enumerate(FLOORS) for folder in folders}
    wrong = []
    for name, others in needs().items():
        _, folder, *_ = (*name.split("."), "")
        for other in others if folder in floor else ():
            below = other.split(".")[1]
            if below != folder and floor[below] >= floor[folder]:
                wrong.append(f"{name} imports {other}")
    assert wrong == []


def test_no_import_stands_in_a_function() -> None:
    """Every import of ours is at the top of its file, where a reader looks for it."""
    late = [
        f"{name}: {ast.unparse(statement)}"
        for name, path in modules().items()
        for function in ast.walk(ast.parse(path.read_text()))
        if isinstance(function, ast.FunctionDef)
        for statement in ast.walk(function)
        if isinstance(statement, ast.ImportFrom) and (statement.module or "").startswith("mosaic")
    ]
    assert late == []
